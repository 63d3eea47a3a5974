#!/usr/bin/env bash
# A SentencePiece tokenizer of 32000 pieces, learnt from a random gigabyte of the documents.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
exec python3 tools/train_tokenizer.py --input "$RECIPE/corpus" --output "$RECIPE/tokenizer" \
    --vocab-size "${VOCAB_SIZE:-32000}" --max-bytes "${MAX_BYTES:-1000000000}" "$@"
