#!/usr/bin/env bash
# Pretrains SATFormer 1.3B: 1,298,764,800 parameters and 1,507,328 gate parameters at 32000 tokens of vocabulary,
# 30 billion tokens, 14305 steps of 2.10 million. README.md says what the environment must hold.
# Any Megatron flag may follow and wins: ./satformer_1.3b.sh --micro-batch-size 2
set -euo pipefail

SEQ_LENGTH=4096
TRAIN_SAMPLES=$((30 * 1000**3 / SEQ_LENGTH))
WARMUP_SAMPLES=$((300 * 1000**2 / SEQ_LENGTH))

MODEL_ARGS=(
    --architecture "${ARCHITECTURE:-satformer}"
    --num-layers 24
    --hidden-size 2048
    --ffn-hidden-size 5632
    --num-attention-heads 32
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
    --lr 8e-4
    --min-lr 8e-5
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
    --eval-interval 1000
    --eval-iters 10
    --save-interval 1000
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
