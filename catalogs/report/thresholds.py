"""Reads the thresholds out of rules: `motion between 0.3 and 120` is a line at 0.3 and one at 120.

A rule is any SQL condition, so this reads what it surely understands (comparisons of one column with a number or with
an aggregate over the catalog, under AND, OR, NOT and brackets) and returns everything else as `Unread`, for a person to
see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import polars as pl

from catalogs.tables.arrow_types import view_schema
from catalogs.tables.catalog import Catalog

DURATION = "duration"
ALIASES = {("end_s", "-", "start_s"): DURATION}
"""Expressions that a chart is drawn of, under the name of that chart."""
AGGREGATES = {"quantile_cont", "quantile_disc", "median", "avg", "min", "max"}
NEGATED = {">=": "<", ">": "<=", "<=": ">", "<": ">=", "=": "<>", "<>": "="}
MIRRORED = {">=": "<=", ">": "<", "<=": ">=", "<": ">", "=": "=", "<>": "<>"}
SIGNS = {">=": "≥", "<=": "≤", "<>": "≠"}
COMPARISONS = {*NEGATED, "!=", "=="}
TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|('(?:[^']|'')*')|(\"[^\"]+\"|[A-Za-z_]\w*)"
    r"|(<=|>=|<>|!=|==|\|\||::|[-+*/%<>=(),.]))"
)
ENDS_OPERAND = {"and", "or", "between", "in", "is", "like", "ilike", "not", *COMPARISONS}


class Rule(NamedTuple):
    """A rule of a recipe as plain data. `level`: its nested level (None: the recipe has only one)."""

    name: str
    level: str | None
    keep: str


def plain_rules(rules: Mapping[str, str | Mapping[str, str]]) -> list[Rule]:
    """Rules from a recipe's names and conditions; a mapping has one condition for each level."""
    per_rule = {name: keep if isinstance(keep, Mapping) else {None: keep} for name, keep in rules.items()}
    return [Rule(name, level, text) for name, levels in per_rule.items() for level, text in levels.items()]


@dataclass(frozen=True)
class Threshold:
    """`column operator value` keeps a clip, as far as this part of a rule goes.

    Attributes:
        operator: one of >=, >, <=, <, =, <>.
        value: None where `text` is an aggregate that nobody has computed yet, see `resolved`.
        text: the value as the rule writes it.
    """

    column: str
    operator: str
    value: float | None
    text: str
    rule: str
    level: str | None = None

    @property
    def sign(self) -> str:
        return SIGNS.get(self.operator, self.operator)

    def passes(self, values: pl.Expr) -> pl.Expr:
        """Which of a column's values it keeps."""
        compare = {">=": values.ge, ">": values.gt, "<=": values.le, "<": values.lt, "=": values.eq, "<>": values.ne}
        return compare[self.operator](self.value)


class Unread(NamedTuple):
    """A rule, or a part of one, that no line can be drawn for."""

    rule: str
    level: str | None
    text: str
    why: str


def extract(rules: Iterable[Rule]) -> tuple[list[Threshold], list[Unread]]:
    """Thresholds of rules, and what is none."""
    thresholds: list[Threshold] = []
    unread: list[Unread] = []
    for rule in rules:
        try:
            reader = _Reader(rule)
            reader.read()
        except _Confusing:
            unread.append(Unread(rule.name, rule.level, rule.keep, "cannot be read as comparisons"))
            continue
        thresholds += reader.thresholds
        unread += reader.unread
        if not reader.thresholds and not reader.unread:
            unread.append(Unread(rule.name, rule.level, rule.keep, "no comparison with a number"))
    return list(dict.fromkeys(thresholds)), list(dict.fromkeys(unread))


def resolved(thresholds: Sequence[Threshold], catalog: Catalog, versions: dict[str, int]) -> list[Threshold]:
    """The same with aggregates computed over all clips, as the recipe does; of a column without values they stay
    None."""
    texts = sorted({t.text for t in thresholds if t.value is None})
    expressions = {text: pl.sql_expr(text) for text in texts}
    columns = sorted({name for e in expressions.values() for name in e.meta.root_names()})
    known: dict[str, float | None] = {}
    if columns:
        row = catalog.clips(versions, columns).select(e.alias(text) for text, e in expressions.items()).collect()
        known = row.row(0, named=True)
    return [replace(t, value=known[t.text]) if t.value is None else t for t in thresholds]


class _Confusing(Exception):
    """The rule has a form that is not foreseen here."""


