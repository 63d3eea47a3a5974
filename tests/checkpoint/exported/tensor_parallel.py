"""What test_tools.py runs on two forked ranks (see tests/zygote.py)."""

import warnings
from typing import Any

import pytest
import torch

from megatron_satformer.checkpoint.hugging_face.code import model_class


def check(folder: str, architecture: str, greedy: dict, trains: bool) -> None:
    """Logits, text and gradients of the model in `folder`, split over the ranks, are its own."""
    model = _load_split(folder, architecture)
    ids, logits, text, gradients = torch.load(f"{folder}/case")
    out = model(ids, output_gates=True)
    assert all(alpha.size(-1) == 1 for alpha in out.gates), "one of the two KV heads on each rank"
    assert {layer.values.size(1) for layer in out.past_key_values.layers} == {1}
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-4)
    assert torch.equal(model.generate(ids, **greedy), text)
    if not trains:
        try:
            model.train()(ids)
        except NotImplementedError:
            return
        raise AssertionError("the lambdas' gradients would be halves")
    model.train()(ids, labels=ids).loss.backward()
    rank = torch.distributed.get_rank()
    for name, parameter in model.named_parameters():
        ours, whole = parameter.grad, gradients[name]
        ours = ours.to_local() if hasattr(ours, "to_local") else ours
        axis = [n for n in range(whole.dim()) if ours.size(n) < whole.size(n)]
        part = whole.chunk(2, axis[0])[rank] if axis else whole
        torch.testing.assert_close(ours, part, rtol=1e-4, atol=1e-5, msg=name)


def check_refused(folder: str, architecture: str, what: str) -> None:
    """The model in `folder` says that it does not run split over the ranks."""
    model = _load_split(folder, architecture)
    with pytest.raises(NotImplementedError, match=f"{what} needs all KV heads together"):
        model(torch.tensor([[3, 4, 5]]))


def _load_split(folder: str, architecture: str) -> Any:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer way to ask is not in the oldest transformers
        return model_class(architecture).from_pretrained(folder, tp_plan="auto").eval()
