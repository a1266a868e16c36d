#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --error=SWEEP/workers/slurm/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=lorasweep-wide
#SBATCH --mem=65536M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=SWEEP/workers/slurm/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=240

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output SWEEP/workers/slurm/%j_%t_log.out --error SWEEP/workers/slurm/%j_%t_log.err --cpus-per-task=4 --kill-on-bad-exit=1 '--container-image=registry#lorasweep:1' --container-mounts=HERE:HERE,SWEEP:SWEEP --container-workdir=HERE sh -c 'trap "" USR2; exec "$@"' sh python3 -u -m submitit.core._submit SWEEP/workers/slurm
