"""Inheritance: initialization of the student's neck and head with the teacher's."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from .checkpoint import Fit, StateDict, fill
from .errors import UserError

logger = logging.getLogger(__name__)


def inherit(student: nn.Module, teacher: nn.Module, modules: Iterable[str]) -> Fit:
    """Copy the teacher's neck and head into the student by parameter name (Kang et al. 2021), and log what fits.

    A layer is copied as a whole or not at all, and so is a sequence of layers: if the layers of two sequences differ,
    equal names have different meanings.

    Args:
        student: changed in place.
        teacher: the source.
        modules: any of "neck" (the backbone without its bottom-up network) and "head" (all outside the backbone).

    Raises:
        UserError: nothing fits.
    """
    source = {name: t for name, t in teacher.state_dict().items() if component_of(name) in modules}
    wanted = {name: t for name, t in student.state_dict().items() if component_of(name) in modules}
    apart = _broken_layers(wanted, source) | _other_sequences(student, wanted, source)
    reasons = {name: why for name in wanted for layer, why in apart.items() if name.startswith(layer + ".")}
    fit = fill(student, source, [name for name in wanted if name not in reasons])
    fit.misfits.update({name: reason for name, reason in reasons.items() if name in source})
    fit.missing += [name for name in reasons if name not in source]
    logger.info(f"Inherited from the teacher ({', '.join(modules)}):\n{fit.table()}")
    if not fit.has_weights:
        raise UserError(
            f"MODEL.KD.INHERIT: no weight of the teacher's {' and '.join(modules)} ({type(teacher).__name__}) fits the student "
            f"({type(student).__name__}) by name and shape."
        )
    return fit


def _broken_layers(wanted: StateDict, source: StateDict) -> dict[str, str]:
    """Return layers with a tensor of another shape in the source, with the reason."""
    broken: dict[str, str] = {}
    for name, tensor in wanted.items():
        if name in source and source[name].shape != tensor.shape:
            layer, _, leaf = name.rpartition(".")
            reason = f"{leaf} of shape {tuple(source[name].shape)} offered, {tuple(tensor.shape)} needed"
            broken[layer] = f"{broken[layer]}; {reason}" if layer in broken else reason
    return broken


def _other_sequences(student: nn.Module, wanted: StateDict, source: StateDict) -> dict[str, str]:
    """Return the student's sequences of layers whose tensors have other names in the source, with the reason."""
    others = {}
    for path, module in student.named_modules():
        if isinstance(module, nn.Sequential):
            ours, theirs = (
                {n for n in names if n.startswith(path + ".") and not n.endswith("num_batches_tracked")}
                for names in (wanted, source)
            )
            if theirs and ours and ours != theirs:
                others[path] = f"the teacher's {path} has other layers"
    return others


def component_of(name: str) -> str:
    """Return the part of a detector that a parameter belongs to: "bottom_up", "neck" or "head"."""
    if not name.startswith("backbone."):
        return "head"
    return "bottom_up" if name.startswith("backbone.bottom_up.") else "neck"
