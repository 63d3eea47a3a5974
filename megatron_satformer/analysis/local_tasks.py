r"""Makes data for evaluation tasks that run offline out of any text that was not trained on.

Four tasks in the format of lm-eval, whose YAML files stand in examples/evaluate/tasks:

    perplexity  whole documents, for bits per byte
    last_word   the last word of a passage, one that the passage holds already (as LAMBADA's mostly)
    ending      which of four endings follows a passage (as HellaSwag)
    recall      the word that followed six words of the passage, which are repeated after it (as the
                completion tasks of retrieval suites)

Must not know: models, tokenizers.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.data.reading.documents import read_documents
from megatron_satformer.data.reading.inputs import find_inputs
from megatron_satformer.data.training.blend import parse_split, split_documents
from megatron_satformer.files.output_folder import check_target, written_atomically

WORD = re.compile(r"\S+")
PLAIN_WORD = re.compile(r"[^\W\d_]{4,}")
CUE_WORDS, ENDING_WORDS, CHOICES = 6, 16, 4
PLACEHOLDER = "@DATA@"  # in the YAML files, for the folder of the data
TRIES = 20  # passages looked at per sample before a text is held to have none
MARKER = "tasks.json"


@dataclass(frozen=True)
class LocalTasks:
    """What was made.

    Attributes:
        folder: Holds one YAML file per task and data/*.jsonl; for lm_eval's --include_path.
        samples: Number of samples of each task.
        documents: Number of documents that they were taken from.
    """

    folder: Path
    samples: dict[str, int]
    documents: int

    def __str__(self) -> str:
        counts = ", ".join(f"local_{name} {count}" for name, count in self.samples.items())
        return f"{self.folder}: {counts}, from {self.documents} documents"


class _Text:
    """A document, its words and where they stand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spans = [match.span() for match in WORD.finditer(text)]

    def __len__(self) -> int:
        return len(self.spans)

    def words(self, first: int, end: int) -> str:
        """Words first to end (exclusive) as they stand in the text."""
        return self.text[self.spans[first][0] : self.spans[end - 1][1]]

    def follows_a_space(self, word: int) -> bool:
        """Whether one space, not a line break, is between this word and the one before."""
        return self.text[self.spans[word - 1][1] : self.spans[word][0]] == " "


def build_local_tasks(
    values: Sequence[str],
    save: Path,
    templates: Path,
    split: str | None = None,
    json_key: str = "text",
    document_separator: str | None = None,
    on_unknown: str = "error",
    samples: int = 200,
    passage_words: int = 60,
    seed: int = 1234,
    overwrite: bool = False,
) -> LocalTasks:
    """Writes the folder of tasks, whole or not at all.

    Args:
        values: Files, globs or folders, as tools/preprocess_data.py takes them.
        save: Folder to make.
        templates: Folder of the YAML files.
        split: As in training: its validation documents alone are used. None: all documents.
        json_key: Whose text is used.
        document_separator: Between two documents of plain text.
        on_unknown: Whether a file of an unknown kind in a folder is an "error", or to "skip".
        samples: Most samples per task; perplexity takes a document each.
        passage_words: Words of a passage; a model must be made for about twice as many tokens.
        seed: Of the choice of passages.
        overwrite: Whether earlier tasks at `save` may be replaced.

    Raises:
        ValueError: If an option is wrong, or the text holds no sample of a task.
    """
    check_target(save, MARKER, overwrite)
    for name, value, least in (("samples", samples, 1), ("passage_words", passage_words, 20)):
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}.")
    sources = find_inputs(values, document_separator, on_unknown).sources
    texts = [text for (text,) in read_documents(sources, [json_key], document_separator) if text]
    if split is not None:
        first, end = split_documents(parse_split(split), len(texts))[1] or (0, 0)
        if first >= end:
            raise ValueError(f"split ({split}) leaves validation none of {len(texts)} documents.")
        texts = texts[first:end]
    documents = [_Text(text) for text in texts if text.strip()]
    rng = random.Random(seed)
    shuffled = rng.sample(documents, len(documents))
    rows = {"perplexity": [{"text": document.text} for document in shuffled[:samples]]}
    for name, take in TAKE.items():
        rows[name] = _collect(documents, take, samples, passage_words, rng)
        if not rows[name]:
            raise ValueError(
                f"input ({' '.join(values)}) holds no sample of local_{name} in {len(documents)} "
                f"documents. Give more text, or a smaller --passage-words than {passage_words}."
            )
    _write(rows, save, templates)
    return LocalTasks(save, {name: len(found) for name, found in rows.items()}, len(documents))


Row = dict[str, Any]
Take = Callable[[Sequence[_Text], int, random.Random], Row | None]


def _collect(
    documents: Sequence[_Text], take: Take, samples: int, words: int, rng: random.Random
) -> list[Row]:
    long = [document for document in documents if len(document) >= words + ENDING_WORDS]
    found: dict[str, Row] = {}
    for _ in range(samples * TRIES if long else 0):
        row = take(long, words, rng)
        if row is not None:
            found[row["context"]] = row
        if len(found) == samples:
            break
    return list(found.values())


def _passage(documents: Sequence[_Text], words: int, rng: random.Random) -> tuple[_Text, int]:
    document = rng.choice(documents)
    return document, rng.randrange(len(document) - words - ENDING_WORDS + 1)


def _take_last_word(documents: Sequence[_Text], words: int, rng: random.Random) -> Row | None:
    document, first = _passage(documents, words, rng)
    last = first + words
    answer = document.words(last, last + 1)
    context = document.words(first, last)
    known = PLAIN_WORD.fullmatch(answer) and answer in WORD.findall(context)
    if not known or not document.follows_a_space(last):
        return None
    return {"context": context, "answer": answer}


def _take_ending(documents: Sequence[_Text], words: int, rng: random.Random) -> Row | None:
    document, first = _passage(documents, words, rng)
    last = first + words
    endings = [document.words(last, last + ENDING_WORDS)]
    for _ in range(CHOICES - 1):
        other, begin = _passage(documents, words, rng)
        endings.append(other.words(begin, begin + ENDING_WORDS))
    if len(set(endings)) < CHOICES:
        return None
    label = rng.randrange(CHOICES)
    choices = [*endings[1:]]
    choices.insert(label, endings[0])
    return {"context": document.words(first, last), "choices": choices, "label": label}


def _take_recall(documents: Sequence[_Text], words: int, rng: random.Random) -> Row | None:
    document, first = _passage(documents, words, rng)
    passage = document.words(first, first + words)
    cue = first + rng.randrange(words - CUE_WORDS - 1)
    after = cue + CUE_WORDS
    question, answer = document.words(cue, after), document.words(after, after + 1)
    plain = PLAIN_WORD.match(answer)
    # a cue that stands there twice has two answers
    if plain is None or passage.count(question) > 1 or not document.follows_a_space(after):
        return None
    return {"context": passage, "cue": question, "answer": plain.group()}


TAKE: dict[str, Take] = {
    "last_word": _take_last_word,
    "ending": _take_ending,
    "recall": _take_recall,
}


def _write(rows: dict[str, list[Row]], save: Path, templates: Path) -> None:
    found = sorted(templates.glob("*.yaml"))
    if not found:
        raise ValueError(f"templates ({templates}) must be a folder with .yaml files.")
    with written_atomically(save) as folder:
        (folder / "data").mkdir()
        for name, content in rows.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
            (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        for template in found:
            # lm_eval takes data files relative to where it is run, hence the whole path
            text = template.read_text(encoding="utf-8")
            data = json.dumps(str(save.absolute() / "data"))[1:-1]
            (folder / template.name).write_text(text.replace(PLACEHOLDER, data), encoding="utf-8")
        counts = {f"local_{name}": len(content) for name, content in rows.items()}
        (folder / MARKER).write_text(json.dumps(counts, indent=2) + "\n")
