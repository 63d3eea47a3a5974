#!/usr/bin/env bash
# The zero-shot suite, or another script of examples/evaluate as TASK_SCRIPT. Flags are those of lm_eval.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
exec "examples/evaluate/${TASK_SCRIPT:-1_zero_shot.sh}" "$@"
