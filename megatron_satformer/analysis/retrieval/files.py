"""Retrieval tasks on disk: token files with loss masks for training, tasks of lm_eval for the rest.

    SAVE/tokenizer/                     of words alone, where none was given
    SAVE/{train,valid,test}/TASK_LENGTH.bin, .idx, and TASK_LENGTH_mask.bin, .idx
    SAVE/lm_eval/retrieval_TASK_LENGTH.yaml, data/TASK_LENGTH.jsonl     the test examples
    SAVE/retrieval.json                 what was asked for

Every example is answered by its task's solver before it is written. No two are the same, within a
split or between splits.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_satformer.analysis.retrieval.encoding import Encoder
from megatron_satformer.analysis.retrieval.examples import Difficulty, Example
from megatron_satformer.analysis.retrieval.prose import Haystack
from megatron_satformer.analysis.retrieval.tasks import TASKS, Solve, Task
from megatron_satformer.analysis.retrieval.vocabulary import (
    find_words,
    own_words,
    write_word_tokenizer,
)
from megatron_satformer.data.datasets.indexed import bin_path, idx_path, index_blocks, token_dtype
from megatron_satformer.data.tokenizers.exact import Tokenizer, build_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.training.loss_masks import mask_prefix
from megatron_satformer.files.output_folder import check_target, written_atomically

MARKER = "retrieval.json"
SPLITS = ("test", "valid", "train")  # in this order, so that training gives way
TRIES = 100  # examples drawn for one that is new
PARTS = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}  # of the real text
TASK_FILE = """\
# {count} examples of {name}, {length} tokens each: whether the greedy answer is the right one.
task: retrieval_{name}_{length}
tag: [retrieval, retrieval_{name}]
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{parts[:asked]|join('')}}}}"
doc_to_target: "{{{{parts[asked]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


@dataclass(frozen=True)
class Plan:
    """What to make.

    Attributes:
        tasks: Names; all that can be made if left out.
        lengths: Tokens of an example, the end of the document included.
        train_lengths: Of those to train on; the same if left out.
        depths: Percent of the text before the question, of valid and test; training's are random.
        train: Examples of each task and length to train on.
        valid: Examples of each to validate with.
        test: Examples of each to test with.
        words: Words of the vocabulary that are used at most.
        seed: Of everything that is drawn.

    Raises:
        ValueError: If one is out of its range.
    """

    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    train_lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    train: int = 1000
    valid: int = 100
    test: int = 100
    words: int = 8192
    seed: int = 1234

    def __post_init__(self) -> None:
        wrong = [name for name in self.tasks or () if name not in TASKS]
        if wrong:
            raise ValueError(f"tasks ({wrong[0]}) must be of {', '.join(TASKS)}.")
        for name in ("lengths", "train_lengths", "depths", "tasks"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} ({' '.join(map(str, values))}) must not repeat a value.")
        for name, value in (("lengths", self.lengths), ("train_lengths", self.train_lengths)):
            if value is not None and (not value or min(value) < 8):
                raise ValueError(f"{name} ({' '.join(map(str, value))}) must be at least 8.")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 100:
            told = " ".join(f"{depth:g}" for depth in self.depths)
            raise ValueError(f"depths ({told}) must be from 0 to 100 percent.")
        for name, least in {"train": 0, "valid": 0, "test": 0, "words": 16, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}.")

    def lengths_of(self, split: str) -> tuple[int, ...]:
        """The lengths of one split's examples."""
        return self.lengths if split != "train" else self.train_lengths or self.lengths


@dataclass(frozen=True)
class _Source:
    """What examples of one task and split are made with."""

    task: Task
    encoder: Encoder
    make: Callable[..., Example]
    solve: Solve
    strips: bool


