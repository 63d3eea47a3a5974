"""What tests of the export run on forked ranks (see tests/zygote.py)."""

import os
import sys

import torch

import pretrain_satformer
from tests.checkpoint.inputs import LENGTH, MICRO_BATCH

FLAGS = f"""--num-layers 4 --hidden-size 32 --num-attention-heads 4 --kv-channels 10
--ffn-hidden-size 72 --seq-length {LENGTH} --max-position-embeddings {LENGTH}
--micro-batch-size {MICRO_BATCH} --global-batch-size 8 --train-iters 8 --lr 3e-3 --min-lr 1e-3
--init-method-std 0.3 --eval-iters 1 --eval-interval 100 --save-interval 100
--num-workers 0""".split()


def train(flags: list[str], ids: str, logits: str) -> None:
    """Trains a tiny model; its evaluation reads the file `ids` and saves logits [b, s, v/tp]."""
    torch.set_num_threads(1)
    sys.argv = ["pretrain_satformer.py", *FLAGS, *flags]
    train_step = pretrain_satformer.forward_step

    def forward_step(data_iterator, model):
        if model.training:
            return train_step(data_iterator, model)
        positions = torch.arange(LENGTH).expand(MICRO_BATCH, -1)
        return model(torch.load(ids), positions, None), save_logits

    def save_logits(output):
        torch.save(output.detach().float(), f"{logits}.{os.environ['RANK']}")
        count = torch.ones((), dtype=torch.int)
        return output.sum(), count, {"lm loss": torch.ones(2)}

    pretrain_satformer.forward_step = forward_step
    pretrain_satformer.main()
