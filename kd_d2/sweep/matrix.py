"""The matrix of a comparison: its cells and their settings."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import (
    KD_META_ARCH,
    changed_keys,
    check_overrides,
    detector_of,
    load_config,
    load_teacher_config,
    read_config,
    validate_kd_config,
)
from ..config_files import as_overrides, find_beside, leaves
from ..data import register_synthetic
from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError, check_seed
from ..files import checksum
from ..lazy_teacher import is_lazy_config, lazy_teacher_files
from ..plain_yaml import read_plain_yaml

KINDS = {str: "text", int: "whole number", dict: "mapping"}

# Keys for the locations of files and the execution of a training, which do not define what is measured.
LOCATION_KEYS = (
    "OUTPUT_DIR",
    "DATASETS.COCO_JSON",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.KD.TEACHER.CONFIG_FILE",
    "MODEL.KD.TEACHER.WEIGHTS",
    "MODEL.KD.TEACHER.COMPILE",
    "MODEL.KD.TEACHER.CHANNELS_LAST",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHANNELS_LAST",
    "SOLVER.COMPILE",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_MINUTES",
    "SOLVER.CHECKPOINTS_TO_KEEP",
    "SOLVER.CHECKPOINT_ASYNC",
    "TEST.EVAL_PERIOD",
    "SEED",
)

PATH_KEYS = ("MODEL.WEIGHTS", "MODEL.KD.TEACHER.CONFIG_FILE", "MODEL.KD.TEACHER.WEIGHTS")
"""Keys of files, besides DATASETS.COCO_JSON."""

SET_BY_SWEEP = {"SEED": "the cell's seeds", "OUTPUT_DIR": "the option --output"}
"""Keys that a sweep sets in each training, and where they come from."""

TEACHER = "files of the teacher"
WEIGHTS = "file of MODEL.WEIGHTS"
TRAIN_ANNOTATIONS, TEST_ANNOTATIONS = "annotations of DATASETS.TRAIN", "annotations of DATASETS.TEST"
OWN_METHODS = "code of the methods from --import"
CHECKSUMS = frozenset({TEACHER, WEIGHTS, TRAIN_ANNOTATIONS, TEST_ANNOTATIONS, OWN_METHODS})
"""Settings that are checksums of files and code."""


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
            _check_test_sets(cell.config, tested)
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
    common = tree.get("config")

    def cell(name: str, entry: dict[str, Any] | None) -> Cell:
        entry = entry or {}
        _check(
            path, f"cell {name}", entry, {"title": str, "fragments": [str], "opts": dict, "seeds": [int], "config": str}
        )
        config = entry.get("config", common)
        if not config:
            raise UserError(f"Sweep {path}: cell {name} has no config.")
        files = [find_beside(file, path, f"Sweep {path}: cell {name}") for file in entry.get("fragments", ())]
        own = list(chain.from_iterable(leaves(entry.get("opts") or {})))
        for key, place in SET_BY_SWEEP.items():
            if key in own[::2]:
                raise UserError(f"Sweep {path}: cell {name} sets {key} in opts, without effect; use {place}.")
        opts = list(chain.from_iterable(_with_paths_beside(as_overrides(file), file) for file in files))
        opts = (*opts, *_with_paths_beside(own, path))
        for seed in entry.get("seeds") or ():
            check_seed(f"Sweep {path}: a seed of cell {name}", seed)
        return Cell(
            name=name,
            title=entry.get("title", name),
            config=find_beside(config, path, f"Sweep {path}: cell {name}"),
            opts=opts,
            seeds=tuple(dict.fromkeys(entry.get("seeds") or (0,))),
        )

    for name in tree.get("cells") or {}:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]{0,99}", name):
            raise UserError(
                f"Sweep {path}: the cell {name!r} is not a valid folder name; use up to 100 letters, digits, and the characters _ . + -"
            )
        if name == "teacher":
            raise UserError(f"Sweep {path}: no cell can be named 'teacher', the name of the teacher's row: rename it.")
    cells = tuple(cell(name, entry) for name, entry in (tree.get("cells") or {}).items())
    names, titles = [c.name for c in cells], [c.title for c in cells]
    for title in titles:
        if title == "teacher":
            raise UserError(
                f"Sweep {path}: no cell can have the title 'teacher', that of the teacher's row: change it."
            )
        if titles.count(title) > 1:
            raise UserError(f"Sweep {path}: two cells have the title {title!r}; change one.")
    for key in ("baseline", "student"):
        if key in tree and tree[key] not in names:
            raise UserError(f"Sweep {path}: {key} {tree[key]!r} is not a cell; available: {', '.join(names)}.")
    if not cells or "baseline" not in tree:
        raise UserError(f"Sweep {path} needs cells, and a baseline among them.")
    teacher = cell("teacher", tree["teacher"]) if "teacher" in tree else None
    return Matrix(cells, tree["baseline"], tree.get("student"), teacher, path)


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


def measured_settings(config: str, opts: list[Any]) -> dict[str, Any]:
    """Return the keys of a config that determine the result: all with non-default values, except LOCATION_KEYS.

    A key that a later version adds does not change the settings as long as it has its default value. Checksums are added
    of the initial weights as `WEIGHTS`, of a teacher's weights and config as `TEACHER`, and of the annotation files, if all
    exist, as `TRAIN_ANNOTATIONS` and `TEST_ANNOTATIONS`, and of the modules of methods from elsewhere, without comments and
    formatting, as `OWN_METHODS`.

    Raises:
        UserError: see `load_config`, or DATASETS.TEST does not name exactly one dataset, whose results are compared.
    """
    cfg = load_config(config, opts)
    _check_test_sets(config, cfg.DATASETS.TEST)
    settings = without_locations(cfg)
    settings[WEIGHTS] = _checksum(_content_of(cfg.MODEL.WEIGHTS))
    for key, names in ((TRAIN_ANNOTATIONS, cfg.DATASETS.TRAIN), (TEST_ANNOTATIONS, cfg.DATASETS.TEST)):
        files = _annotation_files(cfg, names)
        if all(map(os.path.isfile, files)):
            settings[key] = _checksum(" ".join(map(checksum, files)))
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        settings[TEACHER] = _checksum(_teacher_files(cfg))
        if code := _code_of_own_methods(cfg.MODEL.KD.DISTILLERS):
            settings[OWN_METHODS] = _checksum(code)
    return settings


def _check_test_sets(config: str, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise UserError(f"{config}: DATASETS.TEST names {len(names)} datasets; a sweep needs exactly one.")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code_of_own_methods(names: Sequence[str]) -> str:
    """Return the syntax trees of the modules that define these methods and their base classes, except known packages."""
    known = {__name__.partition(".")[0], "torch", *sys.stdlib_module_names}
    classes = chain.from_iterable(DISTILLER_REGISTRY.get(name).__mro__ for name in names)
    modules = sorted({cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in known})
    code = []
    for name in modules:
        with contextlib.suppress(OSError, TypeError):  # of a module without a file
            code.append(ast.dump(ast.parse(inspect.getsource(sys.modules[name]))))
    return " ".join(code)


def _annotation_files(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Return the annotation files of datasets; "" for one that has none."""
    register_synthetic()
    entries = {name: json_file for name, json_file, _ in cfg.DATASETS.COCO_JSON}
    return [entries.get(name) or MetadataCatalog.get(name).get("json_file", "") for name in names]


