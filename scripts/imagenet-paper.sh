#!/usr/bin/env bash
# Every row of the paper's Figure 1 and Tables 1 and 2, five seeds each, as arrays at SLURM: 23 experiments, 115 runs.
# Rows that stand in several tables are one experiment. Further words go to every run:
#   scripts/imagenet-paper.sh /data/imagenet /shared/runs/paper launcher.partition=gpu launcher.time=08:00:00
#   scripts/imagenet-paper.sh /data/imagenet /shared/runs/paper launcher.dry_run=true    # shows the batch scripts
# Then: largebatch sweep status /shared/runs/paper, and largebatch table runs=/shared/runs/paper paper=figure1
# A run computes 115 million images; on 8 GPUs at 2,500 images/s each (bf16) that is 1.6 hours, so 1,500 GPU-hours in all.
set -euo pipefail
if (($# < 2)); then
  echo "usage: $0 DATASET_ROOT SWEEP_DIRECTORY [key=value ...]" >&2
  exit 2
fi
root=$1 directory=$2
shift 2

experiments=(
  figure1_{64,128,256,512,1k,2k,4k,8k,16k,32k,64k}
  table1_{none,constant}
  table2a_256_rate_{005,02} table2a_8k_rate_{005x32,02x32} table2a_8k_{unscaled,sqrt}
  table2b_{256,8k}_gamma1
  table2c_{256,8k}
)
names=$(printf ',imagenet_%s' "${experiments[@]}")
exec largebatch train -m launcher=slurm experiment="${names#,}" seed=0,1,2,3,4 \
  dataset.root="$root" hydra.sweep.dir="$directory" "$@"
