"""Compares the logits of two models on the same tokens, each run by its own engine.

A Megatron checkpoint is run by Megatron's modules, a Hugging Face folder by transformers, one after
the other: memory holds one model and the first one's logits.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_satformer.checkpoint.compare.sample_tokens import (
    VERIFY_TEXT,
    SampleTokens,
    draw_tokens,
    encode_text,
    read_text,
    read_validation_tokens,
)
from megatron_satformer.checkpoint.dtypes import DTYPES
from megatron_satformer.checkpoint.hugging_face.loading import (
    has_tokenizer,
    is_hugging_face,
    load_hugging_face_model,
    load_hugging_face_tokenizer,
    quiet_transformers,
)
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import own_tokenizer_options
from megatron_satformer.checkpoint.megatron.model import (
    check_runnable,
    load_megatron_model,
    megatron_logits,
)
from megatron_satformer.checkpoint.megatron.reader import MegatronCheckpoint, open_checkpoint
from megatron_satformer.checkpoint.megatron.vocabulary import known_size
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.model.architectures import PLAIN

CHUNK = 64  # rows of logits
VERIFY_SEQUENCES, VERIFY_LENGTH = 4, 256
Logits = Callable[[Tensor], Tensor]  # ids [1, s] -> logits [1, s, at least the vocabulary]


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart.

    Attributes:
        a: First model, for people.
        b: Second model.
        source: Where the tokens are from.
        sequences: Number of them.
        seq_length: Tokens of each.
        vocab_size: Logits of each token that were compared.
        dtype: Both were run in.
        max_difference: Largest absolute difference of two logits; NaN where a logit is not finite.
        mean_difference: Mean absolute difference.
        min_cosine: Smallest cosine between the logits of one token.
        mean_cosine: Mean of them.
        argmax_agreement: Share of the tokens where the likeliest next token is the same.
        largest_logit: Of both, absolute: what the differences are to be seen against.
    """

    a: str
    b: str
    source: str
    sequences: int
    seq_length: int
    vocab_size: int
    dtype: str
    max_difference: float
    mean_difference: float
    min_cosine: float
    mean_cosine: float
    argmax_agreement: float
    largest_logit: float

    @property
    def tokens(self) -> int:
        """Number of tokens that both models read."""
        return self.sequences * self.seq_length

    def within(self, tolerance: float) -> bool:
        """Whether every logit is finite and no two differ by more than `tolerance`."""
        return math.isfinite(self.max_difference) and self.max_difference <= tolerance

    def to_json(self) -> str:
        """All of it as one JSON object; figures that are not finite become null."""
        values = asdict(self) | {"tokens": self.tokens}
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        return json.dumps(finite, indent=2)

    def __str__(self) -> str:
        agree = round(self.argmax_agreement * self.tokens)
        rows = [
            ("A", self.a),
            ("B", self.b),
            ("tokens", f"{self.sequences} x {self.seq_length}, {self.source}"),
            (
                "logits",
                f"{self.vocab_size} a token, in {self.dtype}, up to {self.largest_logit:.4g}",
            ),
            ("max difference", f"{self.max_difference:.3e}"),
            ("mean difference", f"{self.mean_difference:.3e}"),
            ("cosine", f"{self.min_cosine:.10f} at least, {self.mean_cosine:.10f} on average"),
            ("same argmax", f"{agree} of {self.tokens}"),
        ]
        if not math.isfinite(self.max_difference):
            rows.append(("warning", "a logit is not finite: the models are not equal"))
        return "\n".join(f"{name:<16} {value}" for name, value in rows)


@dataclass(frozen=True)
class _Side:
    """One of the two models, not loaded yet.

    Attributes:
        name: For people.
        rows: Logits of one token, padding included.
        vocab_size: Without padding; None if nothing says it.
        longest: Tokens that it was made for.
        load: Dtype -> the running model, a context.
        encode: Its tokenizer; None if it has none. The reason is in `no_tokenizer`.
        no_tokenizer: Why `encode` is None.
    """

    name: str
    rows: int
    vocab_size: int | None
    longest: int | None
    load: Callable[[torch.dtype], AbstractContextManager[Logits]]
    encode: Callable[[str], Any] | None = None
    no_tokenizer: str = ""


