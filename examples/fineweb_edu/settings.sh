#!/usr/bin/env bash
# Sourced by the numbered scripts: what they share. Each variable of the environment wins. README.md explains them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"

export RECIPE=${RECIPE:-runs/fineweb_edu}
SBATCH=${SBATCH-sbatch}
export SIZE=${SIZE:-1.3b} ARCHITECTURE=${ARCHITECTURE:-satformer}
export TOKENIZER_MODEL=${TOKENIZER_MODEL:-$RECIPE/tokenizer/tokenizer.model}
export DATA_PATH=${DATA_PATH:-$RECIPE/data/corpus_text_document}
export CHECKPOINT_PATH=${CHECKPOINT_PATH:-$RECIPE/${ARCHITECTURE}_$SIZE}
export TENSORBOARD_LOGS_PATH=${TENSORBOARD_LOGS_PATH:-$CHECKPOINT_PATH/tensorboard}
export HF_MODEL=${HF_MODEL:-$CHECKPOINT_PATH/hf} RESULTS=${RESULTS:-$CHECKPOINT_PATH/results}
