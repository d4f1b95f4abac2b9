"""Every config key of the library, reading config files, and checking them before anything expensive starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from .config_files import find_config_file, find_file, find_weights, is_zoo_file, read_yaml
from .distillers import DISTILLER_REGISTRY
from .errors import UserError
from .keys import Above, AtLeast, Below, Keys, keys_of
from .modeling import add_modeling_config

KD_META_ARCH = "KDMetaArch"
INHERITABLE = ("neck", "head")


@dataclass(frozen=True)
class DatasetKeys(Keys):
    coco_json: Annotated[
        list,
        "COCO-format data sets: [[name, annotations.json, image folder], ...]; the names are then used in TRAIN and TEST.",
    ] = field(default_factory=list)


@dataclass(frozen=True)
class DataloaderKeys(Keys):
    filter_empty_annotations: Annotated[
        bool, "Whether images without objects are left out of the training; Detectron2's default is True."
    ] = False
    skip_unusable_images: Annotated[
        bool,
        "Whether a training image that cannot be read is named in the log and the next one takes its place; otherwise it ends the "
        "training.",
    ] = False


@dataclass(frozen=True)
class AmpKeys(Keys):
    dtype: Annotated[
        Literal["float16", "bfloat16"],
        "Autocast type under SOLVER.AMP.ENABLED; 'float16' comes with a gradient scaler.",
    ] = "float16"


@dataclass(frozen=True)
class SolverKeys(Keys):
    gradient_accumulation_steps: Annotated[
        int,
        "Parts into which a process divides its images of a batch, one forward and backward pass each, before the optimiser's step.",
    ] = 1
    channels_last: Annotated[
        bool, "Train with channels last in memory: the same losses up to rounding, faster on CPUs."
    ] = False
    checkpoint_minutes: Annotated[
        float,
        AtLeast(0),
        "Minutes after which a checkpoint is written as model_latest.pth, if none was written since; 0 for never.",
    ] = 10.0
    checkpoints_to_keep: Annotated[
        int,
        AtLeast(0),
        "Checkpoints of SOLVER.CHECKPOINT_PERIOD that are kept, the last ones; 0 keeps all. model_final.pth, and model_best.pth of "
        "trainings that are evaluated meanwhile, are kept too.",
    ] = 0
    checkpoint_async: Annotated[
        bool,
        "Write checkpoints in another thread while the training continues; takes memory for a copy of the weights.",
    ] = False


@dataclass(frozen=True)
class DistillationKeys(Keys):
    student: Annotated[str, "The student's own meta-architecture, where MODEL.META_ARCHITECTURE is KDMetaArch."] = (
        "RetinaNet"
    )
    distillers: Annotated[
        tuple[str, ...], "Distillation methods by their registered names; each has its node beside this key."
    ] = ()


@dataclass(frozen=True)
class TeacherKeys(Keys):
    config_file: Annotated[
        str,
        "The teacher's config: a yaml file, or a model-zoo name such as 'COCO-Detection/retinanet_R_101_FPN_3x.yaml'.",
    ] = ""
    weights: Annotated[
        str,
        "The teacher's checkpoint; '' is the config's own MODEL.WEIGHTS, for a model-zoo name its trained checkpoint.",
    ] = ""
    opts: Annotated[list, "Overrides of the teacher's config: [KEY, value, ...]."] = field(default_factory=list)
    compile: Annotated[
        bool,
        "Compile the teacher's backbone (torch.compile): a minute or two at the start, then a faster forward pass.",
    ] = False
    channels_last: Annotated[
        bool, "Keep the teacher's weights with channels last, which mixed precision on a GPU prefers."
    ] = False


@dataclass(frozen=True)
class PseudoLabelKeys(Keys):
    enabled: Annotated[bool, "Train on the teacher's detections in place of annotations; none are read."] = False
    score_thresh: Annotated[float, AtLeast(0), Below(1), "Detections with a higher score count."] = 0.3


@dataclass(frozen=True)
class InheritKeys(Keys):
    enabled: Annotated[
        bool,
        "Before the first iteration copy the teacher's modules to the student, as far as names and shapes fit.",
    ] = False
    modules: Annotated[
        tuple[Literal["neck", "head"], ...],
        "Modules that are copied: the neck is the backbone without its bottom-up network, the head all that is not backbone.",
    ] = INHERITABLE


@dataclass(frozen=True)
class BalanceKeys(Keys):
    enabled: Annotated[
        bool,
        "Multiply the losses of each distiller, but its auxiliary ones, so that the norm of their gradient in the student's neck "
        "keeps a chosen ratio to that of the detector's own losses, whatever the data, the image size and the detector.",
    ] = False
    target: Annotated[
        float,
        Above(0),
        "The ratio of all active distillers together. Each has an equal share; a WEIGHT other than the method's default changes its "
        "share in proportion.",
    ] = 2.0
    period: Annotated[int, AtLeast(1), "Iterations between two measurements of the ratios."] = 20
    momentum: Annotated[float, AtLeast(0), Below(1), "Momentum of the ratios' moving average."] = 0.9
    limit: Annotated[float, AtLeast(1), "Multipliers are at least 1 / LIMIT and at most LIMIT."] = 100000.0


LIBRARY_KEYS: dict[str, type[Keys]] = {
    "DATASETS": DatasetKeys,
    "DATALOADER": DataloaderKeys,
    "SOLVER.AMP": AmpKeys,
    "SOLVER": SolverKeys,
    "MODEL.KD": DistillationKeys,
    "MODEL.KD.TEACHER": TeacherKeys,
    "MODEL.KD.PSEUDO_LABELS": PseudoLabelKeys,
    "MODEL.KD.INHERIT": InheritKeys,
    "MODEL.KD.BALANCE": BalanceKeys,
}
"""The library's own keys by config node, those of methods and detectors excepted."""


