"""The protocol of an analysis: run, print, save, load, and show in a report."""

from __future__ import annotations

import argparse
import glob
import math
import os
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from ..engine.checks import check_output_folder
from ..errors import UserError
from ..files import read_json, write_json
from ..report.page import Picture, Section
from .models import load_models
from .registry import find_analysis

MARKER = "analysis.json"
"""In a finished folder: the name of the analysis that made it."""


@dataclass
class Analysis(ABC):
    """An analysis; an instance is what one run of it found.

    A subclass is a dataclass that says what it measures in its docstring, which is also the text of
    `kd-d2 analyze NAME --help`, and implements `run` and `section`; where it writes more than its data file, also `draw`.

    Class attributes:
        name: of the command, `kd-d2 analyze NAME`.
        file: what the data file is called in the output folder.
        content: the type of `data`, built of dataclasses, dict[str, ...], list[...], str, int, float, bool and None; NaN is
            stored as null and loaded as None. `load` checks the file against it.
        model_count: the least and the largest number of models; None for no limit.
        read_models: makes what `run` takes of the command line's models and overrides: `load_models` or `load_distillations`.

    Attributes:
        data: the numbers, as the data file has them.
        folder: where they are saved; None before `save`.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    content: ClassVar[Any]
    model_count: ClassVar[tuple[int, int | None]] = (1, None)
    read_models: ClassVar = staticmethod(load_models)

    data: Any
    folder: str | None = field(default=None, kw_only=True)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the analysis's own options; each is a keyword argument of `run`."""
        return

    @classmethod
    @abstractmethod
    def run(cls, models: Sequence[Any], output: str, **options: Any) -> Self:
        """Analyze models.

        Args:
            models: what `read_models` returns.
            output: folder in which pictures of single images are written as they are drawn.
        """

    @abstractmethod
    def section(self) -> Section:
        """The part of a report; pictures are those of `folder`."""

    def summary(self) -> str:
        """What the command prints at its end."""
        return ""

    def draw(self, folder: str) -> None:
        """Write tables and plots beside the data file; of a loaded analysis, those that `data` is enough for."""
        return

    def save(self, folder: str) -> None:
        """Write everything into a folder, and last what marks it as finished.

        Raises:
            UserError: it cannot be written.
        """
        check_output_folder(folder, "--output")
        write_json(os.path.join(folder, self.file), _as_tree(self.data))
        self.draw(folder)
        write_json(os.path.join(folder, MARKER), {"analysis": self.name})
        self.folder = folder

    @classmethod
    def load(cls, folder: str) -> Self:
        """What `save` has written.

        Raises:
            UserError: a file is missing, or has other content than this analysis writes.
        """
        path = os.path.join(folder, cls.file)
        data = _from_tree(cls.content, read_json(path), path, "the file")
        if data in ({}, []):
            raise UserError(f"{path}: the file is empty.")
        return cls(data, folder=folder)

    def pictures(self, pattern: str, caption: str = "", *, names: bool = False) -> list[Picture]:
        """The folder's pictures of a pattern such as "curves.png" or "channels/*.png".

        Args:
            names: put the file's name behind the caption.
        """
        paths = sorted(glob.glob(os.path.join(glob.escape(self.folder), pattern)))
        return [Picture(path, caption + (os.path.basename(path) if names else "")) for path in paths]


def is_analysis(folder: str) -> bool:
    """Whether an analysis has finished in this folder."""
    return os.path.isfile(os.path.join(folder, MARKER))


def load_analysis(folder: str) -> Analysis:
    """The result of whichever analysis has written into a folder.

    Raises:
        UserError: no analysis has finished there, or its files have other content than it writes.
    """
    path = os.path.join(folder, MARKER)
    return find_analysis(_from_tree(_Marker, read_json(path), path, "the file").analysis).load(folder)


@dataclass
class _Marker:
    analysis: str


def check_at_least(option: str, value: int, minimum: int) -> None:
    """Raise a UserError that names the option where its value is too small."""
    if value < minimum:
        raise UserError(f"{option} is {value}; it must be at least {minimum}.")


def nanmean(values: Any, axis: int | None = None) -> Any:
    """The mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


def as_text(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    """A number of a table; `missing` for None and NaN."""
    return missing if value is None or math.isnan(value) else format(value, form)


def _as_tree(data: Any) -> Any:
    if is_dataclass(data):
        return {f.name: _as_tree(getattr(data, f.name)) for f in fields(data)}
    if isinstance(data, dict):
        return {key: _as_tree(value) for key, value in data.items()}
    return [_as_tree(value) for value in data] if isinstance(data, list | tuple) else data


def _from_tree(kind: Any, tree: Any, path: str, place: str) -> Any:
    """A tree of JSON as an instance of a type: see `Analysis.content`."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        members = _checked(dict, tree, path, place)
        missing = sorted(hints.keys() - members.keys())
        if missing:
            raise UserError(f"{path}: {place} has no {missing[0]!r}.")
        return kind(**{name: _from_tree(hint, members[name], path, repr(name)) for name, hint in hints.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        members = _checked(dict, tree, path, place)
        return {name: _from_tree(arguments[1], value, path, repr(name)) for name, value in members.items()}
    if origin is list:
        return [
            _from_tree(arguments[0], value, path, f"an entry of {place}") for value in _checked(list, tree, path, place)
        ]
    if origin in (Union, types.UnionType):
        return _checked(arguments, tree, path, place)
    return _checked(kind, tree, path, place)


def _checked(kinds: type | tuple[type, ...], tree: Any, path: str, place: str) -> Any:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(tree, allowed) or (isinstance(tree, bool) and bool not in kinds):
        names = " or ".join(
            {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(k, "a number") for k in kinds
        )
        raise UserError(f"{path}: {place} is {str(tree)[:60]!r}, not {names}.")
    return tree
