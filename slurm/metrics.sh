#!/bin/bash
#SBATCH --job-name=hpcres-metrics
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# sbatch --nodes 4 --ntasks-per-node 16 --time 2:00:00 slurm/metrics.sh STUDY [options of hpcres metrics]
# One Dask worker a task; the scheduler runs beside the first.
cd "$SLURM_SUBMIT_DIR" || exit 1
if [ -d .venv ]; then . .venv/bin/activate; fi
file=$PWD/dask-$SLURM_JOB_ID.json
trap 'kill %1 %2 2>/dev/null; wait; rm -f "$file"' EXIT
dask scheduler --scheduler-file "$file" --no-dashboard --port 0 &
srun dask worker --scheduler-file "$file" --nthreads "${SLURM_CPUS_PER_TASK:-1}" --no-dashboard \
  --no-nanny --death-timeout 120 --local-directory "${TMPDIR:-/tmp}" &
until [ -s "$file" ]; do kill -0 %1 || exit 1; sleep 0.2; done
hpcres metrics "$@" --scheduler "$file"
