"""What the gates of a trained SATFormer do on text that it has not seen.

Per mixing layer and KV head: the mean of alpha, and the share of tokens where alpha is exactly 0
(V1 shut out). For relu, half of the gates are 0 at initialisation: judge the share against that.

    python -m megatron_satformer.analysis.gates --model HF_FOLDER --data-path PREFIX --split 95,5,0
        --output gates.json
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megatron_satformer.analysis.unigram import read_splits


@dataclass(frozen=True)
class GateReport:
    """Gates over a text.

    Attributes:
        layers: The mixing layers, 1-based.
        mean: Mean of alpha. [layers][KV heads]
        zeros: Share of alpha that is exactly 0. [layers][KV heads]
        tokens: Number of tokens that were read.
        value_gate: Name of the gate function.
    """

    layers: list[int]
    mean: list[list[float]]
    zeros: list[list[float]]
    tokens: int
    value_gate: str


def measure_gates(
    folder: Path, tokens: npt.NDArray, seq_length: int, max_tokens: int = 16_384, batch: int = 8
) -> GateReport:
    """Reads text with an exported model and returns what its gates did.

    Args:
        folder: Exported Hugging Face folder of a model whose layers have gates.
        tokens: Token ids, documents end to end. [tokens]
        seq_length: Tokens that the model reads at once.
        max_tokens: Most tokens to read.
        batch: Sequences at a time.

    Raises:
        ValueError: If there is less than one sequence of tokens, or the model has no gates.
    """
    from transformers import AutoModelForCausalLM

    count = min(tokens.size, max_tokens) // seq_length
    if count == 0:
        raise ValueError(
            f"tokens ({tokens.size}) must be at least one sequence ({seq_length}). Give validation "
            "more documents, with --split."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
    )
    model = model.to(device).eval()
    ids = torch.from_numpy(tokens[: count * seq_length].astype(np.int64)).view(count, seq_length)
    sums = zeros = torch.zeros((), dtype=torch.float64)
    for rows in ids.to(device).split(batch):
        with torch.inference_mode():
            gates = model(rows, output_gates=True, use_cache=False, logits_to_keep=1).gates
        if not gates:
            raise ValueError(
                f"architecture ({model.config.architecture}) must be one whose layers have gates."
            )
        alpha = torch.stack(gates)  # [mixing layers, b, s, ng]
        sums = sums + alpha.double().sum((1, 2)).cpu()
        zeros = zeros + (alpha == 0).sum((1, 2)).cpu()
    return GateReport(
        layers=[layer + 1 for layer in model.config.mixing_layers],
        mean=(sums / ids.numel()).tolist(),
        zeros=(zeros / ids.numel()).tolist(),
        tokens=ids.numel(),
        value_gate=model.config.value_gate,
    )


def main() -> None:
    """Parses the flags, measures, writes the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="Exported folder.")
    parser.add_argument("--data-path", required=True, help="Prefix of the data set.")
    parser.add_argument("--split", required=True, help="As in training; validation is read.")
    parser.add_argument("--seq-length", type=int, required=True, help="As in training.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    args = parser.parse_args()
    tokens = read_splits(args.data_path, args.split)["valid"]
    report = measure_gates(args.model, tokens, args.seq_length)
    args.output.write_text(json.dumps(asdict(report), indent=2) + "\n")
    print(f"gates of {len(report.layers)} layers on {report.tokens} tokens: {args.output}")


if __name__ == "__main__":
    main()
