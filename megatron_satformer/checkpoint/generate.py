"""Writes text with an exported folder, token by token; knows nothing of how it was trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        max_new_tokens: At most so many.
        temperature: 0 takes the likeliest token every time.
        top_k: Among so many likeliest; 0 for all.
        top_p: Among the likeliest that make up this probability.
        seed: Of the first sample; each further one adds 1.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 1234


def load_folder(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Loads model and tokenizer of an exported folder, running the code that it holds.

    Raises:
        ValueError: If it is not such a folder, or has no tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for file in ("config.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            raise ValueError(
                f"load ({folder}) must be a folder made by tools/convert_checkpoint.py to-hf, with "
                f"a tokenizer: it has no {file}."
            )
    options = {"trust_remote_code": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(device).eval(), tokenizer


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
        model: From `load_folder`.
        tokenizer: From `load_folder`.
        prompt: Empty to start a document.
        sampling: How to choose tokens.
        number: Of the sample; other numbers give other text.
        streamer: One of transformers' streamers, told of every token as it comes.

    Raises:
        ValueError: If prompt and new tokens are more than the model was made for.
    """
    import torch

    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    longest = model.config.max_position_embeddings
    if len(ids) + sampling.max_new_tokens > longest:
        raise ValueError(
            f"max_new_tokens ({sampling.max_new_tokens}) must be at most {longest - len(ids)}: the "
            f"prompt has {len(ids)} tokens and the model was made for {longest}."
        )
    inputs = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    torch.manual_seed(sampling.seed + number)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=sampling.max_new_tokens,
        streamer=streamer,
        **options,
    )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text
