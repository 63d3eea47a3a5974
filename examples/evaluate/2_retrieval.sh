#!/usr/bin/env bash
# The retrieval suite: find in the text, or recall, what is asked for. Fetches its data sets from the hub.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" \
    fda,swde,squad_completion,triviaqa,nq_open,drop "$@"
