"""Inheritance: initialization of the student's modules with the teacher's."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from functools import reduce
from itertools import accumulate, takewhile
from typing import Any

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from .checkpoint import Fit, StateDict, fill
from .errors import UserError
from .weight_selection import select_weights

logger = logging.getLogger(__name__)
INPUT_KEYS = {"input_format": "INPUT.FORMAT", "pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}
"""Config keys that determine a bottom-up network's input, by the detector's attribute."""
COMPONENTS = ("bottom_up", "neck", "head")
BOX_LAYERS = {"bbox_pred", "scales"}
"""Names of the layers whose outputs are in units of the kind of detector, and of the factors of these outputs."""
USES = {
    "backbone.top_block.p7.weight": ("backbone.top_block.relu_before_p7", True, "MODEL.DENSE_FPN.RELU_BEFORE_P7"),
    "head.ctrness.weight": ("head.centerness_tower", "box", "MODEL.FCOS.CENTERNESS_TOWER"),
}
"""Weights of layers that may read different inputs in student and teacher: the model's attribute for it, its default, and its config key."""
BLOCK = re.compile(r".*?\.b?\d+(?=\.)(?:\.(?:blocks\.)?\d+(?=\.))*")
"""Name of a block of a bottom-up network, such as res2.0, features.3, and timm's blocks.1.0, stages.2.blocks.5 and s1.b2."""


def inherit(student: nn.Module, teacher: nn.Module, modules: Collection[str], *, weight_selection: bool = True) -> Fit:
    """Copy the teacher's modules into the student by parameter name, and log what fits.

    Neck and head: Kang et al. 2021. A layer, with its norm, is copied as a whole or not at all, and so is a sequence of
    layers: if the layers of two sequences differ, equal names have different meanings. The bottom-up network is copied block by block.
    A ResNet with fewer blocks gets the first blocks of each of the teacher's stages. BOX_LAYERS are copied only between detectors of one kind.

    Args:
        student: changed in place.
        teacher: the source.
        modules: any of "bottom_up" (see `bottom_up_of`), "neck" (the rest of the backbone) and "head" (all outside the
            backbone).
        weight_selection: reduce the teacher's layers to the student's numbers of channels (see `select_weights`).

    Raises:
        UserError: a module has another name, nothing fits, nothing of the bottom-up network fits, or the bottom-up
            networks' inputs differ.
    """
    if isinstance(modules, str) or not {*modules} <= {*COMPONENTS}:
        raise UserError(
            f"The modules to inherit are {modules!r}; they must be a list of some of {', '.join(COMPONENTS)}."
        )
    if "bottom_up" in modules:
        _check_same_input(student, teacher)
    bottom_up, teachers_bottom_up = bottom_up_of(student), bottom_up_of(teacher)
    offered = {n: t for n, t in teacher.state_dict().items() if component_of(n, teachers_bottom_up) in modules}
    wanted = {n: t for n, t in student.state_dict().items() if component_of(n, bottom_up) in modules}
    source = _selected(wanted, offered, bottom_up) if weight_selection else offered
    apart = _foreign_box_layers(student, teacher, wanted)
    apart |= _broken_units(wanted, source, bottom_up) | _other_sequences(student, wanted, source, bottom_up)
    reasons = {n: why for n in wanted for unit, why in apart.items() if n == unit or n.startswith(unit + ".")}
    fit = fill(student, source, [name for name in wanted if name not in reasons])
    fit.misfits.update({name: reason for name, reason in reasons.items() if name in source})
    fit.missing += [name for name in reasons if name not in source]
    logger.info(f"Inherited from the teacher ({', '.join(modules)}):\n{fit.table()}")
    selected = [name for name in fit.filled if source[name].shape != offered[name].shape]
    if selected:
        _log_selection(student, selected)
    _warn_of_other_use(student, teacher, fit.filled)
    components = {component_of(n, bottom_up) for n in fit.filled if not n.endswith("num_batches_tracked")}
    lacking = [module for module in modules if module not in components]
    if not components or "bottom_up" in lacking:
        raise UserError(
            f"MODEL.KD.INHERIT: no weight of the teacher's {' and '.join(lacking)} ({type(teacher).__name__}) fits the student "
            f"({type(student).__name__}) by name and shape."
        )
    if "neck" in lacking and bottom_up == "backbone":
        lacking.remove("neck")
        logger.warning(
            f"MODEL.KD.INHERIT: the student's backbone ({type(student.backbone).__name__}) has no neck; to inherit it, add 'bottom_up' "
            "to MODEL.KD.INHERIT.MODULES."
        )
    if lacking:
        logger.warning(f"MODEL.KD.INHERIT: no weight of the teacher's {' and '.join(lacking)} fits the student.")
    return fit


