"""The settings of a training that determine its result, by which a sweep knows whether a result still counts."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import KD_META_ARCH, changed_keys, load_config, load_teacher_config
from ..data import register_synthetic
from ..distillers import DISTILLER_REGISTRY
from ..errors import UserError
from ..files import checksum
from ..lazy_teacher import is_lazy_config, lazy_teacher_files
from .own_code import code_of, parts_of_detectors

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
    "TEST.BEST_METRIC",
    "TEST.EVAL_PERIOD",
    "SEED",
)
"""Keys for the locations of files and the execution of a training, which do not determine its result."""

TEACHER = "files of the teacher"
WEIGHTS = "file of MODEL.WEIGHTS"
TRAIN_ANNOTATIONS, TEST_ANNOTATIONS = "annotations of DATASETS.TRAIN", "annotations of DATASETS.TEST"
OWN_METHODS = "code of the methods from --import"
OWN_DETECTORS = "code of the detectors from --import"
OWN_TEACHER = "code of the teacher from --import"
CHECKSUMS = frozenset({TEACHER, WEIGHTS, TRAIN_ANNOTATIONS, TEST_ANNOTATIONS, OWN_METHODS, OWN_DETECTORS, OWN_TEACHER})
"""Settings that are checksums of files and code."""
EPOCHS = "SOLVER.EPOCHS"
LENGTH = frozenset({EPOCHS, "SOLVER.MAX_ITER", "SOLVER.STEPS"})
"""Keys that a training which was started with SOLVER.EPOCHS replaces in its config.yaml."""


def measured_settings(config: str, opts: list[Any]) -> dict[str, Any]:
    """Return the keys of a config that determine the result: all with non-default values, except LOCATION_KEYS.

    A key that a later version adds does not change the settings as long as it has its default value. Checksums are added
    of the initial weights as `WEIGHTS`, of a teacher's weights and config as `TEACHER`, and of the annotation files, if all
    exist, as `TRAIN_ANNOTATIONS` and `TEST_ANNOTATIONS`, and of the code of methods from elsewhere as `OWN_METHODS`, and
    of detectors, their parts and adapters as `OWN_DETECTORS`, those of the teacher as `OWN_TEACHER`; see `code_of`.

    Raises:
        UserError: see `load_config`, or DATASETS.TEST does not name exactly one dataset, whose results are compared.
    """
    cfg = load_config(config, opts)
    check_test_sets(config, cfg.DATASETS.TEST)
    settings = without_locations(cfg)
    settings[WEIGHTS] = _checksum(_content_of(cfg.MODEL.WEIGHTS))
    for key, names in ((TRAIN_ANNOTATIONS, cfg.DATASETS.TRAIN), (TEST_ANNOTATIONS, cfg.DATASETS.TEST)):
        files = _annotation_files(cfg, names)
        if all(map(os.path.isfile, files)):
            settings[key] = _checksum(" ".join(map(checksum, files)))
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        settings[TEACHER] = _checksum(_teacher_files(cfg))
        if code := code_of(_parts_of_teacher(cfg)):
            settings[OWN_TEACHER] = _checksum(code)
    return settings | own_code_of_student(cfg)


def own_code_of_student(cfg: CfgNode) -> dict[str, str]:
    """Return the checksums of the code of own methods and detectors, as far as they are registered."""
    is_distilled = cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH
    methods = [method for name, method in DISTILLER_REGISTRY if is_distilled and name in cfg.MODEL.KD.DISTILLERS]
    parts = {OWN_METHODS: methods, OWN_DETECTORS: parts_of_detectors(cfg)}
    return {key: _checksum(code) for key, definitions in parts.items() if (code := code_of(definitions))}


def check_test_sets(config: str, names: Sequence[str]) -> None:
    if len(names) != 1:
        raise UserError(f"{config}: DATASETS.TEST names {len(names)} datasets; a sweep needs exactly one.")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _parts_of_teacher(cfg: CfgNode) -> list[Callable]:
    """Return the parts of the teacher's detector; none of a LazyConfig, which may run code."""
    is_lazy = is_lazy_config(cfg.MODEL.KD.TEACHER.CONFIG_FILE)
    return [] if is_lazy else parts_of_detectors(load_teacher_config(cfg))


def _content_of(name: str) -> str:
    """Return the hash of a file; the name itself of one that is not local."""
    path = name.partition("?")[0]
    return checksum(path) if os.path.isfile(path) else name


def test_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that name the dataset of an evaluation."""
    return {key: settings[key] for key in ("DATASETS.TEST", TEST_ANNOTATIONS) if key in settings}


def of_evaluation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the result of an evaluation of the teacher."""
    keys = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.FORMAT", "DATASETS.TEST")
    kept = (*keys, TEACHER, OWN_TEACHER, TEST_ANNOTATIONS)
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
