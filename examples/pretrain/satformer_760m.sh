#!/usr/bin/env bash
# Pretrains SATFormer 760M: 766,440,320 parameters and 663,552 gate parameters at 32000 tokens of vocabulary,
# 20 billion tokens, 9536 steps of 2.10 million. README.md says what the environment must hold.
# Any Megatron flag may follow and wins: ./satformer_760m.sh --micro-batch-size 2
set -euo pipefail

SEQ_LENGTH=4096
TRAIN_SAMPLES=$((20 * 1000**3 / SEQ_LENGTH))
WARMUP_SAMPLES=$((200 * 1000**2 / SEQ_LENGTH))

MODEL_ARGS=(
    --architecture "${ARCHITECTURE:-satformer}"
    --num-layers 19
    --hidden-size 1536
    --ffn-hidden-size 6144
    --num-attention-heads 24
    --kv-channels 64
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope
    --rotary-base 10000
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --qk-layernorm
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --init-method-std 0.02
    --transformer-impl transformer_engine
)

TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 512
    --train-samples "$TRAIN_SAMPLES"
    --lr 1e-3
    --min-lr 1e-4
    --lr-decay-style cosine
    --lr-decay-samples "$TRAIN_SAMPLES"
    --lr-warmup-samples "$WARMUP_SAMPLES"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --bf16
    --seed 1234
    --eval-interval 500
    --eval-iters 10
    --save-interval 500
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)

exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" \
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "$@"
