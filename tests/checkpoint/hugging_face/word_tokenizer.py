"""A tokenizer of any number of entries, in a folder: "t0", "t1", ... are its words."""

from pathlib import Path


def write_word_tokenizer(folder: Path, entries: int, **names: str) -> Path:
    """Writes it; `names` are special tokens of transformers, such as eos_token="t91"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{n}": n for n in range(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", **names)
    assert len(wrapped) == entries
    wrapped.save_pretrained(folder)
    return folder
