# Sourced by check.sh and test.sh: an environment in .venv with what the checks and all tests need.
. scripts/install_uv.sh
echo "Installing what the checks and tests need into .venv (the first time this takes a minute or two) …" >&2
uv sync --quiet --inexact --all-extras --no-extra vllm --no-extra flash --no-extra gcs --group colossalai
