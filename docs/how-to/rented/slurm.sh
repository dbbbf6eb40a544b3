#!/bin/bash
# Slurm: trains on one node of a cluster and continues after a pre-emption or at the time limit.
# What was tried: docs/how-to/rented-machines.md
#
#   make install                          # once, on the login node
#   sbatch docs/how-to/rented/slurm.sh composer train.py yamls/smollm2_lora.yaml
#   sbatch --gpus-per-node=4 docs/how-to/rented/slurm.sh foundry-ext sweep experiments/paper/sweep.yaml --gpus 0,1,2,3 --yes
#
# Submit from the project's folder, on a file system that all nodes share: outputs/ stays there.
# The W&B key comes from `wandb login` on the login node, or from WANDB_API_KEY in your shell.
#
#SBATCH --job-name=foundry-ext
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
# Two minutes before the time limit, and only to this script.
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

if [ $# = 0 ]; then
    echo "usage: sbatch $0 COMMAND ..., such as composer train.py yamls/smollm2_lora.yaml" >&2
    exit 2
fi
make install
# shellcheck disable=SC1091
source .venv/bin/activate

state() {
    squeue --noheader --job "$SLURM_JOB_ID" --format %T || true
}

caught=
# shellcheck disable=SC2329 # the trap calls it
stop() {
    trap '' TERM
    caught=1
    # Before the time limit only this script is signalled, and a run saves at the end of its batch. When a job is pre-empted
    # or cancelled, Slurm has signalled all its processes, and a second signal would end them without saving.
    if [ "$(state)" != COMPLETING ]; then
        kill -INT "$command" || true
    fi
}

set -m # a process group of its own for the command, in which SIGINT is not ignored
"$@" &
command=$!
trap stop TERM
status=0
wait "$command" || status=$?
if [ -n "$caught" ]; then # it was the signal that ended the first wait
    status=0
    wait "$command" || status=$?
fi

# Slurm requeues a pre-empted job by itself, and a cancelled one must not come back: neither is RUNNING.
if [ -n "$caught" ] && [ "$status" != 0 ] && [ "$(state)" = RUNNING ]; then
    echo "stopped by Slurm; requeued to continue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
