"""Tokenizers by Megatron's flag names, with its ids, `eod` and `vocab_size`, without torch.

Each class gives what `megatron.core.tokenizers` of 0.19.2 gives for the same flags; tests hold the
two together. The class to build is chosen by `--tokenizer-type`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_satformer.data.tiktoken_tokenizer import TikTokenizer
from megatron_satformer.data.tokenizer_options import (
    SENTENCEPIECE,
    SUPPORTED,
    TokenizerOptions,
    add_tokenizer_arguments,
    check_tokenizer_options,
    take_tokenizer_options,
)

__all__ = [
    "SENTENCEPIECE",
    "SUPPORTED",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "TokenizerOptions",
    "add_tokenizer_arguments",
    "build_tokenizer",
    "hide_torch",
    "take_tokenizer_options",
]

GPT2_END = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the data tools need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, before Megatron pads it."""

    @property
    def eod(self) -> int | None:
        """Id that ends a document, or None if the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without `eod`."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns what `encode` gives for each text, in one call and one thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included."""


def hide_torch() -> None:
    """Makes `import torch` fail in this process from now on, unless torch is imported already.

    transformers imports torch wherever it finds it: seconds, and memory in every worker, for a data
    tool that needs none of it. For the main function of such a tool and for its workers, never for
    a process that trains. Also silences what transformers says about the absence.
    """
    if "torch" not in sys.modules:
        # What Python itself documents for "this name cannot be imported".
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class SentencePieceTokenizer:
    """A SentencePiece model; `eod` is its `</s>`, as in Megatron.

    Args:
        model: The model file.
        ignore_extra_whitespaces: Megatron's flag. False matters only for a model that drops
            repeated spaces, and is refused there.
    """

    def __init__(self, model: str, ignore_extra_whitespaces: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError):
            raise ValueError(
                f"tokenizer_model ({model}) must be a SentencePiece model file; this one cannot "
                "be read as such. Train one with tools/train_tokenizer.py."
            ) from None
        encode = self.processor.encode_as_ids
        if not ignore_extra_whitespaces and encode("x  y") == encode("x y"):
            raise ValueError(
                "tokenizer_sentencepiece_ignore_extra_whitespaces (False) must be left out: this "
                "model drops repeated spaces. Train one that keeps them, with "
                "tools/train_tokenizer.py."
            )
        self.vocab_size: int = self.processor.get_piece_size()
        eos: int = self.processor.eos_id()
        self.eod: int | None = eos if eos >= 0 else None
        # The bound method, not a wrapper: this is the inner loop.
        self.encode: Callable[[str], list[int]] = encode

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        # Not the library's own batch call, which starts a thread pool each time.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self.processor.decode(list(ids)))


