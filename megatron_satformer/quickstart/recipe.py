"""The numbers of the quickstart, each in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long; made for two CPU cores and five minutes."""

    vocab_size: int = 4096
    split: str = "95,5,0"  # weight 0: Megatron would wait for ever on a split without documents

    num_layers: int = 6
    hidden_size: int = 256
    num_attention_heads: int = 4
    ffn_hidden_size: int = 768
    seq_length: int = 256

    train_iters: int = 200
    micro_batch_size: int = 2
    global_batch_size: int = 8
    lr: float = 2e-3
    lr_warmup_iters: int = 20
    eval_interval: int = 30
    eval_iters: int = 12  # global batches, about a quarter of the validation text
    save_interval: int = 50
    seed: int = 1234

    prompts: tuple[str, ...] = (
        "ROMEO.\n",
        "[Enter the King and",
        "What though the field be lost?\n",
    )
    max_new_tokens: int = 160
    min_gain: float = 0.7  # nats by which validation must end below the unigram entropy

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one step."""
        return self.global_batch_size * self.seq_length

    @property
    def train_tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.train_iters * self.tokens_per_step

    def training_options(self) -> dict[str, object]:
        """Returns Megatron's options of the run by flag name, without paths and layout."""
        names = (
            "num_layers hidden_size num_attention_heads ffn_hidden_size seq_length train_iters "
            "micro_batch_size global_batch_size lr lr_warmup_iters eval_interval eval_iters "
            "save_interval seed split"
        )
        options: dict[str, object] = {name: getattr(self, name) for name in names.split()}
        # A short run needs more than one validation too.
        halves = max(1, self.train_iters // 2)
        return options | {
            "architecture": "satformer",
            "max_position_embeddings": self.seq_length,
            "min_lr": self.lr / 10,
            "lr_warmup_iters": min(self.lr_warmup_iters, self.train_iters // 4),
            "eval_interval": min(self.eval_interval, halves),
            "save_interval": min(self.save_interval, halves),
            "log_interval": 1,
            "num_workers": 0,  # the cores are busy as it is
        }


def as_flags(options: dict[str, object]) -> list[str]:
    """Returns options as command-line flags, names spelled with dashes."""
    flags: list[str] = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags
