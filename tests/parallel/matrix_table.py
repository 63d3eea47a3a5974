"""--matrix-table FILE: write what the parity matrix measured between the marks in that file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_satformer.model.architectures import TABLE
from tests.parallel.layouts import ROWS

# Those of the package, not what the tests add.
EVERY = [name for name, place in TABLE.items() if place.startswith("megatron_satformer.")]
BEGIN, END = "<!-- parity matrix: begin -->", "<!-- parity matrix: end -->"


def measured(reports: list[pytest.TestReport]) -> Iterator[tuple]:
    for report in reports:
        yield from (value for name, value in report.user_properties if name == "cell")


def table(cells: list[tuple]) -> str:
    """Markdown: a line per layout, loss / gradient norm per architecture."""
    found = {(name, architecture): (loss, norm) for name, architecture, loss, norm in cells}
    lines = ["| layout | ranks | " + " | ".join(EVERY) + " |", "|---|---|" + "---|" * len(EVERY)]
    for row in ROWS:
        pairs = [found.get((row.name, architecture)) for architecture in EVERY]
        shown = [f"{pair[0]:.0e} / {pair[1]:.0e}" if pair else "" for pair in pairs]
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name} | {row.ranks} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def pytest_addoption(parser):
    parser.addoption("--matrix-table", metavar="FILE", help="write the parity matrix into FILE")


def pytest_terminal_summary(terminalreporter, config):
    target = config.getoption("--matrix-table")
    cells = list(measured(terminalreporter.stats.get("passed", [])))
    if not target or not cells:
        return
    path = Path(target)
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(cells)}\n{END}{after}")
    terminalreporter.write_line(f"{len(cells)} cells written to {path}")
