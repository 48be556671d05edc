#!/bin/bash
#SBATCH --job-name=hpcres-train
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# sbatch --nodes 4 --gpus-per-node 4 --time 24:00:00 slurm/train.sh STUDY [options of hpcres train]
# HPCRES_PROCESSES: processes per node (default: its GPUs, or 1).
cd "$SLURM_SUBMIT_DIR" || exit 1
if [ -d .venv ]; then . .venv/bin/activate; fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --ntasks-per-node=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${HPCRES_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m hpcres train "$@"
