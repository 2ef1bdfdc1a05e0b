#!/usr/bin/env bash
# Asks for a pod and waits until it is there.
#
#     tpu_scripts/create.sh --name=NAME --type=v3-256 --zone=ZONE [--spot | --reserved]

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
need NAME TYPE
create_or_explain || die "$FAILED_STATUS" "gcloud could not create $NAME"
wait_for_pod || die "$FAILED_STATUS" "$NAME did not become active: it is $(pod_state)"
