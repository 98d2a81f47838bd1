#!/usr/bin/env bash
# Installs what a run needs into .venv, with JAX for "tpu" or "cuda13", and a Python that is new enough.
#
#     launch/install.sh tpu

set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m pip install --quiet --upgrade --target=.uv uv
.uv/bin/uv venv --quiet --allow-existing --python='>=3.11' .venv
.uv/bin/uv pip install --quiet --python=.venv/bin/python --requirements=requirements.txt "jax[$1]"
