#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest. With --quick first, only the tests that take no
# model, no browser and no Ray, without installing torch and its kin (where it is installed, quick tests use it).
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --quick ]]; then
  set -- -m "not slow" "${@:2}"
  . scripts/install_uv.sh
  uv sync --quiet --inexact --extra demo --extra dedup --extra quality --extra openai
else
  . scripts/sync.sh
  . scripts/install_chromium.sh
fi
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two files at a time (three overload two cores: deadlines pass); -n 0 for one after another