def _selected(wanted: StateDict, offered: StateDict, bottom_up: str) -> StateDict:
    """Reduce the teacher's tensors to the student's numbers of channels (see `select_weights`).

    If the student's bottom-up network has other blocks, its channels are not those of the teacher's, and layers that read
    them are not reduced.
    """
    source = select_weights(wanted, offered)
    if not any(component_of(unit + ".", bottom_up) == "bottom_up" for unit in _broken_units(wanted, source, bottom_up)):
        return source
    others = [
        {n: t for n, t in state.items() if component_of(n, bottom_up) != "bottom_up"} for state in (wanted, offered)
    ]
    return {**source, **select_weights(*others)}


def _log_selection(student: nn.Module, selected: Collection[str]) -> None:
    logger.info(
        f"{len(selected)} of these tensors have fewer channels than the teacher's and hold evenly spaced channels of them "
        "(MODEL.KD.INHERIT.WEIGHT_SELECTION)."
    )
    buffers = dict(student.named_buffers())  # which weights are only in FrozenBN, of any library
    frozen = [name.removesuffix(".weight") for name in selected if name.endswith(".weight") and name in buffers]
    if frozen:
        logger.warning(
            f"{len(frozen)} of these layers are FrozenBN, with the statistics of the teacher's wider layers; the first one is {frozen[0]}. "
            "BN learns those of the student (MODEL.RESNETS.NORM, MODEL.TIMM.NORM, MODEL.FPN.NORM)."
        )


def _warn_of_other_use(student: nn.Module, teacher: nn.Module, filled: Collection[str]) -> None:
    """Warn of inherited layers that the student uses in another way than the teacher, which names and shapes do not show."""
    for weight, (attribute, default, key) in USES.items():
        of_student, of_teacher = (_attribute(model, attribute, default) for model in (student, teacher))
        if weight in filled and of_student != of_teacher:
            logger.warning(
                f"MODEL.KD.INHERIT: {weight.removesuffix('.weight')} is inherited, but {key} is {of_student} for the student and {of_teacher} "
                "for the teacher; use the same."
            )
    ours, theirs = _anchors(student), _anchors(teacher)
    predicts_boxes = any(name.rpartition(".")[0].endswith(("bbox_pred", "anchor_deltas")) for name in filled)
    if predicts_boxes and None not in (ours, theirs) and ours != theirs:
        logger.warning(
            "MODEL.KD.INHERIT: the student's anchors are not the teacher's, for which the inherited layers predict boxes."
        )


def _attribute(model: nn.Module, path: str, default: Any) -> Any:
    return reduce(lambda value, name: getattr(value, name, default), path.split("."), model)


def _anchors(model: nn.Module) -> tuple | None:
    """Return offset, strides and shapes of a detector's anchors; None without anchors, for other generators, and on the meta device."""
    owner = getattr(model, "proposal_generator", None) or model
    generator = getattr(owner, "anchor_generator", None)
    if not isinstance(generator, DefaultAnchorGenerator) or any(anchors.is_meta for anchors in generator.cell_anchors):
        return None
    return generator.offset, list(generator.strides), [anchors.tolist() for anchors in generator.cell_anchors]


def _check_same_input(student: nn.Module, teacher: nn.Module) -> None:
    for key in ("input_format", "pixel_mean", "pixel_std"):
        ours, theirs = (
            x.flatten().tolist() if isinstance(x, Tensor) else x
            for x in (getattr(model, key, None) for model in (student, teacher))
        )
        if ours != theirs:
            raise UserError(
                f"MODEL.KD.INHERIT.MODULES names 'bottom_up', but the student's {INPUT_KEYS[key]} is {ours} and the teacher's {theirs}."
            )


