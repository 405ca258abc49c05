#!/usr/bin/env bash
# Submits a run to a running Ray cluster, and follows it:
#   launch/ray_job.sh --address http://10.0.0.1:8265 --platform npu --nodes 2 --interface eth0 16 -m dapo_mcore.train ...
# One launch/torchrun.sh per machine; this repository and its .venv lie in the same folder of each. --dry-run prints.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m launch.ray_job "$@"
