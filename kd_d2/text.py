"""Sanitizing of untrusted text, such as class and file names, for display."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST_MESSAGE = 2000
LONGEST_LABEL = 80
LONGEST_FILE_NAME = 200  # bytes; the usual file system limit of 255 minus room for a suffix or a numeric prefix
COLOR = re.compile(r"\x1b\[[\d;]*m")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""A control character, a line break of any kind, or a surrogate: Unicode's categories Cc, Zl, Zp and Cs."""


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Return the text on one line, with non-printable characters escaped and its middle elided if it is too long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def label(text: str) -> str:
    """Return `printable` text that is short enough for a figure or a table."""
    return printable(text, LONGEST_LABEL)


def wrapped_label(text: str) -> str:
    """Return `printable` text for a figure, in up to three lines of the length of a label."""
    lines = textwrap.wrap(printable(text), LONGEST_LABEL, break_on_hyphens=False)
    if len(lines) > 3:
        lines = [lines[0], f"{lines[1][: LONGEST_LABEL - 4].rstrip()} ...", lines[-1]]
    return "\n".join(lines)


def composed(name: str) -> str:
    """Return a name in Unicode's form NFC, in which names that look the same, such as those with an accent, are equal."""
    return unicodedata.normalize("NFC", name)


def has_controls(text: str) -> bool:
    """Return whether the text has control characters, line breaks of any kind, or surrogates."""
    return CONTROL.search(text) is not None


def is_unicode(path: str) -> bool:
    """Return whether a path has no surrogates, which stand for bytes of a name that is not UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in path)


def without_controls(text: str) -> str:
    """Return the text with control characters, except newlines and tabs, and surrogates escaped."""
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else ascii(found[0])[1:-1], text)


def file_stem(name: str) -> str:
    """Return a unique, valid file name without suffix for `name`, unchanged where it is already valid."""
    cut = name.encode(errors="replace")[:LONGEST_FILE_NAME].decode(errors="ignore")
    stem = "".join("-" if c in "/\\" or has_controls(c) else c for c in cut)
    if stem == name and stem.strip("."):
        return stem
    return f"{stem.lstrip('.')}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def folder_name(title: str) -> str:
    """Return a folder name for a title, with letters, digits, `_`, `.` and `-` only."""
    cut = re.sub(r"[^\w.-]+", "-", title).lstrip(".").encode()[:100].decode(errors="ignore")
    return cut or "model"


def markdown_cell(text: str) -> str:
    """Return the text as a cell of a Markdown table, with `|` and `<` escaped."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return the rows as CSV. Text that a spreadsheet would evaluate as a formula is prefixed with an apostrophe."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_csv_cell(cell) for cell in row] for row in rows)
    return stream.getvalue()


def _csv_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    is_formula = cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not _is_number(cell)
    return without_controls("'" + cell if is_formula else cell)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Record(logging.LogRecord):
    """A log record with control characters escaped, except the color codes of loggers outside this package."""

    def getMessage(self) -> str:
        message = super().getMessage()
        if not has_controls(message) or self.name.startswith("kd_d2"):
            return without_controls(message)
        colors = [*COLOR.findall(message), ""]
        plain = COLOR.split(message)
        return "".join(without_controls(part) + color for part, color in zip(plain, colors, strict=True))


def keep_controls_out_of_logs() -> None:
    """Escape control characters, except newlines and tabs, in all log messages of this process from now on."""
    logging.setLogRecordFactory(_Record)
