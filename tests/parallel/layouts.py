"""The rows of the parity matrix: every way to cut the model that must train like one rank."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

import tests.architectures  # noqa: F401  # one more in the table
from megatron_satformer.model.architectures import PLAIN, TABLE, all_architectures
from tests.models import carries, has_tensors

TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
SP = "--sequence-parallel"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage 1"
OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-num-layers"
UNIFORM, BLOCK = f"{FULL} 2 --recompute-method uniform", f"{FULL} 1 --recompute-method block"
VIRTUAL_UNIFORM = f"{PP2} {VIRTUAL} {UNIFORM}".replace("layers 2", "layers 1")
FIRST_3 = f"{PP2} --decoder-first-pipeline-num-layers 3"
CP2, CP4 = "--context-parallel-size 2", "--context-parallel-size 4"
LONG = "--seq-length 256 --max-position-embeddings 256"  # most samples hold several documents
DOCUMENTS, WINDOW = f"--dataloader-inter-document-masking {LONG}", "--window-size 24,0"
SELECTIVE = "--recompute-granularity selective"
GROUPS_OF_3 = "--microbatch-group-size-per-virtual-pipeline-stage 3"
LAYOUT = "--pipeline-model-parallel-layout"
GQA2 = "--group-query-attention --num-query-groups 2"
SUMS_2X3 = "--dwa-dilation 2 --dwa-period 3"
NORMED_SUMS = "--mudd-prepost-norm --mudd-ffn-realloc --ffn-hidden-size 512 --optimizer sgd"
NORMED_SUMS += " --mudd-form baseline --lr 3e-4 --min-lr 3e-5"  # or rounding noise grows
PER_CHANNEL = "--value-gate lerp_channels --value-gate-bias-init -1"
SOFTPLUS = "--value-gate softplus --value-gate-offset 1 --value-gate-bias"
LAST_2 = "--value-residual-last-k 2"
UNTIED = "--untie-embeddings-and-output-weights"
FROM_IDS = "--v1-transport recompute"
PER_TOKEN = "--calculate-per-token-loss --eod-mask-loss"

# Architectures of the table, by what they have.
EVERY = tuple(TABLE)
OURS = tuple(a.name for a in all_architectures() if a.twin.startswith("megatron_satformer."))
CARRYING = tuple(a.name for a in all_architectures() if any(carries(a)))
MIXING = tuple(a.name for a in all_architectures() if "value_residual_last_k" in a.own_options)
WITH_HEADS = tuple(a.name for a in all_architectures() if carries(a).heads)
DILATED = tuple(a.name for a in all_architectures() if "dwa_dilation" in a.own_options)
NORMED = tuple(a.name for a in all_architectures() if "mudd_prepost_norm" in a.own_options)
STREAMED = tuple(a.name for a in all_architectures() if "hc_form" in a.own_options)
SOURCED = tuple(a.name for a in all_architectures() if "attnres_form" in a.own_options)
MANIFOLD = tuple(a.name for a in all_architectures() if "mhc_collapse" in a.own_options)
READING = tuple(a.name for a in all_architectures() if a.reads_tokens)
# They go through code that others go through: fewer cells run everywhere, `make parity` has all.
LIGHT = SOURCED + MANIFOLD + READING
LIGHT += tuple(a.name for a in all_architectures() if a.name in CARRYING and not has_tensors(a))
OFTEN = tuple(name for name in CARRYING if name not in LIGHT)
FORMS = tuple(a.name for a in all_architectures() if "resformer_form" in a.own_options)
GATED = tuple(a.name for a in all_architectures() if "value_gate" in a.own_options)
SOME = GATED + STREAMED + SOURCED + DILATED
# Whether cells run that others stand for elsewhere; `make parity` asks for it.
EVERY_CELL = "EVERY_CELL" in os.environ
# Exported classes that go through the tests of transformers.
EXPORTED = EVERY if EVERY_CELL else (*GATED, *STREAMED, *LIGHT)


def some_fast(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that is slow but for the gated architectures."""
    return [n if n in GATED else pytest.param(n, marks=pytest.mark.slow) for n in names]


