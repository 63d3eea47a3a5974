#!/usr/bin/env bash
# Sourced by the job scripts of this folder: what they have in common. They run in the repository's root.

die() {
    printf '%s: %s\n' "${SLURM_JOB_NAME:-job}" "$*" >&2
    exit 2
}

# One of an array's tasks has the array's own number as its SLURM_JOB_ID, and that number means all of them.
OWN_JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || OWN_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"

# run_to_limit SECONDS STOP COMMAND ...
# Runs a command; `status` is its exit code. When SLURM says that the time limit is near (SIGUSR2), calls STOP PID
# until it succeeds, and gives the command so many seconds to end.
run_to_limit() {
    local seconds=$1 stop=$2 pid stopped='' deadline=''
    shift 2
    limit_is_near=
    status=0
    trap 'limit_is_near=1' USR2
    "$@" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [[ -n $limit_is_near ]]; then
            [[ -n $deadline ]] || printf '%s: the time limit is near, stopping\n' "$(date)"
            deadline=${deadline:-$((SECONDS + seconds))}
            [[ -n $stopped ]] || ! "$stop" "$pid" || stopped=1
            if ((SECONDS > deadline)); then
                printf '%s: not stopped in %d s, ending it\n' "$(date)" "$seconds"
                kill -TERM "$pid" || true
                deadline=$((SECONDS + seconds))
            fi
        fi
        sleep 1
    done
    wait "$pid" || status=$?
}

# Ends the job as its command ended, or, near the time limit, queues it again: of an array this task alone.
end_or_requeue() {
    [[ -n $limit_is_near ]] || exit "$status"
    printf '%s: queueing job %s again (its command ended with %d)\n' "$(date)" "$OWN_JOB" "$status"
    scontrol requeue "$OWN_JOB" || die "scontrol requeue $OWN_JOB failed with exit code $?: the job will not go on by" \
        "itself. What it has done is kept; submit it again."
    exit 0
}
