"""Reading of MMDetection's checkpoints and configs, without running code from them."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import StateDict
from ..checkpoint.reading import check_weights, read_tensors_and_text
from ..errors import UserError
from ..plain_yaml import read_text

NEEDED = {"_base_", "model", "test_cfg", "test_dataloader", "test_pipeline", "data"}
"""Entries of a config that describe the detector, its images, or where they are."""

STUDENTS = ("architecture.", "student.")
"""Beginnings of the names of the student's weights in checkpoints that also have those of a teacher: of MMRazor, and of FGD and MGD."""


@dataclass(frozen=True)
class MMDetectionCheckpoint:
    """Content of a checkpoint.

    Attributes:
        weights: weights by MMDetection's names.
        config: text of the config with which it was trained; None if the file has none.
        classes: class names by class index; None if the file has none.
    """

    weights: StateDict
    config: str | None
    classes: tuple[str, ...] | None


def read_mmdet_checkpoint(path: str) -> MMDetectionCheckpoint:
    """Read a checkpoint of MMDetection 2 or 3, or the student in one of a distillation with it.

    Raises:
        UserError: it cannot be read, or has no weights.
    """
    content = read_tensors_and_text(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path} is not a checkpoint of MMDetection: it has no state_dict.")
    check_weights(weights, path)
    for prefix in STUDENTS:
        student = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        weights = student or weights
    meta = _dict_in(content, "meta")
    texts = [meta.get(name) for name in ("cfg", "config")]
    dataset = _dict_in(meta, "dataset_meta")
    classes = next((c for c in (dataset.get("classes"), dataset.get("CLASSES"), meta.get("CLASSES")) if c), None)
    return MMDetectionCheckpoint(
        {name: value.float() if value.dtype == torch.float16 else value for name, value in weights.items()},
        next((text for text in texts if isinstance(text, str)), None),
        _names(classes),
    )


def _dict_in(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _names(classes: Any) -> tuple[str, ...] | None:
    if isinstance(classes, str):
        return (classes,)
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) else None


def read_mmdet_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file as MMDetection writes it to its work_dir, with all values.

    Raises:
        UserError: see `parse_mmdet_config`.
    """
    path = os.fspath(path)
    what = f"The MMDetection config {path}"
    return parse_mmdet_config(read_text(path, what), what)


def parse_mmdet_config(text: str, what: str) -> dict[str, Any]:
    """Evaluate the assignments of a config that consist of literals, dict(...) and names assigned before.

    Args:
        text: Python code.
        what: name of the config at the beginning of messages.

    Returns:
        The values by name, without those that nothing of the detector is read from and that have another form, such as `range(0, 8)`.

    Raises:
        UserError: a value that is needed has another form, or the config has other statements or inherits from another file.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{what} is not Python code: {error}.") from error
    values: dict[str, Any] = {}
    refused: dict[str, UserError] = {}
    try:
        for statement in tree.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a comment in the form of a string
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise _unsupported(statement, what)
            name = statement.targets[0].id
            values.pop(name, None), refused.pop(name, None)
            try:
                values[name] = _evaluate(statement.value, values, what)
            except UserError as error:
                refused[name] = error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply.") from error
    if needed := [refused[name] for name in refused if name in NEEDED]:
        raise needed[0]
    if values.get("_base_"):
        raise UserError(
            f"{what} inherits from other files (_base_): name the complete config that MMDetection writes to the work_dir of the training, or the "
            "output of its tools/misc/print_config.py."
        )
    return values


def _evaluate(node: ast.expr, names: dict[str, Any], what: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        keywords = [(keyword.arg, keyword.value) for keyword in node.keywords]
        if not node.args and all(name is not None for name, _ in keywords):
            return {name: _evaluate(value, names, what) for name, value in keywords}
        if len(node.args) == 1 and isinstance(node.args[0], ast.Dict) and not keywords:
            return _evaluate(node.args[0], names, what)
    if isinstance(node, ast.List):
        return [_evaluate(item, names, what) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(item, names, what) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_evaluate(key, names, what) for key in node.keys if key is not None]
        return dict(zip(keys, (_evaluate(value, names, what) for value in node.values), strict=True))
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise _unsupported(node, what) from error


def _unsupported(node: ast.AST, what: str) -> UserError:
    return UserError(
        f"{what} has {ast.unparse(node).partition(chr(10))[0]!r} in line {getattr(node, 'lineno', 1)}, which is not a plain value: name the complete config "
        "that MMDetection writes to the work_dir of the training."
    )
