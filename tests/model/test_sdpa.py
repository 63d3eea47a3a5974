"""Every query reads one run of keys: exact, whatever cuts it, and nothing is as large as [s, s]."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from megatron_satformer.model import flex, sdpa, spans
from megatron_satformer.model.flex import BLOCK, attend_by_mask, build_mask
from megatron_satformer.model.packing import chunks_of, pack_samples, reach_of
from tests import models

S, B, HEADS, HN = 640, 2, 4, 6
DOCUMENTS = [[0, 1, 130, 131, 500, 640], [0, 7, 640]]
SHAPE = {
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": HEADS,
    "kv_channels": HN,
    "num_query_groups": 2,
}
WINDOWS = [None, 0, 5, 300, 2000]


def documents_of(ends: list[list[int]]):
    longest = max(map(len, ends)) + 2
    bounds = [each + each[-1:] * (longest - len(each)) for each in ends]
    return pack_samples(torch.tensor(bounds, dtype=torch.int32), ends[0][-1])


def read_by(ends: list[list[int]], window: int | None) -> torch.Tensor:
    """[b, 1, s, s], written out: which keys a query reads."""
    number = torch.stack(
        [torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(pairwise(e))]) for e in ends]
    )
    query, key = torch.arange(number.size(1)).unsqueeze(1), torch.arange(number.size(1))
    read = (key <= query) & (query - key <= (number.size(1) if window is None else window))
    return (read & (number.unsqueeze(2) == number.unsqueeze(1))).unsqueeze(1)


def attention_of(window: int | None, **options) -> sdpa.ScaledDotProductAttention:
    size = None if window is None else (window, 0)
    config = models.build_config(**SHAPE, window_size=size, attention_dropout=0.0, **options)
    return sdpa.ScaledDotProductAttention(config, 1, None, "self")


def inputs(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    heads = (HEADS, SHAPE["num_query_groups"], SHAPE["num_query_groups"])
    return [torch.randn(S, B, n, HN, dtype=dtype, device=device).requires_grad_() for n in heads]


def written_out(query, key, value, read):
    key, value = (t.repeat_interleave(HEADS // t.size(2), dim=2) for t in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * HN**-0.5
    weights = scores.masked_fill(~read, float("-inf")).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ends", [None, DOCUMENTS], ids=["one", "packed"])
def test_each_query_reads_its_run_of_keys(ends, window):
    tensors = inputs()
    packed = None if ends is None else documents_of(ends)
    wanted = written_out(*tensors, read_by(ends or [[0, S]] * B, window))
    got = attention_of(window)(*tensors, None, packed_seq_params=packed)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, tensors, upstream)
    for mine, plain in zip(gradients, torch.autograd.grad(wanted, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("window", [None, 300])
def test_bf16(window):
    tensors = inputs(torch.bfloat16)
    wanted = written_out(*(t.float() for t in tensors), read_by(DOCUMENTS, window))
    got = attention_of(window)(*tensors, None, packed_seq_params=documents_of(DOCUMENTS))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_a_cache_is_read_within_the_window():
    query, key, value = inputs()
    wanted = written_out(query, key, value, read_by([[0, S]] * B, 5))[-1:]
    torch.testing.assert_close(attention_of(5)(query[-1:], key, value, None), wanted)


def test_layers_that_skip_the_window():
    options = SHAPE | {"window_size": (4, 0), "window_attn_skip_freq": 2}
    config = models.build_config(**options)
    assert [sdpa.window_before(config, n) for n in (1, 2, 3)] == [4, None, 4]
    assert sdpa.window_before(models.build_config(**SHAPE, window_size=(-1, 0)), 1) is None
    assert sdpa.window_before(models.build_config(**SHAPE), 1) is None


@pytest.mark.parametrize("window", [None, 300])
def test_no_tensor_is_as_large_as_all_scores(window):
    """Of one head, on the CPU, forward and backward, with all that is saved."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for each in made if isinstance(made, tuple | list) else [made]:
                if isinstance(each, torch.Tensor):
                    largest[0] = max(largest[0], each.numel())
            return made

    tensors = inputs()
    with Watch():
        packed = documents_of([[0, S]] * B)
        attention_of(window)(*tensors, None, packed_seq_params=packed).sum().backward()
    mask = 0 if window is None else spans.BLOCK * (spans.BLOCK + window)
    assert 0 < largest[0] <= max(2 * S * B * HEADS * HN, mask) < S * S


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ends", [None, DOCUMENTS], ids=["one", "packed"])
def test_the_mask_of_a_gpu(ends, window, ranks):
    """Block by block what is read, also by a rank's two chunks, and the same attention by it."""
    packed = None if ends is None else documents_of(ends)
    read = read_by(ends or [[0, S]] * B, window)
    query, key, value = (t.detach() for t in inputs())  # no backward on the CPU
    whole = attention_of(window)(query, key, value, None, packed_seq_params=packed)
    for rank in range(ranks):
        chunks = chunks_of(S // ranks, ranks, rank)
        rows = torch.cat([torch.arange(c.start, c.start + c.length) for c in chunks])
        first, last = reach_of(chunks, packed, window, "cpu")
        mask = build_mask(first, last, S)
        samples = len(first)
        written = create_mask(mask.mask_mod, samples, 1, len(rows), S, device="cpu")
        assert torch.equal(written, read[:samples, :, rows])
        check_blocks(mask, read[:samples, :, rows])
        got = attend_by_mask(query[rows], key, value, mask, None, flex_attention).flatten(2)
        torch.testing.assert_close(got, whole[rows])


def check_blocks(mask: BlockMask, read: torch.Tensor) -> None:
    """Of blocks passed over none is read, of those taken whole all is, and few are in vain."""
    rows = -read.size(2) % BLOCK
    read = F.pad(read, (0, -read.size(3) % BLOCK, 0, rows))
    blocks = read.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [b, 1, q, BLOCK, k, BLOCK]
    some, every = blocks.any(-1).any(3), blocks.all(-1).all(3)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    assert not (some & ~(partial | whole)).any()
    full = read.size(2) // BLOCK - bool(rows)  # blocks of queries that are all there
    assert not (whole & ~every)[:, :, :full].any()
    if read.size(2) == S:
        assert torch.equal(partial | whole, some)
        assert torch.equal(whole, every)


def listed(count: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    places = torch.arange(numbers.size(-1)) < count.unsqueeze(-1)
    return torch.zeros_like(places).scatter(-1, numbers.long(), places)


def test_a_gpu_is_asked_for_no_value(monkeypatch):
    """From the bounds to the call of the kernel, on a device that is not there."""
    called = []

    def kernel(query, key, value, block_mask, scale, enable_gqa):
        place = torch.arange(block_mask.shape[0], device=query.device)
        assert block_mask.mask_mod(place, place, place, place).is_cuda
        assert block_mask.kv_indices.is_cuda
        assert enable_gqa
        called.append(block_mask)
        return query + 0

    monkeypatch.setattr(flex, "compiled_flex", lambda: kernel)
    with FakeTensorMode():
        query, key, value = inputs(device="cuda")
        bounds = torch.zeros(B, S + 1, dtype=torch.int32, device="cuda")
        packed = pack_samples(bounds, S)
        for layer in (attention_of(9), attention_of(9)):
            out = layer(query, key, value, None, packed_seq_params=packed)
            assert out.is_cuda
            assert out.shape == (S, B, HEADS * HN)
    assert called[0] is called[1], "the mask of a micro-batch is made once"