def build_retrieval_data(
    save: Path,
    plan: Plan,
    how: Difficulty,
    tokenizer_options: TokenizerOptions | None = None,
    vocab_size: int | None = None,
    texts: Sequence[str] = (),
    overwrite: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, int]:
    """Writes the folder of all tasks, whole or not at all.

    Args:
        save: Folder to make.
        plan: What of.
        how: How difficult.
        tokenizer_options: Of the model; None makes a tokenizer of single words.
        vocab_size: Of the tokenizer to make.
        texts: Real text, for passkey.
        overwrite: Whether earlier tasks at `save` may be replaced.
        tell: Prints a line.

    Returns:
        Examples by "split/task_length".

    Raises:
        ValueError: If an option is wrong, or does not go with another.
    """
    check_target(save, MARKER, overwrite)
    names = _choose(plan.tasks or (), tokenizer_options, vocab_size, bool(texts))
    with written_atomically(save) as folder:
        if tokenizer_options is None:
            assert vocab_size is not None
            write_word_tokenizer(folder / "tokenizer", vocab_size)
            options = TokenizerOptions("HuggingFaceTokenizer", str(folder / "tokenizer"))
        else:
            options = tokenizer_options
        tokenizer = build_tokenizer(options)
        (folder / "lm_eval" / "data").mkdir(parents=True)
        counts: dict[str, int] = {}
        sources = {
            name: _sources(TASKS[name], how, tokenizer, plan, vocab_size, texts) for name in names
        }
        for name in names:
            lengths = sorted({n for split in SPLITS for n in plan.lengths_of(split)})
            for length in lengths:
                seen: set[bytes] = set()
                for split in SPLITS:
                    if getattr(plan, split) and length in plan.lengths_of(split):
                        key = f"{split}/{name}_{length}"
                        made = _write_split(folder, split, length, sources[name][split], plan, seen)
                        counts[key] = getattr(plan, split)
                        tell(f"retrieval: {key}, {counts[key]} examples")
                        if split == "test":
                            _write_task(folder, save, name, length, made)
        asked = {"plan": asdict(plan), "difficulty": asdict(how), "vocab_size": vocab_size}
        asked |= {"tokenizer": None if tokenizer_options is None else asdict(tokenizer_options)}
        report = json.dumps(asked | {"tasks": names, "examples": counts}, indent=2)
        (folder / MARKER).write_text(report + "\n")
    return counts


def _choose(
    asked: tuple[str, ...], options: TokenizerOptions | None, vocab_size: int | None, text: bool
) -> list[str]:
    """The tasks that can be made of these."""
    if (options is None) == (vocab_size is None):
        given = "neither is" if options is None else "both are"
        raise ValueError(
            f"tokenizer_type and vocab_size must be one of the two; {given} given. Name the "
            "tokenizer of a model, or pass --vocab-size N for a tokenizer of N single words."
        )
    if options is not None and options.tokenizer_type == "NullTokenizer":
        raise ValueError(
            "tokenizer_type (NullTokenizer) must be one of text. Leave it out: --vocab-size N "
            "alone makes a tokenizer of single words."
        )
    can = {"words"} | ({"count"} if options else set()) | ({"text"} if options and text else set())
    for name in asked:
        if TASKS[name].needs not in can:
            wanted = "a tokenizer of text" + " and --input" * (TASKS[name].needs == "text")
            raise ValueError(
                f"tasks ({name}) must come with {wanted}. Give that, or leave the task out."
            )
    names = list(asked) or [name for name, task in TASKS.items() if task.needs in can]
    if text and not any(TASKS[name].needs == "text" for name in names):
        raise ValueError(
            "input must come with the task passkey, which alone reads it, and a tokenizer of text. "
            "Add them, or leave it out."
        )
    return names


