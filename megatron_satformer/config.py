"""What every model of this project is: Megatron's TransformerConfig and a few options more.

One source of truth per number: a field is a flag of the same name on the command line
(``arguments.py``), an attribute of the checkpoint's args, and, where the exported model computes
it, a key of its config.json. What one architecture alone has stands in its file under
``model/architectures/``. Must not know: architectures, modules, process groups, training.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal


@dataclass
class DecoderOptions:
    """Options of every architecture."""

    architecture: str = "satformer"
    """How layers read what earlier layers made; see docs/design.md for the equations."""

    scaled_output_init: bool = False
    """Scale the init of the output projections (linear_proj, linear_fc2) by 1/sqrt(2 num_layers),
    Megatron's default. Without it they are N(0, init_method_std) like the rest, as published."""

    fused_blend: bool = True
    """Leave Triton's kernels out, which on a GPU make V' and the sums of what earlier layers made;
    what they compute is computed by torch then."""

    from_transformer: bool = False
    """Start from the weights of a plain Transformer, saved by this project or by Megatron-LM: its
    folder is --pretrained-checkpoint (read until --load holds a checkpoint, so that the same
    command line resumes), or --load with --finetune. What the architecture adds keeps its own
    init; optimizer, schedule and data start afresh."""


@dataclass
class DecoderConfig(TransformerConfig, DecoderOptions):
    """Megatron's TransformerConfig for one architecture; those with options subclass it.

    Raises:
        ValueError: an option is out of its range (the message names option, value and way out).
        NotImplementedError: fused_single_qkv_rope, which has no flag.
    """

    layers_alike: ClassVar[bool] = True
    """Whether every layer has the same tensors: a checkpoint then holds each kind in one."""

    expects_transformer: bool = field(default=False, init=False)  # see expect_transformer

    def __post_init__(self) -> None:
        self.expect_transformer(False)
        given = getattr(self, "output_layer_init_method", None)
        if given is None and not self.scaled_output_init:
            self.output_layer_init_method = init_method_normal(self.init_method_std)
        if self.fused_single_qkv_rope:
            raise NotImplementedError(
                "fused_single_qkv_rope (True) is not supported: it never splits V off, which the "
                "value residual is added to. Leave it out."
            )
        self.check_options(
            self,
            num_layers=self.num_layers,
            groups=self.num_query_groups or self.num_attention_heads,
            tp=self.tensor_model_parallel_size,
        )
        super().__post_init__()

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse shapes and options that the architecture cannot have.

        Args:
            options: with the architecture's own fields: a config, or parsed arguments.
            num_layers: layers of the model.
            groups: KV heads of the model.
            tp: tensor-parallel size.

        Raises:
            ValueError: naming the option, its value and the way out.
        """

    def expect_transformer(self, expected: bool) -> None:
        """Give checkpoint entries the form of a plain Transformer, or of this model.

        Args:
            expected: whether the next checkpoint to be read is a Transformer's, which has none of
                the architecture's own tensors and holds all layers of a kind in one.
        """
        self.expects_transformer = expected
        # Layers that differ in shape have one checkpoint entry each. The spelling is Megatron's.
        self.hetereogenous_dist_checkpoint = not (expected or self.layers_alike)

    @property
    def summary(self) -> str:
        """Architecture and options in a few words, for the report at start."""
        return self.architecture

    @property
    def warning(self) -> str | None:
        """What may be computed but hardly meant."""
        return None

    @property
    def kv_projection_size(self) -> int:
        """Width of V over the whole model: KV heads times head dim."""
        return self.num_query_groups * self.kv_channels
