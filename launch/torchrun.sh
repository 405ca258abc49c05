#!/usr/bin/env bash
# Runs a module on the devices (or CPU cores) of this machine, one process each:
#   launch/torchrun.sh 2 -m dapo_mcore.train experiment=quickstart
# Sets environment only. PYTHON names another interpreter than that of .venv.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh PROCESSES -m MODULE [ARGUMENTS]" >&2
    exit 2
fi
processes=$1
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1                                 # Megatron: keeps communication in order
export HF_HUB_OFFLINE=1                                              # models come from folders
export VLLM_ENABLE_V1_MULTIPROCESSING=0                              # the engine lives in the trainer's process
export VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"  # several engines share the cores
export PYTHONUNBUFFERED=1

cd "$root"
exec "$python" -m torch.distributed.run --nnodes=1 --nproc-per-node="$processes" \
    --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 "$@"