def add_kd_config(cfg: CN) -> None:
    """Add the library's keys, with their defaults, to a Detectron2 config, and register its detectors by name.

    Raises:
        UserError: a registered method has the node of another or of the library.
    """
    from . import meta_arch  # noqa: F401  registers KDMetaArch; it imports this module

    for path, keys in LIBRARY_KEYS.items():
        keys.add_to(_node_at(cfg, path))
    add_modeling_config(cfg)
    for name, method in DISTILLER_REGISTRY:
        if method.CONFIG_NODE in cfg.MODEL.KD:
            raise UserError(
                f"The method {name} has the CONFIG_NODE {method.CONFIG_NODE!r}, which is a key of MODEL.KD already: rename it."
            )
        method.Config.add_to(_node_at(cfg, f"MODEL.KD.{method.CONFIG_NODE}"))


def _node_at(cfg: CN, path: str) -> CN:
    """The node at a dotted path; those that are not there are added."""
    node = cfg
    for part in path.split("."):
        if part not in node:
            node[part] = CN()
        node = node[part]
    return node


def load_config(
    config_file: str, opts: Iterable[Any] = (), *, student_only: bool = False, needs_data: bool = True
) -> CN:
    """Read a config file and overrides into a full config.

    Relative paths in the config count from the working directory, then from the config file's folder.

    Args:
        config_file: a config (see `config_files.find_config_file`), or "" for the defaults alone.
        opts: alternating keys and values.
        student_only: for evaluation: KDMetaArch becomes the student's own meta-architecture; nothing of the
            teacher, and no training data, has to exist.
        needs_data: False where no data set is read: files that DATASETS.COCO_JSON names need not exist.

    Returns:
        The config, checked by `validate_kd_config`, not frozen.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type.
    """
    opts = list(opts)
    cfg = read_config(config_file, opts)
    folder = os.path.dirname(find_config_file(config_file, "the config")) if config_file else ""
    if student_only and cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.KD.STUDENT
    validate_kd_config(cfg)
    _choose_device(cfg, opts)
    _resolve_paths(cfg, folder, student_only, needs_data)
    return cfg


