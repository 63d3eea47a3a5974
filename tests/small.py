"""The smallest model that every layout can hold, as flags of pretrain_satformer.py."""

SHAPE = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
--lr 3e-3 --min-lr 3e-4 --log-interval 1 --eval-iters 1 --eval-interval 100 --num-workers 0
--init-method-std 0.05""".split()
RTOL = 1e-5  # fp32, same weights and data: only the order of additions differs
PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
SP, DO = "--sequence-parallel", "--use-distributed-optimizer"
