# What every job exports, in one place; `launch` exports the same from configs/cluster/*.yaml (env:).
# Sourced by the scripts in this folder. Uncomment what your site needs.

# One rank's threads are its cores.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# srun does not take --cpus-per-task from the job since Slurm 22.05.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# gloo listens on the address that the host's name resolves to, unless told the interface:
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

# The rendezvous: the first node, and another port after a requeue, because the old one may still be in use. Below 32000.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((15000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0} * 101) % 17000))"
export MASTER_ADDR MASTER_PORT
