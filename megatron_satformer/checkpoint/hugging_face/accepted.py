"""Which Hugging Face models are one of ours, and as which; what is not computed exactly is refused.

Fields are those of transformers' Llama and Qwen3 configurations and of our own.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig
from megatron_satformer.checkpoint.hugging_face.folder import CONFIG, HFFolder
from megatron_satformer.checkpoint.hugging_face.plain_classes import SHAPE_FIELDS
from megatron_satformer.unsupported import Place, Row, Table, refuse_unsupported

# model_type -> whether its queries and keys are normalised
STOCK = {"llama": False, "qwen3": True}
REFERENCE = ("SATFormer", "ResFormer", "transformer")
# gates that a weight of zero shuts, and that learn from there
GATE = "self_attn.value_gate."
ZERO_GATES = ("tanh", "identity")
IMPORT = Place(
    ValueError, "of {path} must be {needed}: Megatron's model computes nothing else here."
)
REQUIRED: Table = {
    (IMPORT,): (
        Row("hidden_act", allowed=("silu", "swish")),
        Row("mlp_bias use_sliding_window", allowed=(False,)),
        Row("quantization_config", allowed=(None,)),
    )
}
# fields of the same name and meaning
SHARED = (*SHAPE_FIELDS, "attention_bias", "pad_token_id")


@dataclass(frozen=True)
class Importable:
    """A model that can be imported.

    Attributes:
        config: Of the model that is to be trained.
        adds_gates: Whether it has gates, of zero, that the folder does not have.
        notes: Sentences that the user should read.
    """

    config: SATFormerConfig
    adds_gates: bool
    notes: tuple[str, ...]


def read_model(
    folder: HFFolder, architecture: str | None, value_gate: str | None, accept_qk_norm_eps: bool
) -> Importable:
    """Reads what model a folder holds.

    Args:
        folder: Opened.
        architecture: Asked for; None for the folder's own.
        value_gate: Of gates that are added; None for tanh.
        accept_qk_norm_eps: Whether QK-norm may get the other norms' epsilon.

    Raises:
        ValueError: Names the first field that does not allow an exact import.
    """
    config = read_config(folder)
    assert config.rope_parameters is not None
    theta = config.rope_parameters["rope_theta"]
    if theta != int(theta):
        raise ValueError(
            f"rope_theta ({theta}) of {folder.path} must be a whole number: Megatron takes no "
            "other as --rotary-base."
        )
    own = config.architecture
    notes = _settle_epsilon(config, accept_qk_norm_eps)
    notes += _settle_architecture(folder, config, architecture, value_gate)
    return Importable(config, config.architecture != own, tuple(notes))


def read_config(folder: HFFolder) -> SATFormerConfig:
    """Reads config.json of one of our folders, or of a Llama or Qwen3 as a plain Transformer.

    Raises:
        ValueError: Names the first field that our classes do not compute exactly.
    """
    theirs = _parse(folder)
    _check_exact(folder, theirs)
    if isinstance(theirs, SATFormerConfig):
        return theirs
    return SATFormerConfig(
        **{name: getattr(theirs, name) for name in SHARED},
        rope_parameters=dict(theirs.rope_parameters),
        architecture="transformer",
        qk_norm=STOCK[theirs.model_type],
    )


def check_tensors(folder: HFFolder, config: SATFormerConfig, adds_gates: bool = False) -> HFFolder:
    """Compares names and shapes with the model's.

    Args:
        folder: Opened.
        config: Of the model.
        adds_gates: Whether the model has gates that the folder must not have.

    Returns:
        The folder without what the model can do without: the copy of tied embeddings, frequencies
        of the rotary embedding, biases of zeros.

    Raises:
        ValueError: Lists every name that is missing, not known, or of another shape.
    """
    shapes = model_shapes(config)
    if config.tie_word_embeddings:
        folder = folder.without_tied("lm_head.weight", "model.embed_tokens.weight")
    if adds_gates:
        shapes = {name: shape for name, shape in shapes.items() if GATE not in name}
    spare = [name for name in folder.tensors if name.endswith("rotary_emb.inv_freq")]
    for name in folder.tensors:
        # with attention_bias, Llama and Qwen3 have one on the output projection too
        if name.endswith("self_attn.o_proj.bias"):
            if folder.read(name).any():
                raise ValueError(
                    f"attention_bias (True) of {folder.path} must come with zeros in {name}: only "
                    "the query, key and value projections have a bias here."
                )
            spare.append(name)
    folder = folder.without(*spare)
    folder.check(shapes, f"this {folder.config['model_type']}")
    return folder


def model_shapes(config: SATFormerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model; tied embeddings once."""
    from megatron_satformer.checkpoint.exported.modeling_satformer import SATFormerForCausalLM

    with torch.device("meta"):
        state = SATFormerForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _parse(folder: HFFolder) -> Any:
    """The configuration in transformers' own class, with its defaults for what is left out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = folder.config.get("model_type")
    if kind in REFERENCE:
        raise ValueError(
            f"model_type ({kind}) of {folder.path} is the paper's own layout. Convert it with "
            "from-reference first."
        )
    if kind != SATFormerConfig.model_type and kind not in STOCK:
        raise ValueError(
            f"model_type ({kind}) of {folder.path} must be {SATFormerConfig.model_type}, "
            f"{' or '.join(STOCK)}: no other is computed exactly."
        )
    build: Any = SATFormerConfig if kind not in STOCK else CONFIG_MAPPING[kind]
    try:
        return build.from_dict(dict(folder.config))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder.path / CONFIG} cannot be read: {reason}") from None


def _check_exact(folder: HFFolder, theirs: Any) -> None:
    refuse_unsupported(theirs, IMPORT, REQUIRED, path=folder.path)
    layers = set(getattr(theirs, "layer_types", None) or ()) - {"full_attention"}
    if layers:
        raise ValueError(
            f"layer_types ({', '.join(sorted(layers))}) of {folder.path} must be full_attention in "
            "every layer."
        )
    rope = theirs.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters ({rope}) of {folder.path} must have rope_type default and no other "
            "scaling: Megatron's here has none."
        )


def _settle_epsilon(config: SATFormerConfig, accept: bool) -> list[str]:
    """Megatron (0.19.2) has one epsilon for all norms."""
    mine, theirs = config.rms_norm_eps, config.qk_norm_eps
    config.qk_norm_eps = None
    if not config.qk_norm or theirs in (None, mine):
        return []
    if not accept:
        raise ValueError(
            f"qk_norm_eps ({theirs}) must be rms_norm_eps ({mine}): Megatron has one epsilon for "
            "all norms. To go on with that one, which moves the logits, pass --accept-qk-norm-eps."
        )
    return [
        f"NOTE: QK-norm's epsilon is {mine} in Megatron and was {theirs}, which moves the logits; "
        "compare tells how far."
    ]


def _settle_architecture(
    folder: HFFolder, config: SATFormerConfig, asked: str | None, value_gate: str | None
) -> list[str]:
    own = config.architecture
    adds = asked == "satformer" and own == "transformer"
    if asked not in (None, own) and not adds:
        raise ValueError(
            f"architecture ({asked}) must be left out for {folder.path}, which is a {own}. Only a "
            "plain Transformer can be imported as another: as satformer."
        )
    if value_gate is not None and not adds:
        raise ValueError(
            f"value_gate ({value_gate}) must only be given with --architecture satformer for a "
            f"plain Transformer, and {folder.path} is imported as {own}. Leave it out."
        )
    if not adds:
        return []
    gate = value_gate or ZERO_GATES[0]
    if gate not in ZERO_GATES:
        why = "has no gradient at 0 and would never open" if gate == "relu" else "starts open"
        raise ValueError(
            f"value_gate ({gate}) must be {' or '.join(ZERO_GATES)} for gates of zero: {gate} "
            f"{why}. For it, import a transformer and train with --from-transformer."
        )
    config.architecture, config.value_gate, config.value_gate_bias = "satformer", gate, False
    config.value_residual_last_k = None
    return [
        f"NOTE: gates are zero with value_gate ({gate}), so training starts as the plain model and "
        "the gates learn from there. relu, the published gate, has no gradient at exactly 0; for "
        "it, import a transformer and train with --from-transformer."
    ]
