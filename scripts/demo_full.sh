#!/usr/bin/env bash
# The whole story on a CPU, in about twenty minutes on two cores (scripts/demo.sh --full [CATALOG]): a film is ingested into the catalog of the
# demo, captioned, planned; an autoencoder and a video diffusion transformer are trained on it for some minutes; videos are sampled
# with the captions of clips, and a page compares them with the footage.
set -euo pipefail
cd "$(dirname "$0")/.."
catalog=${1:-demo-catalog}
mkdir -p "$catalog-full"
work=$(realpath "$catalog-full")  # what is not part of the catalog: models, runs, samples
echo "Installing what training needs into .venv (torch and ColossalAI: some minutes the first time) …" >&2
uv sync --quiet --inexact --no-dev --extra demo --extra train --group colossalai --extra transformers --extra caption --extra features
datakit=.venv/bin/datakit

say() { echo; echo "── $*"; }

say "A film: Big Buck Bunny (596 s, CC BY 3.0), out of the source package of moviepy"
film=$(.venv/bin/python scripts/fetch_film.py)
$datakit run ingest "$film" --catalog "$catalog" --recipe technical --set shots.max_s=4 --set ocr.enabled=false

say "Captions, by a vision-language model of 0.4 million random parameters: it shows the way, what it says is nonsense (see docs/captions.md for real ones)"
[[ -e $work/vlm/config.json ]] || .venv/bin/python scripts/tiny_vlm.py "$work/vlm"
$datakit run caption --catalog "$catalog" --where "status = 'kept'" \
  --set caption.backend=transformers --set caption.model="$work/vlm" --set caption.language=null --set caption.frames=2 --set caption.side=64

say "The tiny autoencoder goes on learning, from its shipped weights, on these clips"
[[ -e $work/autoencoder/run.json ]] || $datakit train vae --catalog "$catalog" --preset vae-tiny --out "$work/autoencoder" \
  --set autoencoder.weights=embedded --set steps=40 --set optimizer.lr=2.0e-4 --set optimizer.warmup=10 --set optimizer.steps=40 \
  --set validation.every=0 --set preview.every=0 --set checkpoint.every=40
$datakit train export "$work/autoencoder" -o "$work/autoencoder.safetensors"

say "Latents, once for all epochs"
settings=(--preset tiny --set autoencoder.weights="$work/autoencoder.safetensors")
$datakit plan --catalog "$catalog" --out "$work/plan" --preset tiny
$datakit run encode --plan "$work/plan" "${settings[@]}"

say "A diffusion transformer of 4 million parameters learns from them"
[[ -e $work/dit/run.json ]] || $datakit train dit --plan "$work/plan" "${settings[@]}" --out "$work/dit" \
  --set loader.latents=only --set steps=300 --set engine.ema=0.98 --set 'conditions={t2v: 1}' --set validation.every=0 --set preview.every=0 --set checkpoint.every=100

say "Samples, of the captions of clips"
$datakit sample --catalog "$catalog" --where "status = 'kept' AND split = 'train'" -n 3 --limit 40 --ckpt "$work/dit" --preset tiny --out "$work/samples"

say "What they are like, beside the footage"
$datakit eval samples --samples "$work/samples" --catalog "$catalog" --where "status = 'kept'" -o "$work/samples.html"
$datakit catalog report "$catalog" -o "$work/catalog.html"

echo
echo "Open $work/samples.html (samples against footage) and $work/catalog.html (what training found in the clips)."
echo "Try it:  $datakit sample serve --ckpt $work/dit --out $work/samples --preset tiny      (extra serve)"
