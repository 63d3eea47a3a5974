#!/usr/bin/env bash
# The zero-shot suite of the paper's kind. Fetches its data sets from the Hugging Face hub.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" \
    wikitext,lambada_openai,piqa,hellaswag,winogrande,arc_easy,arc_challenge,boolq "$@"
