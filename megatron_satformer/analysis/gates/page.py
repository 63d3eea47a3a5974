"""gates.html: texts whose tokens show what each layer and head did with them.

One file that needs no network: data, style and script are in it. The page is `page.html`;
nothing but the data is put into it, as JSON.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_satformer.files.atomic import write_atomically

PLACE = "@DATA@"
HALF = np.finfo(np.float16)


@dataclass(frozen=True)
class PageText:
    """A text and what the model did with it.

    Attributes:
        title: Where it is from.
        tokens: Each token as it is to be shown; together they are the text.
        values: A gate, or another learned share; NaN where there is none. [rows, columns, tokens]
        losses: Loss of each token given those before it; None where there is none.
    """

    title: str
    tokens: list[str]
    values: np.ndarray
    losses: list[float | None]


def write_page(
    path: Path, title: str, summary: Mapping[str, Any], texts: Sequence[PageText]
) -> None:
    """Writes the page, whole or not at all.

    Values are kept as float16. What is exactly 0 stays so, and nothing else becomes 0.

    Args:
        path: File to write.
        title: Of the page.
        summary: `rows` and `columns` (labels, as layers and heads), `value` (what is shown, as
            alpha) and `notes` (sentences above the texts).
        texts: What is shown, in this order.

    Raises:
        ValueError: If a text's values, losses, tokens and labels do not fit each other.
    """
    rows, columns = list(summary["rows"]), list(summary["columns"])
    for text in texts:
        shape = (len(rows), len(columns), len(text.tokens))
        if text.values.shape != shape or len(text.losses) != len(text.tokens):
            raise ValueError(
                f"values {text.values.shape} and losses ({len(text.losses)}) of text "
                f"{text.title!r} must be by row, column and token {shape}."
            )
    data = {
        "title": title,
        "rows": rows,
        "columns": columns,
        "value": summary["value"],
        "notes": list(summary["notes"]),
        "texts": [
            {
                "title": text.title,
                "tokens": text.tokens,
                "values": base64.b64encode(_halve(text.values).tobytes()).decode(),
                "losses": [_finite(loss) for loss in text.losses],
            }
            for text in texts
        ],
    }
    page = Path(__file__).with_suffix(".html").read_text()
    write_atomically(path, page.replace(PLACE, _inline(data)).encode())


def _halve(values: np.ndarray) -> np.ndarray:
    """Little-endian float16; what it cannot hold becomes the nearest that is neither 0 nor inf."""
    halves = np.clip(values, HALF.min, HALF.max).astype("<f2")
    lost = (halves == 0) & (values != 0)
    halves[lost] = np.copysign(HALF.smallest_subnormal, values[lost])
    return halves


def _finite(loss: float | None) -> float | None:
    return None if loss is None or not math.isfinite(loss) else round(float(loss), 4)


def _inline(data: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: no text in it can end that, or start a comment."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
