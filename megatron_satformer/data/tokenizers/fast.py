"""The fast backend: the same ids as the exact tokenizer, from the package fastokens.

What it runs is a tokenizer.json: a Hugging Face tokenizer's own, or a SentencePiece model converted
exactly. Where the two are known to differ, the text goes to the exact one (`takes`) or the whole
run does (FastUnavailable); each pipeline is also compared with the exact tokenizer on some hundred
texts before it is used.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.tokenizers.exact import SentencePieceTokenizer, Tokenizer
from megatron_satformer.data.tokenizers.hugging_face import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.sentencepiece_pipeline import (
    SAMPLE_TEXTS,
    SPACE,
    NotConvertibleError,
    build_pipeline,
    control_pieces,
    random_texts,
    read_proto,
)

# The marks of text that is routed are looked for one by one: more would cost more than they give.
MOST_MARKS = 16
# Where a character is not in the vocabulary, the engine may take the name of a byte for the byte.
BYTE_MARK = "<0x"
# Of the comparison at the start, which takes some 0.1 s.
PROBES = 300
PROBE_PIECES = 2000
_CONTEXTS = ("{}", "a{}b", " {} ", "{0}{0}", "\n{}\n", "({})")


# Which split regexes mean the same to the two engines behind a tokenizer.json: `tokenizers` runs
# them on Oniguruma, the fast backend on PCRE2. They agree on the syntax listed here, compared over
# every code point with letters, digits, spaces and line ends around it. They differ on what is left
# out: `\w` and `\b` (marks, enclosed letters), `\h` (a hex digit, a space), `^` and `$` (of a line,
# of the text), `{1,3}+` (a repeat, possessive), `\p{Han}` (Unicode versions), POSIX classes, nested
# classes, folding of case. On U+180E they disagree whether it is a space, and on U+017F whether it
# is an s where case is folded: texts with one of these two are for the exact tokenizer.
DISPUTED = ("\u180e", "\u017f")
# Groups without case that only these published patterns have; folding meets U+017F alone in them.
_FOLDED = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)")
_CATEGORIES = "L|Lu|Ll|Lt|Lm|Lo|M|N|Nd|Nl|P|S|Z"
_ESCAPE = rf"\\[pP]\{{(?:{_CATEGORIES})\}}|\\[sSdDrnt]|\\[^\w\s]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|[^\\\[\]&]|&(?!&))+\]"
_GROUP = r"\((?!\?)|\(\?(?::|=|!|<=|<!)|\)"
_REPEAT = r"(?:[?*+]|\{\d+(?:,\d*)?\}(?!\+))"
_LITERAL = r"[^\\\[\](){}^$?*+]"
SAFE = re.compile(rf"(?:{_ESCAPE}|{_CLASS}|{_GROUP}|{_REPEAT}|{_LITERAL})*", re.DOTALL)


class FastUnavailable(ValueError):  # noqa: N818 - the condition, not a fault of anybody's
    """There is no fast backend for these options; the message says why, in one sentence."""


class FastTokenizer:
    """Encodes batches of texts in this thread, without a Python object for each token.

    Args:
        pipeline: What `fast_pipeline` returned.
    """

    def __init__(self, pipeline: str) -> None:
        marks, _, engine = pipeline.partition("\n")
        self._engine = _load_engine(engine)
        self._marks: list[str] = json.loads(marks)

    def takes(self, text: str) -> bool:
        """Whether `encode_batch` gives the exact ids for this text.

        Text with one of a few marks is for the exact tokenizer. Marks outside ASCII cost nothing
        on ASCII: CPython knows that such a string cannot hold them.
        """
        return not any(mark in text for mark in self._marks)

    def encode_batch(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Encodes texts that `takes` accepts.

        Returns:
            The ids of all texts end to end, and the number of ids of each text. The ids include
            what the exact tokenizer's template adds. The ids are read-only.

        Raises:
            ValueError: If a regex backtracks beyond the engine's limit. The exact one decides then.
        """
        ids, offsets = self._engine.encode_batch_flat(list(texts), add_special_tokens=True)
        ends = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return np.frombuffer(ids, dtype="<u4"), ends[1:] - ends[:-1]


# Loading takes a second where the vocabulary is large: what `fast_pipeline` has loaded is kept.
@lru_cache(maxsize=1)
def _load_engine(engine: str) -> Any:
    # Read by the library at its first encode: one process among many takes one core.
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    from fastokens import Tokenizer as Engine

    return Engine.from_json_str(engine)


def fast_pipeline(options: TokenizerOptions, exact: Tokenizer) -> str:
    """Returns what a FastTokenizer is made of, as text that travels to worker processes.

    Args:
        options: The tokenizer flags.
        exact: What `build_tokenizer` gives for them; the ids are compared with its.

    Raises:
        FastUnavailable: If the package is missing, the kind of tokenizer has no fast equal, or the
            comparison finds a difference.
    """
    try:
        import fastokens  # noqa: F401
    except ImportError:
        raise FastUnavailable(
            "The package fastokens is not installed (pip install 'megatron-satformer[data]')."
        ) from None
    if isinstance(exact, SentencePieceTokenizer):
        engine, marks = _from_sentencepiece(Path(str(options.tokenizer_model)))
        pieces = [
            exact.processor.id_to_piece(n).replace(SPACE, " ") for n in range(exact.vocab_size)
        ]
    elif isinstance(exact, HuggingFaceTokenizer) and exact.fast is not None:
        engine, marks = _from_backend(exact.fast.backend, exact.add_special_tokens)
        pieces = _decoded_pieces(exact.fast.backend)
    elif isinstance(exact, GPT2BPETokenizer):
        engine, marks = _from_backend(exact.backend, exact.add_special_tokens)
        pieces = _decoded_pieces(exact.backend)
    else:
        raise FastUnavailable(f"{_kind(options, exact)} has no fast equal.")
    # The marks are the first line: compact JSON has no line end.
    parts = (marks, engine)
    text = "\n".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in parts)
    _compare(text, exact, [*_awkward_texts(engine), *random_texts(pieces, PROBES, seed=0)])
    return text


