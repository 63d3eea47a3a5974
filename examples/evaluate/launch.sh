#!/usr/bin/env bash
# Runs lm_eval on an exported folder: launch.sh TASKS [FLAGS OF lm_eval ...]. The numbered scripts end here;
# README.md has the environment variables.
set -euo pipefail

die() {
    printf 'evaluate: %s\n' "$*" >&2
    exit 2
}

(($# > 0)) || die "give the tasks, with commas between them, then flags of lm_eval."
tasks=$1
shift
[[ -n ${HF_MODEL:-} ]] || die "HF_MODEL must be set: a folder made by tools/convert_checkpoint.py to-hf."
exec python3 "$(dirname "${BASH_SOURCE[0]}")/../../tools/evaluate.py" --model "$HF_MODEL" --tasks "$tasks" \
    --save "${RESULTS:-results}" --batch-size "${BATCH_SIZE:-8}" --dtype "${DTYPE:-auto}" \
    ${DEVICE:+--device "$DEVICE"} ${PREFIX_TOKEN_ID:+--prefix-token-id "$PREFIX_TOKEN_ID"} "$@"