def _teacher_files(cfg: CfgNode) -> str:
    """Return the teacher's config and the hash of its checkpoint; of a LazyConfig, which may run code, the file's hash."""
    if is_lazy_config(cfg.MODEL.KD.TEACHER.CONFIG_FILE):
        return " ".join(_content_of(path) for path in lazy_teacher_files(cfg.MODEL.KD.TEACHER))
    teacher = load_teacher_config(cfg)
    keys = {k: v for k, v in without_locations(teacher).items() if k.startswith(("MODEL.", "INPUT."))}
    return f"{keys} {_content_of(teacher.MODEL.WEIGHTS)}"


def _content_of(name: str) -> str:
    """Return the hash of a file; the name itself of one that is not local."""
    path = name.partition("?")[0]
    return checksum(path) if os.path.isfile(path) else name


def test_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that name the dataset of an evaluation."""
    return {key: settings[key] for key in ("DATASETS.TEST", TEST_ANNOTATIONS) if key in settings}


def of_evaluation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the result of an evaluation of the teacher."""
    kept = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.FORMAT", "DATASETS.TEST", TEACHER, TEST_ANNOTATIONS)
    return {key: value for key, value in settings.items() if key in kept}


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first key that differs between two settings, with both values; "" if none does.

    The checksums of files count only if both have them: configs and older result files do not.
    """
    unknown = CHECKSUMS - (before.keys() & now.keys())
    for key in sorted((before.keys() | now.keys()) - unknown):
        if before.get(key) != now.get(key):
            return f"{key}: {before.get(key, 'default')} then, {now.get(key, 'default')} now"
    return ""


def without_locations(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys of a config with non-default values, except LOCATION_KEYS; infinities are text, as JSON has none."""
    changed = {key: value for key, value in changed_keys(cfg).items() if key not in LOCATION_KEYS}
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in changed.items()}
