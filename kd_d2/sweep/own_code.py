"""The code from --import that determines the result of a training."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import resolve_name
from itertools import chain

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from ..adapters import DETECTOR_ADAPTER_REGISTRY

LIBRARIES = {__name__.partition(".")[0], "detectron2", "fvcore", "timm", "torch", "torchvision"}
KNOWN = frozenset({*LIBRARIES, *sys.stdlib_module_names})
"""Packages whose code is not one's own, also where a class derives from theirs."""
REGISTRIES = (
    META_ARCH_REGISTRY,
    BACKBONE_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    ANCHOR_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
"""Registries of detectors and their parts."""


def parts_of_detectors(cfg: CfgNode) -> list[Callable]:
    """Return the classes and functions that a config names of Detectron2's registries, and the adapters of these detectors."""
    names = {*_strings(cfg.MODEL)}
    parts = [part for registry in REGISTRIES for name, part in registry if name in names]
    detectors = tuple(part for part in parts if inspect.isclass(part))
    return parts + [a for _, a in DETECTOR_ADAPTER_REGISTRY if any(issubclass(d, a.model_class) for d in detectors)]


def _strings(node: CfgNode) -> Iterator[str]:
    for value in node.values():
        if isinstance(value, CfgNode):
            yield from _strings(value)
        elif isinstance(value, str):
            yield value


def code_of(definitions: Iterable[Callable]) -> str:
    """Return the code of the modules that define classes, their base classes and functions, except known packages.

    That of other own modules that they import is added, see `_is_beside`. Comments and formatting do not count. It is code
    again, not a dump of syntax trees, which differs between versions of Python.
    """
    origins = chain.from_iterable(getattr(definition, "__mro__", [definition]) for definition in definitions)
    waiting = [origin.__module__ for origin in origins if _top(origin.__module__) not in KNOWN]
    code: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in code:
            continue
        code[name] = ""
        with contextlib.suppress(ImportError, OSError, TypeError):  # of a module without a file
            tree = ast.parse(inspect.getsource(sys.modules[name]))
            code[name] = ast.unparse(tree)
            waiting += [other for other in _imported(tree, name) if _is_beside(other, name)]
    return "\n".join(code[name] for name in sorted(code) if code[name])


def _imported(tree: ast.Module, name: str) -> Iterator[str]:
    """Yield the modules that the module `name` imports, and the names of what it imports from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            origin = resolve_name(relative, sys.modules[name].__package__)
            yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))


def _is_beside(other: str, name: str) -> bool:
    """Return whether `other` is a module of the package or the folder of the module `name`, but not of an installed package."""
    if other not in sys.modules or _top(other) in KNOWN:
        return False
    folder = _folder(_top(name))
    is_installed = os.path.basename(folder) in ("site-packages", "dist-packages")
    return _top(other) == _top(name) or (not is_installed and _folder(_top(other)) == folder)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _folder(top: str) -> str:
    """Return the folder that contains a top-level module or package; "" if it has no file."""
    path = inspect.getsourcefile(sys.modules[top]) if getattr(sys.modules[top], "__file__", None) else None
    if path is None:
        return ""
    folder = os.path.dirname(os.path.realpath(path))
    return os.path.dirname(folder) if hasattr(sys.modules[top], "__path__") else folder
