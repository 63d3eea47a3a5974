"""Trains a byte-level BPE tokenizer for Hugging Face such that text comes back exactly.

`<|endoftext|>` is 0 (eos, Megatron's eod), the 256 bytes follow, then merges. Text is cut by the
regex of Llama 3: words with the space before them, at most three digits, line ends by themselves.
"""

import json
from collections.abc import Iterator

END = "<|endoftext|>"
# The end and the bytes.
FIXED_TOKENS = 1 + 256
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
    "model_max_length": int(1e30),
}


def train_byte_level(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a tokenizer and returns its tokenizer.json; the same texts give the same bytes.

    Memory goes by the number of different words, not by the amount of text.

    Args:
        texts: What to learn from.
        vocab_size: Number of tokens, all included.

    Raises:
        ValueError: If the vocabulary is too large for the text, or `texts` raises it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size == FIXED_TOKENS:
        raise ValueError("input must hold some text; there is nothing to learn from.")
    if size < vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at most {size} for this much text. Give more "
            "text, or a smaller vocabulary."
        )
    return tokenizer.to_str(pretty=True).encode("utf-8")


def tokenizer_config() -> bytes:
    """Returns the tokenizer_config.json that belongs to every such tokenizer."""
    return (json.dumps(CONFIG, indent=2) + "\n").encode("utf-8")
