#!/usr/bin/env bash
# Everything that is measured on a GPU, in one call of less than ten minutes: one table, and a last line of JSON.
#
#     benchmarks/gpu.sh [--size 1.5b] [further arguments of gpu_memory.py]
#
# Uses the environment that is installed: PYTHON, else .venv, else the python on PATH. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1
export TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU that $python's torch can use: nothing was measured" >&2
  exit 1
fi
exec timeout 590 "$python" benchmarks/gpu_memory.py --device cuda "$@"
