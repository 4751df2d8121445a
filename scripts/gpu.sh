#!/usr/bin/env bash
# What takes a GPU: the tests that are skipped elsewhere, and the figures of the step, about ten minutes on one of them.
#
#   scripts/gpu.sh DIR        tests first; then JSON in DIR, such as results/bench
#
# The environment must have largebatch and its development packages (make setup) and a C compiler, for Triton.
set -euo pipefail

[[ $# == 1 ]] || { sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
[[ -d .venv/bin ]] && export PATH=$PWD/.venv/bin:$PATH

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
python -m pytest -q -n 0 tests/models/test_batchnorm_kernels.py tests/training/test_cuda_graph.py tests/offloading

python -m largebatch bench step model=resnet20 n=32 'bench.k=[8]' bench.iterations=20 format=json >"$out/gpu-resnet20.json"
python -m largebatch bench step model=resnet50 n=32 'bench.k=[8,32]' bench.iterations=4 format=json >"$out/gpu-resnet50.json"
if (($(nvidia-smi --list-gpus | wc -l) > 1)); then
  for compress in none bf16; do
    python -m largebatch bench exchange n=32 dataset=synthetic exchange.compress=$compress format=json \
      >"$out/gpu-exchange-$compress.json"
  done
fi
