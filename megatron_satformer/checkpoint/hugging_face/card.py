"""The README.md of an exported folder."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.model.architectures import find_architecture

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
| layers | {config.num_hidden_layers}{layers_note} |
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
        own_code: Whether that class comes with the folder.
        tokenizer: As exported, or None.
        verified: One line about the comparison with Megatron; None if there was none.
    """

    step: int
    parameters: int
    dtype: str
    model_class: str
    own_code: bool
    tokenizer: Any
    verified: str | None


def build_card(config: Any, args: Namespace, facts: Facts) -> str:
    """Builds the model card.

    Args:
        config: Of the exported model, in our own class.
        args: Of the checkpoint.
        facts: Of this export.
    """
    tokens = getattr(args, "consumed_train_samples", 0) * (getattr(args, "seq_length", 0) or 0)
    architecture = find_architecture(config.architecture)
    equation = architecture.equation.format(config=config)
    use = WITHOUT_TOKENIZER if facts.tokenizer is None else WITH_TOKENIZER
    return CARD.format(
        architecture=config.architecture,
        parameters=f"{facts.parameters:,}",
        progress=f"{facts.step:,} steps" + (f" on {tokens:,} tokens" if tokens else ""),
        dtype=facts.dtype,
        equation=equation.replace("\n", "\n    "),
        about=_about(config, facts),
        layers_note=architecture.layers_note(config),
        heads=f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
        config=config,
        data=_describe_data(args),
        verified=facts.verified or "not verified (to-hf --verify was not asked for)",
        code=" The model's code is in this folder."
        if facts.own_code
        else " No code comes with the folder.",
        imports="" if facts.tokenizer is None else ", AutoTokenizer",
        use=use.format(trust=", trust_remote_code=True" if facts.own_code else ""),
        notes=_notes(config, facts),
    )


def _describe_data(args: Namespace) -> str:
    """Names the training data by their last part alone, with the share of each."""
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


def _about(config: Any, facts: Facts) -> str:
    architecture = find_architecture(config.architecture)
    about = architecture.about
    if not architecture.stock:
        return about
    if facts.own_code:
        return f"{about} with an option that transformers' own Llama and Qwen3 do not have."
    return f"{about}: transformers' own {facts.model_class} computes it."


def _notes(config: Any, facts: Facts) -> str:
    notes, tokenizer = [], facts.tokenizer
    wide = {
        name.rpartition(".")[2]
        for _, tensor in find_architecture(config.architecture).all_tensors(config)
        for name in tensor.hf
        if tensor.fp32
    }
    if wide and facts.dtype != "fp32":
        notes.append(
            f"A model loaded in {facts.dtype} rounds {', '.join(sorted(wide))}, which the folder "
            "holds in float32; what it computes from them is float32. Load with "
            "`dtype=torch.float32` to train them: the steps are too small for what is rounded."
        )
    if tokenizer is not None:
        added = "no special tokens" if not tokenizer("").input_ids else "its special tokens"
        as_text = tokenizer.split_special_tokens and tokenizer.eos_token
        text = f', and reads strings such as "{as_text}" as text' if as_text else ""
        notes.append(f"The tokenizer adds {added}{text}, as in training.")
    if gates := find_architecture(config.architecture).gates:
        notes.append(f"`model(**inputs, output_gates=True).gates` gives {gates}.")
    return "".join(f"\n{note}\n" for note in notes)
