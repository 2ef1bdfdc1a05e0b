#!/usr/bin/env bash
# Has a run save and end, waits until it has, and ends a run.sh that looks after it; the pod stays. Starting the same
# command again goes on.
#
#     tpu_scripts/stop.sh --name=NAME --zone=ZONE --run=RUN

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
need NAME
stop_run
