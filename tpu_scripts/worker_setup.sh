#!/usr/bin/env bash
# Installs the checkout that it is started in, with its dependencies, on one machine of a pod. setup.sh starts it on
# every machine, and may do so again.

set -euo pipefail
# Ubuntu 22.04 has Python 3.10; uv brings a newer one without asking for root.
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
