"""Filling a model from a state dict where names and shapes match."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from tabulate import tabulate
from torch import nn

from ..errors import UserError
from .torchvision import StateDict, TorchvisionFormat, check_torchvision_input

logger = logging.getLogger(__name__)


@dataclass
class Fit:
    """The result of filling a model from a state dict.

    Attributes:
        filled: names of the tensors that were copied.
        misfits: names of the tensors that were not copied, with the reason.
        missing: names of the model's tensors that are not in the state dict.
    """

    filled: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def has_weights(self) -> bool:
        """Whether anything other than batch counters, which fit any model, was copied."""
        return not all(name.endswith("num_batches_tracked") for name in self.filled)

    def table(self) -> str:
        """Return a table of filled tensors by module (see `_module_of`), and one of misfits by module and reason."""
        total = Counter(_module_of(k) for k in [*self.filled, *self.misfits, *self.missing])
        filled = Counter(_module_of(k) for k in self.filled)
        missing = Counter(_module_of(k) for k in self.missing)
        rows = [[m, f"{filled[m]} of {n}", missing[m] or ""] for m, n in sorted(total.items())]
        table = tabulate(rows, headers=["module", "filled", "not offered"], tablefmt="simple")
        if self.misfits:
            groups: dict[tuple[str, str], list[str]] = {}
            for name, reason in sorted(self.misfits.items()):
                groups.setdefault((_module_of(name), reason), []).append(name)
            rows = [[_pattern_of(names), reason] for (_, reason), names in groups.items()]
            table += "\n" + tabulate(rows, headers=["does not fit", "why"], tablefmt="simple")
        return table


def _module_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[0] == "backbone" and "bottom_up" in parts else 2])


def _pattern_of(names: list[str]) -> str:
    """Return a name, or what several names have in common with a "*" at the end."""
    first, *others = (name.split(".") for name in names)
    common = takewhile(lambda parts: len({*parts}) == 1, zip(first, *others, strict=False))
    return ".".join(parts[0] for parts in common) + (".*" if others else "")


@torch.no_grad()
def fill(model: nn.Module, offered: StateDict, names: Iterable[str] | None = None) -> Fit:
    """Copy tensors into a model by name where the shapes match.

    Args:
        model: modified in place.
        offered: tensors by the model's names, converted to the model's dtype and device.
        names: names of the model's tensors to fill; None for all.
    """
    own = model.state_dict()
    fit = Fit()
    for name in own if names is None else names:
        if name not in offered:
            fit.missing.append(name)
        elif own[name].shape != offered[name].shape:
            fit.misfits[name] = f"shape {tuple(offered[name].shape)} offered, {tuple(own[name].shape)} needed"
        else:
            own[name].copy_(torch.as_tensor(offered[name]))
            fit.filled.append(name)
    return fit


def fill_bottom_up(
    model: nn.Module, offered: StateDict, prefix: str, library: str, architecture: str, path: str
) -> Fit:
    """Fill a detector's bottom-up network from weights of a classifier, and log what fits and what is missing.

    Args:
        model: the detector, modified in place.
        offered: weights by the model's names.
        prefix: what the names of the bottom-up network start with.
        library, architecture: where the classifier is from, such as "torchvision" and "ResNet".
        path: path of the weights.

    Raises:
        UserError: no weight fits the model.
    """
    fit = fill(model, offered, [n for n in model.state_dict() if n.startswith(prefix)])
    if not fit.has_weights:
        raise UserError(f"{path} holds a {architecture} in {library}'s format, but none of its weights fits the model.")
    used = {*fit.filled, *fit.misfits}
    unused = Counter(_module_of(n) for n in offered if n not in used and not n.endswith("num_batches_tracked"))
    logger.info(f"Initial weights in {library}'s {architecture} format from {path}:\n{fit.table()}")
    if unused:
        logger.info(
            "Not used, since the model has no such block: " + ", ".join(f"{n} of {m}" for m, n in unused.items())
        )
    unfilled = [n for n in (*fit.missing, *fit.misfits) if not n.endswith("num_batches_tracked")]
    if unfilled:
        logger.warning(
            f"{path} does not fill {len(unfilled)} weights of the model's {architecture}, which keep their initial values; the "
            f"first one is {unfilled[0]}."
        )
    return fit


def load_torchvision(model: nn.Module, weights: StateDict, source: TorchvisionFormat, path: str) -> Fit:
    """Fill a detector's bottom-up network from weights with torchvision's names, see `fill_bottom_up`.

    Raises:
        UserError: the model does not have exactly one such network, nothing fits it, or its input format differs.
    """
    starts = [n.removesuffix(source.first) for n in model.state_dict() if n.endswith(source.first)]
    if len(starts) != 1:
        raise UserError(
            f"{path} holds a {source.architecture} in torchvision's format, but {type(model).__name__} has {len(starts)} "
            f"{source.architecture}s to fill."
        )
    check_torchvision_input(model, path)
    offered = source.rename(weights, starts[0])
    return fill_bottom_up(model, offered, starts[0], "torchvision", source.architecture, path)
