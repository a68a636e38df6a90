"""The written pages: links resolve, and the commands, options, settings and imports that they show exist."""

import ast
import functools
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from datakit import config
from datakit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = ("datakit", "catalogs", "pipelines", "trainer", "sampler", "scripts", "tests")
GROUPS = ("run", "catalog", "models", "train", "sample", "eval")
README_LINES = 150
HELP = {"--help", "-h"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def fences(text: str, language: str) -> list[str]:
    """The code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code of the page; line breaks are spaces, escaped bars of tables are bars."""
    return [" ".join(s.replace(r"\|", "|").split()) for s in re.findall(r"`([^`]+)`", prose(text))]


def shown_commands(text: str) -> list[list[str]]:
    """The words after `datakit` of every command line on the page, placeholders included."""
    lines = []
    for block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "datakit":
                lines.append(words[1:])
    for span in spans(text):
        first, _, rest = span.partition(" ")
        if first == "datakit" and re.match(r"[a-z…-]", rest):
            lines.append(loose_words(rest))
        elif first in GROUPS and re.match(r"[a-z][a-z|-]*\b", rest):  # written short: `run score`
            lines.append([first, *loose_words(rest)])
    return lines


def loose_words(text: str) -> list[str]:
    """Words of a synopsis: brackets around what is optional are taken off."""
    return re.sub(r"\[(.*?)\]", r" \1 ", text).replace("“", '"').split()


@functools.cache
def program():
    return typer.main.get_command(app)


def resolve(words: list[str]) -> list[tuple[str, object, list[str]]]:
    """(name, command, words left) for a command line; `a|b` in the place of a command stands for both."""
    found = [("datakit", program(), list(words))]
    while any(getattr(c, "commands", None) and left for _, c, left in found):
        deeper = []
        for name, command, left in found:
            commands = getattr(command, "commands", None)
            if not commands or not left:
                deeper.append((name, command, left))
                continue
            if left[0] == "…" or left[0] in options_of(command):
                deeper.append((name, None, []))
                continue
            for word in left[0].split("|"):
                if word in commands:
                    deeper.append((f"{name} {word}", commands[word], left[1:]))
                else:
                    assert "run" in commands and name == "datakit sample", f"there is no command `{name} {word}`"
                    deeper.append((f"{name} run", commands["run"], left))  # prompts
        found = deeper
    return found


def options_of(command) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")} | HELP


def every_option(command) -> set[str]:
    return options_of(command).union(*(every_option(c) for c in getattr(command, "commands", {}).values()))


def settings_of(name: str):
    """The class of the settings that `--set` of a command changes; None: it has no such option."""
    kind, _, rest = name.removeprefix("datakit ").partition(" ")
    if (kind, rest) == ("run", "encode"):
        from trainer.latents.encode import EncodeSettings as Settings
    elif kind == "run":
        from pipelines.settings import Settings
    elif (kind, rest) == ("train", "dit"):
        from trainer.settings import DiTSettings as Settings
    elif (kind, rest) == ("train", "vae"):
        from trainer.vae.settings import VAESettings as Settings
    elif kind == "sample":
        from sampler.settings import SampleSettings as Settings
    else:
        return None
    return Settings


def slug(heading: str) -> str:
    """The anchor that a heading has where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pages
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert linked.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {target}: no such heading"


@pages
def test_commands_and_their_options(page):
    for words in shown_commands(page.read_text()):
        for name, command, left in resolve(words):
            if command is None:
                continue
            options = options_of(command) if not getattr(command, "commands", None) else every_option(command)
            for word in left:
                if re.match(r"--?[a-z]", word):
                    option = word.partition("=")[0]
                    assert option in options, f"{page.name}: `{name}` has no {option}"


@pages
def test_options_on_their_own(page):
    scripts = "".join(p.read_text() for p in (ROOT / "scripts").iterdir() if p.suffix in (".py", ".sh"))
    known = every_option(program()) | set(re.findall(r"--[a-z][a-z-]*", scripts))
    for span in spans(page.read_text()):
        if span.startswith("--"):
            option = re.split(r"[ =]", span)[0]
            assert option in known, f"{page.name}: no command and no script has {option}"


@pages
def test_settings(page):
    """`--set SECTION.option=value` of the command lines is taken by the settings of that command."""
    for words in shown_commands(page.read_text()):
        for name, command, left in resolve(words):
            sets = [b for a, b in zip(left, left[1:], strict=False) if a == "--set"]
            if command is None or not (sets := [s for s in sets if "=" in s and "…" not in s and "|" not in s]):
                continue
            model = settings_of(name)
            assert model is not None, f"{page.name}: `{name}` takes no --set"
            config.load(model, sets=sets)


@pages
def test_files_of_the_repository(page):
    """A path in inline code is one that exists."""
    for span in spans(page.read_text()):
        path = span.rstrip("/")
        if re.fullmatch(rf"({'|'.join(TOP)})(/[\w.-]+)+", path):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def test_code_that_names_a_page():
    """Pages that the code refers to exist."""
    for folder in TOP:
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[a-z-]+\.md\b", file.read_text()):
                assert (ROOT / name).exists(), f"{file.relative_to(ROOT)} refers to {name}"


def test_references_to_modules():
    """`package.module.name` and `package/file` in backticks, in code and on pages, is there."""
    files = [p for folder in TOP for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml", ".sh")]
    for file in [*PAGES, *files]:
        for reference in re.findall(rf"`((?:{'|'.join(TOP)})(?:[./]\w+)+)`", file.read_text()):
            assert is_there(reference), f"{file.relative_to(ROOT)} refers to `{reference}`"


def is_there(reference: str) -> bool:
    """Whether a file, a module, or a name that a module's text has, is at this path."""
    if (ROOT / reference).exists():
        return True
    path, names = ROOT, re.split(r"[./]", reference)
    while names and (path / names[0]).is_dir():
        path /= names.pop(0)
    module = path / "__init__.py"
    if names and (path / f"{names[0]}.py").exists():
        module = path / f"{names.pop(0)}.py"
    return not names or (module.exists() and re.search(rf"\b{names[0]}\b", module.read_text()) is not None)


@pytest.mark.slow
@pages
def test_python_imports(page):
    for block in fences(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: no {alias.name} in {node.module}"


def test_the_table_of_scores_is_what_the_stages_say(capsys):
    """A score that is new need not be in it: `datakit scores` has it."""
    app(["scores", "--markdown"], standalone_mode=False)
    rows = re.findall(r"^\| `.*$", (ROOT / "docs" / "scores.md").read_text(), re.M)
    assert rows and set(rows) <= set(capsys.readouterr().out.splitlines())


def test_readme_is_short_and_shows_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= README_LINES
    for script in ("scripts/demo.sh", "scripts/test.sh"):
        assert re.search(rf"^{script}\b", text, re.M)
        assert os.access(ROOT / script, os.X_OK)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md does not list {page.name}"
