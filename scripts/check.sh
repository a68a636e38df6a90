#!/usr/bin/env bash
# What a reviewer need not look for: lint, format, layers and rooms, types. Arguments: none. Takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install_uv.sh
run() { echo "$*" >&2; uv run --quiet --no-sync "$@"; }
run ruff check .
run ruff format --check .
run lint-imports
run pyright
