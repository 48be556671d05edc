#!/bin/bash
#SBATCH --job-name=hpcres-infer
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# sbatch --nodes 8 --ntasks-per-node 16 --time 4:00:00 slurm/infer.sh STUDY [options of hpcres infer]
# HPCRES_LAUNCH=mpirun starts the ranks with mpirun; HPCRES_SRUN_MPI names srun's MPI plugin (pmix).
cd "$SLURM_SUBMIT_DIR" || exit 1
if [ -d .venv ]; then . .venv/bin/activate; fi
if [ "${HPCRES_LAUNCH:-srun}" = mpirun ]; then
  exec mpirun -n "$SLURM_NTASKS" hpcres infer "$@"
fi
exec srun --mpi="${HPCRES_SRUN_MPI:-pmix}" hpcres infer "$@"
