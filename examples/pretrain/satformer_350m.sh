#!/usr/bin/env bash
# Pretrains a published size on published terms: its shape, batch, learning rate and tokens stand in
# megatron_satformer/sizes.py. README.md says what the environment must hold. Any flag may follow and wins.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" \
    --model-size 350m \
    "$@"