class _BackendTokenizer:
    """The calls into the package `tokenizers` that two classes below share."""

    def __init__(self, backend: Any, add_special_tokens: bool) -> None:
        self.backend = backend
        self.add_special_tokens = add_special_tokens
        backend.no_truncation()
        backend.no_padding()
        # Read at each call: a worker is one process among many, and takes one core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def encode(self, text: str) -> list[int]:
        """Returns the ids, with whatever the tokenizer's own template adds, as Megatron does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text. Leaves out the offsets that nobody reads here."""
        special = self.add_special_tokens
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        except BaseException as error:
            # The library panics where a regex backtracks without end; that is no Exception.
            if type(error).__name__ == "PanicException":
                raise ValueError(
                    f"the package tokenizers gives up on this text ({error})"
                ) from None
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a local folder or tokenizer.json; never looks on the network.

    Goes through `transformers.AutoTokenizer`, as Megatron does, because the class named in
    tokenizer_config.json may change what tokenizer.json alone would give. The file tokenizer.json
    stands for its folder if that has a tokenizer_config.json; Megatron's training wants the folder.

    Attributes:
        fast: The `tokenizers` calls that give the same ids, or None for a tokenizer in Python.
    """

    def __init__(self, model: str, options: TokenizerOptions) -> None:
        tokenizer = _load_hugging_face(model, options)
        _settle_special_tokens(tokenizer, options.special_tokens or ())
        # Otherwise a long document draws a warning about what a model could take.
        tokenizer.model_max_length = int(1e30)
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        token = tokenizer.eos_token
        self.eod: int | None = tokenizer.convert_tokens_to_ids(token) if token else None
        self.add_special_tokens = not options.tokenizer_hf_no_include_special_tokens
        self.fast: _BackendTokenizer | None = None
        if _encodes_in_the_backend(tokenizer):
            backend = tokenizer.backend_tokenizer
            backend.encode_special_tokens = tokenizer.split_special_tokens
            self.fast = _BackendTokenizer(backend, self.add_special_tokens)

    def encode(self, text: str) -> list[int]:
        """Returns the ids, with whatever the tokenizer's own template adds, as Megatron does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        if self.fast is not None:
            return self.fast.encode_batch(texts)
        special = self.add_special_tokens
        return [self.tokenizer(text, add_special_tokens=special).input_ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _load_hugging_face(model: str, options: TokenizerOptions) -> Any:
    if options.trust_remote_code and sys.modules.get("torch", True) is None:
        # The tokenizer's own code may want it.
        del sys.modules["torch"]
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise ValueError(
            "tokenizer_type (HuggingFaceTokenizer) needs the package transformers. "
            "Install it: pip install transformers."
        ) from None
    try:
        path = Path(model)
        if path.is_file() and (path.parent / "tokenizer_config.json").exists():
            path = path.parent
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=model)
        return AutoTokenizer.from_pretrained(
            path,
            local_files_only=True,
            use_fast=not options.tokenizer_hf_no_use_fast,
            # False, not left out: transformers would ask the terminal.
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        if "custom code" in str(error):
            raise ValueError(
                f"tokenizer_model ({model}) is Python code of its own, which is not run without "
                "leave. Read it, then pass --trust-remote-code."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"tokenizer_model ({model}) cannot be read as a Hugging Face tokenizer: {reason} "
            "It must be a folder with tokenizer.json, or that file."
        ) from None


def _settle_special_tokens(tokenizer: Any, further: Sequence[str]) -> None:
    # As Megatron's HuggingFaceTokenizer does: of eos and sep, and of bos and cls, a missing one is
    # the other. Naming a token here makes it match in text, so this is not only about `eod`.
    named: dict[str, Any] = {"additional_special_tokens": list(further)}
    if tokenizer.sep_token is None and tokenizer.eos_token:
        named["sep_token"] = tokenizer.eos_token
    elif tokenizer.eos_token is None and tokenizer.sep_token:
        named["eos_token"] = tokenizer.sep_token
    if tokenizer.bos_token is None and tokenizer.cls_token:
        named["bos_token"] = tokenizer.cls_token
    elif tokenizer.cls_token is None and tokenizer.bos_token:
        named["cls_token"] = tokenizer.bos_token
    tokenizer.add_special_tokens(named)


def _encodes_in_the_backend(tokenizer: Any) -> bool:
    # A class may change the text or the ids on the way; then only its own call will do.
    from transformers import PreTrainedTokenizerFast as Base

    names = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
    return isinstance(tokenizer, Base) and all(
        getattr(type(tokenizer), name) is getattr(Base, name) for name in names
    )


class GPT2BPETokenizer(_BackendTokenizer):
    """GPT-2's byte-level BPE out of its two files; `eod` is `<|endoftext|>`.

    Megatron 0.19.2 looks for a tokenizer called gpt2 in the working directory or on the network,
    whatever the two flags say. This is the tokenizer that it finds there: 50257 ids for GPT-2's own
    files, and "<|endoftext|>" in a text is the special token.

    Args:
        vocab_file: vocab.json, from token to id.
        merge_file: merges.txt.
        special_tokens: Further ones, in ids after the last.
    """

    def __init__(
        self, vocab_file: str, merge_file: str, special_tokens: Sequence[str] = ()
    ) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        try:
            backend = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
        except Exception as error:
            raise ValueError(
                f"vocab_file ({vocab_file}) and merge_file ({merge_file}) must be GPT-2's "
                f"vocab.json and merges.txt: {error}."
            ) from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [AddedToken(token, normalized=False) for token in (GPT2_END, *special_tokens)]
        )
        super().__init__(backend, add_special_tokens=True)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eod: int | None = backend.token_to_id(GPT2_END)


