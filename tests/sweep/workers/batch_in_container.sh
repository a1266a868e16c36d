#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --error=SWEEP/quickstart/slurm/%j_0_log.err
#SBATCH --job-name=lorasweep-quickstart
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=SWEEP/quickstart/slurm/%j_0_log.out
#SBATCH --signal=USR2@120
#SBATCH --time=240

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output SWEEP/quickstart/slurm/%j_%t_log.out --error SWEEP/quickstart/slurm/%j_%t_log.err --cpus-per-task=4 '--container-image=registry#lorasweep:1' --container-mounts=HERE:HERE,SWEEP/quickstart:SWEEP/quickstart --container-workdir=HERE python3 -u -m submitit.core._submit SWEEP/quickstart/slurm
