"""Folders of Hugging Face datasets: which files are their data, in which order.

Two kinds: what `Dataset.save_to_disk` writes (state.json lists the .arrow files), and a snapshot
of a repository of the hub (its README.md may say which files belong to which split).
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.reading.streams import import_or_explain

# As in train-00000-of-00002.parquet, validation/0000.parquet or wikitext-test.arrow.
_SPLIT = re.compile(
    r"(?<![^-_.])(train|training|valid|validation|val|dev|test|testing|eval|evaluation)(?=[-_.]|$)",
    re.IGNORECASE,
)
# Named in a message.
_MOST = 6


def dataset_files(folder: Path) -> list[Path] | None:
    """Returns the data files of a dataset, in its order; None if the folder declares none.

    Raises:
        ValueError: If it has several splits, of which one has to be named, or files are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        return _dataset_dict(folder)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder)
    if (folder / "blobs").is_dir() and (folder / "snapshots").is_dir():
        snapshots = ", ".join(str(path) for path in sorted((folder / "snapshots").iterdir()))
        raise ValueError(
            f"input ({folder}) is the hub's cache of a repository. Name a snapshot in it: "
            f"{snapshots or 'there is none'}."
        )
    return _declared(folder)


def check_splits(folder: Path, files: Sequence[Path]) -> None:
    """Refuses Parquet or Arrow files that are, by their names, of several splits.

    Args:
        folder: What the user named.
        files: Found in it.

    Raises:
        ValueError: Naming the splits, and what to give for each.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        for place, part in enumerate(parts, start=1):
            found = _SPLIT.search(part)
            if found:
                inside = folder.joinpath(*parts[: place - 1])
                last = place == len(parts)
                path = str(inside / (f"{part[: found.end()]}*" if last else part))
                splits.setdefault(found[0].lower(), []).append(path)
                break
    if len(splits) > 1:
        _refuse_splits(folder, {name: sorted(set(paths)) for name, paths in splits.items()})


def _refuse_splits(folder: Path, splits: dict[str, list[str]]) -> None:
    shown = [f"{name} ({' '.join(paths[:_MOST])})" for name, paths in splits.items()][:_MOST]
    more = f" and {len(splits) - _MOST} more" if len(splits) > _MOST else ""
    raise ValueError(
        f"input ({folder}) is a dataset of {len(splits)} splits: {', '.join(shown)}{more}. All "
        "of them together would train on what evaluates: name in its place what to read."
    )


def _dataset_dict(folder: Path) -> list[Path]:
    content = _read_json(folder / "dataset_dict.json")
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits:
        raise ValueError(f"{folder / 'dataset_dict.json'} names no splits. Save the dataset again.")
    if len(splits) > 1:
        _refuse_splits(folder, {name: [str(folder / name)] for name in splits})
    return _saved(folder / splits[0])


def _saved(folder: Path) -> list[Path]:
    state = _read_json(folder / "state.json")
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder / 'state.json'} lists no data files. Save the dataset again."
        ) from None
    if state.get("_indices_data_files"):
        raise ValueError(
            f"input ({folder}) is a dataset with an index of its rows, as old versions saved "
            "them. Load it and save it again."
        )
    return _present(folder, files)


def _declared(folder: Path) -> list[Path] | None:
    """The files that the header of a dataset card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text("utf-8", "replace")
    header = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    if header is None or "configs:" not in header[1]:
        return None
    yaml = import_or_explain("yaml", str(card))
    try:
        configs = yaml.safe_load(header[1])["configs"]
        patterns = dict(_patterns(configs))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{card} has a header that is no dataset card. Name the data files instead of the "
            "folder."
        ) from None
    if len(patterns) > 1:
        splits = {
            name: [str(folder / pattern) for pattern in chosen] for name, chosen in patterns.items()
        }
        _refuse_splits(folder, splits)
    files = [
        file
        for chosen in patterns.values()
        for pattern in chosen
        for file in sorted(folder.glob(pattern))
        if file.is_file()
    ]
    if patterns and not files:
        raise ValueError(
            f"input ({folder}) lacks the files that its README.md names "
            f"({' '.join(next(iter(patterns.values())))}). Fetch it again."
        )
    return list(dict.fromkeys(files)) or None


def _patterns(configs: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields the splits of a card's configs, and the patterns of their files."""
    for config in configs:
        data = config.get("data_files")
        if data is None:
            if "data_dir" in config:
                yield config["config_name"], [f"{config['data_dir']}/**/*"]
            continue
        data = [data] if isinstance(data, str | dict) else list(data)
        if all(isinstance(entry, str) for entry in data):
            data = [{"split": "train", "path": data}]
        for entry in data:
            name, paths = entry["split"], entry["path"]
            name = name if len(configs) == 1 else f"{config['config_name']}/{name}"
            yield name, [paths] if isinstance(paths, str) else list(paths)


def _present(folder: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"input ({folder}) lacks {', '.join(missing) or 'data files'}, which its state.json "
            "lists. Fetch it again."
        )
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from None
