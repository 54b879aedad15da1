#!/bin/bash
# The lesson parallel on two machines. In the folder of the repository, which both machines see:
#   sbatch docs/machines/slurm.sh --max-epochs 10
#   SIDE=lightning sbatch docs/machines/slurm.sh --max-epochs 10

#SBATCH --job-name=parallel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail

SIDE=${SIDE:-plain}
RUNS_DIR=${RUNS_DIR:-runs/slurm-$SLURM_JOB_ID}

# All machines meet at the first one. No two jobs there have the same port.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not "| head": that may end scontrol early
first=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))

# Two minutes before its time is over, the job goes back into the queue; ten times at most.
if ((${SLURM_RESTART_COUNT:-0} < 10)); then
  trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
fi

# In the background: bash would keep the signal until srun has ended.
srun --label --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  .venv/bin/python "$SIDE/parallel.py" \
  --devices "${SLURM_GPUS_ON_NODE:-2}" \
  --num-nodes "$SLURM_JOB_NUM_NODES" \
  --rdzv-endpoint "$first:$port" \
  --max-restarts 3 \
  --ckpt-path last \
  --runs-dir "$RUNS_DIR" \
  "$@" &
wait "$!"
