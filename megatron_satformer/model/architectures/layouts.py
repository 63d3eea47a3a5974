"""How other repositories store an architecture, for `checkpoint/convert/paper_layout.py`.

Must not know: any architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Repository:
    """What a repository calls what all its models have.

    Attributes:
        name: for messages.
        sign: key that the config.json of its models alone has, not null; None: where no other's is
            there.
        names: pattern in our tensors' names -> what it becomes in theirs, as re.sub has them.
        fields: our field -> theirs, where the value is the same.
        rope_theta: its name of that.
        defaults: what its classes take a missing key for.
        allowed: key -> values of it with which ours computes the same; the first is written.
        qk_norm_eps: of QK-norm, whatever the other norms have; None: theirs.
    """

    name: str
    sign: str | None
    names: Mapping[str, str]
    fields: Mapping[str, str]
    rope_theta: str
    defaults: Mapping[str, Any]
    allowed: Mapping[str, tuple]
    qk_norm_eps: float | None = None


PAPER = Repository(
    name="the paper's repository (arXiv 2605.03953)",
    sign=None,
    names={
        r"model\.embed_tokens\.": "model.embeddings.",
        r"\.input_layernorm\.": ".attn_norm.",
        r"\.post_attention_layernorm\.": ".mlp_norm.",
        r"\.self_attn\.": ".attn.",
    },
    fields={
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "attention_bias": "qkv_bias",
        "qk_norm": "qk_norm",
        "max_position_embeddings": "max_position_embeddings",
        "intermediate_size": "intermediate_size",
        "initializer_range": "initializer_range",
        "rms_norm_eps": "norm_eps",
        "use_cache": "use_cache",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
        "vocab_size": "vocab_size",
    },
    rope_theta="rope_theta",
    defaults={
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_heads": 32,
        "num_kv_heads": None,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": None,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "hidden_ratio": 4,
        "intermediate_size": None,
        "hidden_act": "swish",
        "initializer_range": 0.02,
        "norm_eps": 1e-6,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
        "use_value_residual": True,
        "value_residual_gate": "relu",
        "value_residual_proj_bias": False,
        "value_residual_last_k": None,
        "dwa_dilation": 1,
        "dwa_period": 1,
        "expansion_rate": 4,
        "use_dynamic_hc": True,
        "use_tanh": True,
        "hc_norm_type": "rms",
        "num_ways": 4,
        "param_realloc": True,
        "use_pre_post_da_norm": True,
    },
    allowed={"hidden_act": ("swish", "silu"), "window_size": (None,)},
    qk_norm_eps=1e-5,
)
"""Of arXiv 2605.03953."""

FLA = replace(
    PAPER,
    name="flash-linear-attention",
    sign="attnres_block_size",
    defaults={**PAPER.defaults, "attnres_block_size": None},
)
"""The library whose names that repository took over; its Transformer has more options."""


@dataclass(frozen=True)
class PaperLayout:
    """How a repository stores an architecture, that of arXiv 2605.03953 if no other is named.

    Attributes:
        model_type: its name there.
        class_name: of its causal language model there.
        names: pattern in our tensors' names -> what it becomes in theirs, before the repository's;
            "*" in the latter stands for the number of a piece, from 0.
        shapes: options -> pattern in our names -> the shape there, where another; -1 stands for
            what is left. A tensor with more elements is several there, of that shape each.
        options: our option -> theirs.
        read: their options -> those of ours that are not found otherwise.
        fixed: options of ours -> what its configuration has beside.
        allowed: their options -> what `Repository.allowed` says, of its own.
        refuse: options of ours -> what of them that repository computes otherwise; None: nothing.
        repository: which.
    """

    model_type: str
    class_name: str
    names: Mapping[str, str] = field(default_factory=dict)
    shapes: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda options: {}
    options: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda theirs: {}
    fixed: Callable[[Any], Mapping[str, Any]] = lambda options: {}
    allowed: Callable[[Mapping[str, Any]], Mapping[str, tuple]] = lambda theirs: {}
    refuse: Callable[[Any], str | None] = lambda options: None
    repository: Repository = PAPER
