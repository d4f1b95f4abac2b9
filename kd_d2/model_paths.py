"""Parsing of `--model` arguments: the output folder of a training, or a config and a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import UserError

EXPORT_SUFFIXES = {".onnx": "onnx", ".ts": "torchscript", ".torchscript": "torchscript", ".xml": "openvino"}
"""Formats of `kd-d2 export` by file suffix."""


def format_of(path: str) -> str | None:
    """Return the format of an exported model by its file suffix, or None for any other file."""
    return EXPORT_SUFFIXES.get(os.path.splitext(path)[1].lower())


@dataclass(frozen=True)
class ModelPath:
    """The files of a trained detector.

    Attributes:
        title: name of the detector in tables and figures.
        config: config file; for an exported model given without a config, its file.
        weights: checkpoint or file of an exported model; "" for the config's MODEL.WEIGHTS.
        run: output folder of the training, if it was given instead of a config.
    """

    title: str
    config: str
    weights: str
    run: str | None = None

    @property
    def exported(self) -> str | None:
        """The file of an exported model, or None for a PyTorch detector."""
        return next((path for path in (self.weights, self.config) if format_of(path)), None)

    @property
    def overrides(self) -> list[str]:
        """The weights as an override of the config."""
        return ["MODEL.WEIGHTS", self.weights] if self.weights else []


def read_model_paths(values: list[list[str]], *, may_be_exported: bool = False) -> list[ModelPath]:
    """Parse the values of `--model`.

    Args:
        may_be_exported: whether the command accepts exported models.

    Raises:
        UserError: there are too many values, a run folder lacks its config or checkpoint, two models have the same
            title, or an exported model is not accepted or followed by weights.
    """
    models = [_model_path(*value) for value in values]
    titles = [model.title for model in models]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"--model: two models have the title {title!r}; write TITLE=CONFIG_OR_RUN.")
    for model in models:
        if model.exported and not may_be_exported:
            raise UserError(f"--model: {model.exported} is an exported model, accepted only by kd-d2 predict and eval.")
    return models


def read_one_model_path(values: list[list[str]], *, may_be_exported: bool = False) -> ModelPath:
    """Parse the values of a `--model` option that accepts one model.

    Raises:
        UserError: see `read_model_paths`, or there are several models.
    """
    models = read_model_paths(values, may_be_exported=may_be_exported)
    if len(models) > 1:
        raise UserError(f"--model: this command accepts one model, not {len(models)}.")
    return models[0]


def _model_path(place: str, weights: str = "", *more: str) -> ModelPath:
    if more:
        raise UserError(f"--model takes a config or run, and weights; {more[0]!r} is one value too many.")
    title, equals, path = place.partition("=")
    if not equals or os.path.exists(place):
        title, path = "", place
    if not path:
        raise UserError("--model is empty: name a config or the output folder of a training.")
    if format_of(path) and weights and not os.path.isdir(path):
        raise UserError(f"--model: {path} is an exported model, which includes its weights; leave out {weights}.")
    if not os.path.isdir(path):
        name = os.path.basename(path)
        return ModelPath(title or (name if format_of(path) else os.path.splitext(name)[0]), path, weights)
    config, final = (os.path.join(path, name) for name in ("config.yaml", "model_final.pth"))
    for file in (config,) if weights else (config, final):
        if not os.path.isfile(file):
            raise UserError(f"--model: {path} is not the output folder of a finished training: there is no {file}.")
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise UserError(f"--model: there is no file {weights}.")
    return ModelPath(title or os.path.basename(os.path.abspath(path)), config, weights or final, path)