def read_config(config_file: str, opts: Iterable[Any] = ()) -> CN:
    """The keys of a config file and overrides, laid over the defaults; see `load_config`, which checks them as well.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    if config_file:
        path = find_config_file(config_file, "the config")
        _merge(cfg, read_yaml(path), path)
    _merge(cfg, _tree_from_opts(list(opts), "the command line"), "the command line")
    return cfg


def changed_keys(cfg: CN) -> dict[str, Any]:
    """The keys that are not at the defaults of Detectron2 and of this library, with their values; tuples count as lists."""
    defaults = get_cfg()
    add_kd_config(defaults)
    changed: dict[str, Any] = {}

    def walk(node: CN, default: CN, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, CN):
                walk(value, default[key], f"{prefix}{key}.")
            elif _as_lists(value) != _as_lists(default[key]):
                changed[prefix + key] = _as_lists(value)

    walk(cfg, defaults, "")
    return changed


def _as_lists(value: Any) -> Any:
    """Tuples as lists, as json gives them back."""
    return [_as_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _choose_device(cfg: CN, opts: Iterable[Any]) -> None:
    """Detectron2's default device is a GPU; without one, only a device that somebody asked for is an error."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        if "MODEL.DEVICE" in opts:
            raise UserError(
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has no usable GPU; set it to 'cpu'."
            )
        cfg.MODEL.DEVICE = "cpu"


def _tree_from_opts(opts: list[Any], source: str) -> dict[str, Any]:
    options = [o for o in opts[::2] if str(o).startswith("--")]
    if options:
        raise UserError(f"{source}: the option {options[0]} must come before the KEY VALUE overrides.")
    if len(opts) % 2:
        raise UserError(f"{source}: overrides come in pairs of a key and a value; {opts[-1]!r} has no value.")
    tree: dict[str, Any] = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        *parents, leaf = str(key).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{source}: {key} is given, but also a value for its group {parent}.")
        node[leaf] = value
    return tree


def _merge(cfg: CN, tree: dict[str, Any], source: str) -> None:
    try:
        cfg.merge_from_other_cfg(type(cfg)(_with_default_types(tree, cfg, source)))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{source}: {error.args[0] if error.args else error}") from error


