"""config.json and generation_config.json as model families publish them, with all their fields.

Sizes are small; every other value is one that is published.
"""

from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
COMMON = {
    **SIZES,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
LLAMA3 = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 90,
    "eos_token_id": [91, 98, 99],
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
}
QWEN2 = {
    **COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 93,
    "eos_token_id": 95,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "transformers_version": "4.43.1",
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = {
    **COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 93,
    "eos_token_id": 95,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
MISTRAL = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.0.dev0",
}
SMOLLM2 = {
    **COMMON,
    "_name_or_path": "/fsx/somebody/checkpoints/loubna-smollm-135M",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_llama_config": True,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
# name -> config.json, generation_config.json or None
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "Llama 3": (
        LLAMA3,
        {
            **SAMPLING,
            "bos_token_id": 90,
            "eos_token_id": [91, 99],
            "max_length": 4096,
            "transformers_version": "4.42.3",
        },
    ),
    "Llama 3 without an end": (LLAMA3 | {"eos_token_id": None, "pad_token_id": None}, None),
    "Qwen2.5": (
        QWEN2,
        {
            "bos_token_id": 93,
            "do_sample": True,
            "eos_token_id": [95, 93],
            "pad_token_id": 93,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.37.0",
        },
    ),
    "Qwen3": (
        QWEN3,
        {
            **SAMPLING,
            "bos_token_id": 93,
            "eos_token_id": [95, 93],
            "pad_token_id": 93,
            "top_k": 20,
            "transformers_version": "4.51.0",
        },
    ),
    "Mistral": (
        MISTRAL,
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "transformers_version": "4.42.0.dev0",
        },
    ),
    "SmolLM2": (
        SMOLLM2,
        {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "transformers_version": "4.42.3",
        },
    ),
}
# What transformers itself does not compute as one of STOCK, and its field.
OLMO = LLAMA3 | {"architectures": ["OlmoForCausalLM"], "model_type": "olmo", "clip_qkv": None}
REFUSED = {
    "model_type (olmo)": OLMO,
    "model_type (olmo2)": OLMO | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]},
    "model_type (granite)": LLAMA3 | {"model_type": "granite", "residual_multiplier": 0.22},
    "clip_qkv (8.0)": LLAMA3 | {"clip_qkv": 8.0},
    "residual_multiplier (0.22)": LLAMA3 | {"residual_multiplier": 0.22},
    "attention_multiplier (0.0078125)": LLAMA3 | {"attention_multiplier": 0.0078125},
    "final_logit_softcapping (30.0)": LLAMA3 | {"final_logit_softcapping": 30.0},
    "rope_interleaved (True)": SMOLLM2 | {"rope_interleaved": True},
    "mlp_bias (True)": LLAMA3 | {"mlp_bias": True},
    "sliding_window (4096)": MISTRAL | {"sliding_window": 4096},
    "use_sliding_window (True)": QWEN2 | {"use_sliding_window": True},
    "hidden_act (gelu)": LLAMA3 | {"hidden_act": "gelu"},
    "partial_rotary_factor": LLAMA3 | {"partial_rotary_factor": 0.5},
    "num_local_experts (8)": MISTRAL | {"num_local_experts": 8},
    "'rope_type': 'yarn'": QWEN2
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "auto_map (modeling.Other)": LLAMA3 | {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}},
    "tie_word_embeddings (True)": LLAMA3 | {"tie_word_embeddings": True},
}
