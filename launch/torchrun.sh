#!/usr/bin/env bash
# Runs a module on the devices (or CPU cores) of this machine, one process each, or of several machines:
#   launch/torchrun.sh 2 -m dapo_mcore.train experiment=quickstart
#   launch/torchrun.sh --nodes 2 --node-rank 0 --master-addr 10.0.0.1 --interface eth0 8 -m dapo_mcore.train ...
# --dry-run prints what would run on each node. Sets environment only (launch/variables.py); what is exported stays.
# PYTHON names another interpreter than that of .venv.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m launch.torchrun "$@"
