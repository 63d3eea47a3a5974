"""Tells the two kinds of folder apart, and loads a Hugging Face one with nothing made up.

transformers only warns where weights are missing, and goes on with random ones: here that is an
error. Must not know: what the model is for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_satformer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_satformer.checkpoint.megatron.reader import TRACKER

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def is_hugging_face(folder: Path, option: str = "load", step: int | None = None) -> bool:
    """Whether a folder is Hugging Face's rather than a Megatron checkpoint.

    Args:
        folder: Of either kind.
        option: Its name in the message.
        step: Asked for, which only a checkpoint has.

    Raises:
        ValueError: If it is neither, or has no steps and one is asked for.
    """
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(
                f"step ({step}) must not be given with a Hugging Face folder ({folder})."
            )
        return True
    # a step's folder, what --save names, or what is left of either
    signs = (".metadata", "metadata.json", TRACKER)
    if any((folder / name).is_file() for name in signs) or any(folder.glob("iter_*")):
        return False
    state = "it has neither" if folder.is_dir() else "there is no such folder"
    raise ValueError(
        f"{option} ({folder}) must be a Megatron checkpoint (with {TRACKER}) or a Hugging Face "
        f"folder (with config.json): {state}. Check the path."
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from drawing bars and warning while something is loaded."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_hugging_face_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, without any network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def load_hugging_face_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal language model of a folder in evaluation mode, on the CPU.

    The folder's own code is run; nothing is fetched.

    Args:
        folder: With config.json and weights.
        dtype: Of the weights; "auto" for the folder's own.

    Raises:
        ValueError: If it cannot be loaded, or its weights are not those of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=True,
                local_files_only=True,
                dtype=dtype,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, KeyError, ImportError) as error:
        open_hf_folder(folder)  # names the file that is missing or cut short, if one is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error
    wrong = [
        f"{what.removesuffix('_keys')}: {', '.join(sorted(map(str, loaded[what]))[:8])}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if loaded.get(what)
    ]
    if wrong:
        raise ValueError(
            f"{folder} does not hold the weights that its config.json asks for; {'; '.join(wrong)}."
        )
    return model.eval()
