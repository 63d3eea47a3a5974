#!/usr/bin/env bash
# Pretrains SIZE on published terms: here, or as a job where there is sbatch, whose flags SBATCH_FLAGS holds. Flags
# are those of pretrain_satformer.py.
# shellcheck source=examples/fineweb_edu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
TRAIN=(examples/pretrain/launch.sh --model-size "$SIZE" "$@")
if command -v "$SBATCH" >/dev/null; then
    read -ra SBATCH_FLAGS <<<"${SBATCH_FLAGS:-}"
    exec "$SBATCH" --job-name "${ARCHITECTURE}_$SIZE" "${SBATCH_FLAGS[@]}" examples/slurm/pretrain.sbatch "${TRAIN[@]}"
fi
exec "${TRAIN[@]}"
