"""Tokenizers of the package `tokenizers`, alone or by way of transformers; never of torch."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.tokenizers.options import TokenizerOptions

GPT2_END = "<|endoftext|>"


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


class BackendTokenizer:
    """The calls into the package `tokenizers` that the classes below share.

    It pickles as its tokenizer.json: another process builds it without transformers (0.9 s).
    """

    def __init__(
        self, backend: Any, add_special_tokens: bool, vocab_size: int, eod: int | None
    ) -> None:
        self.backend = backend
        self.add_special_tokens = add_special_tokens
        self.vocab_size, self.eod = vocab_size, eod
        backend.no_truncation()
        backend.no_padding()
        # Read at each call: a worker is one process among many, and takes one core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def __reduce__(self) -> tuple[Any, ...]:
        names_are_text = self.backend.encode_special_tokens
        rest = (self.add_special_tokens, self.vocab_size, self.eod)
        return _unpickle, (self.backend.to_str(), names_are_text, *rest)

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


def _unpickle(pipeline: str, names_are_text: bool, *rest: Any) -> BackendTokenizer:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(pipeline)
    # Whether the names of special tokens in a text are text: no part of the tokenizer.json.
    backend.encode_special_tokens = names_are_text
    return BackendTokenizer(backend, *rest)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a local folder or tokenizer.json; never looks on the network.

    Goes through `transformers.AutoTokenizer`, as Megatron does, because the class named in
    tokenizer_config.json may change what tokenizer.json alone would give. The file tokenizer.json
    stands for its folder if that has a tokenizer_config.json; Megatron's training wants the folder.

    Attributes:
        fast: The `tokenizers` calls that give the same ids, or None for a tokenizer in Python.
    """

    def __init__(self, options: TokenizerOptions) -> None:
        tokenizer = _load_hugging_face(options)
        _settle_special_tokens(tokenizer, options.special_tokens or ())
        # Otherwise a long document draws a warning about what a model could take.
        tokenizer.model_max_length = int(1e30)
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        token = tokenizer.eos_token
        self.eod: int | None = tokenizer.convert_tokens_to_ids(token) if token else None
        self.add_special_tokens = not options.tokenizer_hf_no_include_special_tokens
        self.fast: BackendTokenizer | None = None
        if _encodes_in_the_backend(tokenizer):
            backend = tokenizer.backend_tokenizer
            backend.encode_special_tokens = tokenizer.split_special_tokens
            self.fast = BackendTokenizer(
                backend, self.add_special_tokens, self.vocab_size, self.eod
            )

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


def _load_hugging_face(options: TokenizerOptions) -> Any:
    model = options.existing_file(
        "tokenizer_model", "a local folder with tokenizer.json, or that file", or_folder=True
    )
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


class GPT2BPETokenizer(BackendTokenizer):
    """GPT-2's byte-level BPE out of its two files; `eod` is `<|endoftext|>`.

    Megatron 0.19.2 looks for a tokenizer called gpt2 in the working directory or on the network,
    whatever the two flags say. This is the tokenizer that it finds there: 50257 ids for GPT-2's own
    files, and "<|endoftext|>" in a text is the special token. Further special tokens come after the
    last id.
    """

    def __init__(self, options: TokenizerOptions) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocab_file = options.existing_file("vocab_file", "GPT-2's vocab.json")
        merge_file = options.existing_file("merge_file", "GPT-2's merges.txt")
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
            [
                AddedToken(token, normalized=False)
                for token in (GPT2_END, *(options.special_tokens or ()))
            ]
        )
        size = backend.get_vocab_size(with_added_tokens=True)
        super().__init__(backend, True, size, backend.token_to_id(GPT2_END))
