"""Lookup of config files by path or name, and loading with their bases."""

from __future__ import annotations

import difflib
import functools
import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import yaml

from .errors import UserError
from .plain_yaml import read_plain_yaml, read_text

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_SHARE = os.path.join(_PACKAGE, "share")
ROOT = _SHARE if os.path.isdir(_SHARE) else os.path.dirname(_PACKAGE)
"""The folder of `configs` and `projects`: inside an installed package, next to it in a checkout."""

MOST_LAYERS = 200


def shipped_configs() -> dict[str, str]:
    """Return the paths of the configs that are shipped with the library, by name.

    `tiny/retinanet-ssim` is configs/tiny/retinanet-ssim.yaml, and `ICD/fcos_R50` is projects/ICD/configs/fcos_R50.yaml.
    """
    patterns = ("configs/**/*.yaml", "projects/*/configs/**/*.yaml")
    paths = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)]
    return dict(sorted((_name_of(os.path.relpath(path, ROOT)), path) for path in paths))


def _name_of(path: str) -> str:
    """Return the name of a shipped config from its path relative to ROOT."""
    return re.sub(r"^(?:configs/|projects/([^/]+/)configs/)", r"\1", path.removesuffix(".yaml"))


@functools.cache
def _zoo_folder() -> str:
    from detectron2 import model_zoo  # imports torch, which names of shipped configs do not need

    return os.path.dirname(os.path.realpath(model_zoo.get_config_file("Base-RetinaNet.yaml")))


def find_config_file(name: str, key: str, folder: str = "") -> str:
    """Find a config: an existing file, a shipped config by name, or one in Detectron2's model zoo.

    Args:
        name: a path, relative to the working directory or to `folder`, or a name.
        key: name of the config in error messages.

    Raises:
        UserError: not found; the message names the key, the searched paths and the closest names.
    """
    try:
        return find_file(name, key, folder)
    except UserError as error:
        sentence = str(error)
    return _find_by_name(name, sentence)


def _find_by_name(name: str, sentence: str) -> str:
    """Find a shipped or model zoo config. The UserError begins with `sentence`, which says that it is not a file."""
    path = shipped_configs().get(_name_of(name), os.path.join(_zoo_folder(), name))
    if os.path.isfile(path):
        return path
    if os.path.isabs(os.path.expanduser(name)):
        raise UserError(sentence)
    zoo = glob.glob("**/*.yaml", root_dir=_zoo_folder(), recursive=True)
    names = {_name_of(known): known for known in (*zoo, *shipped_configs())}
    close = difflib.get_close_matches(_name_of(name), names, n=2)
    hint = f" Did you mean {' or '.join(names[known] for known in close)}?" if close else ""
    raise UserError(
        f"{sentence.removesuffix('.')}, and no config {name} comes with kd_d2 or is in Detectron2's model zoo.{hint}"
    )


def find_file(name: str, key: str, folder: str = "", *, is_folder: bool = False) -> str:
    """Return the path of an existing file that a config key names. URLs are returned unchanged.

    Raises:
        UserError: not found; the message names the key and the searched paths.
    """
    if "://" in name:
        return name
    expanded = os.path.expanduser(name)
    exists = os.path.isdir if is_folder else os.path.isfile
    places = list(dict.fromkeys([os.path.abspath(expanded), os.path.abspath(os.path.join(folder, expanded))]))
    for place in places:
        if exists(place):
            return place
    kind = "folder" if is_folder else "file"
    raise UserError(f"{key}: there is no {kind} {' or '.join(places)}.")


def find_weights(name: str, key: str, folder: str = "") -> str:
    """Return the path of a checkpoint (see `find_file`) with its query, such as "?matching_heuristics=True"."""
    file, mark, query = name.partition("?")
    return find_file(file, key, folder) + mark + query


def is_zoo_file(path: str) -> bool:
    """Return whether a config is in Detectron2's model zoo."""
    return os.path.realpath(path).startswith(_zoo_folder() + os.sep)


def read_layers(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a config file and its bases as (path, keys in that file only), each after its own bases.

    Files are plain YAML, except those in Detectron2's model zoo, some of which compute values with code. A `_BASE_` is
    a path relative to the file that contains it, or a config name (see `find_config_file`).

    Raises:
        UserError: a file is missing, is not YAML, or is YAML that would run code.
    """
    for number, layer in enumerate(_layers(path, ())):
        if number == MOST_LAYERS:
            raise UserError(
                f"Config file {path} has more than {MOST_LAYERS} _BASE_ files, with repeated ones counted each time."
            )
        yield layer


def _layers(path: str, above: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    real = os.path.realpath(path)
    if real in above:
        raise UserError(f"Config file {path} is its own _BASE_, directly or through others.")
    tree = _read_file(path)
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"Config file {path} has the _BASE_ {bases!r}, which is neither a path nor a list of paths.")
    for base in bases:
        yield from _layers(find_beside(base, path, f"_BASE_ of {path}"), (*above, real))
    yield path, tree


def find_beside(name: str, path: str, key: str) -> str:
    """Return the path of a config that the file `path` refers to: relative to that file, or by name.

    Raises:
        UserError: see `find_config_file`.
    """
    if "://" in name:
        return name
    file = os.path.join(os.path.dirname(path), os.path.expanduser(name))
    if "://" in file:
        return file
    file = os.path.normpath(file)
    if os.path.isfile(file):
        return file
    return _find_by_name(name, f"{key}: there is no file {file}.")


def _read_file(path: str) -> dict[str, Any]:
    what = f"Config file {path}"
    if path.endswith(".py"):
        raise UserError(
            f"{what} is a Python file; it must be YAML. A LazyConfig can be the teacher (MODEL.KD.TEACHER.CONFIG_FILE) or, in "
            "Detectron2's own training, the student: see docs/guides/own-training.md."
        )
    tree = yaml.unsafe_load(read_text(path, what)) if is_zoo_file(path) else read_plain_yaml(path, what)
    if not isinstance(tree, dict):
        raise UserError(f"Config file {path} {'is empty' if tree is None else 'holds no config keys'}.")
    return tree


def read_yaml(path: str) -> dict[str, Any]:
    """Load a config file merged with its bases.

    Raises:
        UserError: see `read_layers`, or VERSION is not 2.
    """
    result: dict[str, Any] = {}
    for name, tree in read_layers(path):
        _lay_over(result, tree, name)
    if result.pop("VERSION", 2) != 2:
        raise UserError(f"Config file {path} has an old VERSION; only VERSION 2 is supported.")
    return result


def _lay_over(below: dict[str, Any], tree: dict[str, Any], name: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise UserError(f"Config file {name}: {key} is a group of keys here and a value in its _BASE_.")
            below[key] = below[key].copy()  # aliases may have given it to other keys, too
            _lay_over(below[key], value, name)
        else:
            below[key] = value


def as_overrides(path: str) -> list[Any]:
    """Return the keys that a config file and its bases set, as overrides: [key, value, ...].

    Raises:
        UserError: see `read_yaml`.
    """
    return list(itertools.chain.from_iterable(leaves(read_yaml(path))))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full keys, such as "MODEL.DEVICE", and the values of a tree of config keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