class NullTokenizer:
    """Text that is ids already: decimal numbers with one space between.

    Args:
        vocab_size: Number of ids.
        eod: Id that ends a document; the last id if None.
    """

    def __init__(self, vocab_size: int, eod: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1 if eod is None else eod

    def encode(self, text: str) -> list[int]:
        """Returns the numbers in `text`."""
        try:
            return [int(number) for number in text.split(" ")]
        except ValueError:
            raise ValueError(
                "NullTokenizer wants numbers with one space between, but the text starts "
                f"{text[:40]!r}"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the numbers in each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the ids, which are the text."""
        return " ".join(map(str, ids))


def build_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Builds the tokenizer that the flags name.

    Raises:
        ValueError: If the type is not supported, a file is missing or unreadable, or a flag is
            given that this type does not read.
    """
    check_tokenizer_options(options)
    kind = options.tokenizer_type
    if kind == "NullTokenizer":
        return _build_null(options)
    if kind == "GPT2BPETokenizer":
        return GPT2BPETokenizer(
            _existing_file("vocab_file", options.vocab_file, "vocab.json"),
            _existing_file("merge_file", options.merge_file, "merges.txt"),
            options.special_tokens or (),
        )
    model = _existing_model(kind, options.tokenizer_model)
    if kind == "TikTokenizer":
        return TikTokenizer(model, options)
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(model, options)
    return SentencePieceTokenizer(model, options.tokenizer_sentencepiece_ignore_extra_whitespaces)


def _build_null(options: TokenizerOptions) -> NullTokenizer:
    size, eod = options.vocab_size, options.null_tokenizer_eod_id
    if size is None or size < 1:
        raise ValueError(
            f"vocab_size ({size}) must be at least 1 with NullTokenizer. Pass --vocab-size."
        )
    if eod is not None and not 0 <= eod < size:
        raise ValueError(
            f"null_tokenizer_eod_id ({eod}) must be from 0 to vocab_size ({size}) less one. "
            "Leave it out for the last id."
        )
    return NullTokenizer(size, eod)


def _existing_file(name: str, file: str | None, what: str) -> str:
    if file is None:
        raise ValueError(f"{name} (not given) must be GPT-2's {what} for GPT2BPETokenizer.")
    if not Path(file).is_file():
        raise ValueError(f"{name} ({file}) does not exist. It must be GPT-2's {what}.")
    return file


def _existing_model(kind: str, model: str | None) -> str:
    if kind in SENTENCEPIECE:
        what = "a SentencePiece .model file. Train one with tools/train_tokenizer.py"
    elif kind == "TikTokenizer":
        what = "a TikToken vocabulary, a .json file"
    else:
        what = "a local folder with tokenizer.json, or that file"
    if model is None:
        raise ValueError(f"tokenizer_model (not given) must be {what} for {kind}.")
    path = Path(model)
    if not path.exists():
        raise ValueError(f"tokenizer_model ({model}) does not exist. It must be {what}.")
    if kind != "HuggingFaceTokenizer" and path.is_dir():
        inside = path / "tokenizer.model"
        found = kind in SENTENCEPIECE and inside.exists()
        hint = f"Did you mean {inside}?" if found else f"It must be {what}."
        raise ValueError(f"tokenizer_model ({model}) is a folder. {hint}")
    return os.fspath(path)
