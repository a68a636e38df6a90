#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/sync.sh
. scripts/install_chromium.sh
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two files at a time (three overload two cores: deadlines pass); -n 0 for one after another
