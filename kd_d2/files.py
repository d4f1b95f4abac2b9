"""Atomic file writes, and JSON files."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Container, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import IO, Any

from .errors import UserError, system_error
from .signals import exit_on_signals

LONGEST_NAME = 255
"""Bytes in the name of a file."""
ABANDONED_AFTER = 3600
"""Seconds after which a temporary file that is not written to is that of a killed process."""


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a file for atomic writing: the old file is replaced only after the block has finished without an exception.

    If several processes write a file at once, the last one to finish replaces it. A link is kept, and its target replaced.
    A device or a pipe is written to directly.

    Args:
        path: target file.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    encoding = None if "b" in mode else "utf-8"
    if _is_special(path):
        with named_in_errors(path), open(path, mode, encoding=encoding) as file:
            yield file
        return
    target = os.path.realpath(path)
    remove_leftovers(glob.escape(target), ABANDONED_AFTER)
    partial = _partial(target)
    with named_in_errors(path, partial), _moved(partial, target), open(partial, mode, encoding=encoding) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def named_in_errors(path: str, temporary: str | None = None) -> Iterator[None]:
    """Name the path in system errors of this context, such as that of a full disk, in place of a temporary one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        system = system_error(error)
        if system and system.errno and system.filename in (None, temporary):
            system.filename = path
        raise


@contextlib.contextmanager
def temporary_folder(**options: Any) -> Iterator[str]:
    """Create a temporary folder, as `tempfile.TemporaryDirectory` does, that is deleted also if a signal ends the process."""
    with exit_on_signals(), tempfile.TemporaryDirectory(**options) as folder:
        yield folder


def _partial(target: str) -> str:
    """Return a path for a temporary file next to the target, which no other writer has."""
    folder, name = os.path.split(target)
    suffix = f".{uuid.uuid4().hex[:8]}.partial"
    return os.path.join(folder, os.fsdecode(os.fsencode(name)[: LONGEST_NAME - len(suffix)]) + suffix)


@contextlib.contextmanager
def _moved(partial: str, target: str) -> Iterator[None]:
    """Move a temporary file to its target at the end of this context; if there is an exception, delete it."""
    try:
        yield
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def remove_leftovers(targets: str, unchanged: float = 0) -> None:
    """Delete temporary files that killed processes left next to the targets.

    Args:
        targets: pattern of paths, as in `glob`.
        unchanged: how long they have not been written to, in seconds.
    """
    of_earlier_versions = glob.glob(f"{targets}.partial")
    for path in (*glob.glob(f"{targets}.{'[0-9a-f]' * 8}.partial"), *of_earlier_versions):
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime >= unchanged:
                os.remove(path)


def _is_special(path: str) -> bool:
    """Return whether a path is a device or a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def link_or_copy(source: str, target: str) -> None:
    """Atomically make `target` a hard link to `source`, or a copy if hard links are not supported."""
    partial = _partial(target)
    with _moved(partial, target):
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def write_text(path: str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text)


def end_last_line(path: str) -> None:
    """Append a newline to a file whose last line has none, such as one cut off by a full disk; the file may not exist."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with named_in_errors(path), open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")


def write_json(path: str, tree: Any, indent: int | None = 1) -> None:
    """Write a JSON file atomically. The tree may contain dataclasses; NaN and infinities are written as null."""
    write_text(path, json.dumps(_finite(tree), indent=indent, allow_nan=False) + "\n")


def _finite(tree: Any) -> Any:
    if is_dataclass(tree):
        return {field.name: _finite(getattr(tree, field.name)) for field in fields(tree)}
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_json(path: str) -> Any:
    """Load a JSON file.

    Raises:
        UserError: the file is missing, unreadable or not valid JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not valid JSON: {error}"
        raise UserError(f"{path} cannot be read ({reason}).") from error


def checksum(path: str) -> str:
    """Return the SHA-256 hash of a file's content; that of an unchanged file is computed once per process."""
    status = os.stat(path)
    return _checksum(os.path.realpath(path), status.st_mtime_ns, status.st_size)


@functools.cache
def _checksum(path: str, *version: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_file(path: str) -> None:
    """Create the folder of an --output file and check that it is writable.

    Raises:
        UserError: the path is a folder, or its folder cannot be created or is not writable.
    """
    if os.path.isdir(path) or not os.path.basename(path):
        raise UserError(f"--output {path} is a folder; name a file.")
    if not _is_special(path):
        check_output_folder(os.path.dirname(os.path.realpath(path)), "--output")


def distinct_name(stem: str, suffix: str, taken: Container[str]) -> str:
    """Return a file name that is not taken: the stem with the suffix, or with the first number from 2 on between them."""
    name, numbers = stem + suffix, itertools.count(2)
    while name in taken:
        name = f"{stem}-{next(numbers)}{suffix}"
    return name


def check_inputs_are_kept(drawings: Iterable[str], inputs: Iterable[str]) -> None:
    """Raise a UserError if one of the paths of drawings is that of an input."""
    files = set(map(os.path.realpath, inputs))
    for path in drawings:
        if os.path.realpath(path) in files:
            raise UserError(f"--output: the drawing {path} would overwrite an input; choose another folder.")


def check_output_folder(folder: str, key: str = "OUTPUT_DIR") -> None:
    """Create the output folder and check that it is writable; messages refer to it by the config key or option `key`.

    Raises:
        UserError: the folder cannot be created or is not writable.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key} {folder} cannot be written: {error.strerror}.") from error
