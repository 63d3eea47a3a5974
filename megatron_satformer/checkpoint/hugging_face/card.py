"""The README.md of an exported folder."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig

EQUATION = {
    "transformer": "V'_n = V_n\n(no value residual)",
    "resformer": (
        "V'_n = lambda1_n V_1 + lambda2_n V_n, in layers n that mix\n"
        "lambda1_n = lambda_scale * softmax(lambda_logits)_n"
    ),
    "satformer": (
        "V'_n = V_n + alpha_n V_1, in layers n that mix\n"
        "alpha_n = {gate}(W_gate,n x_n), one scalar per token and KV head"
    ),
}
V1 = (
    "V_1 are the values of the first layer. The KV cache holds V', so decoding costs what it costs "
    "a\nplain Transformer. "
)
ABOUT = {
    "transformer": "It is a plain Transformer: transformers' own {model_class} computes it.",
    "resformer": V1 + "ResFormer is described in arXiv 2410.17897.",
    "satformer": V1 + "SATFormer is described in arXiv 2605.03953.",
}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}, megatron]
---

# {architecture}, {parameters} parameters

A decoder-only language model trained with Megatron-core, {progress}. Weights are {dtype}.

    {equation}

{about}

| | |
|---|---|
| layers | {config.num_hidden_layers}, of which mix V_1: {mixing} |
| hidden, MLP | {config.hidden_size}, {config.intermediate_size} |
| query heads, KV heads, head dim | {heads} |
| vocabulary, context | {config.vocab_size}, {config.max_position_embeddings} |
| QK-norm, tied embeddings | {config.qk_norm}, {config.tie_word_embeddings} |
| trained on | {data} |
| against Megatron | {verified} |

## Use

Needs torch and transformers >= 5.4.{code}

```python
from transformers import AutoModelForCausalLM{imports}

folder = "."  # this folder
{use}
```
{notes}"""
WITH_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
WITHOUT_TOKENIZER = """\
model = AutoModelForCausalLM.from_pretrained(folder{trust})
print(model(input_ids).logits)  # input_ids: LongTensor [batch, sequence]"""


@dataclass(frozen=True)
class Facts:
    """What the card says beside the configuration and the training arguments.

    Attributes:
        step: Training iterations.
        parameters: Number of them, tied ones once.
        dtype: Of the weights.
        model_class: That loads them.
        tokenizer: As exported, or None.
        verified: One line about the comparison with Megatron; None if there was none.
    """

    step: int
    parameters: int
    dtype: str
    model_class: str
    tokenizer: Any
    verified: str | None


def build_card(config: SATFormerConfig, args: Namespace, facts: Facts) -> str:
    """Builds the model card.

    Args:
        config: Of the exported model, in our own class.
        args: Of the checkpoint.
        facts: Of this export.
    """
    tokens = getattr(args, "consumed_train_samples", 0) * (getattr(args, "seq_length", 0) or 0)
    mixing, ours = config.mixing_layers, facts.model_class == "SATFormerForCausalLM"
    equation = EQUATION[config.architecture].format(gate=config.value_gate)
    use = WITHOUT_TOKENIZER if facts.tokenizer is None else WITH_TOKENIZER
    return CARD.format(
        architecture=config.architecture,
        parameters=f"{facts.parameters:,}",
        progress=f"{facts.step:,} steps" + (f" on {tokens:,} tokens" if tokens else ""),
        dtype=facts.dtype,
        equation=equation.replace("\n", "\n    "),
        about=_about(config, facts.model_class),
        mixing=f"{mixing.start + 1} to {mixing.stop}" if mixing else "none",
        heads=f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
        config=config,
        data=describe_data(args),
        verified=facts.verified or "not verified (to-hf --verify was not asked for)",
        code=" The model's code is in this folder." if ours else " No code comes with the folder.",
        imports="" if facts.tokenizer is None else ", AutoTokenizer",
        use=use.format(trust=", trust_remote_code=True" if ours else ""),
        notes=_notes(config, facts.tokenizer),
    )


def describe_data(args: Namespace) -> str:
    """Names the training data by their last part alone, with the share of each.

    Args:
        args: Of the checkpoint.
    """
    for name in ("data_path", "train_data_path"):
        if listed := getattr(args, name, None):
            return _describe_blend(listed)
    for name in ("data_args_path", "per_split_data_args_path"):
        if file := getattr(args, name, None):
            return f"what {Path(file).name} lists"
    return "random tokens" if getattr(args, "mock_data", False) else "not recorded"


def _describe_blend(listed: Sequence[str]) -> str:
    try:
        weights = [float(weight) for weight in listed[::2]]
    except ValueError:
        weights = []
    if len(listed) % 2 or not weights or not sum(weights) > 0:
        return ", ".join(Path(path).name for path in listed)
    return ", ".join(
        f"{Path(path).name} ({weight / sum(weights):.4g})"
        for weight, path in zip(weights, listed[1::2], strict=True)
    )


def _about(config: SATFormerConfig, model_class: str) -> str:
    if config.architecture == "transformer" and model_class == "SATFormerForCausalLM":
        return (
            "It is a plain Transformer with an option that transformers' own Llama and Qwen3 do "
            "not have."
        )
    return ABOUT[config.architecture].format(model_class=model_class)


def _notes(config: SATFormerConfig, tokenizer: Any) -> str:
    notes = []
    if tokenizer is not None:
        added = "no special tokens" if not tokenizer("").input_ids else "its special tokens"
        as_text = tokenizer.split_special_tokens and tokenizer.eos_token
        text = f', and reads strings such as "{as_text}" as text' if as_text else ""
        notes.append(f"The tokenizer adds {added}{text}, as in training.")
    if config.architecture == "satformer":
        notes.append(
            "`model(**inputs, output_gates=True).gates` gives alpha [batch, sequence, KV heads] of "
            "each layer\nthat mixes."
        )
    return "".join(f"\n{note}\n" for note in notes)
