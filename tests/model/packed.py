"""What tests of packed documents and of context parallelism run on forked ranks."""

from itertools import pairwise

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_satformer.backend.device import choose_device
from megatron_satformer.model.context import GatherContext, gather_context
from megatron_satformer.model.packing import chunks_of, pack_samples
from tests.model.ranks import RTOL, VOCABULARY, build, build_reference, load

LENGTH = 16
ENDS = [[0, 1, 9, 16, 16], [0, 6, 7, 12, 16]]


def start(ranks: int) -> None:
    choose_device("cpu")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def rows_here(ranks: int) -> torch.Tensor:
    rank = parallel_state.get_context_parallel_rank()
    chunks = chunks_of(LENGTH // ranks, ranks, rank)
    return torch.cat([torch.arange(c.start, c.start + c.length) for c in chunks])


def gathers_in_order(ranks: int) -> None:
    """What is gathered is the sequence, and every rank's gradient comes home."""
    start(ranks)
    group = parallel_state.get_context_parallel_group()
    rows = rows_here(ranks)
    whole = torch.randn(2, LENGTH, 3, generator=torch.Generator().manual_seed(1))
    mine = whole[:, rows].clone().requires_grad_()
    assert torch.equal(gather_context(mine.detach(), group), whole)
    factor = torch.arange(1.0, 2 * LENGTH * 3 + 1).view_as(whole)
    (GatherContext.apply(mine, group) * factor * (group.rank() + 1)).sum().backward()
    torch.testing.assert_close(mine.grad, (factor * sum(range(1, ranks + 1)))[:, rows])


def equals_documents_alone(ranks: int, options: dict) -> None:
    """Logits of a packed sample: those of its documents, each run alone by the plain twin."""
    start(ranks)
    twin, exported = build_reference(options)
    sizes = {"tensor_model_parallel_size": 1, "context_parallel_size": ranks}
    model = build(options | sizes).eval()
    load(model, twin, exported)
    ids = torch.randint(VOCABULARY, (len(ENDS), LENGTH), generator=torch.Generator().manual_seed(3))
    packed = pack_samples(torch.tensor(ENDS, dtype=torch.int32), LENGTH)
    rows = rows_here(ranks)
    starts = packed.starts_at(torch.arange(LENGTH))
    positions = torch.arange(LENGTH) - starts
    with torch.no_grad():
        got = model(ids[:, rows], positions[:, rows], None, packed_seq_params=packed)
        for sample, ends in enumerate(ENDS):
            alone = [ids[sample : sample + 1, a:b] for a, b in pairwise(ends)]
            logits = torch.cat([twin(part).logits[0] for part in alone if part.numel()])[rows]
            mixed = twin(ids[sample : sample + 1]).logits[0, rows]
            largest = logits.abs().max()
            assert (got[sample] - logits).abs().max() <= RTOL * largest
            assert (mixed - logits).abs().max() > 0.01 * largest, "nothing was kept apart"
