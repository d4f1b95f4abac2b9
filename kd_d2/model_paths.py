"""Trained detectors as people name them: the output folder of a training, or a config and a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import UserError

EXPORT_SUFFIXES = {".onnx": "onnx", ".ts": "torchscript", ".torchscript": "torchscript", ".xml": "openvino"}
"""The formats of `kd-d2 export` by the suffixes of their files."""


def format_of(path: str) -> str | None:
    """The format of an exported model by its file's name, None of another file."""
    return EXPORT_SUFFIXES.get(os.path.splitext(path)[1].lower())


@dataclass(frozen=True)
class ModelPath:
    """A trained detector that is named by its files.

    Attributes:
        title: what tables and pictures call it.
        config: its config file; of an exported model that is given alone, its file.
        weights: its checkpoint, or an exported model's file; "" for the config's own MODEL.WEIGHTS.
    """

    title: str
    config: str
    weights: str

    @property
    def exported(self) -> str | None:
        """The file of `kd-d2 export` that it is, None for a PyTorch detector."""
        return next((path for path in (self.weights, self.config) if format_of(path)), None)

    @property
    def overrides(self) -> list[str]:
        """The weights as an override of the config."""
        return ["MODEL.WEIGHTS", self.weights] if self.weights else []


def read_model_paths(values: list[list[str]], *, may_be_exported: bool = False) -> list[ModelPath]:
    """The models of `--model`.

    Args:
        may_be_exported: whether the command takes files of `kd-d2 export`.

    Raises:
        UserError: too many values, a run folder without config or checkpoint, two models with one title, or an exported model
            that cannot be taken.
    """
    models = [_model_path(*value) for value in values]
    titles = [model.title for model in models]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"--model: two models have the title {title!r}; write TITLE=CONFIG_OR_RUN.")
    for model in models:
        if model.exported and not may_be_exported:
            raise UserError(f"--model: {model.exported} is an exported model, which only kd-d2 predict and eval take.")
    return models


def read_one_model_path(values: list[list[str]], *, may_be_exported: bool = False) -> ModelPath:
    """The model of a `--model` that may be given once.

    Raises:
        UserError: see `read_model_paths`, or there are several.
    """
    models = read_model_paths(values, may_be_exported=may_be_exported)
    if len(models) > 1:
        raise UserError(f"--model: this command takes one model, not {len(models)}.")
    return models[0]


def _model_path(place: str, weights: str = "", *more: str) -> ModelPath:
    if more:
        raise UserError(f"--model takes a config or a run, and weights; {more[0]!r} is one value too many.")
    title, equals, path = place.partition("=")
    if not equals or os.path.exists(place):
        title, path = "", place
    if not os.path.isdir(path):
        return ModelPath(title or os.path.splitext(os.path.basename(path))[0], path, weights)
    config = os.path.join(path, "config.yaml")
    weights = weights or os.path.join(path, "model_final.pth")
    for file in (config, weights):
        if "://" not in file and not os.path.isfile(file):
            raise UserError(f"--model: {path} is not the output folder of a finished training: there is no {file}.")
    return ModelPath(title or os.path.basename(os.path.abspath(path)), config, weights)
