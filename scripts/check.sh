#!/usr/bin/env bash
# Lint, format, layers and rooms, types: about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/sync.sh
run() { echo "$*" >&2; .venv/bin/"$@"; }
run ruff check .
run ruff format --check .
run lint-imports
run pyright
