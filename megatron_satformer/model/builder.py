"""Builds the model: Megatron's GPTModel over this project's layer specs.

Must not know: args, data, how what layers carry crosses pipeline stages.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.specs import build_block_spec


@dataclass(kw_only=True)
class DecoderModelConfig(GPTModelConfig):
    """GPTModelConfig whose `transformer` is a DecoderConfig."""

    builder: ClassVar[str] = "megatron_satformer.model.builder.DecoderModelBuilder"


def build_layer_spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """A `GPTModelConfig.transformer_layer_spec`."""
    return build_block_spec(model_config.transformer, vp_stage=vp_stage)


class DecoderModelBuilder(GPTModelBuilder):
    """GPTModelBuilder that also calls the architecture's `finish`."""

    # GPTModelBuilder.build_model, 0.19.2: the one place that sees every pipeline chunk before
    # it is wrapped for data parallelism.
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One pipeline chunk of the model; arguments as Megatron's."""
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        finish = find_architecture(self._model_config.transformer.architecture).finish
        if finish is not None:
            stages = pg_collection.pp
            finish(model, (vp_stage or 0) * stages.size() + stages.rank())
        return model
