"""Loading of untrusted YAML files in bounded time and memory, without code execution."""

from __future__ import annotations

import copy
import functools
import os
import re
import stat
from http.client import HTTPException
from typing import Any

import yaml

from .errors import UserError

LARGEST_FILE = 4 * 2**20
"""Bytes."""
MOST_NODES = 200_000
"""Maximum number of values in a file, with aliases expanded."""
DEEPEST = 50


def _resolvers(*without: str) -> dict[str, list]:
    """Return the safe loader's rules that give plain values a type, except those for some types."""
    tags = [f"tag:yaml.org,2002:{name}" for name in without]
    return {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Loader(yaml.SafeLoader):
    """The safe loader with dates loaded as strings."""

    yaml_implicit_resolvers = _resolvers("timestamp")


class _TextLoader(yaml.SafeLoader):
    """The safe loader with dates, numbers and truth values loaded as strings, as they are written."""

    yaml_implicit_resolvers = _resolvers("timestamp", "bool", "int", "float")


def read_plain_yaml(path: str, what: str, *, as_text: bool = False) -> Any:
    """Load a YAML file.

    Args:
        path: file, or any path that Detectron2's PathManager supports.
        what: name of the file in messages, such as "Config file x.yaml".
        as_text: whether numbers and truth values are returned as text, as they are written.

    Raises:
        UserError: it is not a regular file, too large, not plain YAML, too deeply nested, or has too many values or the
            same key twice in one mapping.
    """
    return copy.deepcopy(_parsed(read_text(path, what), what, as_text))


@functools.lru_cache(maxsize=32)
def _parsed(text: str, what: str, as_text: bool) -> Any:
    """Parse a file's text; the cells of a sweep, and a student and its teacher, have most bases in common."""
    loader = _TextLoader if as_text else _Loader
    try:
        node = yaml.compose(text, loader)
        if node is None:
            return None
        if _size(node, {}, what) > MOST_NODES:
            raise UserError(f"{what} has more than {MOST_NODES} values after expanding aliases (*name).")
        return loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not plain yaml: {_reason(error)}.") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply.") from error
    except ValueError as error:  # a number that Python cannot parse
        raise UserError(f"{what} has a value that cannot be read: {error}.") from error


def _reason(error: yaml.YAMLError) -> str:
    tag = re.search(r"'tag:yaml\.org,2002:(python/[^']*)'", str(error))
    if tag is None or not isinstance(error, yaml.constructor.ConstructorError):
        return " ".join(str(error).split())
    return (
        f"line {error.problem_mark.line + 1} has the tag !!{tag[1]}, which can run code; write the value itself, "
        "or, instead of copying a config of Detectron2's model zoo, name it, as in _BASE_: Base-RetinaNet.yaml"
    )


def read_text(path: str, what: str) -> str:
    """Return the text of a regular file of at most `LARGEST_FILE` characters.

    Raises:
        UserError: it is not a regular file, is too large or cannot be read.
    """
    from detectron2.utils.file_io import PathManager  # imports torch, which names of configs do not need

    try:
        local = PathManager.get_local_path(path)
        if not stat.S_ISREG(os.stat(local).st_mode):  # opening a named pipe would block
            raise UserError(f"{what} is not a regular file.")
        with open(local, encoding="utf-8-sig") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, AssertionError, ValueError, RuntimeError, HTTPException) as error:
        raise UserError(f"{what} cannot be read: {error}.") from error
    if len(text) > LARGEST_FILE:
        raise UserError(f"{what} is larger than {LARGEST_FILE // 2**20} MiB.")
    return text


def _size(node: yaml.Node, sizes: dict[int, int], what: str, depth: int = 0) -> int:
    """Return the number of values of a node with aliases expanded, visiting each node once."""
    if id(node) in sizes:
        return sizes[id(node)]
    if depth > DEEPEST:
        raise UserError(f"{what} is nested more than {DEEPEST} levels deep.")
    sizes[id(node)] = 0  # ends the recursion at a node that contains itself; the callers reject such trees
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, what)
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    sizes[id(node)] = 1 + sum(_size(child, sizes, what, depth + 1) for child in children)
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode, what: str) -> None:
    """Raise a UserError if a key is repeated, except the merge key <<; PyYAML would use the last value."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):  # refused by the loader
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines and key.tag != "tag:yaml.org,2002:merge":
            raise UserError(f"{what} has the key {key.value} twice, in lines {lines[name]} and {line}.")
        lines[name] = line
