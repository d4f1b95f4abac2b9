"""The matrix of a comparison: its cells and their settings."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from ..config import (
    KD_META_ARCH,
    check_overrides,
    detector_of,
    load_config,
    read_config,
    validate_kd_config,
)
from ..config_files import as_overrides, find_beside, leaves
from ..errors import UserError, check_seed
from ..plain_yaml import read_plain_yaml
from .settings import check_test_sets

KINDS = {str: "text", int: "whole number", dict: "mapping"}

PATH_KEYS = ("MODEL.WEIGHTS", "MODEL.KD.TEACHER.CONFIG_FILE", "MODEL.KD.TEACHER.WEIGHTS")
"""Keys of files, besides DATASETS.COCO_JSON."""

SET_BY_SWEEP = {"SEED": "the cell's seeds", "OUTPUT_DIR": "the option --output"}
"""Keys that a sweep sets in each training, and where they come from."""


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: the name in the matrix.
        title: the title in the table.
        config: the config file.
        opts: overrides of the config: key, value, ...
        seeds: the seeds for training.
    """

    name: str
    title: str
    config: str
    opts: tuple[Any, ...] = ()
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Matrix:
    """A complete comparison.

    Attributes:
        cells: in the order of the table, without the teacher.
        baseline: the cell that gains are relative to.
        student: the cell of the plain student, from which the gap to the teacher is measured.
        teacher: trained first if the matrix has its config; None if the students' config names a teacher, or all cells
            are plain detectors.
    """

    cells: tuple[Cell, ...]
    baseline: str
    student: str | None
    teacher: Cell | None
    path: str = field(repr=False)

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def taught_cell(self, opts: list[Any]) -> Cell | None:
        """Return a cell whose config, with these overrides, names a teacher, or None if all are plain detectors."""
        configs = ((cell, load_config(cell.config, [*opts, *cell.opts])) for cell in self.cells)
        return next((cell for cell, cfg in configs if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH), None)

    def select(self, names: list[str] | None, seeds: list[int] | None) -> list[tuple[Cell, int]]:
        """Return (cell, seed) pairs, sorted by seed.

        Raises:
            UserError: a name is not in the matrix, no cell has a seed, or no selected cell has a selected seed.
        """
        known = [cell.name for cell in self.cells]
        for name in names or []:
            if name not in known:
                raise UserError(f"{self.path} has no cell {name!r}; available: {', '.join(known)}.")
        listed = sorted({seed for cell in self.cells for seed in cell.seeds})
        for seed in seeds or []:
            if seed not in listed:
                raise UserError(
                    f"{self.path} has no cell with the seed {seed}; available: {', '.join(map(str, listed))}."
                )
        pairs = [(c, s) for c in self.cells for s in c.seeds if names is None or c.name in names]
        selected = [(c, s) for c, s in pairs if seeds is None or s in seeds]
        if not selected:
            raise UserError(
                f"{self.path}: the cells in --cells have none of the seeds in --seeds; available: "
                f"{', '.join(map(str, sorted({s for _, s in pairs})))}."
            )
        return sorted(selected, key=lambda pair: pair[1])

    def reduced_to(self, names: list[str] | None) -> Matrix:
        """Return the matrix with only these cells, baseline and plain student; with all cells for None."""
        kept = {cell.name for cell in self.cells} if names is None else {*names, self.baseline, self.student}
        return replace(self, cells=tuple(cell for cell in self.cells if cell.name in kept))

    def check_configs(self, opts: list[Any]) -> None:
        """Raise a UserError if the config of a cell or of the teacher, with these overrides, is invalid.

        All are evaluated on the same dataset. The teacher's files need not exist: it may be untrained.
        """
        for key, place in SET_BY_SWEEP.items():
            if key in opts[::2]:
                raise UserError(f"Sweep {self.path}: {key} on the command line has no effect; use {place}.")
        taught = [] if self.teacher is None else ["MODEL.KD.TEACHER.CONFIG_FILE", self.teacher.config]
        cells, first = (*self.cells, *filter(None, [self.teacher])), None
        for cell in cells:
            check_overrides(cell.opts, f"Sweep {self.path}: cell {cell.name}")
            cfg = read_config(cell.config, [*opts, *taught, *cell.opts])
            validate_kd_config(cfg)
            plain = ["MODEL.META_ARCHITECTURE", detector_of(cfg)]
            tested = tuple(load_config(cell.config, [*opts, *cell.opts, *plain]).DATASETS.TEST)
            check_test_sets(cell.config, tested)
            first = first or tested
            if tested != first:
                raise UserError(
                    f"Sweep {self.path}: the cell {cell.name} is evaluated on {tested[0]} and {cells[0].name} on {first[0]}, so that they cannot "
                    "be compared; change DATASETS.TEST of one."
                )


