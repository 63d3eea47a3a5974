"""The plain pre-norm Transformer: Megatron's own layers, nothing added."""

from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.architectures.record import Architecture

TRANSFORMER = Architecture(
    name="transformer",
    mfu=0.241,
    source="",
    equation="V'_n = V_n\n(no value residual)",
    about="It is a plain Transformer",
    twin="megatron_satformer.model.reference.decoder:Decoder",
    exported="megatron_satformer.checkpoint.exported.modeling_decoder:DecoderForCausalLM",
    stock=True,
    from_transformer="it reads a Transformer's checkpoint as it is",
    paper=(PaperLayout("transformer", "TransformerForCausalLM"),),
)
