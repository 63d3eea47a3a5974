"""gates.html: texts whose tokens show what each layer and head did with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_satformer.files.atomic import write_atomically


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
    """Writes the page, whole or not at all."""
    body = "".join(f"<p>{escape(''.join(text.tokens))}</p>" for text in texts)
    page = f"<!DOCTYPE html><html lang=en><title>{escape(title)}</title><body>{body}</body></html>"
    write_atomically(path, page.encode())
