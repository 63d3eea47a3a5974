"""Turns a Megatron checkpoint into a folder that transformers loads with trust_remote_code.

One CPU process, no process group; memory for the model in the target dtype and one layer more.
"""

import shutil
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint import hf
from megatron_satformer.checkpoint.card import build_card
from megatron_satformer.checkpoint.folder import check_space, check_target, written_atomically
from megatron_satformer.checkpoint.hf.configuration_satformer import SATFormerConfig
from megatron_satformer.checkpoint.names import convert_to_hf, iterate_names
from megatron_satformer.checkpoint.options import build_hf_config
from megatron_satformer.checkpoint.reader import MegatronCheckpoint, open_checkpoint
from megatron_satformer.checkpoint.tokenizer import export_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO_MAP = {
    "AutoConfig": "configuration_satformer.SATFormerConfig",
    "AutoModel": "modeling_satformer.SATFormerModel",
    "AutoModelForCausalLM": "modeling_satformer.SATFormerForCausalLM",
}
# types that are one SentencePiece model, or one Hugging Face folder
TOKENIZERS = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
)
CODE = ("configuration_satformer.py", "modeling_satformer.py")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Where.
        step: Training iterations of the checkpoint.
        parameters: Number of them, tied ones once.
        dtype: "bf16", "fp16" or "fp32".
        bytes: Of the whole folder.
        seconds: Spent.
    """

    folder: Path
    step: int
    parameters: int
    dtype: str
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: step {self.step}, {self.parameters:,} parameters in {self.dtype}, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )


def export_to_hf(
    load: Path,
    save: Path,
    step: int | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes the folder, whole or not at all.

    Args:
        load: Folder of checkpoints, or of one step.
        save: Folder to make.
        step: Iterations; None for the last one saved.
        dtype: One of DTYPES; None for the one trained in.
        tokenizer: SentencePiece .model file or Hugging Face folder; None for the checkpoint's own,
            "none" to export without.
        max_shard_size: Of one safetensors file, such as "5GB".
        verify: Whether to run both models and write the difference into the card.
        overwrite: Whether an earlier export at `save` may be replaced.

    Raises:
        ValueError: If anything given, or in the checkpoint, does not allow an exact export.
    """
    start = time.perf_counter()
    check_target(save, "config.json", overwrite)
    checkpoint = open_checkpoint(load, step)
    checkpoint.check_files()
    args = checkpoint.args
    dtype = dtype or ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")
    source = _find_tokenizer(args, tokenizer)
    with written_atomically(save) as folder:
        ids = _write_tokenizer(args, source, folder)
        config = build_hf_config(args, ids.pop("vocab_size"))
        _check_names(checkpoint, config)
        numbers = sum(stored.size.numel() for stored in checkpoint.tensors.values())
        check_space(folder, numbers * DTYPES[dtype].itemsize)
        state = read_state_dict(checkpoint, config, DTYPES[dtype])
        _write_weights(state, folder, max_shard_size)
        _write_config(config, ids, DTYPES[dtype], folder)
        parameters = sum(tensor.numel() for tensor in state.values())
        card = build_card(config, args, checkpoint.step, parameters, dtype)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = time.perf_counter() - start
    return Export(save, checkpoint.step, parameters, dtype, size, seconds)


def read_state_dict(
    checkpoint: MegatronCheckpoint, config: SATFormerConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Reads the model under its Hugging Face names, layer by layer.

    Args:
        checkpoint: Opened.
        config: Of the exported model.
        dtype: Of all but ResFormer's lambdas, which stay float32: bf16 is too coarse for them.
    """
    state: dict[str, Tensor] = {}
    for name in iterate_names(config):
        wanted = torch.float32 if "lambda" in name.megatron else dtype
        if name.megatron in checkpoint.tensors:
            tensor = checkpoint.read(name.megatron, dtype=wanted)
        else:
            tensor = checkpoint.read(name.stacked, index=name.layer, dtype=wanted)
        state |= convert_to_hf(name, tensor, config)
    return state


def _check_names(checkpoint: MegatronCheckpoint, config: SATFormerConfig) -> None:
    """Compares keys and shapes with the model's, so that nothing is missed and nothing left out."""
    from megatron_satformer.checkpoint.hf.modeling_satformer import SATFormerForCausalLM

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in SATFormerForCausalLM(config).state_dict().items()}
    used, problems = set(), []
    for name in iterate_names(config):
        stored = checkpoint.tensors.get(name.megatron)
        key = name.megatron if stored is not None else name.stacked
        stored = checkpoint.tensors.get(key)
        used.add(key)
        if stored is None:
            problems.append(f"{name.megatron} is missing")
            continue
        rows = sum(shapes[part][0] for part in name.hf)
        expected = (rows, *shapes[name.hf[0]][1:])
        actual = tuple(stored.size[1:] if key != name.megatron else stored.size)
        if actual != expected and not (name.packing == "vocabulary" and actual[0] >= rows):
            problems.append(f"{name.megatron} is {actual}, not {expected}")
    problems += [f"{key} is not known" for key in sorted(set(checkpoint.tensors) - used)]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"{checkpoint.folder} does not fit its own args: {listed}.")


def _find_tokenizer(args: Namespace, given: str | None) -> Path | None:
    if given == "none":
        return None
    kind = args.tokenizer_type or ""
    if given is None and kind.startswith("Null"):
        return None
    if given is None and kind not in TOKENIZERS:
        raise ValueError(
            f"tokenizer_type ({kind}) cannot be exported. Pass --tokenizer with a SentencePiece "
            "model or a Hugging Face tokenizer folder, or --tokenizer none."
        )
    path = Path(given or args.tokenizer_model or "")
    if not path.exists():
        origin = "tokenizer" if given else "tokenizer_model of the checkpoint"
        raise ValueError(f"{origin} ({path}) does not exist here. Pass --tokenizer with its place.")
    if getattr(args, "special_tokens", None) and path.is_file():
        raise ValueError(
            f"special_tokens ({args.special_tokens}) are not part of the SentencePiece model. Pass "
            "--tokenizer with a Hugging Face tokenizer folder that has them."
        )
    return path


def _write_tokenizer(args: Namespace, source: Path | None, folder: Path) -> dict[str, Any]:
    """Returns vocab_size and the ids of bos, eos and pad."""
    if source is None:
        eos = getattr(args, "null_tokenizer_eod_id", None)
        eos = args.vocab_size - 1 if eos is None else eos
        return {
            "vocab_size": args.vocab_size,
            "bos_token_id": None,
            "eos_token_id": eos if (args.tokenizer_type or "").startswith("Null") else None,
            "pad_token_id": None,
        }
    tokenizer = export_tokenizer(source, folder)
    if len(tokenizer) > args.padded_vocab_size:
        raise ValueError(
            f"tokenizer ({source}) has {len(tokenizer)} entries, the checkpoint's embedding only "
            f"{args.padded_vocab_size}: it is not the one that the model was trained with."
        )
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def _write_weights(state: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes them for the owner alone


def _write_config(
    config: SATFormerConfig, ids: dict[str, int | None], dtype: torch.dtype, folder: Path
) -> None:
    from transformers import GenerationConfig

    for name, value in ids.items():
        setattr(config, name, value)
    config.dtype = dtype
    config.architectures = ["SATFormerForCausalLM"]
    config.auto_map = AUTO_MAP
    config.to_json_file(folder / "config.json")
    GenerationConfig(**ids).save_pretrained(folder)
    for name in CODE:
        shutil.copyfile(Path(hf.__file__).parent / name, folder / name)
