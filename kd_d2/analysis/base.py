"""The base class of the analyses, which are run, printed, saved, loaded and shown in reports."""

from __future__ import annotations

import argparse
import glob
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np

from ..errors import UserError
from ..files import check_output_folder, read_json, write_json
from ..report.page import Picture, Section, Table
from ..tables import markdown_table
from ..text import label
from ..typed_json import from_tree, members
from .models import load_models
from .registry import find_analysis

MARKER = "analysis.json"
"""The file that marks the output folder of a finished analysis; it has the name of the analysis."""
PICTURES = "pictures.json"
"""The file of an output folder that lists the pictures written there, by analysis."""
NOT_STORED = {"stored": False}
"""Metadata of a dataclass field of an `Analysis` that is not stored in its data file."""


@dataclass
class Analysis(ABC):
    """Base class of an analysis; an instance has the results of one run.

    A subclass is a dataclass; its docstring is also the text of `kd-d2 analyze NAME --help`. Its fields are stored in
    its data file and must have types that JSON supports: dataclasses, dict[str, ...], list[...], str, int, float, bool
    and None. A file with one field has only its value. NaN is stored as null and loaded as None. A subclass implements
    `run`, `sentences` and `tables`, which are printed and shown in reports, and `draw` if it writes more files.

    Class attributes:
        name: the name in the command `kd-d2 analyze NAME`.
        title: the title of the section in a report.
        file: the data file in the output folder.
        figures: pictures in the output folder, with captions; the file name is appended if the pattern contains a *.
        model_count: the minimum and maximum number of models; None for no limit.
        read_models: converts models and overrides of the command line for `run`: `load_models` or `load_distillations`.

    Attributes:
        folder: the folder in which it is saved; None before `save`.
        picture_files: names, relative to `folder`, of the pictures that `run` and `draw` wrote. A report shows only these,
            and `clear` deletes only these. None if they are not listed: a report shows the pictures that `figures` matches
            and no other analysis lists.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    file: ClassVar[str]
    figures: ClassVar[dict[str, str]] = {"*.png": ""}
    model_count: ClassVar[tuple[int, int | None]] = (1, None)
    read_models: ClassVar = staticmethod(load_models)

    folder: str | None = field(default=None, init=False, repr=False, metadata=NOT_STORED)
    picture_files: list[str] | None = field(default=None, init=False, repr=False, metadata=NOT_STORED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of the analysis; each is a keyword argument of `run`."""
        return

    @classmethod
    @abstractmethod
    def run(cls, models: Sequence[Any], output: str, **options: Any) -> Self:
        """Analyze models.

        Args:
            models: the return value of `read_models`.
            output: folder to which pictures of single images are written.
        """

    @classmethod
    def clear(cls, folder: str) -> None:
        """Delete the marker and the listed pictures of an earlier run of this analysis in the folder."""
        listed = set(_listed_pictures(folder).get(cls.name, ()))
        for pattern in cls.figures:
            for name in listed.intersection(_matches(folder, pattern)):
                os.remove(os.path.join(folder, name))
        marker = os.path.join(folder, MARKER)
        if is_analysis(folder) and read_json(marker) == {"analysis": cls.name}:
            os.remove(marker)

    def sentences(self) -> list[str]:
        """Return sentences that describe the tables and pictures."""
        return []

    def tables(self) -> list[Table]:
        """Return tables of the results."""
        return []

    def details(self) -> list[Table]:
        """Return tables that only the report shows."""
        return []

    def draw(self, folder: str) -> None:
        """Write tables and plots next to the data file; after `load`, only those based on stored fields."""
        return

    def summary(self) -> str:
        """Return the sentences and tables as text."""
        parts = self.sentences()
        for table in self.tables():
            parts += [table.caption] if table.caption else []
            rows = [[label(cell) for cell in row] for row in table.rows]
            parts.append(markdown_table([label(header) for header in table.headers], rows))
        return "\n\n".join(parts)

    def section(self) -> Section:
        """Return the section of a report, with the pictures in `folder`, if it is saved."""
        section = Section(self.title, self.sentences(), [*self.tables(), *self.details()])
        if self.folder is None:
            return section
        listed = {name for names in _listed_pictures(self.folder).values() for name in names}
        for pattern, caption in self.figures.items():
            for name in _matches(self.folder, pattern):
                if name in self.picture_files if self.picture_files is not None else name not in listed:
                    path = os.path.join(self.folder, name)
                    section.blocks.append(Picture(path, caption + (os.path.basename(name) if "*" in pattern else "")))
        return section

    def save(self, folder: str) -> None:
        """Write all files to a folder, the marker of a finished analysis last.

        Raises:
            UserError: the folder is not writable.
        """
        check_output_folder(folder, "--output")
        tree = {name: getattr(self, name) for name in self._stored()}
        write_json(os.path.join(folder, self.file), tree if len(tree) > 1 else tree.popitem()[1])
        self.draw(folder)
        self._list_pictures(folder)
        write_json(os.path.join(folder, MARKER), {"analysis": self.name})
        self.folder = folder

    @classmethod
    def load(cls, folder: str) -> Self:
        """Load what `save` wrote.

        Raises:
            UserError: a file is missing, or its content is not what this analysis writes.
        """
        path, stored = os.path.join(folder, cls.file), cls._stored()
        tree = read_json(path)
        values = members(stored, tree if len(stored) > 1 else dict.fromkeys(stored, tree), path)
        if tree == {}:
            raise UserError(f"{path}: the file is empty.")
        loaded = cls(**values)
        loaded.folder = folder
        loaded.picture_files = _listed_pictures(folder).get(cls.name)
        return loaded

    def _list_pictures(self, folder: str) -> None:
        before, own = _listed_pictures(folder), self.picture_files or ()
        listed = {key: [name for name in names if name not in own] for key, names in before.items() if key != self.name}
        if self.picture_files is not None:
            listed[self.name] = self.picture_files
        if listed != before:
            write_json(os.path.join(folder, PICTURES), listed)

    @classmethod
    def _stored(cls) -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {f.name: hints[f.name] for f in fields(cls) if f.metadata.get("stored", True)}


def _matches(folder: str, pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, root_dir=folder))


def _listed_pictures(folder: str) -> dict[str, list[str]]:
    path = os.path.join(folder, PICTURES)
    return from_tree(dict[str, list[str]], read_json(path), path) if os.path.isfile(path) else {}


def is_analysis(folder: str) -> bool:
    """Return whether the folder contains a finished analysis."""
    return os.path.isfile(os.path.join(folder, MARKER))


def load_analysis(folder: str) -> Analysis:
    """Load the results of the analysis that wrote a folder.

    Raises:
        UserError: the folder contains no finished analysis, or the content of a file is not what the analysis writes.
    """
    path = os.path.join(folder, MARKER)
    return find_analysis(members({"analysis": str}, read_json(path), path)["analysis"]).load(folder)


def nanmean(values: Any, axis: int | None = None) -> Any:
    """Return the mean of the values that are not NaN, or NaN if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)
