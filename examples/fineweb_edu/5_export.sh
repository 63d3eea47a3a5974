#!/usr/bin/env bash
# The last checkpoint to a folder for Hugging Face, compared with Megatron's own logits. Flags are those of to-hf.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
exec python3 tools/convert_checkpoint.py to-hf --load "$CHECKPOINT_PATH" --save "$HF_MODEL" --verify "$@"
