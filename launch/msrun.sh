#!/usr/bin/env bash
# Runs a module under msrun (of the package mindspore, which the ranks do not need), as launch/torchrun.sh does:
#   launch/msrun.sh 8 -m dapo_mcore.train experiment=...
#   launch/msrun.sh --nodes 2 --node-rank 0 --master-addr 10.0.0.1 --interface eth0 8 -m dapo_mcore.train ...
# --dry-run prints what would run on each node. Sets environment only (launch/variables.py); what is exported stays.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m launch.msrun "$@"
