"""Builds the model: Megatron's GPTModel over this project's layer specs.

Must not know: args, data, how V1 crosses pipeline stages (the layer class is handed in).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_satformer.model.architectures.resformer import attach_shared_lambdas
from megatron_satformer.model.layer import ValueResidualLayer
from megatron_satformer.model.specs import build_block_spec


@dataclass(kw_only=True)
class SATFormerModelConfig(GPTModelConfig):
    """GPTModelConfig whose `transformer` is a SATFormerConfig."""

    builder: ClassVar[str] = "megatron_satformer.model.builder.SATFormerModelBuilder"


def layer_spec_builder(residual_layer: type[ValueResidualLayer]) -> Callable[..., Any]:
    """A `GPTModelConfig.transformer_layer_spec` that builds layers of the given class."""

    def build(model_config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        return build_block_spec(
            model_config.transformer, vp_stage=vp_stage, residual_layer=residual_layer
        )

    return build


class SATFormerModelBuilder(GPTModelBuilder):
    """GPTModelBuilder that also gives ResFormer its shared lambdas."""

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
        config = self._model_config.transformer
        if config.architecture == "resformer":
            stages = pg_collection.pp
            attach_shared_lambdas(
                model.decoder, config, (vp_stage or 0) * stages.size() + stages.rank()
            )
        return model
