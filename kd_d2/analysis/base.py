"""The protocol of an analysis: run, print, save, load, and show in a report."""

from __future__ import annotations

import argparse
import glob
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
from tabulate import tabulate

from ..errors import UserError
from ..files import check_output_folder, read_json, write_json
from ..report.page import Picture, Section, Table
from ..text import label
from ..typed_json import members
from .models import load_models
from .registry import find_analysis

MARKER = "analysis.json"
"""In a finished folder: the name of the analysis that made it."""
NOT_STORED = {"stored": False}
"""The metadata of a dataclass field of an `Analysis` that its data file does not have."""


@dataclass
class Analysis(ABC):
    """An analysis; an instance is what one run of it found.

    A subclass is a dataclass that says what it measures in its docstring, which is also the text of
    `kd-d2 analyze NAME --help`. Its fields are stored in its data file and must be of types that JSON has: dataclasses, dict[str, ...],
    list[...], str, int, float, bool and None; a field alone is the whole file. NaN is stored as null and loaded as None.
    It implements `run`, and `sentences` and `tables`, which are printed and shown in reports; `draw` where it writes more.

    Class attributes:
        name: of the command, `kd-d2 analyze NAME`.
        title: of its section in a report.
        file: the data file in the output folder.
        figures: pictures in the output folder with their captions; for a pattern with a *, the file's name follows the caption.
        model_count: the least and the largest number of models; None for no limit.
        read_models: makes what `run` takes of the command line's models and overrides: `load_models` or `load_distillations`.

    Attributes:
        folder: where it is saved; None before `save`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    file: ClassVar[str]
    figures: ClassVar[dict[str, str]] = {"*.png": ""}
    model_count: ClassVar[tuple[int, int | None]] = (1, None)
    read_models: ClassVar = staticmethod(load_models)

    folder: str | None = field(default=None, init=False, repr=False, metadata=NOT_STORED)

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

    def sentences(self) -> list[str]:
        """What the tables and pictures show."""
        return []

    def tables(self) -> list[Table]:
        """The results."""
        return []

    def details(self) -> list[Table]:
        """Tables for the report alone."""
        return []

    def draw(self, folder: str) -> None:
        """Write tables and plots beside the data file; of a loaded analysis, those that its fields are enough for."""
        return

    def summary(self) -> str:
        """Sentences and tables as text."""
        parts = self.sentences()
        for table in self.tables():
            align = ["left", *["right"] * (len(table.headers) - 1)]
            parts += [table.caption] if table.caption else []
            rows = [[label(cell) for cell in row] for row in table.rows]
            headers = [label(header) for header in table.headers]
            parts.append(tabulate(rows, headers, "github", disable_numparse=True, colalign=align))
        return "\n\n".join(parts)

    def section(self) -> Section:
        """The part of a report, with the pictures of `folder`."""
        section = Section(self.title, self.sentences(), [*self.tables(), *self.details()])
        for pattern, caption in self.figures.items():
            for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), pattern))):
                section.blocks.append(Picture(path, caption + (os.path.basename(path) if "*" in pattern else "")))
        return section

    def save(self, folder: str) -> None:
        """Write everything into a folder, and last what marks it as finished.

        Raises:
            UserError: it cannot be written.
        """
        check_output_folder(folder, "--output")
        tree = {name: getattr(self, name) for name in self._stored()}
        write_json(os.path.join(folder, self.file), tree if len(tree) > 1 else tree.popitem()[1])
        self.draw(folder)
        write_json(os.path.join(folder, MARKER), {"analysis": self.name})
        self.folder = folder

    @classmethod
    def load(cls, folder: str) -> Self:
        """What `save` has written.

        Raises:
            UserError: a file is missing, or has other content than this analysis writes.
        """
        path, stored = os.path.join(folder, cls.file), cls._stored()
        tree = read_json(path)
        values = members(stored, tree if len(stored) > 1 else dict.fromkeys(stored, tree), path, "the file")
        if tree == {}:
            raise UserError(f"{path}: the file is empty.")
        loaded = cls(**values)
        loaded.folder = folder
        return loaded

    @classmethod
    def _stored(cls) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {f.name: hints[f.name] for f in fields(cls) if f.metadata.get("stored", True)}


def is_analysis(folder: str) -> bool:
    """Whether an analysis has finished in this folder."""
    return os.path.isfile(os.path.join(folder, MARKER))


def load_analysis(folder: str) -> Analysis:
    """The result of whichever analysis has written into a folder.

    Raises:
        UserError: no analysis has finished there, or its files have other content than it writes.
    """
    path = os.path.join(folder, MARKER)
    return find_analysis(members({"analysis": str}, read_json(path), path, "the file")["analysis"]).load(folder)


def check_at_least(option: str, value: int | None, minimum: int) -> None:
    """Raise a UserError that names the option where its value is too small; None is an option that is not given."""
    if value is not None and value < minimum:
        raise UserError(f"{option} is {value}; it must be at least {minimum}.")


def nanmean(values: Any, axis: int | None = None) -> Any:
    """The mean of the values that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


def as_text(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    """A number of a table; `missing` for None and NaN."""
    return missing if value is None or math.isnan(value) else format(value, form)
