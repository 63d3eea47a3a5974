"""One table says where an option is refused, how, and which of its values ask for nothing."""

from argparse import Namespace

import pytest

from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture
from megatron_satformer.unsupported import (
    ARCHITECTURE,
    EXPORT,
    LOCAL_BACKEND,
    MEGATRONS_ATTENTION,
    ONE_CPU,
    SDPA,
    TRAINING,
    UNSUPPORTED,
    Place,
    Row,
    Table,
    refuse_unsupported,
)
from tests.parallel.layouts import CARRYING, LIGHT

EVERYWHERE = {TRAINING, ONE_CPU, EXPORT}
ATTENTION = {LOCAL_BACKEND, SDPA, ONE_CPU}
REFUSED = [
    ("multi_latent_attention", True, EVERYWHERE),
    ("mtp_num_layers", 1, EVERYWHERE),
    ("is_hybrid_model", True, EVERYWHERE),
    ("sft", True, {TRAINING}),
    ("apply_residual_connection_post_layernorm", True, {TRAINING, EXPORT}),
    ("window_size", (8, 0), {EXPORT}),
    ("context_parallel_size", 2, {MEGATRONS_ATTENTION}),
    ("dataloader_inter_document_masking", True, {MEGATRONS_ATTENTION}),
    ("softmax_type", "learnable", ATTENTION | {EXPORT}),
    ("apply_query_key_layer_scaling", True, ATTENTION),
    ("apply_layernorm_1p", True, {ONE_CPU, EXPORT}),
    ("moe_latent_size", 32, {ONE_CPU}),
    ("swiglu", False, {EXPORT}),
    ("rotary_percent", 0.5, {EXPORT}),
    ("num_experts", 8, {EXPORT}),
]


@pytest.mark.parametrize(("option", "value", "places"), REFUSED)
def test_where_an_option_is_refused(option, value, places):
    for place in (
        TRAINING,
        ARCHITECTURE,
        LOCAL_BACKEND,
        MEGATRONS_ATTENTION,
        SDPA,
        ONE_CPU,
        EXPORT,
    ):
        options = Namespace(**{option: value})
        if place not in places:
            refuse_unsupported(options, place, architecture="resformer")
            continue
        with pytest.raises(place.error) as error:
            refuse_unsupported(options, place, architecture="resformer")
        assert str(error.value).startswith(f"{option} ({value}) ")
        assert "{" not in str(error.value)


# Those of the package that carry anything, or read token ids.
OURS = {n for n in (*CARRYING, *LIGHT) if TABLE[n].startswith("megatron_satformer.")}


@pytest.mark.parametrize(
    ("option", "value", "by"),
    [
        ("qk_clip", True, {*"satformer lime muddformer depth_attention".split()}),
        ("ckpt_format", "torch", {"satformer"}),
        ("optimizer", "soap", {*"satformer hyperconnections muddformer mhc".split()}),
        ("fp8_param_gather", True, {"satformer"}),
        ("fused_residual_rmsnorm", True, {*"hyperconnections attnres mhc".split()}),
        ("use_megatron_fsdp", True, OURS),
        ("cuda_graph_impl", "local", OURS),
    ],
)
def test_what_an_architecture_refuses(option, value, by):
    """For its own reasons alone: only SATFormer has gate rows."""
    for record in all_architectures():
        rows: Table = {(ARCHITECTURE,): record.refuses}
        options = Namespace(**{option: value})
        if record.name not in by:
            refuse_unsupported(options, ARCHITECTURE, rows, architecture=record.name)
            continue
        with pytest.raises(NotImplementedError, match=rf"architecture \({record.name}\): "):
            refuse_unsupported(options, ARCHITECTURE, rows, architecture=record.name)


def test_no_architecture_refuses_a_default():
    defaults = Namespace(optimizer="adam", ckpt_format="torch_dist", cuda_graph_impl="none")
    for record in all_architectures():
        rows: Table = {(ARCHITECTURE,): find_architecture(record.name).refuses}
        refuse_unsupported(defaults, ARCHITECTURE, rows, architecture=record.name)


def test_what_asks_for_nothing_is_let_through():
    given = {"mtp_num_layers": None, "sft": False, "softmax_type": "vanilla", "rope_type": "rope"}
    given |= {"cuda_graph_impl": "none", "ckpt_format": "torch_dist", "rotary_percent": 1.0}
    for options in (Namespace(), Namespace(**given)):
        for place in {place for places in UNSUPPORTED for place in places}:
            refuse_unsupported(options, place)


def test_the_words_of_a_refusal():
    rows: Table = {(ARCHITECTURE,): find_architecture("satformer").refuses}
    with pytest.raises(NotImplementedError) as error:
        refuse_unsupported(Namespace(qk_clip=True), ARCHITECTURE, rows, architecture="satformer")
    assert str(error.value) == (
        "qk_clip (True) is not supported with architecture (satformer): it treats the rows of "
        "linear_qkv by position, and gate rows are among them. Leave it out, or use "
        "--architecture transformer."
    )
    place = Place(ValueError, "of {path} must be {needed}.")
    table = {(place,): (Row("width height", allowed=(1, 2)),)}
    refuse_unsupported(Namespace(width=2), place, table, path="a")
    with pytest.raises(ValueError, match=r"^height \(3\) of a\{b\} must be 1\.$"):
        refuse_unsupported(Namespace(width=2, height=3), place, table, path="a{b}")


def test_every_option_stands_in_one_row():
    options = [option for rows in UNSUPPORTED.values() for row in rows for option in row[0].split()]
    assert len(options) == len(set(options))
