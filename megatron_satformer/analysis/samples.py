"""Text from an exported folder, the way any user of transformers would get it.

This file needs torch and transformers alone, nothing of this project: it shows that the exported
folder stands by itself, so run it by its path:

    python -P megatron_satformer/analysis/samples.py --model HF_FOLDER --output samples.txt
        --prompt "ROMEO."
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RULE = "=" * 80


def generate_samples(
    folder: Path, prompts: list[str], max_new_tokens: int, temperature: float, top_p: float
) -> list[str]:
    """Continues each prompt by sampling; the same folder and prompts give the same text.

    Args:
        folder: Exported Hugging Face folder.
        prompts: Texts to continue.
        max_new_tokens: Tokens to add; the document may end after half of them.
        temperature: Of the softmax.
        top_p: Share of the probability that is sampled from.

    Returns:
        For each prompt, itself and its continuation.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"trust_remote_code": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model = model.to(device).eval()
    texts = []
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens // 2,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        texts.append(prompt + tokenizer.decode(new, skip_special_tokens=True))
    return texts


def main() -> None:
    """Parses the flags, generates, writes the samples."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="Exported folder.")
    parser.add_argument("--output", type=Path, required=True, help="Text file to write.")
    parser.add_argument("--prompt", action="append", required=True, help="May be repeated.")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    args = parser.parse_args()
    texts = generate_samples(
        args.model, args.prompt, args.max_new_tokens, args.temperature, args.top_p
    )
    if "megatron_satformer" in sys.modules:
        raise RuntimeError("the exported folder must not need the package megatron_satformer")
    blocks = (
        f"{RULE}\nSample {n} of {len(texts)}. Prompt: {prompt!r}\n{RULE}\n{text.strip()}\n\n"
        for n, (prompt, text) in enumerate(zip(args.prompt, texts, strict=True), start=1)
    )
    args.output.write_text("".join(blocks))
    print(f"{len(texts)} samples: {args.output}")


if __name__ == "__main__":
    main()