def read_matrix(path: str) -> Matrix:
    """Read a matrix from YAML.

    The keys are `config` (of the students), `baseline`, `student`, optionally `teacher` (`config`, `fragments`, `opts`,
    `seeds`), and `cells`. The keys of a cell are `title`, `fragments` (configs merged into the config, in order),
    `opts` (keys and values as in a config, merged last), `seeds`, and `config` if it is not the common one. Configs are
    paths relative to the matrix, or names (see `config_files.find_config_file`).

    Raises:
        UserError: a file is missing, a key is unknown, or two cells have the same title.
    """
    tree = read_plain_yaml(path, f"Sweep {path}")
    _check(path, "the sweep", tree, {"config": str, "baseline": str, "student": str, "teacher": dict, "cells": dict})
    path = os.path.abspath(path)
    entries = tree.get("cells") or {}
    for name in entries:
        _check_name(path, name)
    cells = tuple(_read_cell(path, name, entry or {}, tree.get("config")) for name, entry in entries.items())
    _check_titles(path, [cell.title for cell in cells])
    for key in ("baseline", "student"):
        if key in tree and tree[key] not in entries:
            raise UserError(f"Sweep {path}: {key} {tree[key]!r} is not a cell; available: {', '.join(entries)}.")
    if not cells or "baseline" not in tree:
        raise UserError(f"Sweep {path} needs cells, and a baseline among them.")
    teacher = _read_cell(path, "teacher", tree["teacher"] or {}, tree.get("config")) if "teacher" in tree else None
    return Matrix(cells, tree["baseline"], tree.get("student"), teacher, path)


def _read_cell(path: str, name: str, entry: dict[str, Any], common: str | None) -> Cell:
    """Return the cell of an entry in the matrix `path`; `common` is the config of cells without their own."""
    where = f"Sweep {path}: cell {name}"
    known = {"title": str, "fragments": [str], "opts": dict, "seeds": [int], "config": str}
    _check(path, f"cell {name}", entry, known)
    config = entry.get("config", common)
    if not config:
        raise UserError(f"{where} has no config.")
    files = [find_beside(file, path, where) for file in entry.get("fragments", ())]
    opts = list(chain.from_iterable(leaves(entry.get("opts") or {})))
    for key, place in SET_BY_SWEEP.items():
        if key in opts[::2]:
            raise UserError(f"{where} sets {key} in opts, without effect; use {place}.")
    seeds = tuple(dict.fromkeys(entry.get("seeds") or (0,)))
    for seed in seeds:
        check_seed(f"Sweep {path}: a seed of cell {name}", seed)
    of_fragments = chain.from_iterable(_with_paths_beside(as_overrides(file), file) for file in files)
    return Cell(
        name=name,
        title=entry.get("title", name),
        config=find_beside(config, path, where),
        opts=(*of_fragments, *_with_paths_beside(opts, path)),
        seeds=seeds,
    )


def _check_name(path: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(
            f"Sweep {path}: the cell {name!r} is not a valid folder name; use up to 100 letters, digits, and the characters _ . + -"
        )
    if name == "teacher":
        raise UserError(f"Sweep {path}: no cell can be named 'teacher', the name of the teacher's row: rename it.")


def _check_titles(path: str, titles: list[str]) -> None:
    for title in titles:
        if title == "teacher":
            raise UserError(
                f"Sweep {path}: no cell can have the title 'teacher', that of the teacher's row: change it."
            )
        if titles.count(title) > 1:
            raise UserError(f"Sweep {path}: two cells have the title {title!r}; change one.")


def _with_paths_beside(opts: list[Any], path: str) -> list[Any]:
    """Replace relative paths in overrides that exist beside the file `path`, and not in the working directory."""

    def beside(value: Any) -> Any:
        if not isinstance(value, str) or not value or "://" in value:
            return value
        here, mark, query = os.path.expanduser(value).partition("?")
        file = os.path.join(os.path.dirname(path), here)
        return file + mark + query if os.path.exists(file) and not os.path.exists(here) else value

    values = []
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key == "DATASETS.COCO_JSON" and isinstance(value, list):
            value = [[e[0], *map(beside, e[1:])] if isinstance(e, list) and e else e for e in value]
        values.append(beside(value) if key in PATH_KEYS else value)
    return list(chain.from_iterable(zip(opts[::2], values, strict=True)))


def _check(path: str, what: str, entry: Any, known: dict[str, Any]) -> None:
    """Raise a UserError unless the entry maps known keys to values of their types; [str] is a list of str."""
    if not isinstance(entry, dict):
        raise UserError(f"Sweep {path}: {what} must be a mapping of keys to values.")
    for key, value in entry.items():
        if key not in known:
            raise UserError(
                f"Sweep {path}: {what} has the unknown key {key!r}; it may have {', '.join(sorted(known))}."
            )
        kind = known[key]
        if isinstance(kind, list):
            words = f"a list of {KINDS[kind[0]]}s"
            fits = isinstance(value, list) and all(type(v) is kind[0] for v in value)
        else:
            words = f"a {KINDS[kind]}"
            fits = type(value) is kind or (kind is dict and value is None)
        if not fits:
            raise UserError(f"Sweep {path}: {key} of {what} is {value!r}; it must be {words}.")
