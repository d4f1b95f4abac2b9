"""The measured tables of the READMEs are those of the finished cells in projects/evidence."""

import re
from pathlib import Path

from kd_d2.sweep import read_matrix
from kd_d2.sweep.table import HEADERS, build_rows, format_row, read_results

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = HEADERS[1 : HEADERS.index("params M")]  # what follows from scores alone, not from the machine


def rows_of_cells(readme: str) -> list[tuple[str, dict[str, str]]]:
    """(title, columns) of every finished cell of the comparisons whose commands a README gives."""
    rows = []
    for command in re.findall(r"kd-d2 sweep (\S+\.yaml(?:.*\\\n)*.*)", readme):
        matrix = read_matrix(str(ROOT / command.split()[0]))
        results = read_results(matrix, str(ROOT / re.search(r"--results (\S+)", command)[1]))
        for row in build_rows(matrix, results, {}):
            columns = dict(zip(HEADERS, format_row(row), strict=True))
            rows.append((row.title, {name: columns[name] for name in MEASURED}))
    return rows


def measured_rows(readme: str) -> list[dict[str, str]]:
    """The rows, by column, of tables that have a column AP50; "" is the title."""
    rows, header = [], None
    for line in readme.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        values = [value.strip() for value in line.strip("|").split("|")]
        if header is None:
            header = values
        elif "AP50" in header and not values[0].startswith("--"):
            rows.append(dict(zip(header, values, strict=True)))
    return rows


READMES = sorted(path for path in ROOT.glob("projects/**/README.md") if measured_rows(path.read_text()))


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_measured_tables(path: Path) -> None:
    """Check that every measured row has the numbers of a finished cell of its title."""
    text = path.read_text()
    cells = rows_of_cells(text)
    for row in measured_rows(text):
        told = {name: row[name] for name in MEASURED if name in row}
        candidates = [columns for title, columns in cells if title == row[""]]
        assert any(told.items() <= columns.items() for columns in candidates), row