def _with_default_types(tree: dict[str, Any], defaults: CN, source: str, prefix: str = "") -> dict[str, Any]:
    """`tree` with every number converted to the type of its default; unknown keys and wrong types are UserErrors."""
    converted = {}
    for key, value in tree.items():
        full_key = f"{prefix}{key}"
        if key not in defaults:
            close = difflib.get_close_matches(str(key), defaults.keys(), n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else ""
            raise UserError(f"{source}: there is no config key {full_key}.{hint}")
        default = defaults[key]
        if isinstance(default, CN):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {full_key} is a group of keys and cannot be set to {value!r}.")
            converted[key] = _with_default_types(value, default, source, full_key + ".")
            continue
        value = _decoded(value, f"{source}: {full_key}")
        if isinstance(default, int | float) and not isinstance(default, bool) and type(value) in (int, float):
            if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
                raise UserError(f"{source}: {full_key} is {value}; it must be a whole number.")
            try:
                value = type(default)(value)
            except OverflowError:
                raise UserError(f"{source}: {full_key} is too large a number.") from None
        if isinstance(default, list | tuple) and isinstance(value, str):
            raise UserError(
                f'{source}: {full_key} is the text {value!r}, but must be a list; one entry is written ("{value}",) '
                "with its comma."
            )
        if not _same_kind(default, value) and not _means_none(full_key, default, value):
            raise UserError(
                f"{source}: {full_key} is {value!r}; it must be of type {type(default).__name__}, as its default {default!r}."
            )
        converted[key] = value
    return converted


def _decoded(value: Any, where: str) -> Any:
    """A text as the Python literal that it is, if it is one: yacs' reading of overrides."""
    try:
        return CN._decode_cfg_value(value)
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{where} is nested too deeply.") from error


def _same_kind(default: Any, value: Any) -> bool:
    sequences = (list, tuple)
    return (
        default is None
        or type(value) is type(default)
        or (isinstance(default, sequences) and isinstance(value, sequences))
    )


def _means_none(key: str, default: Any, value: Any) -> bool:
    """Detectron2 takes None for some names in its models, such as a norm; of a method's keys, those that say so."""
    if value is not None or not isinstance(default, str) or not key.startswith("MODEL."):
        return False
    return not key.startswith("MODEL.KD.") or any(
        entry.accepts(None) and key == f"MODEL.KD.{method.CONFIG_NODE}.{entry.name}"
        for _, method in DISTILLER_REGISTRY
        for entry in keys_of(method.Config)
    )


def _resolve_paths(cfg: CN, folder: str, student_only: bool, needs_data: bool) -> None:
    used = set(cfg.DATASETS.TEST) | (set() if student_only else set(cfg.DATASETS.TRAIN))
    resolved = []
    for name, json_file, images in cfg.DATASETS.COCO_JSON:
        if name in used:
            key = f"DATASETS.COCO_JSON ({name})"
            try:
                json_file = find_file(json_file, key, folder)
                images = find_file(images, key, folder, is_folder=True)
            except UserError:
                if needs_data:
                    raise
        resolved.append([name, json_file, images])
    cfg.DATASETS.COCO_JSON = resolved
    if cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = find_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", folder)
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        teacher = cfg.MODEL.KD.TEACHER
        # A model-zoo name stays a name: it also stands for the trained checkpoint.
        path = find_config_file(teacher.CONFIG_FILE, "MODEL.KD.TEACHER.CONFIG_FILE", folder)
        if not is_zoo_file(path):
            teacher.CONFIG_FILE = path
        if teacher.WEIGHTS:
            teacher.WEIGHTS = find_weights(teacher.WEIGHTS, "MODEL.KD.TEACHER.WEIGHTS", folder)


def load_teacher_config(cfg: CN) -> CN:
    """The teacher's own full config, its MODEL.WEIGHTS being the checkpoint to load, on the student's device.

    A teacher config that says KDMetaArch stands for its student.
    """
    node = cfg.MODEL.KD.TEACHER
    path = find_config_file(node.CONFIG_FILE, "MODEL.KD.TEACHER.CONFIG_FILE")
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    _merge(teacher_cfg, read_yaml(path), path)
    source = "MODEL.KD.TEACHER.OPTS"
    _merge(teacher_cfg, _tree_from_opts(list(node.OPTS), source), source)
    if teacher_cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.MODEL.KD.STUDENT
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    if node.WEIGHTS:
        teacher_cfg.MODEL.WEIGHTS = node.WEIGHTS
    elif is_zoo_file(path):
        try:
            teacher_cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
        except RuntimeError as error:
            raise UserError(
                f"MODEL.KD.TEACHER.WEIGHTS is empty, and the model zoo has no checkpoint for {node.CONFIG_FILE}."
            ) from error
    if not teacher_cfg.MODEL.WEIGHTS:
        raise UserError(
            f"MODEL.KD.TEACHER.WEIGHTS is empty, and {path} names no MODEL.WEIGHTS: the teacher would be untrained."
        )
    folder = os.path.dirname(path)
    teacher_cfg.MODEL.WEIGHTS = find_weights(teacher_cfg.MODEL.WEIGHTS, "MODEL.KD.TEACHER.WEIGHTS", folder)
    return teacher_cfg


def reads_annotations(cfg: CN) -> bool:
    """Whether the ground truth of the training comes from its data sets."""
    return cfg.MODEL.META_ARCHITECTURE != KD_META_ARCH or not cfg.MODEL.KD.PSEUDO_LABELS.ENABLED


def validate_kd_config(cfg: CN) -> None:
    """Check every key of the library that has a wrong value to be found without building anything.

    Raises:
        UserError: one sentence that names the key.
    """
    for entry in cfg.DATASETS.COCO_JSON:
        if not isinstance(entry, list | tuple) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise UserError(
                "DATASETS.COCO_JSON must be a list of lists, [[name, annotations.json, image folder], ...]; one entry is "
                f"{entry!r}."
            )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if not isinstance(name, str):
                raise UserError(f"DATASETS.{key} holds {name!r}; it must be a list of names of data sets.")
    AmpKeys.read(cfg.SOLVER.AMP, "SOLVER.AMP")
    SolverKeys.read(cfg.SOLVER, "SOLVER")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which PyTorch does not know; it is usually 'cuda' or 'cpu'."
        ) from error
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which no registered detector has as its name."
        )
    if cfg.MODEL.META_ARCHITECTURE == KD_META_ARCH:
        _validate_distillation(cfg)