def compare_models(
    a: Path,
    b: Path,
    text: Path | None = None,
    sequences: int = VERIFY_SEQUENCES,
    seq_length: int | None = None,
    dtype: str = "fp32",
    seed: int = 1234,
) -> Comparison:
    """Runs two models on the same tokens.

    Args:
        a: Megatron checkpoint, or one step of it, or Hugging Face folder.
        b: The same.
        text: File to read the tokens from, with a tokenizer of A or B; None for random tokens.
        sequences: Number of sequences.
        seq_length: Tokens of each; None for 256, or fewer where a model was made for fewer.
        dtype: One of DTYPES, for weights and arithmetic of both.
        seed: Of random tokens.

    Raises:
        ValueError: If a model cannot be read, the vocabularies differ, or the tokens do not fit.
        NotImplementedError: If a checkpoint has an option that cannot be run on one CPU process.
    """
    for name, value in (("sequences", sequences), ("seq_length", seq_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1.")
    content = None if text is None else read_text(text)
    sides = _open_side(a, "A"), _open_side(b, "B")
    vocab_size = _common_vocabulary(*sides)
    if seq_length is None:
        made_for = [side.longest for side in sides if side.longest is not None]
        seq_length = min([VERIFY_LENGTH, *made_for])
    for side in sides:
        if side.longest is not None and seq_length > side.longest:
            raise ValueError(
                f"seq_length ({seq_length}) must be at most {side.longest}, the "
                f"max_position_embeddings of {side.name}. Pass --seq-length {side.longest}."
            )
    if content is None:
        tokens = draw_tokens(vocab_size, sequences, seq_length, seed)
    else:
        encode = next((side.encode for side in sides if side.encode is not None), None)
        if encode is None:
            reasons = "; ".join(side.no_tokenizer.rstrip(".") for side in sides)
            raise ValueError(
                f"text must come with a tokenizer, and there is none ({reasons}). Leave --text out "
                "for random tokens."
            )
        tokens = encode_text(content, f"text {text}", encode, sequences, seq_length)
    return _compare(*sides, tokens, vocab_size, dtype)


def verify_export(checkpoint: MegatronCheckpoint, folder: Path) -> Comparison:
    """Holds an exported folder against the checkpoint that it was made of, both run in float32.

    Megatron's weights are first rounded to the dtype of the folder: what is left is the difference
    between the two programs. 4 x 256 tokens are read, shorter where the model is: of the
    validation data of the run where they can be read on this machine, else of a text that comes
    with this package, else random ones.

    Args:
        checkpoint: Opened.
        folder: The export, with its tokenizer if it has one.

    Raises:
        ValueError: If the folder cannot be loaded.
    """
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rounded_to = getattr(torch, written.get("dtype") or "float32")
    export = _hugging_face_side(folder, "folder")
    original = _megatron_side(checkpoint, rounded_to)
    size = VERIFY_SEQUENCES, min(VERIFY_LENGTH, export.longest or VERIFY_LENGTH)
    try:
        tokens = read_validation_tokens(checkpoint.args, export.rows, *size)
    except (ValueError, OSError):
        if export.encode is None:
            tokens = draw_tokens(export.rows, *size, seed=1234)
        else:
            text, source = read_text(VERIFY_TEXT), "Shakespeare's sonnets"
            tokens = encode_text(text, source, export.encode, *size, fewer=True)
    return _compare(original, export, tokens, export.rows, "fp32")


def _open_side(folder: Path, option: str) -> _Side:
    if is_hugging_face(folder, option):
        return _hugging_face_side(folder, option)
    checkpoint = open_checkpoint(folder)
    checkpoint.check_files()
    return _megatron_side(checkpoint)


def _megatron_side(checkpoint: MegatronCheckpoint, rounded_to: torch.dtype | None = None) -> _Side:
    args = checkpoint.args
    check_runnable(args)

    @contextmanager
    def load(dtype: torch.dtype) -> Iterator[Logits]:
        with load_megatron_model(checkpoint, dtype, rounded_to) as model:
            yield partial(megatron_logits, model)

    encode, reason, vocab_size = None, "", known_size(args)
    try:
        with quiet_transformers():
            tokenizer = build_tokenizer(own_tokenizer_options(args))
        encode, vocab_size = tokenizer.encode, vocab_size or tokenizer.vocab_size
    except (ValueError, OSError) as error:
        reason, vocab_size = str(error), vocab_size or getattr(args, "vocab_size", None)
    name = f"{checkpoint.folder} (Megatron, {getattr(args, 'architecture', PLAIN)})"
    longest = args.max_position_embeddings
    return _Side(name, args.padded_vocab_size, vocab_size, longest, load, encode, reason)


def _hugging_face_side(folder: Path, option: str) -> _Side:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except (OSError, KeyError) as error:
        raise ValueError(f"{option} ({folder}) cannot be loaded: {error}") from error

    @contextmanager
    def load(dtype: torch.dtype) -> Iterator[Logits]:
        model = load_hugging_face_model(folder, dtype)
        yield lambda ids: model(ids, use_cache=False).logits

    encode, reason = None, f"{folder} has no tokenizer"
    if has_tokenizer(folder):
        tokenizer = load_hugging_face_tokenizer(folder)
        encode = partial(tokenizer.encode, add_special_tokens=False)
    kind = getattr(config, "architecture", None) or config.model_type
    longest = getattr(config, "max_position_embeddings", None)
    name = f"{folder} (Hugging Face, {kind})"
    return _Side(name, config.vocab_size, config.vocab_size, longest, load, encode, reason)


def _common_vocabulary(a: _Side, b: _Side) -> int:
    """Logits to compare; ValueError if the models do not have the same vocabulary."""
    known = [side.vocab_size for side in (a, b) if side.vocab_size is not None]
    size = known[0] if known else a.rows
    same = set(known) <= {size} and min(a.rows, b.rows) >= size
    if not same or (not known and a.rows != b.rows):
        parts = [
            f"{side.vocab_size or side.rows}{'' if side.vocab_size else ' with padding'} in "
            f"{side.name}"
            for side in (a, b)
        ]
        raise ValueError(
            f"the vocabularies must be of the same size, and they are {parts[0]}, {parts[1]}. "
            "Compare models with the same tokenizer"
            + (", and have it where the checkpoint's args say." if not known else ".")
        )
    return size


def _compare(a: _Side, b: _Side, tokens: SampleTokens, vocab_size: int, dtype: str) -> Comparison:
    rows, length = tokens.ids.shape
    if tokens.ids.min() < 0 or tokens.ids.max() >= vocab_size:
        raise ValueError(
            f"{tokens.source} gives token id {int(tokens.ids.max())}, and the models have "
            f"{vocab_size}. Use the tokenizer that they were trained with."
        )
    needed, free = 4 * rows * length * vocab_size, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"sequences ({rows}) x seq_length ({length}) must be fewer: the logits of A take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
        )
    first = [logits for _, logits in _run(a, tokens.ids, vocab_size, dtype)]
    found = [_measure(first[n], logits) for n, logits in _run(b, tokens.ids, vocab_size, dtype)]
    largest, mean, cosine, same, logit = torch.cat(found, dim=1)
    return Comparison(
        *(a.name, b.name, tokens.source, rows, length, vocab_size, dtype),
        max_difference=largest.max().item(),
        mean_difference=mean.mean().item(),
        min_cosine=cosine.min().item(),
        mean_cosine=cosine.mean().item(),
        argmax_agreement=same.mean().item(),
        largest_logit=logit.max().item(),
    )


@torch.no_grad()
def _run(side: _Side, ids: Tensor, vocab_size: int, dtype: str) -> Iterator[tuple[int, Tensor]]:
    """Yields number and logits [s, vocab_size], float32, of each sequence."""
    with side.load(DTYPES[dtype]) as logits:
        for row in range(len(ids)):
            yield row, logits(ids[row : row + 1])[0, :, :vocab_size].float().clone()
        del logits
    gc.collect()  # modules and their hooks refer to each other


def _measure(a: Tensor, b: Tensor) -> Tensor:
    """What the logits of one sequence, both [s, v], say of each token.

    Returns:
        Largest and mean difference, cosine, whether the argmax is the same, and the largest
        logit. [5, s], float64
    """
    difference = (a - b).abs()
    # float32 is off by 1e-6 over a large vocabulary; a few rows at a time, for memory
    cosines = [
        torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
        for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    ]
    return torch.stack(
        [
            difference.amax(-1).double(),  # NaN wherever there is one
            difference.mean(-1, dtype=torch.float64),
            torch.cat(cosines).clamp(max=1.0),  # rounding
            (a.argmax(-1) == b.argmax(-1)).double(),
            torch.maximum(a.abs().amax(-1), b.abs().amax(-1)).double(),
        ]
    )
