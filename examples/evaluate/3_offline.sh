#!/usr/bin/env bash
# Four tasks made by tools/build_eval_tasks.py from text that was not trained on. Needs no network.
set -euo pipefail
die() {
    printf 'evaluate: %s\n' "$*" >&2
    exit 2
}

[[ -n ${TASKS:-} ]] || die "TASKS must be set: a folder made by tools/build_eval_tasks.py."
[[ -f $TASKS/tasks.json ]] \
    || die "TASKS ($TASKS) must be a folder made by tools/build_eval_tasks.py: it has no tasks.json."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" \
    local_perplexity,local_last_word,local_ending,local_recall --include_path "$TASKS" "$@"
