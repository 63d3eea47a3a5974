"""What tests of value embeddings run on forked ranks: where their tables start."""

import torch

from tests.model import ranks


def start_as_published(count: int) -> None:
    """Value embeddings: uniform of standard deviation 1 / sqrt(h), gates from 1.5 up a little."""
    ranks.start(count)
    model = ranks.build({"architecture": "value_embeddings", "num_query_groups": 6})
    h, kv, seen = model.config.hidden_size, 6 * ranks.SHAPE["kv_channels"], []
    for layer in model.decoder.layers[1::2]:
        table, gate = (
            layer.self_attention.value_embedding,
            layer.self_attention.value_embedding_gate,
        )
        assert table.shape == (ranks.VOCABULARY, kv // count)
        assert gate.shape == (6 // count, 12)
        assert abs(table.std() * h**0.5 - 1) < 0.05
        assert table.abs().max() <= (3 / h) ** 0.5
        assert gate.min() >= 0
        assert 0.015 < gate.max() <= 0.02
        seen += [table.flatten()[:8], gate.flatten()[:8]]
    firsts = torch.stack(seen)
    others = [torch.empty_like(firsts) for _ in range(count)]
    torch.distributed.all_gather(others, firsts)
    assert len(torch.cat(others).unique(dim=0)) == 4 * count  # no two alike
