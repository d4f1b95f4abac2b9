"""Text of unknown origin, such as the names of classes and files, made fit for where it is shown."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST_MESSAGE = 2000
LONGEST_LABEL = 80
LONGEST_FILE_NAME = 200  # bytes; file systems take 255, of which a suffix or a number in front needs some
COLOR = re.compile(r"\x1b\[[\d;]*m")


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text on one line: escapes in place of characters that are not printed, such as line breaks and the escape sequences of
    terminals; without its middle where it is longer.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def label(text: str) -> str:
    """`printable`, so short that it has a place in a picture or a table."""
    return printable(text, LONGEST_LABEL)


def has_controls(text: str) -> bool:
    """Whether there are control characters, line breaks of any kind, or halves of characters."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def without_controls(text: str) -> str:
    """The text with escapes in place of control characters but for line breaks and tabs, and of halves of characters."""
    if not has_controls(text):
        return text
    return "".join(ascii(c)[1:-1] if has_controls(c) and c not in "\n\t" else c for c in text)


def file_stem(name: str) -> str:
    """The name of a file of its own in a folder, without suffix; as it is wherever it can be one."""
    cut = name.encode(errors="replace")[:LONGEST_FILE_NAME].decode(errors="ignore")
    stem = "".join("-" if c in "/\\" or has_controls(c) else c for c in cut)
    if stem == name and stem.strip("."):
        return stem
    return f"{stem.lstrip('.')}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def folder_name(title: str) -> str:
    """A title as the name of a folder: letters, digits, and _ . -"""
    cut = re.sub(r"[^\w.-]+", "-", title).lstrip(".").encode()[:100].decode(errors="ignore")
    return cut or "model"


def markdown_cell(text: str) -> str:
    """A cell of a Markdown table, which has no HTML of its own."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Comma-separated values; a text that a spreadsheet would take for a formula has an apostrophe before it."""
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
    """A line of the log without control characters of what it is about; the colors of Detectron2's own lines stay."""

    def getMessage(self) -> str:
        message = super().getMessage()
        if not has_controls(message) or self.name.startswith("kd_d2"):
            return without_controls(message)
        colors = [*COLOR.findall(message), ""]
        plain = COLOR.split(message)
        return "".join(without_controls(part) + color for part, color in zip(plain, colors, strict=True))


def keep_controls_out_of_logs() -> None:
    """From now on no log of this process has control characters but line breaks and tabs."""
    logging.setLogRecordFactory(_Record)
