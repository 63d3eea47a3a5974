"""What to analyze; imports nothing heavy, so that --help is quick."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Plan:
    """What to analyze.

    Attributes:
        data: Prefix of a data set, as preprocess_data.py writes it, in the model's tokens.
        split: As in training: its validation part is read, and tokens are counted in its training
            part. If left out, all of --data serves for both.
        seq_length: Tokens of a sequence; what the model was made for, at most 1024, if left out.
        max_tokens: Tokens of text to read.
        ablation_tokens: Tokens of text to read with every ablation; 0 for no ablations.
        retrieval: Folder made by make_retrieval_data.py with the model's tokenizer.
        retrieval_limit: Examples of each task and length.
        texts: Held-out texts to show token by token.

    Raises:
        ValueError: If one is out of its range.
    """

    data: str
    split: str | None = None
    seq_length: int | None = None
    max_tokens: int = 32_768
    ablation_tokens: int = 4096
    retrieval: str | None = None
    retrieval_limit: int = 16
    texts: int = 3

    def __post_init__(self) -> None:
        least = {"seq_length": 2, "max_tokens": 2, "retrieval_limit": 1}
        for name in ("seq_length", "max_tokens", "ablation_tokens", "retrieval_limit", "texts"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 0):
                raise ValueError(f"{name} ({value}) must be at least {least.get(name, 0)}.")


FLAGS = tuple(field.name for field in fields(Plan))
