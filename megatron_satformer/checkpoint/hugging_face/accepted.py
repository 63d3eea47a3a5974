"""Which Hugging Face models are one of ours, and as which; what is not computed exactly is refused.

Fields are those of the configurations of STOCK in transformers and of our own. One that those do
not have, but that means another computation wherever it is known, is refused too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.checkpoint.hugging_face.code import config_class, model_shapes
from megatron_satformer.checkpoint.hugging_face.folder import CONFIG, HFFolder
from megatron_satformer.checkpoint.hugging_face.plain_classes import IDS, SHAPE_FIELDS, STOCK
from megatron_satformer.model.architectures import (
    PLAIN,
    TABLE,
    all_architectures,
    find_architecture,
)
from megatron_satformer.unsupported import Place, Row, Table, refuse_unsupported

# model_type of every export before each architecture had a class of its own
FORMER = "satformer"
IMPORT = Place(
    ValueError, "of {path} must be {needed}: Megatron's model computes nothing else here."
)
REQUIRED: Table = {
    (IMPORT,): (
        Row("hidden_act", allowed=("silu", "swish")),
        Row(
            "mlp_bias use_sliding_window use_qk_norm qk_layernorm rope_interleaved",
            allowed=(False, None),
        ),
        Row("parallel_attn use_parallel_residual alibi", allowed=(False, None)),
        Row("quantization_config sliding_window attention_chunk_size", allowed=(None,)),
        Row("no_rope_layers no_rope_layer_interval", allowed=(None, [])),
        Row("clip_qkv attn_logit_softcapping final_logit_softcapping", allowed=(None,)),
        Row("attention_multiplier query_pre_attn_scalar logit_scale", allowed=(None,)),
        Row("residual_multiplier embedding_multiplier logits_scaling", allowed=(1.0, None)),
        Row("num_experts num_local_experts n_routed_experts", allowed=(None, 0)),
    )
}
# fields of the same name and meaning
SHARED = (*SHAPE_FIELDS, *IDS)
_UNSAID = (None, False)


@dataclass(frozen=True)
class Importable:
    """A model that can be imported.

    Attributes:
        config: Of the model that is to be trained.
        adds: Names of what it has at its start, which the folder does not have.
        notes: Sentences that the user should read.
    """

    config: Any
    adds: frozenset[str]
    notes: tuple[str, ...]


def read_model(
    folder: HFFolder,
    architecture: str | None,
    options: Mapping[str, Any],
    accept_qk_norm_eps: bool,
) -> Importable:
    """Reads what model a folder holds.

    Args:
        folder: Opened.
        architecture: Asked for; None for the folder's own.
        options: Of the architecture that a plain Transformer becomes.
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
    notes = _settle_epsilon(config, accept_qk_norm_eps)
    started = _start_as(folder, config, architecture, options)
    if started is None:
        return Importable(config, frozenset(), tuple(notes))
    adds = model_shapes(started).keys() - model_shapes(config).keys()
    own = started.architecture
    notes.append(
        f"NOTE: what a {own} adds to a Transformer changes nothing yet"
        + "".join(f", {name} ({value})" for name, value in _own_values(started).items())
        + ": training starts as the plain model and learns from there. For another start, import "
        "a transformer and train with --from-transformer."
    )
    return Importable(started, frozenset(adds), tuple(notes))


def read_config(folder: HFFolder) -> Any:
    """Reads config.json of one of our folders, or of one of STOCK as a plain Transformer.

    Raises:
        ValueError: Names the first field that our classes do not compute exactly.
    """
    theirs = parse_config(folder.config, folder.path)
    _check_exact(folder, theirs)
    if theirs.model_type not in STOCK:
        return theirs
    stock = STOCK[theirs.model_type]
    return config_class(PLAIN)(
        **{name: getattr(theirs, name) for name in SHAPE_FIELDS if name != "head_dim"},
        head_dim=getattr(theirs, "head_dim", None),  # Qwen2's class may have none
        **{name: getattr(theirs, name) for name in IDS},
        attention_bias=getattr(theirs, "attention_bias", stock.qkv_bias),
        rope_parameters=dict(theirs.rope_parameters),
        qk_norm=stock.qk_norm,
    )