class _Reader:
    """Reads one rule: a recursive descent over AND, OR, NOT, brackets and predicates."""

    def __init__(self, rule: Rule):
        self.rule, self.at = rule, 0
        self.tokens = _tokens(rule.keep)
        self.thresholds: list[Threshold] = []
        self.unread: list[Unread] = []

    def read(self) -> None:
        self._condition(False)
        if self.at != len(self.tokens):
            raise _Confusing

    def _condition(self, negated: bool) -> None:
        self._term(negated)
        while self._next() in ("and", "or"):
            self.at += 1
            self._term(negated)

    def _term(self, negated: bool) -> None:
        while self._next() == "not":
            self.at += 1
            negated = not negated
        if self._next() == "(" and self._bracket_is_condition():
            self.at += 1
            self._condition(negated)
            self.at += 1
        else:
            self._predicate(negated)

    def _predicate(self, negated: bool) -> None:
        start, left = self.at, self._operand()
        word = self._next()
        if word == "not":
            self.at, negated = self.at + 1, not negated
            word = self._next()
        if word in COMPARISONS:
            self.at += 1
            self._compared(left, {"!=": "<>", "==": "="}.get(word, word), self._operand(), negated, start)
        elif word == "between":
            self.at += 1
            low = self._operand()
            if self._next() != "and":
                raise _Confusing
            self.at += 1
            self._compared(left, ">=", low, negated, start)
            self._compared(left, "<=", self._operand(), negated, start)
        elif word in ("is", "in", "like", "ilike"):
            self._skip(left, word, start)
        else:  # a boolean column, or a function that returns one
            self._leave(start, "not a comparison") if len(left) > 1 else None

    def _compared(self, left: list[str], operator: str, right: list[str], negated: bool, start: int) -> None:
        column, value = _column(left), _value(right)
        if column is None or value is None:
            column, value, operator = _column(right), _value(left), MIRRORED[operator]
        if column is not None and value is not None:
            operator = NEGATED[operator] if negated else operator
            self.thresholds.append(Threshold(column, operator, value[0], value[1], self.rule.name, self.rule.level))
        elif not any(_is_text(side) for side in (left, right)):
            self._leave(start, "more than a column compared with a number")

    def _skip(self, left: list[str], word: str, start: int) -> None:
        """Past a predicate that compares with no number, which is for the rule's text to say; of numbers, it is
        noted."""
        self.at += 1
        if word == "is":
            self.at += 1 + (self._next() == "not")
            return
        values = self._operand()
        numbers = word == "in" and not any(v.startswith("'") for v in values)
        if numbers or _column(left) is None:
            self._leave(start, f"{word.upper()} is no threshold")

    def _operand(self) -> list[str]:
        """The tokens up to what cannot belong to a value any more; brackets and CASE … END are taken whole."""
        start, depth = self.at, 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token in ("(", "case"):
                depth += 1
            elif token in (")", "end"):
                if depth == 0:
                    break
                depth -= 1
            elif depth == 0 and token in ENDS_OPERAND:
                break
            self.at += 1
        if start == self.at or depth:
            raise _Confusing
        return self.tokens[start : self.at]

    def _bracket_is_condition(self) -> bool:
        """Whether the bracket that opens here holds a condition, not a part of a value."""
        depth = 0
        for index in range(self.at, len(self.tokens)):
            depth += {"(": 1, ")": -1}.get(self.tokens[index], 0)
            if depth == 0:
                return index + 1 == len(self.tokens) or self.tokens[index + 1] in ("and", "or", ")")
        raise _Confusing

    def _leave(self, start: int, why: str) -> None:
        self.unread.append(Unread(self.rule.name, self.rule.level, " ".join(self.tokens[start : self.at]), why))

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None


def _tokens(text: str) -> list[str]:
    """Words in lower case, texts with their quotes, names without."""
    found, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        if match is None:
            raise _Confusing
        token = match.group(match.lastindex)
        found.append(token if token.startswith("'") else token.strip('"') if token.startswith('"') else token.lower())
        at = match.end()
    return found


def _column(tokens: list[str]) -> str | None:
    tokens = _without_brackets(tokens)
    if len(tokens) == 1 and tokens[0] in view_schema():
        return tokens[0]
    return ALIASES.get(tuple(tokens))


def _value(tokens: list[str]) -> tuple[float | None, str] | None:
    """Number and text of a constant; (None, text) of an aggregate; None of anything else."""
    text = _joined(tokens)
    if _is_text(tokens):
        return None
    if tokens[0] in AGGREGATES and len(tokens) > 2 and tokens[1] == "(" and tokens.index(")") == len(tokens) - 1:
        return None, text
    if any(token[0].isalpha() or token[0] == "_" for token in tokens):
        return None
    try:
        return float(pl.select(pl.sql_expr(text)).item()), text
    except (pl.exceptions.PolarsError, TypeError, ValueError):
        return None


def _is_text(tokens: list[str]) -> bool:
    return any(token.startswith("'") for token in tokens) and "case" not in tokens


def _without_brackets(tokens: list[str]) -> list[str]:
    while len(tokens) > 2 and tokens[0] == "(" and tokens[-1] == ")" and ")" not in tokens[1:-1]:
        tokens = tokens[1:-1]
    return tokens


def _joined(tokens: list[str]) -> str:
    return (
        re.sub(r"\s*([(),])\s*", r"\1", " ".join(tokens))
        .replace(",", ", ")
        .replace("- ", "-" if len(tokens) == 2 else "- ")
    )