def _sources(
    task: Task,
    how: Difficulty,
    tokenizer: Tokenizer,
    plan: Plan,
    vocab_size: int | None,
    texts: Sequence[str],
) -> dict[str, _Source]:
    """By split: real text is cut in three, so that none of it is in two splits."""
    vocabulary = None
    if task.needs == "words":
        size = None if vocab_size is None else min(vocab_size, plan.words + 1)
        vocabulary = find_words(tokenizer, plan.words) if size is None else own_words(size)
    encoder = Encoder(tokenizer, vocabulary)
    found = {}
    for split, part in PARTS.items():
        given: list[object] = [vocabulary.words if vocabulary else encoder.count]
        if task.needs == "text":
            whole = "\n\n".join(texts)
            given.append(Haystack([whole[slice(*(round(len(whole) * x) for x in part))]]))
        strips = vocabulary is not None and vocabulary.strips
        maker, solver = task.maker(how, *given), task.solver(how, *given)
        found[split] = _Source(task, encoder, maker, solver, strips)
    return found


def _write_split(
    folder: Path, split: str, length: int, source: _Source, plan: Plan, seen: set[bytes]
) -> list[Example]:
    """Writes the token files of one task, split and length; returns the examples of test."""
    name, count = source.task.name, getattr(plan, split)
    numbers = [plan.seed, zlib.crc32(f"{split}/{name}".encode()), length]
    rng = np.random.default_rng(numbers)
    prefix = folder / split / f"{name}_{length}"
    prefix.parent.mkdir(exist_ok=True)
    masks = mask_prefix(prefix)
    dtype = token_dtype(source.encoder.vocab_size)
    examples = []
    with ExitStack() as stack:
        tokens, marks = (
            stack.enter_context(bin_path(at).open("wb")) for at in (str(prefix), masks)
        )
        for number in range(count):
            depth = None
            if split != "train" and source.task.at_depth:
                depth = plan.depths[number % len(plan.depths)] / 100
            example, ids, marked = _draw(source, rng, length, depth, seen)
            tokens.write(ids.astype(dtype).tobytes())
            marks.write(marked.tobytes())
            if split == "test":
                examples.append(example)
    for at, kind in ((str(prefix), dtype), (masks, np.dtype("u1"))):
        lengths = np.full(count, length, dtype=np.int32)
        idx_path(at).write_bytes(b"".join(index_blocks(kind, lengths)))
    return examples


def _draw(
    source: _Source, rng: np.random.Generator, length: int, depth: float | None, seen: set[bytes]
) -> tuple[Example, np.ndarray, np.ndarray]:
    for _ in range(TRIES):
        example = source.make(rng, length - source.encoder.before, depth)
        if source.strips:
            example = replace(example, parts=(example.parts[0][1:], *example.parts[1:]))
        ids, marks = source.encoder.encode(example, length)
        if ids.tobytes() in seen:
            continue
        seen.add(ids.tobytes())
        for number, answer in enumerate(example.answers):
            solved = source.solve(example.context(number))
            if solved != answer:
                raise AssertionError(f"{source.task.name}: {solved!r} is not {answer!r}")
        return example, ids, marks
    raise ValueError(
        f"{source.task.name} of {length} tokens must have more different examples: {TRIES} in a "
        "row were there already. Ask for fewer, or harder ones."
    )


def _write_task(
    folder: Path, save: Path, name: str, length: int, examples: Sequence[Example]
) -> None:
    """Writes the test examples for lm_eval and evaluate_retrieval; one answer of each is asked."""
    file = f"{name}_{length}.jsonl"
    rng = np.random.default_rng([zlib.crc32(name.encode()), length])
    rows = []
    for example in examples:
        asked = 2 * int(rng.integers(len(example.answers))) + 1
        row = {"parts": example.parts, "asked": asked, "depths": example.depths}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "lm_eval" / "data" / file).write_text("".join(rows), encoding="utf-8")
    # lm_eval takes data files relative to where it is run, hence the whole path
    data = json.dumps(str(save.absolute() / "lm_eval" / "data" / file))
    told = TASK_FILE.format(count=len(rows), name=name, length=length, data=data)
    (folder / "lm_eval" / f"retrieval_{name}_{length}.yaml").write_text(told, encoding="utf-8")
