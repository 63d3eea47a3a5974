"""Runs lm_eval on a Hugging Face folder, with the right token before a text, and keeps its results.

lm_eval (0.4.13) names a folder after the model's path, and where that is too long, or the disk
full, it logs a line and exits as if all were well. Before a text that is scored whole it puts a
token of its own, also where the tokenizer's template puts one there already.
"""

import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_satformer.checkpoint.hugging_face.loading import (
    has_tokenizer,
    load_hugging_face_tokenizer,
)

MODEL = "exported"  # lm_eval's name of the class below
PROBE = "a text"
OURS = {  # flags of lm_eval that are set here, and by what
    "model": "set here",
    "model_args": "set by HF_MODEL, DTYPE and PREFIX_TOKEN_ID",
    "tasks": "set by the script",
    "output_path": "set by RESULTS",
}


@dataclass(frozen=True)
class Prefix:
    """The token that a text follows.

    Attributes:
        token: Its id.
        text: Its name.
        why: Where it comes from.
        ends: Whether the tokenizer's template also puts tokens behind a text.
        left_out: Names of the tokens that the template puts before this one. lm_eval has room for
            one where no context goes before a text.
    """

    token: int
    text: str
    why: str
    ends: bool = False
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"evaluate: the token before a text is {self.token} ({self.text}): {self.why}."
        if self.left_out:
            told += (
                f" WARNING: the template puts {' '.join(self.left_out)} before it, which is left "
                "out where a text is scored whole or follows nothing: lm_eval takes one token "
                "there. Those figures are not the model's behind its whole template."
            )
        if self.ends:
            told += (
                " The template also puts tokens behind a text, where a continuation is to follow, "
                "so it is not used at all."
            )
        return told


def find_prefix(folder: Path, given: int | None = None) -> Prefix:
    """Finds what a text followed in training.

    That is what the tokenizer's template puts there; else the end-of-document token, by which
    documents are joined: a tokenizer's <s> that the template does not add was never seen.

    Args:
        folder: Of the model, with its tokenizer.
        given: By the user, in place of both.

    Raises:
        ValueError: If nothing says it.
    """
    tokens = load_hugging_face_tokenizer(folder)
    plain = tokens(PROBE, add_special_tokens=False).input_ids
    whole = tokens(PROBE).input_ids
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    if not starts:
        raise ValueError(
            f"tokenizer of {folder} must put its own tokens around a text: {PROBE!r} is {whole} "
            f"with them and {plain} without."
        )
    before, ends = whole[: starts[0]], len(whole) > starts[0] + len(plain)
    ending = json.loads((folder / "config.json").read_text("utf-8")).get("eos_token_id")
    ending = ending[0] if isinstance(ending, list) and ending else ending
    if given is not None:
        token, why = given, "PREFIX_TOKEN_ID"
    elif before:
        token, why = before[-1], "the tokenizer's template puts it there, and nothing is added"
    elif isinstance(ending, int):
        token, why = ending, "eos_token_id of config.json, for the tokenizer's template adds none"
    else:
        raise ValueError(
            f"eos_token_id of {folder / 'config.json'} ({ending}) must name the token that a text "
            "follows, for the tokenizer's template adds none. Set PREFIX_TOKEN_ID."
        )
    left_out = () if given is not None else tokens.convert_ids_to_tokens(before[:-1])
    name = tokens.convert_ids_to_tokens(token)
    return Prefix(token, str(name), why, ends, tuple(map(str, left_out)))


