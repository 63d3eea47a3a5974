"""What tests of the model run on forked ranks: bytes that autograd keeps until backward."""

from typing import Any

import torch

from megatron_satformer.benchmark.saved import bytes_saved
from megatron_satformer.model.architectures import all_architectures
from tests.model import ranks


def grows_by(architecture: str, options: dict[str, Any], more: float) -> None:
    """It grows evenly with depth, per layer by `more` [s, b, kv] beyond a Transformer's."""
    ranks.start()
    depths = (4, 8, 12)
    shape = ranks.SHAPE | options
    kept, plain = (
        [_kept(shape | {"architecture": name, "num_layers": n})[0] for n in depths]
        for name in (architecture, "transformer")
    )
    assert kept[2] - kept[1] == kept[1] - kept[0]
    kv = shape["num_query_groups"] * shape["kv_channels"]
    unit = 4 * ranks.SEQUENCE * ranks.BATCH * kv  # bytes of one [s, b, kv]
    per_layer = [(of[1] - of[0]) / (depths[1] - depths[0]) / unit for of in (kept, plain)]
    assert per_layer[0] - per_layer[1] == more


def value_residuals_keep_logits_and_v1() -> None:
    """Beyond a Transformer's: the gate's rows, padding included, and one V1; in every case."""
    ranks.start()
    for norm in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            common = {"qk_layernorm": norm, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
            plain, model = _kept({"architecture": "transformer"} | common)
            tokens = dtype.itemsize * ranks.SEQUENCE * ranks.BATCH
            v1 = tokens * ranks.SHAPE["num_query_groups"] * ranks.SHAPE["kv_channels"]
            # Nothing but V would keep the buffer: then V1, which is a copy, is no more than V.
            held = model.decoder.layers[0].self_attention._kept
            assert held == (norm and dtype == torch.float32)
            for record in all_architectures():
                if "value_residual_last_k" not in record.own_options:
                    continue
                kept, model = _kept({"architecture": record.name} | common)
                rows = [
                    sum(layer.self_attention._row_counts[1:])
                    if held
                    else layer.self_attention._row_counts[1]
                    for layer in model.decoder.layers[1:]
                    if hasattr(layer.self_attention, "_row_counts")
                ]
                scalars = kept - plain - tokens * sum(rows) - held * v1
                assert 0 <= scalars < 100, (record.name, norm, dtype, scalars)  # lambdas


def _kept(options: dict[str, Any]) -> tuple[int, Any]:
    model = ranks.build(options)
    return bytes_saved(model, lambda: ranks.mean_loss(model)), model
