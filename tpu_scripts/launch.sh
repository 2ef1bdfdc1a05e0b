#!/usr/bin/env bash
# Starts a command on every machine of a pod, and returns.
#
#     tpu_scripts/launch.sh --name=NAME --zone=ZONE --run=RUN --bucket=gs://BUCKET/runs -- python -m easyrl.train_ppo ...

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
need NAME
need_command
complete_command
need_kept_output
launch_run