def check_tensors(folder: HFFolder, config: Any, adds: frozenset[str] = frozenset()) -> HFFolder:
    """Compares names and shapes with the model's.

    Args:
        folder: Opened.
        config: Of the model.
        adds: Names of what the model has and the folder must not have.

    Returns:
        The folder without what the model can do without: the copy of tied embeddings, frequencies
        of the rotary embedding, biases of zeros.

    Raises:
        ValueError: Lists every name that is missing, not known, or of another shape.
    """
    shapes = model_shapes(config)
    if config.tie_word_embeddings:
        folder = folder.without_tied("lm_head.weight", "model.embed_tokens.weight")
    shapes = {name: shape for name, shape in shapes.items() if name not in adds}
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


def parse_config(content: Mapping[str, Any], folder: Path) -> Any:
    """The configuration in its own class, ours or transformers', with that one's defaults.

    Args:
        content: Of config.json.
        folder: It lies in.

    Raises:
        ValueError: If it is none that is computed exactly, or cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    kind = content.get("model_type")
    if kind in {layout.model_type for a in all_architectures() for layout in a.paper}:
        raise ValueError(
            f"model_type ({kind}) of {folder} is the layout of another repository. Convert it with "
            "from-paper first."
        )
    ours = {config_class(name).model_type: name for name in TABLE}
    if kind not in ours and kind not in STOCK:
        raise ValueError(
            f"model_type ({kind}) of {folder} must be {', '.join(ours)}, {', '.join(STOCK)}: no "
            "other is computed exactly."
        )
    values = dict(content)
    if kind in STOCK:
        build: Any = CONFIG_MAPPING[kind]
    else:
        build = config_class(values.get("architecture", FORMER) if kind == FORMER else ours[kind])
        # of the class that wrote it, which may have had another name; and options that it lacks
        for name in ("model_type", "architectures", "auto_map", *_foreign_options(build)):
            values.pop(name, None)
    try:
        return build.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / CONFIG} cannot be read: {reason}") from None


def _check_exact(folder: HFFolder, theirs: Any) -> None:
    if theirs.model_type in STOCK and "AutoModelForCausalLM" in folder.config.get("auto_map", {}):
        code = folder.config["auto_map"]["AutoModelForCausalLM"]
        raise ValueError(
            f"auto_map ({code}) of {folder.path} must be left out: the folder's own code may "
            f"compute something else than transformers' {theirs.model_type}. If it does not, take "
            "it out of config.json."
        )
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


def _settle_epsilon(config: Any, accept: bool) -> list[str]:
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


def _start_as(
    folder: HFFolder, config: Any, asked: str | None, options: Mapping[str, Any]
) -> Any | None:
    """The configuration of what a plain Transformer is imported as; None: of what it is."""
    own = config.architecture
    starts = own == PLAIN and asked not in (None, PLAIN)
    if asked not in (None, own) and not starts:
        raise ValueError(
            f"architecture ({asked}) must be left out for {folder.path}, which is a {own}. Only a "
            "plain Transformer can be imported as another."
        )
    if options and not starts:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"{name} ({value}) must only be given with an --architecture that has it, for a plain "
            f"Transformer, and {folder.path} is imported as {own}. Leave it out."
        )
    if not starts:
        return None
    architecture = find_architecture(str(asked))
    for name, value in options.items():
        if name not in architecture.model_options:
            raise ValueError(
                f"{name} ({value}) must be left out: it does not say what a {asked} computes, and "
                "what that adds to a Transformer changes nothing here."
            )
    given = {**architecture.model_options, **architecture.start_options, **options}
    names = (*SHARED, "attention_bias", "rope_parameters", "qk_norm")
    theirs = {name: getattr(config, name) for name in names}
    started = config_class(architecture.name)(**theirs, **given)
    why = architecture.plain_start(started)
    if why is not None:
        told = "".join(f" with {name} ({value})" for name, value in options.items())
        raise ValueError(
            f"architecture ({asked}){told} cannot start as a plain Transformer: "
            f"{why} Import a transformer, and train with --from-transformer where that is possible."
        )
    return started


def _own_values(config: Any) -> dict[str, Any]:
    names = find_architecture(config.architecture).model_options
    return {name: getattr(config, name) for name in names if getattr(config, name) not in _UNSAID}


def _foreign_options(build: Any) -> set[str]:
    """Options of other architectures, which every export once had in its configuration."""
    named = {name for a in all_architectures() for name in a.own_options}
    return named - find_architecture(build.architecture).own_options.keys()
