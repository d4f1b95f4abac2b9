"""Tables of measurements on the pages in projects, which must match the finished cells in projects/evidence."""

import functools
import re
from pathlib import Path

from kd_d2.sweep import read_matrix
from kd_d2.sweep.table import HEADERS, build_rows, format_row, read_results

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = HEADERS[1 : HEADERS.index("params M")]  # columns that depend only on scores, not on the machine


@functools.cache
def rows_of_cells(page: str) -> list[tuple[str, dict[str, str]]]:
    """Return (title, columns) of every finished cell of the sweeps whose commands are on a page."""
    rows = []
    for command in re.findall(r"kd-d2 sweep (\S+\.yaml(?:.*\\\n)*.*)", page):
        matrix = read_matrix(str(ROOT / command.split()[0]))
        results = read_results(matrix, str(ROOT / re.search(r"--results (\S+)", command)[1]))
        for row in build_rows(matrix, results, {}):
            columns = dict(zip(HEADERS, format_row(row), strict=True))
            rows.append((row.title, {name: columns[name] for name in MEASURED}))
    return rows


def measured_rows(page: str) -> list[dict[str, str]]:
    """Return the rows, by column, of tables that have a column AP50; the title is in ""."""
    rows, header = [], None
    for line in page.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        values = [value.strip() for value in line.strip("|").split("|")]
        if header is None:
            header = values
        elif "AP50" in header and not values[0].startswith("--"):
            rows.append(dict(zip(header, values, strict=True)))
    return rows


PAGES = sorted(path for path in ROOT.glob("projects/**/*.md") if measured_rows(path.read_text()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT / "projects")))
def test_measured_tables(path: Path) -> None:
    """Check that every measured row has the numbers of a finished cell with its title."""
    project = path.relative_to(ROOT / "projects").parts[0]
    commands = [path, ROOT / "projects/results.md", *ROOT.glob(f"projects/{project}/notes.md")]
    cells = [cell for page in commands for cell in rows_of_cells(page.read_text())]
    for row in measured_rows(path.read_text()):
        told = {name: row[name] for name in MEASURED if name in row}
        candidates = [columns for title, columns in cells if title == row[""]]
        assert any(told.items() <= columns.items() for columns in candidates), row
