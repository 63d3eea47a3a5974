"""DenseFormer: every layer reads a weighted sum of what all earlier layers made (arXiv 2402.02622).

    X_0 = embedding,  X_n = layer n of Y_{n-1}, residuals included
    Y_n = sum_j a_nj X_j,  over j <= n with j = n modulo dwa_dilation

for n > 0 that are multiples of dwa_period; else Y_n = X_n. The final norm reads Y_L. One scalar per
pair of layers, 1 for X_n and 0 for the others at the start: a plain Transformer.

Y_n is summed up by layer n + 1, so that a boundary takes X_n and, of the X_j before, those that
are still read behind it; Y_L by layer L.

Shapes: s sequence, b micro-batch, h hidden; "/tp": per rank.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import REFUSES, ExtendedLayer
from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.coefficients import stream_coefficients
from megatron_satformer.model.mixing import weighted_sum


@dataclass
class DenseFormerOptions:
    """DenseFormer's own options."""

    dwa_dilation: int = 1
    """Sum up every how many layers' outputs (denseformer); 1: all. Its paper's fast form is 4 with
    --dwa-period 5."""

    dwa_period: int = 1
    """Sum up behind every how many layers (denseformer); 1: behind each."""


@dataclass
class DenseFormerConfig(DecoderConfig, DenseFormerOptions):
    """DecoderConfig with weights of earlier layers' outputs."""

    layers_alike: ClassVar[bool] = False  # the later, the more it reads
    architecture: str = "denseformer"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse distances that are none, or with which nothing is ever summed up."""
        for name in ("dwa_dilation", "dwa_period"):
            value = getattr(options, name)
            if not 1 <= value <= num_layers:
                raise ValueError(
                    f"{name} ({value}) must be at least 1 and at most num_layers ({num_layers}). "
                    "Leave it out for 1."
                )

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        return f"{self.architecture}, {self.dwa_dilation} x {self.dwa_period}"


def sources(options: Any, n: int) -> range:
    """Numbers j of the X_j that Y_n is summed up from; none where Y_n is X_n."""
    if n < 1 or n % options.dwa_period:
        return range(0)
    return range(n % options.dwa_dilation, n + 1, options.dwa_dilation)


def kept(options: Any, n: int) -> list[int]:
    """Numbers of the X_j before X_n that Y_n or a later sum reads."""
    later = [sources(options, i) for i in range(n, options.num_layers + 1)]
    return [j for j in range(n) if any(j in read for read in later)]


def starting_weights(shape: tuple[int, ...]) -> Tensor:
    """Weights with which Y_n is X_n."""
    weights = torch.zeros(shape, device="cpu")
    weights[-1] = 1
    return weights


class DenseFormerLayer(ExtendedLayer):
    """ExtendedLayer that reads Y_{n-1}; `context` is what is `kept`, hidden_states X_{n-1}."""

    config: DenseFormerConfig

    def __init__(self, config: DenseFormerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for tensor in own_tensors(config, self.layer_number):
            values = starting_weights(tensor.shape)
            setattr(self, tensor.megatron, stream_coefficients(config, values))

    # TransformerLayer.forward, 0.19.2: the residual stream itself is what is summed up.
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """X_{n-1} and what is kept before it -> X_n, or Y_L, and what is kept before X_n.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: tensors like hidden_states; None in layer 1.
            **kwargs: as Megatron's.
        """
        n, options = self.layer_number, self.config
        history = dict(zip(kept(options, n - 1), context or (), strict=True))
        history[n - 1] = hidden_states
        if read := sources(options, n - 1):
            hidden_states = self._sum(self.depth_weights, [history[j] for j in read])
        hidden_states, _ = super().forward(hidden_states, *args, **kwargs)
        if n == options.num_layers and (read := sources(options, n)):
            history[n] = hidden_states
            hidden_states = self._sum(self.final_depth_weights, [history[j] for j in read])
        return hidden_states, tuple(history[j] for j in kept(options, n))

    def _sum(self, weights: Tensor, read: list[Tensor]) -> Tensor:
        return weighted_sum(weights, read, fused=self.config.fused_blend)


def carry(config: Any, n: int) -> Carry:
    """X_n is hidden_states; the others that are still read."""
    return Carry(streams=len(kept(config, n)))


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Weights of Y_{n-1}, behind layer n - 1 in the Hugging Face model; in layer L those of Y_L."""
    found = []
    if read := sources(options, n - 1):
        found.append(_weights("depth_weights", len(read), behind=True))
    if n == options.num_layers and (read := sources(options, n)):
        found.append(_weights("final_depth_weights", len(read)))
    return found


def _weights(name: str, count: int, behind: bool = False) -> OwnTensor:
    return OwnTensor(
        name, ("depth_weights",), (count,), fp32=True, start=starting_weights, behind=behind
    )


DENSEFORMER = Architecture(
    name="denseformer",
    mfu=0.228,
    source="arXiv 2402.02622",
    equation=(
        "Y_n = sum_j a_nj X_j, X_j the output of layer j, is what layer n + 1 reads\n"
        "j <= n, j = n modulo {config.dwa_dilation}, for n that are multiples of "
        "{config.dwa_period}"
    ),
    about=(
        "X_0 is the embedding, the final norm reads Y_L; there is one scalar a_nj per pair of "
        "layers. The KV\ncache is a plain Transformer's. DenseFormer is described in arXiv "
        "2402.02622."
    ),
    twin="megatron_satformer.model.reference.denseformer:DenseFormer",
    exported="megatron_satformer.checkpoint.exported.modeling_denseformer:DenseFormerForCausalLM",
    config=DenseFormerConfig,
    options=DenseFormerOptions,
    layer=DenseFormerLayer,
    carry=carry,
    tensors=own_tensors,
    refuses=REFUSES,
    from_transformer=None,
    paper=(
        PaperLayout(
            "denseformer",
            "DenseFormerForCausalLM",
            names={r"layers\.(\d+)\.depth_weights": r"dwa_modules.alphas.\1.weight"},
            shapes=lambda options: {"depth_weights": (1, -1)},
            options={"dwa_dilation": "dwa_dilation", "dwa_period": "dwa_period"},
        ),
    ),
)
