#!/usr/bin/env bash
# Starts pretrain_satformer.py with the flags it is given, on the data, paths and devices that the environment names:
# one GPU, all of a machine, many machines, or (--model-size debug) the CPU.
# The satformer_*.sh scripts end here; what a size is stands in megatron_satformer/sizes.py.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

: "${DATA_PATH:?prefix of the tokenized data (.bin and .idx), or a blend: weight prefix weight prefix ...}"
: "${TOKENIZER_MODEL:?the tokenizer that made the data: a SentencePiece .model file}"
: "${CHECKPOINT_PATH:?directory where checkpoints are written and from which training resumes}"
: "${TENSORBOARD_LOGS_PATH:?directory for TensorBoard logs}"

# Tensor and sequence parallelism overlap rightly only with one hardware queue (up to Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || GPUS=0
NNODES=${NNODES:-1}
# What all nodes of this launch know, and no other launch has.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    LAUNCH=$SLURM_JOB_ID.${SLURM_STEP_ID:-$$}
else
    LAUNCH=$(cksum <<<"$CHECKPOINT_PATH" | cut -d ' ' -f 1)
fi
if [[ $NNODES == 1 ]]; then
    ENDPOINT=localhost:0 # any free port, since no other node needs to know it
else
    : "${MASTER_ADDR:?the first of NNODES nodes, where all of them meet}"
    ENDPOINT=$MASTER_ADDR:${MASTER_PORT:-$((20000 + ${LAUNCH%.*} % 10000))}
fi

DISTRIBUTED_ARGS=(
    --nnodes "$NNODES"
    --nproc-per-node "${GPUS_PER_NODE:-$((GPUS > 0 ? GPUS : 1))}"
    --rdzv-backend c10d
    --rdzv-endpoint "$ENDPOINT"
    --rdzv-id "$LAUNCH"
)

read -ra BLEND <<<"$DATA_PATH"
DATA_ARGS=(
    --data-path "${BLEND[@]}"
    --split "${SPLIT:-990,10,0}"
    --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
    --tokenizer-model "$TOKENIZER_MODEL"
)

LOGGING_ARGS=(
    --log-interval 10
    --log-throughput
    --log-validation-ppl-to-tensorboard
    --tensorboard-dir "$TENSORBOARD_LOGS_PATH"
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    # A job that was killed in its first save begins again when it is requeued.
    --allow-fresh-start
    --ckpt-format torch_dist
    # Without it the optimizer in a checkpoint cannot be loaded at another TP or PP.
    --dist-ckpt-optim-fully-reshardable
)

MODEL_ARGS=(
    --architecture "${ARCHITECTURE:-satformer}"
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

exec torchrun "${DISTRIBUTED_ARGS[@]}" "$REPOSITORY/pretrain_satformer.py" \
    "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "${MODEL_ARGS[@]}" "$@"
