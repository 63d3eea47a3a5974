#!/usr/bin/env bash
# The documents to tokens, in NUM_PARTS parts: a SLURM array and a job that merges them where there is sbatch, else
# one after the other here. Killed or submitted again, what is done stays done. Flags are those of sbatch.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
NUM_PARTS=${NUM_PARTS:-16}
FLAGS=(
    --input "$RECIPE/corpus"
    --output-prefix "$RECIPE/data/corpus"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER_MODEL"
    --append-eod
)
MERGE=(python3 tools/merge_datasets.py --input "$RECIPE/data/corpus.parts" --output-prefix "$DATA_PATH")

if command -v "$SBATCH" >/dev/null; then
    array=$("$SBATCH" --parsable --array="0-$((NUM_PARTS - 1))" "$@" examples/slurm/preprocess.sbatch "${FLAGS[@]}")
    printf 'parts: job %s\n' "$array"
    printf -v merge '%q ' "${MERGE[@]}"
    merge=$("$SBATCH" --parsable --job-name=merge --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes "$@" \
        --wrap "$merge")
    printf 'merge: job %s\n' "$merge"
    exit
fi
(($# == 0)) || { printf 'there is no sbatch here, whose flags these would be: %s\n' "$*" >&2 && exit 2; }
for ((part = 0; part < NUM_PARTS; part++)); do
    python3 tools/preprocess_data.py "${FLAGS[@]}" --num-parts "$NUM_PARTS" --part "$part"
done
exec "${MERGE[@]}"
