"""Writes text with a Megatron checkpoint or a Hugging Face folder, token by token.

A checkpoint becomes, in memory, the model that `to-hf` would export: it has the KV cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint.convert.to_hf import build_plan, read_state_dict
from megatron_satformer.checkpoint.dtypes import DTYPES
from megatron_satformer.checkpoint.hugging_face.code import model_class
from megatron_satformer.checkpoint.hugging_face.loading import (
    has_tokenizer,
    is_hugging_face,
    load_hugging_face_model,
    load_hugging_face_tokenizer,
    quiet_transformers,
)
from megatron_satformer.checkpoint.hugging_face.tokenizer import build_transformers_tokenizer
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import detect_tokenizer
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        max_new_tokens: At most so many.
        temperature: 0 takes the likeliest token every time.
        top_k: Among so many likeliest; 0 for all.
        top_p: Among the likeliest that make up this probability.
        seed: Of the first sample; each further one adds 1.

    Raises:
        ValueError: If a number is out of its range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature ({self.temperature}) must be 0 or more. 0 is greedy, 1 the model's."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be 0 or more. 0 is all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1. 1 is all.")


class TextStream:
    """One of transformers' streamers: hands on text as soon as its characters are whole.

    A token may be a few bytes of a character, or the space before a word, which decoding drops
    at the start of a text: so what is new is what a window of tokens decodes to, less what it
    decoded to before.

    Args:
        tokenizer: Of the model.
        write: Called with each piece of text that follows the prompt.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] | None = None
        self._start = self._done = 0  # of the window; up to where its text is written

    def put(self, value: Tensor) -> None:
        """Takes the prompt [1, s] first, then one token [1] at a time."""
        if self._ids is None:
            self._ids = value.flatten().tolist()
            self._start, self._done = 0, len(self._ids)
            return
        self._ids += value.flatten().tolist()
        text = self._new_text()
        if text and not text.endswith(INCOMPLETE):
            self._advance(text)

    def end(self) -> None:
        """Writes what is left, whole or not."""
        if self._ids is not None:
            self._advance(self._new_text())
        self._ids = None

    def _new_text(self) -> str:
        """What the tokens that are not written yet read as, behind those before them."""
        assert self._ids is not None
        old, window = self._ids[self._start : self._done], self._ids[self._start :]
        before, whole = self._decode(old), self._decode(window)
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(window[len(old) :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _advance(self, text: str) -> None:
        assert self._ids is not None
        self._write(text)
        self._start, self._done = self._done, len(self._ids)


def load_model(
    load: Path,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> tuple[Any, Any]:
    """Loads model and tokenizer of either kind of folder.

    Args:
        load: Megatron checkpoint, one step of it, or Hugging Face folder, whose own code is run.
        step: Iterations of a Megatron checkpoint; None for the last one saved.
        tokenizer: File or folder in the place of the model's own, as in `to-hf`.
        dtype: "bf16", "fp16" or "fp32"; None for the one saved.
        device: Of torch.

    Returns:
        Causal language model of transformers, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If it is neither kind, has no tokenizer, or cannot be loaded.
    """
    if tokenizer == "none":
        raise ValueError("tokenizer (none) must be a file or folder: text is written with it.")
    hugging_face = is_hugging_face(load, step=step)
    where = _check_device(device)
    if hugging_face:
        tokens = _folder_tokenizer(load, tokenizer)
        model = load_hugging_face_model(load, DTYPES[dtype] if dtype else "auto")
        rows = model.get_input_embeddings().weight.shape[0]
        if tokenizer is not None and len(tokens) > rows:
            raise ValueError(
                f"tokenizer ({tokenizer}) has {len(tokens)} entries, the model only {rows}. Give "
                "the one that the model was trained with."
            )
    else:
        model, tokens = _load_megatron(load, step, tokenizer, dtype)
    return model.to(where).eval(), tokens


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device ({name}) must be there, and it is not: {reason}") from None
    return device


def _folder_tokenizer(folder: Path, given: str | None) -> Any:
    if given is not None:
        return build_transformers_tokenizer(detect_tokenizer(Path(given)))
    if not has_tokenizer(folder):
        raise ValueError(
            f"load ({folder}) must hold a tokenizer, and it has no tokenizer_config.json. Pass "
            "--tokenizer."
        )
    return load_hugging_face_tokenizer(folder)


def _load_megatron(
    load: Path, step: int | None, tokenizer: str | None, dtype: str | None
) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(load, step)
    checkpoint.check_files()
    with quiet_transformers():
        plan = build_plan(checkpoint, dtype, tokenizer)
        if plan.tokens is None:
            kind = checkpoint.args.tokenizer_type
            raise ValueError(
                f"tokenizer_type ({kind}) of the checkpoint must be one that has text. Pass "
                "--tokenizer."
            )
        config, chosen = plan.config, DTYPES[plan.dtype]
        model = model_class(config.architecture).from_pretrained(
            None,
            config=config,
            state_dict=read_state_dict(checkpoint, config, chosen),
            dtype=chosen,
        )
    return model, plan.tokens


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling,
    number: int = 0,
    streamer: Any = None,
) -> str:
    """Returns the text that follows the prompt.

    Args:
        model: From `load_model`.
        tokenizer: From `load_model`.
        prompt: Empty to start a document.
        sampling: How to choose tokens.
        number: Of the sample; other numbers give other text.
        streamer: One of transformers' streamers, told of every token as it comes.

    Raises:
        ValueError: If prompt and new tokens are more than the model was made for.
    """
    ids = encode_prompt(model, tokenizer, prompt, sampling.max_new_tokens)
    inputs = torch.tensor([ids], device=model.device)
    samples = sampling.temperature > 0
    # None: transformers warns of a folder's own settings for sampling where nothing is sampled
    names = ("temperature", "top_k", "top_p")
    options = {name: getattr(sampling, name) if samples else None for name in names}
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), None)
    torch.manual_seed(sampling.seed + number)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        streamer=streamer,
        do_sample=samples,
        **options,
    )
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for new in (output[:, : len(ids)], *output[0, len(ids) :]):
        stream.put(new)
    stream.end()
    return "".join(pieces)


def encode_prompt(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """Token ids of the prompt; of an empty one, the token that stands before a document.

    Raises:
        ValueError: If it leaves no room for the new tokens, or there is no such token.
    """
    ids: list[int] = tokenizer.encode(prompt)
    if not ids:
        starts = [n for n in (tokenizer.eos_token_id, tokenizer.bos_token_id) if n is not None]
        if not starts:
            raise ValueError(
                "prompt ('') must not be empty: the tokenizer has no token that starts a document."
            )
        ids = starts[:1]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None or len(ids) + max_new_tokens <= longest:
        return ids
    if len(ids) >= longest:
        raise ValueError(
            f"prompt ({len(ids)} tokens) must be shorter than {longest} tokens, which the model "
            "was made for. Shorten it."
        )
    raise ValueError(
        f"max_new_tokens ({max_new_tokens}) must be at most {longest - len(ids)}: the prompt has "
        f"{len(ids)} tokens and the model was made for {longest}."
    )