def _validate_distillation(cfg: CN) -> None:
    kd = cfg.MODEL.KD
    if kd.STUDENT == KD_META_ARCH or kd.STUDENT not in META_ARCH_REGISTRY:
        raise UserError(
            f"MODEL.KD.STUDENT is {kd.STUDENT!r}; it must be the name of a registered detector, such as 'RetinaNet'."
        )
    if not kd.TEACHER.CONFIG_FILE:
        raise UserError("MODEL.KD.TEACHER.CONFIG_FILE is empty: name the teacher's config.")
    known = sorted(name for name, _ in DISTILLER_REGISTRY)
    for name in kd.DISTILLERS:
        if name not in known:
            raise UserError(f"MODEL.KD.DISTILLERS names the unknown method {name!r}; available: {', '.join(known)}.")
        if list(kd.DISTILLERS).count(name) > 1:
            raise UserError(f"MODEL.KD.DISTILLERS names {name!r} twice.")
        method = DISTILLER_REGISTRY.get(name)
        node, node_name = kd[method.CONFIG_NODE], f"MODEL.KD.{method.CONFIG_NODE}"
        _validate_schedule(node_name, node, cfg.SOLVER.MAX_ITER)
        method.Config.read(node, node_name)
    for module in kd.INHERIT.MODULES:
        if module not in INHERITABLE:
            raise UserError(
                f"MODEL.KD.INHERIT.MODULES names {module!r}; it may name {' and '.join(map(repr, INHERITABLE))}."
            )
    if kd.INHERIT.ENABLED and not kd.INHERIT.MODULES:
        raise UserError("MODEL.KD.INHERIT is enabled, but MODEL.KD.INHERIT.MODULES is empty.")
    PseudoLabelKeys.read(kd.PSEUDO_LABELS, "MODEL.KD.PSEUDO_LABELS")
    BalanceKeys.read(kd.BALANCE, "MODEL.KD.BALANCE")
    if not kd.DISTILLERS and not kd.INHERIT.ENABLED and not kd.PSEUDO_LABELS.ENABLED:
        raise UserError(
            "MODEL.KD.DISTILLERS is empty and MODEL.KD.INHERIT.ENABLED and MODEL.KD.PSEUDO_LABELS.ENABLED are False: nothing "
            f"would come from the teacher. For a plain student set MODEL.META_ARCHITECTURE to {kd.STUDENT!r}."
        )


def _validate_schedule(name: str, node: CN, max_iter: int) -> None:
    if max_iter <= node.START_ITER:
        raise UserError(
            f"{name}.START_ITER is {node.START_ITER}, but training ends at SOLVER.MAX_ITER {max_iter}: it would never run."
        )
    if node.END_ITER is not None and (not isinstance(node.END_ITER, int) or node.END_ITER <= node.START_ITER):
        raise UserError(
            f"{name}.END_ITER is {node.END_ITER!r}; it must be None or a whole number above START_ITER {node.START_ITER}."
        )
