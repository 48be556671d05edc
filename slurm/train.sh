#!/bin/bash
#SBATCH --job-name=hpcres-train
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# sbatch --nodes 4 --gpus-per-node 4 --time 24:00:00 slurm/train.sh STUDY [options of hpcres train]
# HPCRES_PROCESSES: processes per node (default: its GPUs, or 1). Where time runs out, the job saves and queues again.
cd "$SLURM_SUBMIT_DIR" || exit 1
if [ -d .venv ]; then . .venv/bin/activate; fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) LOCAL_WORLD_SIZE="${HPCRES_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
# Without torchrun, which ends with 1 whatever the exit status of its processes.
srun --ntasks-per-node="$LOCAL_WORLD_SIZE" --overcommit --cpu-bind=none --wait=120 bash -c \
  'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec python -m hpcres train "$@"' train "$@" &
step=$!
trap 'again=yes; kill -USR1 $step' USR1
while wait $step; status=$?; kill -0 $step 2>/dev/null; do :; done
if [ "$again" = yes ] && [ $status = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
