#!/bin/bash
# sbatch recipes/accelerate/slurm.sh recipes/ppo.py --output_dir outputs/ppo
# LAUNCH_FILE=recipes/accelerate/zero3.yaml sbatch --nodes 4 recipes/accelerate/slurm.sh recipes/ppo.py ...
# One task per machine, which starts a process for each of its GPUs. Not run on a cluster: a test reads what it starts.
#SBATCH --job-name=rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
set -euo pipefail
port=$((20000 + SLURM_JOB_ID % 20000))  # another one for each job on a machine
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${machines%%$'\n'*}  # the first
launch=(
    accelerate launch --config_file "${LAUNCH_FILE:-recipes/accelerate/multi_node.yaml}" --num_machines "$SLURM_NNODES"
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --main_process_ip "$address" --main_process_port "$port"
)
# shellcheck disable=SC2016  # only within a task is the machine's number known
srun --kill-on-bad-exit=1 bash -c 'exec "${@:1:'${#launch[@]}'}" --machine_rank "$SLURM_NODEID" "${@:1+'${#launch[@]}'}"' \
    machine "${launch[@]}" "$@"
