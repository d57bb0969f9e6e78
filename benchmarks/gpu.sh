#!/usr/bin/env bash
# Measures everything on one GPU, within nine minutes, and leaves a folder with gpu.json, gpu.md, plots
# and logs.
#
#   benchmarks/gpu.sh [--rehearse] [--parts=facts,right] [--output=runs/gpu] [--limit_s=530]
#
# --rehearse does the same on a CPU with tiny models. benchmarks/gpu/README.md says what it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
