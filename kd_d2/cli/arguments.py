"""Arguments that commands share."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from ..errors import UserError


def add_config_argument(parser: argparse.ArgumentParser, help: str = "a config") -> None:
    """CONFIG, which is `args.config_file`."""
    parser.add_argument(
        "config_file",
        metavar="CONFIG",
        help=f"{help}: a file, the name of one that ships (kd-d2 config list), or one in Detectron2's model zoo",
    )


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """--import, of which `args.imports` is the list."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a Python module or file that registers methods or detectors; may be repeated",
    )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes run, and where: Detectron2's options."""
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, and processes, of each machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="URL of the first process, such as tcp://HOST:PORT")


@dataclass(frozen=True)
class ModelPath:
    """A trained detector on a command line.

    Attributes:
        title: what tables and pictures call it.
        config: its config file.
        weights: its checkpoint; "" for the config's own MODEL.WEIGHTS.
    """

    title: str
    config: str
    weights: str

    @property
    def overrides(self) -> list[str]:
        """The weights as an override of the config."""
        return ["MODEL.WEIGHTS", self.weights] if self.weights else []


def add_model_argument(parser: argparse._ActionsContainer, count: str, *, required: bool = True) -> None:
    """--model, of which `args.model` is a list of value lists, one for each `--model`: see `read_model_paths`.

    Args:
        count: how many models the command takes, for the help.
    """
    parser.add_argument(
        "--model",
        action="append",
        nargs="+",
        required=required,
        metavar=("[TITLE=]CONFIG_OR_RUN", "WEIGHTS"),
        help="a trained model: the output folder of a training, or a config and a checkpoint; a distillation's config means "
        f"its student ({count})",
    )


def read_model_paths(values: list[list[str]]) -> list[ModelPath]:
    """The models of `--model`.

    Raises:
        UserError: too many values, a run folder without config or checkpoint, or two models with one title.
    """
    models = [_model_path(*value) if len(value) <= 2 else _refuse(value) for value in values]
    titles = [model.title for model in models]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"--model: two models have the title {title!r}; write TITLE=CONFIG_OR_RUN.")
    return models


def read_one_model_path(values: list[list[str]]) -> ModelPath:
    """The model of a `--model` that may be given once.

    Raises:
        UserError: see `read_model_paths`, or there are several.
    """
    models = read_model_paths(values)
    if len(models) > 1:
        raise UserError(f"--model: this command takes one model, not {len(models)}.")
    return models[0]


def _model_path(place: str, weights: str = "") -> ModelPath:
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


def _refuse(value: list[str]) -> ModelPath:
    raise UserError(f"--model takes a config or a run, and weights; {value[2]!r} is one value too many.")