@dataclass(frozen=True)
class Row:
    """One layout.

    Args:
        name: as the table shows it.
        ranks: processes.
        layout: flags that only the run on several ranks gets.
        model: flags that the reference on one rank, and its checkpoint, get too.
        architectures: those it is run for.
        fast: for which of them in the default subset.
        few: for which of them the slow tests run it; the parity table has all.
    """

    name: str
    ranks: int
    layout: str
    model: str = ""
    architectures: tuple[str, ...] = EVERY
    fast: tuple[str, ...] = ()
    few: tuple[str, ...] = OFTEN


ROWS = (
    Row("TP2", 2, TP2, fast=GATED, few=STREAMED),
    Row("TP4", 4, TP4, few=GATED),
    Row("TP2 + SP", 2, f"{TP2} {SP}", few=OFTEN + LIGHT),
    Row("TP4 + SP", 4, f"{TP4} {SP}", few=GATED + STREAMED),
    Row("PP2", 2, PP2, fast=(PLAIN, *GATED), few=OFTEN + LIGHT),
    Row("PP4", 4, PP4, few=SOME),
    Row("PP2 x 2 virtual", 2, f"{PP2} {VIRTUAL}", fast=GATED, few=OFTEN + LIGHT),
    Row("PP4 x 2 virtual, 8 layers", 4, f"{PP4} {VIRTUAL}", "--num-layers 8", few=SOME),
    Row("PP2, first stage 3 layers", 2, f"{PP2} --decoder-first-pipeline-num-layers 3", few=GATED),
    Row("PP2, last stage 3 layers", 2, f"{PP2} --decoder-last-pipeline-num-layers 3", few=GATED),
    Row("PP4, layout E|tt|tt|L", 4, f"{PP4} {LAYOUT} E|tt|tt|L"),
    Row("PP2 x 2, layout Et||ttt|L", 2, f"{PP2} {LAYOUT} Et||ttt|L", few=GATED),
    Row("PP2 x 2, layout E|tt|tt|L", 2, f"{PP2} {LAYOUT} E|tt|tt|L"),
    Row("PP2 x 3, layout E||tt|t|t|L", 2, f"{PP2} {LAYOUT} E||tt|t|t|L", few=GATED),
    Row("TP2 x PP2", 4, f"{TP2} {PP2}"),
    Row("TP2 x PP2 + SP", 4, f"{TP2} {PP2} {SP}", fast=GATED, few=OFTEN + LIGHT),
    Row("TP2 x PP2 x DP2, distributed optimizer", 8, f"{TP2} {PP2} {OPTIMIZER}", fast=GATED),
    Row("TP2 x PP2 x DP2 + SP, distributed optimizer", 8, f"{TP2} {PP2} {SP} {OPTIMIZER}"),
    Row("DP2, distributed optimizer", 2, OPTIMIZER, fast=GATED),
    Row("DP4", 4, "", few=GATED),
    Row("DP4, distributed optimizer", 4, OPTIMIZER, few=GATED),
    Row("PP2 x 2 virtual x DP2, distributed optimizer", 4, f"{PP2} {VIRTUAL} {OPTIMIZER}"),
    Row(
        "PP4 x DP2, layout E|tt|tt|L, distributed optimizer",
        8,
        f"{PP4} {LAYOUT} E|tt|tt|L {OPTIMIZER}",
    ),
    Row("PP2, 8 micro-batches", 2, f"{PP2} --micro-batch-size 1", few=GATED),
    Row(
        "PP2 x 2 virtual, groups of 3 of 8 micro-batches",
        2,
        f"{PP2} {VIRTUAL} --micro-batch-size 1 {GROUPS_OF_3}",
    ),
    Row("recompute full, uniform", 1, UNIFORM),
    Row("recompute full, block", 1, BLOCK, few=GATED),
    Row("recompute selective", 1, SELECTIVE, few=GATED),
    Row("PP2, recompute full, uniform", 2, f"{PP2} {UNIFORM}", fast=GATED, few=CARRYING),
    Row("PP2, recompute full, block", 2, f"{PP2} {BLOCK}", few=GATED),
    Row("PP2, recompute selective", 2, f"{PP2} {SELECTIVE}", few=GATED),
    Row(
        "PP2 x 2 virtual, recompute full, uniform",
        2,
        f"{PP2} {VIRTUAL} {UNIFORM}".replace("layers 2", "layers 1"),
        few=OFTEN + LIGHT,
    ),
    Row("TP2 + SP, recompute full, uniform", 2, f"{TP2} {SP} {UNIFORM}"),
    Row(
        "PP4, last_k 1: stages 2 and 3 forward V1",
        4,
        PP4,
        "--value-residual-last-k 1",
        MIXING,
    ),
    Row("PP2, last_k 2: the last stage alone mixes", 2, PP2, "--value-residual-last-k 2", MIXING),
    Row(
        "PP4 x 2 virtual, 8 layers, last_k 2",
        4,
        f"{PP4} {VIRTUAL}",
        "--num-layers 8 --value-residual-last-k 2",
        MIXING,
    ),
    Row(
        "PP4, 8 layers, 2 x 3: outputs dropped behind their last reader",
        4,
        PP4,
        f"--num-layers 8 {SUMS_2X3}",
        DILATED,
    ),
    Row(
        "PP4 x 2 virtual, 8 layers, 2 x 3",
        4,
        f"{PP4} {VIRTUAL}",
        f"--num-layers 8 {SUMS_2X3}",
        DILATED,
    ),
    # With Adam rounding noise in tiny gradients would move weights: first norms agree to 1e-6.
    Row(
        "TP2 x PP2 + SP, normed sums, SGD",
        4,
        f"{TP2} {PP2} {SP}",
        NORMED_SUMS,
        NORMED,
    ),
    Row(
        "PP2 x 2 virtual, normed sums, SGD, recompute full, uniform",
        2,
        f"{PP2} {VIRTUAL} {UNIFORM}".replace("layers 2", "layers 1"),
        NORMED_SUMS,
        NORMED,
    ),
    Row(
        "TP2 x PP2 + SP, streams normed with a gain",
        4,
        f"{TP2} {PP2} {SP}",
        "--hc-form baseline",
        STREAMED,
    ),
    Row(
        "PP2 x 2 virtual, layout Et|ttt|tt|ttL, blocks of 3",
        2,
        f"{PP2} {LAYOUT} Et|ttt|tt|ttL",
        "--num-layers 8 --attnres-block-layers 3",
        SOURCED,
        few=SOURCED,
    ),
    Row(
        "TP2 x PP2 + SP, every sublayer a source",
        4,
        f"{TP2} {PP2} {SP}",
        "--attnres-form full",
        SOURCED,
        few=SOURCED,
    ),
    Row(
        "TP2 x PP2 + SP, plain side, learned head",
        4,
        f"{TP2} {PP2} {SP}",
        "--mhc-residual plain --mhc-collapse head",
        MANIFOLD,
        few=MANIFOLD,
    ),
    *(
        Row(f"TP2, {gate} gate", 2, TP2, f"--value-gate {gate}", GATED)
        for gate in ("sigmoid", "tanh", "identity")
    ),
    Row("TP2, softmax gate", 2, TP2, "--value-gate softmax", GATED, fast=GATED),
    Row("TP2, softmax_sigmoid gate", 2, TP2, "--value-gate softmax_sigmoid", GATED),
    Row("TP2 x PP2 + SP, gate per channel", 4, f"{TP2} {PP2} {SP}", PER_CHANNEL, GATED),
    Row("TP2 x PP2 + SP, constant gate", 4, f"{TP2} {PP2} {SP}", "--value-gate constant", GATED),
    Row("TP2, 1 + softplus gate", 2, TP2, SOFTPLUS, GATED),
    *(
        Row(
            f"TP2 x PP2, {form} form", 4, f"{TP2} {PP2}", f"--resformer-form {form} {LAST_2}", FORMS
        )
        for form in ("learnable", "identity", "sparse", "svformer")
    ),
    Row("TP4 + SP, softmax gate", 4, f"{TP4} {SP}", "--value-gate softmax", GATED),
    Row("TP2, gate with bias", 2, TP2, "--value-gate-bias", GATED),
    Row("TP2, 2 KV heads", 2, TP2, GQA2),
    Row("TP2 x PP2 + SP, 2 KV heads", 4, f"{TP2} {PP2} {SP}", GQA2),
    Row("PP2, untied embeddings", 2, PP2, UNTIED),
    Row("TP2 x PP2 + SP, untied embeddings", 4, f"{TP2} {PP2} {SP}", UNTIED),
    Row("CP2", 2, CP2, fast=GATED, few=WITH_HEADS + NORMED + STREAMED),
    Row("CP4", 4, CP4, few=GATED),
    Row("CP2 x TP2 + SP", 4, f"{CP2} {TP2} {SP}", few=NORMED),
    Row("CP2 x PP2", 4, f"{CP2} {PP2}", few=STREAMED + LIGHT),
    Row("CP2 x DP2, distributed optimizer", 4, f"{CP2} {OPTIMIZER}", few=GATED),
    Row("CP2, recompute full, uniform", 2, f"{CP2} {UNIFORM}", few=()),
    Row("CP2, loss not on all tokens", 2, CP2, "--eod-mask-loss", few=GATED),
    Row(
        "CP2 x TP2 x PP2 + SP, documents, window",
        8,
        f"{CP2} {TP2} {PP2} {SP}",
        f"{DOCUMENTS} {WINDOW}",
        few=GATED,
    ),
    Row("PP2 x 2 virtual, documents", 2, f"{PP2} {VIRTUAL}", DOCUMENTS, few=DILATED + READING),
    *(
        Row(f"{name}, V1 from ids", ranks, f"{layout} {FROM_IDS}", model, MIXING, fast, few)
        for name, ranks, layout, model, fast, few in (
            ("PP2", 2, PP2, "", GATED, MIXING),
            ("PP4", 4, PP4, "", (), GATED),
            ("PP2 x 2 virtual", 2, f"{PP2} {VIRTUAL}", "", (), MIXING),
            ("PP2, first stage 3 layers", 2, FIRST_3, "", (), ()),
            ("PP4, layout E|tt|tt|L", 4, f"{PP4} {LAYOUT} E|tt|tt|L", "", (), GATED),
            ("PP2, last_k 1", 2, PP2, "--value-residual-last-k 1", (), ()),
            ("TP2 x PP2 + SP", 4, f"{TP2} {PP2} {SP}", "", (), MIXING),
            ("PP4 x DP2, distributed optimizer", 8, f"{PP4} {OPTIMIZER}", "", (), GATED),
            ("PP2 x 2 virtual, recompute full", 2, VIRTUAL_UNIFORM, "", (), GATED),
            ("PP2, recompute selective", 2, f"{PP2} {SELECTIVE}", "", (), ()),
            ("CP2 x PP2", 4, f"{CP2} {PP2}", "", (), ()),
            ("PP2, untied, biases", 2, PP2, f"{UNTIED} --add-qkv-bias", (), GATED),
            ("PP2, loss per token", 2, PP2, PER_TOKEN, (), ()),
        )
    ),
    Row("DP2, loss per token", 2, "", PER_TOKEN, few=GATED),
    Row("TP2 x PP2, loss per token", 4, f"{TP2} {PP2}", PER_TOKEN),
)
