"""The README.md of an exported folder."""

from argparse import Namespace

from megatron_satformer.checkpoint.hf.configuration_satformer import SATFormerConfig

EQUATION = {
    "transformer": "V'_n = V_n\n(no value residual)",
    "resformer": (
        "V'_n = lambda1_n V_1 + lambda2_n V_n        layers n that mix\n"
        "lambda1_n = lambda_scale * softmax(lambda_logits)_n"
    ),
    "satformer": (
        "V'_n = V_n + alpha_n V_1                    layers n that mix\n"
        "alpha_n = {gate}(W_gate,n x_n)              one scalar per token and KV head"
    ),
}
SOURCE = {
    "transformer": "",
    "resformer": "ResFormer is described in arXiv 2410.17897.",
    "satformer": "SATFormer is described in arXiv 2605.03953.",
}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}, megatron]
---

# {architecture}, {parameters} parameters

A decoder-only language model trained with Megatron-core, {progress}. Weights are {dtype}.

    {equation}

V_1 are the values of the first layer. The KV cache holds V', so decoding costs what it costs a
plain Transformer. {source}

| | |
|---|---|
| layers | {config.num_hidden_layers}, of which mix V_1: {mixing} |
| hidden, MLP | {config.hidden_size}, {config.intermediate_size} |
| query heads, KV heads, head dim | {heads} |
| vocabulary, context | {config.vocab_size}, {config.max_position_embeddings} |
| QK-norm, tied embeddings | {config.qk_norm}, {config.tie_word_embeddings} |

## Use

Needs torch and transformers >= 5.4.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

The tokenizer adds no special tokens, and reads strings such as "</s>" as text, as in training.
`model(**inputs, output_gates=True).gates` gives alpha [batch, sequence, KV heads] of each layer
that mixes (satformer only).
"""


def build_card(
    config: SATFormerConfig, args: Namespace, step: int, parameters: int, dtype: str
) -> str:
    """Builds the model card.

    Args:
        config: Of the exported model.
        args: Of the checkpoint.
        step: Training iterations.
        parameters: Number of them.
        dtype: Of the weights.
    """
    tokens = getattr(args, "consumed_train_samples", 0) * (getattr(args, "seq_length", 0) or 0)
    mixing = config.mixing_layers
    equation = EQUATION[config.architecture].format(gate=config.value_gate)
    return CARD.format(
        architecture=config.architecture,
        parameters=f"{parameters:,}",
        progress=f"{step:,} steps" + (f" on {tokens:,} tokens" if tokens else ""),
        dtype=dtype,
        equation=equation.replace("\n", "\n    "),
        source=SOURCE[config.architecture],
        mixing=f"{mixing.start + 1} to {mixing.stop}" if mixing else "none",
        heads=f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
        config=config,
    )
