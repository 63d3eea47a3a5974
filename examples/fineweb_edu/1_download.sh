#!/usr/bin/env bash
# FineWeb-Edu's documents, up to TOKENS of its own count (GPT-2's). Killed at any moment, the same command goes on.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
[[ -n ${DATASET:-} ]] || DATASET=HuggingFaceFW/fineweb-edu DATASET_NAME=${DATASET_NAME:-sample-100BT}
exec python3 tools/download_dataset.py --dataset "$DATASET" ${DATASET_NAME:+--name "$DATASET_NAME"} \
    --tokens "${TOKENS:-32B}" --output "$RECIPE/corpus" "$@"
