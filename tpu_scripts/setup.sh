#!/usr/bin/env bash
# Copies this checkout (what is committed) to every machine of a pod, and installs it there.
#
#     tpu_scripts/setup.sh --name=NAME --zone=ZONE [--secrets=FILE]

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
need NAME
setup_pod
