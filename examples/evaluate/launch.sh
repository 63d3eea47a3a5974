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
[[ -f $HF_MODEL/config.json ]] || die "HF_MODEL ($HF_MODEL) must be an exported folder: it has no config.json."
[[ -f $HF_MODEL/tokenizer_config.json ]] \
    || die "HF_MODEL ($HF_MODEL) has no tokenizer. Export with to-hf --tokenizer."
command -v lm_eval >/dev/null || die "lm_eval is not installed: pip install -c constraints.txt -e '.[eval,hf]'"
model_args=$(python3 - "$HF_MODEL" "${PREFIX_TOKEN_ID:-}" "${DTYPE:-auto}" <<'PY'
import json, sys
folder, prefix, dtype = sys.argv[1:]
if not prefix:
    # Documents were joined by the end-of-document token: it is what a text begins after. The
    # tokenizer's <s>, which lm_eval would take, was never seen in training.
    prefix = json.load(open(f"{folder}/config.json"))["eos_token_id"]
    prefix = prefix[0] if isinstance(prefix, list) else prefix
if prefix is None:
    sys.exit("evaluate: config.json has no eos_token_id. Set PREFIX_TOKEN_ID.")
args = {"pretrained": folder, "trust_remote_code": True, "dtype": dtype}
print(json.dumps(args | {"prefix_token_id": int(prefix)}))
PY
)
exec lm_eval run --model hf --model_args "$model_args" --tasks "$tasks" \
    --batch_size "${BATCH_SIZE:-8}" ${DEVICE:+--device "$DEVICE"} \
    --output_path "${RESULTS:-results}" --log_samples "$@"
