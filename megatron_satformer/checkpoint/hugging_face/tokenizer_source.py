"""Which tokenizer a checkpoint was trained with, and what --tokenizer names instead.

Both end as the tokenizer flags that the data tools read, so that one place builds the reference.
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_satformer.data.tokenizers.options import (
    READ_BY,
    SENTENCEPIECE,
    SUPPORTED,
    TokenizerOptions,
    check_tokenizer_options,
)

WAY_OUT = "Pass --tokenizer with a Hugging Face tokenizer folder, or --tokenizer none."
# What Megatron reads for a type, the data tools refuse, and would change the ids.
_ALSO_READ = {
    **{kind: {"tokenizer_sentencepiece_legacy", "special_tokens"} for kind in SENTENCEPIECE},
    "HuggingFaceTokenizer": {"vocab_file", "merge_file"},
}


def find_tokenizer(args: Namespace, given: str | None) -> TokenizerOptions | None:
    """Finds the tokenizer to export.

    Args:
        args: Of the checkpoint.
        given: --tokenizer: a file or folder, "none", or None for the checkpoint's own. One of the
            checkpoint's own type is read with the checkpoint's further options.

    Returns:
        Its flags, or None to export without.

    Raises:
        ValueError: If it is not here, or not one that can be exported.
    """
    kind = args.tokenizer_type or ""
    if given == "none" or (given is None and kind.startswith("Null")):
        return None
    own = None
    if kind in SUPPORTED and not kind.startswith("Null"):
        own = replace(own_tokenizer_options(args), trust_remote_code=False)  # no code is run here
    if given is not None:
        options = detect_tokenizer(Path(given))
        if own is None or _family(own) != _family(options):
            return options
        files = ("tokenizer_model", "vocab_file", "merge_file")
        return _checked(replace(own, **{name: getattr(options, name) for name in files}))
    if own is None:
        raise ValueError(f"tokenizer_type ({kind}) cannot be exported. {WAY_OUT}")
    if (metadata := getattr(args, "metadata_path", None)) is not None:
        raise ValueError(
            f"tokenizer_metadata ({metadata}) of the checkpoint may name a class of its own, which "
            f"cannot be exported. {WAY_OUT}"
        )
    names = ("vocab_file", "merge_file") if kind == "GPT2BPETokenizer" else ("tokenizer_model",)
    for name in names:
        file = getattr(own, name)
        if file is None or not Path(file).exists():
            what = "its place" if len(names) == 1 else "a folder of vocab.json and merges.txt"
            raise ValueError(
                f"{name} of the checkpoint ({file}) does not exist here. Pass --tokenizer with "
                f"{what}."
            )
    return _checked(own)


def detect_tokenizer(path: Path) -> TokenizerOptions:
    """Tells from a file or folder what kind of tokenizer it is.

    Args:
        path: A SentencePiece model, a tokenizer.json, a TikToken vocabulary, or a folder: of a
            Hugging Face tokenizer, of GPT-2's vocab.json and merges.txt, of one tokenizer.model.

    Raises:
        ValueError: If there is nothing, or nothing that is a tokenizer.
    """
    if not path.exists():
        raise ValueError(
            f"tokenizer ({path}) does not exist here. Pass --tokenizer with its place."
        )
    if path.is_dir():
        return _detect_in_folder(path)
    if path.suffix != ".json":
        return TokenizerOptions("SentencePieceTokenizer", str(path))
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.read(4096).lstrip()[:1]
    except UnicodeDecodeError:
        first = ""
    if first not in ("{", "["):
        raise ValueError(
            f"tokenizer ({path}) must be a tokenizer.json or a TikToken vocabulary. {WAY_OUT}"
        )
    return TokenizerOptions("HuggingFaceTokenizer" if first == "{" else "TikTokenizer", str(path))


def _detect_in_folder(path: Path) -> TokenizerOptions:
    if (path / "tokenizer_config.json").is_file():
        _refuse_code(path / "tokenizer_config.json")
    elif not (path / "tokenizer.json").is_file():
        files = path / "vocab.json", path / "merges.txt"
        if all(file.is_file() for file in files):
            vocabulary, merges = map(str, files)
            return TokenizerOptions("GPT2BPETokenizer", vocab_file=vocabulary, merge_file=merges)
        if (path / "tokenizer.model").is_file():
            return TokenizerOptions("SentencePieceTokenizer", str(path / "tokenizer.model"))
    return TokenizerOptions("HuggingFaceTokenizer", str(path))


def _refuse_code(file: Path) -> None:
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. {WAY_OUT}") from None
    if isinstance(config, dict) and "auto_map" in config:
        raise ValueError(
            f"tokenizer ({file.parent}) is Python code of its own, which is neither run nor "
            "exported. Pass --tokenizer none, and put its files into the folder afterwards."
        )


def own_tokenizer_options(args: Namespace) -> TokenizerOptions:
    """Takes what Megatron's own tokenizer of this type read; it ignored the other flags.

    Args:
        args: Of the checkpoint.
    """
    kind = getattr(args, "tokenizer_type", None) or "none"
    names = READ_BY.get(kind, set()) | _ALSO_READ.get(kind, set())
    values: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    values = {name: value for name, value in values.items() if value is not None and value != []}
    if "special_tokens" in values:
        values["special_tokens"] = tuple(values["special_tokens"])
    return TokenizerOptions(kind, **values)


def _checked(options: TokenizerOptions) -> TokenizerOptions:
    try:
        check_tokenizer_options(options)
    except ValueError as error:
        raise ValueError(
            f"The checkpoint's tokenizer cannot be exported: {error} {WAY_OUT}"
        ) from None
    model = Path(options.tokenizer_model or "")
    if options.tokenizer_type == "HuggingFaceTokenizer":
        folder = model if model.is_dir() else model.parent
        if (folder / "tokenizer_config.json").is_file():
            _refuse_code(folder / "tokenizer_config.json")
    return options


def _family(options: TokenizerOptions) -> str:
    kind = options.tokenizer_type
    return "SentencePieceTokenizer" if kind in SENTENCEPIECE else kind