def _units(names: Collection[str], bottom_up: str) -> dict[str, str]:
    """Return what is copied together, by tensor: a block of the bottom-up network, elsewhere a layer with its norm.

    A parameter that a module has beside its layers, such as the scales of a head, is copied alone.
    """
    parents = {name.rpartition(".")[0] for name in names}
    paths = [name.split(".") for name in names if component_of(name, bottom_up) == "bottom_up"]
    # Number of the modules that hold the whole network, such as TimmNetwork's model.
    depth = sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False)))
    ancestors = {ancestor for parent in parents for ancestor in _prefixes(parent)[:-1]}

    def unit_of(name: str) -> str:
        parent = name.rpartition(".")[0]
        if component_of(name, bottom_up) == "bottom_up":
            block = BLOCK.match(name, len(bottom_up))
            return name[: block.end()] if block else ".".join(name.split(".")[: depth + 1])
        layer = next((prefix for prefix in _prefixes(parent) if f"{prefix}.weight" in names), None)
        return layer or (name if parent in ancestors else parent)

    return {name: unit_of(name) for name in names}


def _prefixes(path: str) -> list[str]:
    """Return the module at a path and all modules around it, the outermost first."""
    return list(accumulate(path.split("."), "{}.{}".format))


def _broken_units(wanted: StateDict, source: StateDict, bottom_up: str) -> dict[str, str]:
    """Return units that have other tensors, or tensors of other shapes, in the source, with the first reason."""
    units = _units(wanted.keys() | source.keys(), bottom_up)
    offered = {units[name] for name in source}
    needed = {units[name] for name in wanted}
    broken: dict[str, str] = {}
    for name in [*wanted, *source]:
        unit = units[name]
        leaf = name.removeprefix(unit + ".").removeprefix(name.rpartition(".")[0] + ".")
        if name in source and name in wanted and source[name].shape != wanted[name].shape:
            reason = f"{leaf} of shape {tuple(source[name].shape)} offered, {tuple(wanted[name].shape)} needed"
        elif leaf.rpartition(".")[2] == "num_batches_tracked":
            continue
        elif name not in source and unit in offered:
            reason = f"no {leaf} offered"
        elif name not in wanted and unit in needed:
            reason = f"no {leaf} needed"
        else:
            continue
        broken.setdefault(unit, reason)
    return broken


def _other_sequences(student: nn.Module, wanted: StateDict, source: StateDict, bottom_up: str) -> dict[str, str]:
    """Return the student's sequences of layers whose tensors have other names in the source, with the reason."""
    others = {}
    for path, module in student.named_modules():
        if isinstance(module, nn.Sequential) and component_of(path, bottom_up) != "bottom_up":
            ours, theirs = (
                {n for n in names if n.startswith(path + ".") and not n.endswith("num_batches_tracked")}
                for names in (wanted, source)
            )
            if theirs and ours and ours != theirs:
                others[path] = f"the teacher's {path} has other layers"
    return others


def _foreign_box_layers(student: nn.Module, teacher: nn.Module, wanted: StateDict) -> dict[str, str]:
    """Return the student's BOX_LAYERS, with the reason, unless both detectors compute boxes from them in the same way.

    They do if one detector's class is that of the other or its subclass, and both have the same transform and the same BOX_LAYERS.
    """
    ours, theirs = type(student), type(teacher)
    reason = f"{theirs.__name__} and {ours.__name__} predict boxes in different units"
    if issubclass(ours, theirs) or issubclass(theirs, ours):
        if _box_units(student) == _box_units(teacher):
            return {}
        reason = "boxes are in different units: another BBOX_REG_WEIGHTS, BOX_ACTIVATION or LEVEL_SCALES"
    paths = {path for name in wanted for path in _prefixes(name) if path.rpartition(".")[2] in BOX_LAYERS}
    return dict.fromkeys(paths, reason)


def _box_units(model: nn.Module) -> tuple:
    transform = getattr(model, "box2box_transform", None)
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    return type(transform), tuple(getattr(transform, "weights", ())), BOX_LAYERS & names


def bottom_up_of(model: nn.Module) -> str:
    """Return the name of a detector's bottom-up network: its whole backbone if that has no neck.

    It is called `net` in Detectron2's SimpleFeaturePyramid, ViTDet's neck.
    """
    backbone = getattr(model, "backbone", None)
    return next((f"backbone.{name}" for name in ("bottom_up", "net") if hasattr(backbone, name)), "backbone")


def component_of(name: str, bottom_up: str = "backbone.bottom_up") -> str:
    """Return the part of a detector that a parameter belongs to: "bottom_up", "neck" or "head"."""
    if not name.startswith("backbone."):
        return "head"
    return "bottom_up" if name.startswith(bottom_up + ".") else "neck"
