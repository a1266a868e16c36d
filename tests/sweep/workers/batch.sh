#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-7%8
#SBATCH --cpus-per-task=24
#SBATCH --error=SWEEP/quickstart/slurm/%A_%a_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=lorasweep-quickstart
#SBATCH --mem=1536M
#SBATCH --nice=5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=SWEEP/quickstart/slurm/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --reservation='on tuesday'
#SBATCH --signal=USR2@120
#SBATCH --time=240

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output SWEEP/quickstart/slurm/%A_%a_%t_log.out --error SWEEP/quickstart/slurm/%A_%a_%t_log.err --cpus-per-task=24 PYTHON -u -m submitit.core._submit SWEEP/quickstart/slurm
