"""Trains tiny models with pretrain_satformer.py in several layouts, from one warmed-up process.

    python megatron_runs.py CASES.json

CASES.json is a list of {"ranks", "flags", "logits"}. Each case is forked after the slow imports. In
its evaluation the trained model reads fixed ids, and the ranks that have logits save them,
`<logits>.<rank>`, [b, s, v/tp].

Nothing heavy is imported at the top: a save starts a helper process on every rank, which imports
this file again.
"""

import json
import multiprocessing.util
import os
import socket
import sys
import traceback
from pathlib import Path

MICRO_BATCH, LENGTH, VOCABULARY = 2, 24, 100
FLAGS = f"""--num-layers 4 --hidden-size 32 --num-attention-heads 4 --kv-channels 10
--ffn-hidden-size 72 --seq-length {LENGTH} --max-position-embeddings {LENGTH}
--micro-batch-size {MICRO_BATCH} --global-batch-size 8 --train-iters 6 --lr 1e-2 --min-lr 1e-3
--init-method-std 0.1 --mock-data --eval-iters 1 --eval-interval 100 --save-interval 100
--num-workers 0""".split()


def build_ids():
    """The ids [b, s] that every trained model reads."""
    import torch

    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (MICRO_BATCH, LENGTH), generator=generator)


def run_rank(pretrain_satformer, rank: int, case: dict, port: int) -> None:
    """One rank of one case, in a process of its own."""
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    sys.argv = ["pretrain_satformer.py", *FLAGS, *case["flags"]]
    train_step = pretrain_satformer.forward_step

    def forward_step(data_iterator, model):
        if model.training:
            return train_step(data_iterator, model)
        positions = torch.arange(LENGTH).expand(MICRO_BATCH, -1)
        return model(build_ids(), positions, None), save_logits

    def save_logits(logits):
        torch.save(logits.detach().float(), f"{case['logits']}.{rank}")
        count = torch.ones((), dtype=torch.int)
        return logits.sum(), count, {"lm loss": torch.ones(2)}

    pretrain_satformer.forward_step = forward_step
    pretrain_satformer.main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_case(pretrain_satformer, case: dict) -> None:
    """Forks the ranks of one case and waits for them; output goes to `<logits>.log`."""
    port, children = free_port(), []
    for rank in range(case["ranks"]):
        child = os.fork()
        if child == 0:
            log = os.open(f"{case['logits']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                run_rank(pretrain_satformer, rank, case, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            # Ends the helper process that saving has started; the rest of a proper exit takes
            # seconds with so much imported.
            multiprocessing.util._exit_function()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"case {case['flags']} failed:\n" + Path(f"{case['logits']}.log").read_text())


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import megatron.core.tokenizers.text  # noqa: F401  # imports transformers: once, here

    import pretrain_satformer

    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(pretrain_satformer, case)


if __name__ == "__main__":
    main()