def _kind(options: TokenizerOptions, exact: Tokenizer) -> str:
    if isinstance(exact, HuggingFaceTokenizer):
        return f"{type(exact.tokenizer).__name__}, which encodes in Python,"
    return options.tokenizer_type


def _from_sentencepiece(model: Path) -> tuple[dict[str, Any], list[str]]:
    proto = read_proto(model)
    if proto.trainer_spec.model_type != 2:
        raise FastUnavailable("The SentencePiece model is not of type BPE.")
    try:
        engine: dict[str, Any] = json.loads(build_pipeline(proto).to_str())
    except NotConvertibleError as feature:
        raise FastUnavailable(f"The SentencePiece model has {feature}.") from None
    # "</s>" in a text is text. A name with a space cannot come up in it: spaces are replaced first.
    vocabulary, model_part = engine["model"]["vocab"], engine["model"]
    for name in control_pieces(proto):
        vocabulary[" " + name] = vocabulary.pop(name)
    model_part["unk_token"] = " " + model_part["unk_token"]
    marks = [BYTE_MARK] if model_part["byte_fallback"] else []
    symbols = [token["content"] for token in engine["added_tokens"]]
    if proto.normalizer_spec.add_dummy_prefix or proto.normalizer_spec.remove_extra_whitespaces:
        # The engine starts anew after such a symbol: another prefix, other spaces at an end.
        marks += symbols
    return engine, _few(marks)


def _from_backend(backend: Any, add_special_tokens: bool) -> tuple[dict[str, Any], list[str]]:
    engine: dict[str, Any] = json.loads(backend.to_str())
    model = engine["model"]
    if model.get("type") != "BPE":
        raise FastUnavailable(f"The tokenizer's model is {model.get('type')}, not BPE.")
    if model.get("dropout"):
        raise FastUnavailable("The tokenizer drops merges at random (dropout).")
    _check_alphabet(engine)
    regexes = list(_regexes([engine["normalizer"], engine["pre_tokenizer"]]))
    for regex in regexes:
        if not means_the_same(regex):
            raise FastUnavailable(
                f"The regex {regex!r} may mean something else to the fast engine."
            )
    engine["truncation"] = engine["padding"] = None
    if not add_special_tokens:
        engine["post_processor"] = None
    marks = [*(DISPUTED if regexes else ()), *([BYTE_MARK] if model["byte_fallback"] else ())]
    if backend.encode_special_tokens:
        # "</s>" in a text is text.
        special = [token["content"] for token in engine["added_tokens"] if token["special"]]
        engine["added_tokens"] = [t for t in engine["added_tokens"] if not t["special"]]
        if model["unk_token"] is not None:
            # As with the names of bytes.
            marks += special
    return engine, _few(marks)


def means_the_same(regex: str) -> bool:
    """Whether both engines cut every text without a DISPUTED character alike by this regex."""
    for group in _FOLDED:
        regex = regex.replace(group, "(?:x)")
    return SAFE.fullmatch(regex) is not None


def _few(marks: list[str]) -> list[str]:
    if len(marks) > MOST_MARKS:
        raise FastUnavailable(f"{len(marks)} special strings would have to be looked for.")
    return marks


def _check_alphabet(engine: dict[str, Any]) -> None:
    # What is not in the vocabulary and has no unk is dropped; the two do not agree on what then
    # stands side by side.
    model = engine["model"]
    if model["unk_token"] is None and not model["byte_fallback"]:
        from tokenizers import pre_tokenizers

        missing = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
        if missing or '"ByteLevel"' not in json.dumps(engine["pre_tokenizer"]):
            raise FastUnavailable("The vocabulary does not have all 256 bytes.")


def _regexes(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _regexes(inner)


def _decoded_pieces(backend: Any) -> list[str]:
    size = backend.get_vocab_size(with_added_tokens=True)
    ids = range(0, size, max(1, size // PROBE_PIECES))
    return [backend.decode([n], skip_special_tokens=False) for n in ids]


def _awkward_texts(pipeline: dict[str, Any]) -> Iterator[str]:
    yield from SAMPLE_TEXTS
    words = [token["content"] for token in pipeline["added_tokens"]]
    words = words[:: max(1, len(words) // PROBES)]
    for word in (*words, "'s", "'LL", "\u0660\u0661\u0662\u0663", "12345", "\t \n", "\u0301"):
        for context in _CONTEXTS:
            yield context.format(word)


def _compare(pipeline: str, exact: Tokenizer, texts: list[str]) -> None:
    try:
        fast = FastTokenizer(pipeline)
    except Exception as error:
        raise FastUnavailable(f"The fast engine refuses it ({error}).") from None
    texts = [text for text in texts if fast.takes(text)]
    ids, lengths = fast.encode_batch(texts)
    ends = np.cumsum(lengths)
    for text, expected, end, length in zip(
        texts, exact.encode_batch(texts), ends, lengths, strict=True
    ):
        actual = ids[end - length : end].tolist()
        if actual != expected:
            raise FastUnavailable(
                f"The fast engine gives {actual} for {text!r}, the reference {expected}."
            )
