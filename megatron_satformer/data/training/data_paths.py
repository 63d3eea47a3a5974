"""Where a training run's data are named: on the command line, or in a file that it names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.training.blend import SPLITS


def read_data_paths(options: Mapping[str, Any]) -> dict[str, Sequence[str] | None]:
    """Returns `data_path` and the three paths per split, as if all were on the command line.

    Args:
        options: Megatron's arguments, name -> value.

    Raises:
        ValueError: If a file cannot be read or is not of its form, or two ways are mixed.
    """
    names = [f"{split}_data_path" for split in SPLITS]
    paths = {name: options[name] for name in ("data_path", *names)}
    listed, per_split = options["data_args_path"], options["per_split_data_args_path"]
    if listed is not None:
        if options["data_path"] is not None:
            raise ValueError(
                f"data_args_path ({listed}) must not be combined with data_path. Choose one way."
            )
        if options["split"] is None:
            raise ValueError(
                f"split (not given) must be given with data_args_path ({listed}): Megatron has a "
                "default beside --data-path alone. Add --split 969,30,1, say."
            )
        paths["data_path"] = read_text("data_args_path", listed).split()
    if per_split is not None:
        option = f"per_split_data_args_path ({per_split})"
        if any(options[name] is not None for name in names):
            raise ValueError(f"{option} must not be combined with {names[0]} and its like. Choose.")
        lists = read_json("per_split_data_args_path", per_split)
        for split, name in zip(SPLITS, names, strict=True):
            value = lists.get(split, 0)
            value = value.split() if isinstance(value, str) else value
            words = isinstance(value, list) and all(isinstance(part, str) for part in value)
            if not (words or value is None):
                raise ValueError(
                    f'{option} must give "{split}" a list of words, a string, or null. Add it.'
                )
            paths[name] = value
    return paths


def check_validation_sets(options: Mapping[str, Any]) -> None:
    """Refuses validation sets apart from each other where Megatron (0.19.2) cannot have them.

    Args:
        options: Megatron's arguments, name -> value.

    Raises:
        ValueError: If --multiple-validation-sets lacks what it needs.
    """
    if not options["multiple_validation_sets"]:
        return
    if not options["full_validation"]:
        raise ValueError(
            "multiple_validation_sets (True) must come with --full-validation: Megatron does not "
            "count the samples of each otherwise. Add it."
        )
    if options["valid_data_path"] is None and options["per_split_data_args_path"] is None:
        raise ValueError(
            "multiple_validation_sets (True) must come with --valid-data-path: of --data-path "
            "there is one validation set. Name train and valid apart."
        )


def read_text(option: str, path: str) -> str:
    """Returns the text of a file that an option names.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{option} ({path}) must be a text file that can be read: {error}. Mend the path."
        ) from None


def read_json(option: str, path: str) -> dict[str, Any]:
    """Returns the JSON object in a file that an option names.

    Raises:
        ValueError: If it cannot be read or holds something else.
    """
    try:
        content = json.loads(read_text(option, path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} ({path}) must be JSON: {error}. Mend it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{option} ({path}) must hold one JSON object. Mend it.")
    return content