def evaluate(
    model: Path,
    tasks: str,
    save: Path,
    batch_size: str = "8",
    device: str | None = None,
    dtype: str = "auto",
    prefix_token_id: int | None = None,
    flags: Sequence[str] = (),
) -> list[Path]:
    """Runs the tasks and writes figures and samples.

    Args:
        model: Folder of the model, with its tokenizer.
        tasks: Names, with commas between them.
        save: Folder of the results; made where it is missing.
        batch_size: Sequences at a time, or "auto".
        device: Such as "cuda:1"; None for a GPU if there is one.
        dtype: Of the weights; "auto" for the folder's.
        prefix_token_id: Token that a text follows; None to find it.
        flags: Further ones, of lm_eval.

    Returns:
        The files written, the figures first.

    Raises:
        ValueError: If the folder is not what it must be, or a flag is one that is set here.
        OSError: If the results cannot be written.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"model ({model}) must be an exported folder: it has no config.json.")
    if not has_tokenizer(model):
        raise ValueError(f"model ({model}) has no tokenizer. Export with to-hf --tokenizer.")
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install -c constraints.txt -e '.[eval,hf]'")
    prefix = find_prefix(model, prefix_token_id)
    with _written_into(save) as folder:
        given: dict[str, Any] = {"pretrained": str(model), "trust_remote_code": True}
        given |= {"dtype": dtype, "prefix_token_id": prefix.token}
        if prefix.ends:
            given["add_bos_token"] = False
        ours: dict[str, Any] = {"model": MODEL, "model_args": given, "tasks": tasks}
        ours |= {"batch_size": batch_size, "output_path": str(folder / "results.json")}
        ours |= {"device": device} if device else {}
        print(prefix, flush=True)
        _run_lm_eval(ours, flags)
        print(prefix)
        whole, missing = check_saved(folder)
        for file in whole:
            os.replace(file, save / file.name)
    files = [save / file.name for file in whole]
    if missing:
        kept = ", ".join(file.name for file in files) or "nothing"
        raise OSError(
            f"lm_eval has run and not saved all of its results ({', '.join(missing)}); in {save} "
            f"is {kept}. Its log above says why; look whether the disk is full."
        )
    return files


@contextmanager
def _written_into(save: Path) -> Iterator[Path]:
    """A folder for what is not whole yet, made before any work is done."""
    save.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=save))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_lm_eval(ours: Mapping[str, Any], flags: Sequence[str]) -> None:
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    _register()
    words = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in ours.items()]
    program, sys.argv = sys.argv, ["lm_eval", "run", *words, "--log_samples", *flags]
    # Its bootstrap would fork this process, whose other threads may hold a lock: that can hang.
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["__main__", "lm_eval.api.metrics"])
    try:
        command = HarnessCLI()
        args = command.parse_args()
        for name, told in OURS.items():
            found, meant = getattr(args, name), ours[name]
            if name == "model_args":  # the user's are merged with ours
                found = {key: found.get(key) for key in meant}
            elif name == "tasks":
                found = ",".join(found)
            if found != meant:
                raise ValueError(f"{name} ({found}) must be left out: it is {told}.")
        command.execute(args)
    finally:
        sys.argv = program
        multiprocessing.set_start_method(method, force=True)


@cache
def _register() -> None:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    class ExportedModel(HFLM):
        """HFLM that scores a whole text behind the prefix token alone.

        HFLM.loglikelihood_rolling (0.4.13) has the template's token in the text, and scores it.
        """

        add_bos_token: bool | None

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            before = self.add_bos_token
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = before

    register_model(MODEL)(ExportedModel)


def check_saved(folder: Path) -> tuple[list[Path], list[str]]:
    """Looks whether lm_eval has written all of its results, which it does not say.

    Args:
        folder: Where it was to write.

    Returns:
        The files that are whole, the figures first, and what is missing or not whole.
    """
    figures = [file for file in folder.glob("results_*.json") if _is_whole(file)]
    if not figures:
        return [], ["figures"]
    samples = {
        re.sub(r"^samples_|_\d{4}-[^_]*$", "", file.stem): file
        for file in sorted(folder.glob("samples_*.jsonl"))
        if _is_whole(file)
    }
    tasks = json.loads(figures[0].read_text("utf-8"))["configs"]
    missing = [f"samples of {task}" for task in tasks if task not in samples]
    return [*figures, *samples.values()], missing


def _is_whole(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as stream:
            for part in stream if file.suffix == ".jsonl" else [stream.read()]:
                json.loads(part)
    except ValueError:
        return False
    return True
