"""Merging of config files and overrides into the defaults, with conversion to their types."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from ..config_files import find_config_file, read_layers, read_yaml
from ..errors import UserError
from ..extensions import HINT
from ..keys import keys_of
from .library_keys import add_kd_config, declared_nodes

COMMAND_LINE = "the command line"


def read_config(config_file: str, opts: Iterable[Any] = ()) -> CN:
    """Merge a config file and overrides into the defaults, without the checks of `load_config`.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type.
    """
    cfg = get_cfg()
    add_kd_config(cfg)
    if config_file:
        path = find_config_file(config_file, "the config")
        tree = read_yaml(path)
        if "cells" in tree:
            raise UserError(f"{path} is a sweep of several trainings, not a config: run `kd-d2 sweep {config_file}`.")
        merge(cfg, tree, path)
    merge(cfg, tree_from_opts(list(opts), COMMAND_LINE), COMMAND_LINE)
    return cfg


def solver_layers(config_file: str, opts: Iterable[Any] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return where keys of SOLVER are set, and these keys: each file after its bases, then the command line."""
    files = read_layers(find_config_file(config_file, "the config")) if config_file else ()
    layers = [*files, (COMMAND_LINE, tree_from_opts(list(opts), COMMAND_LINE))]
    return [(source, tree.get("SOLVER") or {}) for source, tree in layers]


def check_overrides(opts: Iterable[Any], source: str) -> None:
    """Raise a UserError that begins with `source` if an override has an unknown key or a value of the wrong type."""
    cfg = get_cfg()
    add_kd_config(cfg)
    merge(cfg, tree_from_opts(list(opts), source), source)


def thawed(cfg: CN) -> CN:
    """Return a copy of a config that can be changed, also if the config is frozen."""
    copy = cfg.clone()
    copy.defrost()
    return copy


def changed_keys(cfg: CN) -> dict[str, Any]:
    """Return the keys whose values differ from the defaults of Detectron2 and this library; tuples count as lists."""
    defaults = get_cfg()
    add_kd_config(defaults)
    changed: dict[str, Any] = {}

    def walk(node: CN, default: CN, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, CN):
                walk(value, default[key], f"{prefix}{key}.")
            elif _as_lists(value) != _as_lists(default[key]):
                changed[prefix + key] = _as_lists(value)

    walk(cfg, defaults, "")
    return changed


def _as_lists(value: Any) -> Any:
    """Convert tuples to lists, as a JSON round trip does."""
    return [_as_lists(v) for v in value] if isinstance(value, list | tuple) else value


def tree_from_opts(opts: list[Any], source: str) -> dict[str, Any]:
    """Convert overrides, [KEY, value, ...], to a tree. Error messages call them `source`."""
    options = [o for o in opts[::2] if str(o).startswith("--")]
    if options:
        raise UserError(f"{source}: the option {options[0]} must come before the KEY VALUE overrides.")
    if len(opts) % 2:
        raise UserError(f"{source}: overrides come in pairs of a key and a value; {opts[-1]!r} has no value.")
    tree: dict[str, Any] = {}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        *parents, leaf = str(key).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{source}: {key} is set, but so is a value for its group {parent}.")
        node[leaf] = value
    return tree


def merge(cfg: CN, tree: dict[str, Any], source: str) -> None:
    """Merge a tree of keys into a config.

    Raises:
        UserError: an unknown key, or a value of the wrong type; the message begins with `source`.
    """
    declared = declared_nodes().items()
    optional = {f"{path}.{key.name}" for path, keys in declared for key in keys_of(keys) if key.accepts(None)}
    try:
        cfg.merge_from_other_cfg(type(cfg)(_with_default_types(tree, cfg, source, optional)))
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{source}: {error.args[0] if error.args else error}") from error


def _with_default_types(
    tree: dict[str, Any], defaults: CN, source: str, optional: set[str], prefix: str = ""
) -> dict[str, Any]:
    """Convert every number in `tree` to the type of its default; raise a UserError for unknown keys and wrong types.

    Values of `optional` keys are left to the validation of the config; yacs accepts any for a key that is None.
    """
    converted = {}
    for key, value in tree.items():
        full_key = f"{prefix}{key}"
        if key not in defaults:
            close = difflib.get_close_matches(str(key).upper(), defaults.keys(), n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else ""
            of_own = f"; {HINT}" if prefix.startswith("MODEL.") and isinstance(value, dict) else ""
            raise UserError(f"{source}: there is no config key {full_key}{of_own}.{hint}")
        default = defaults[key]
        if isinstance(default, CN):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {full_key} is a group of keys and cannot be set to {value!r}.")
            converted[key] = _with_default_types(value, default, source, optional, full_key + ".")
            continue
        value = _decoded(value, f"{source}: {full_key}")
        if full_key in optional:
            if isinstance(value, dict):
                raise UserError(f"{source}: {full_key} is not a group of keys and cannot be set to {value!r}.")
            defaults[key] = None
            converted[key] = value
            continue
        if isinstance(default, int | float) and not isinstance(default, bool) and type(value) in (int, float):
            if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
                raise UserError(f"{source}: {full_key} is {value}; it must be a whole number.")
            try:
                value = type(default)(value)
            except OverflowError:
                raise UserError(f"{source}: {full_key} is too large a number.") from None
        if isinstance(default, list | tuple) and isinstance(value, str):
            entries = ", ".join(f'"{entry.strip()}"' for entry in value.strip("()[], ").split(","))
            raise UserError(f"{source}: {full_key} is the string {value!r}, but must be a list, such as [{entries}].")
        if not _same_kind(default, value) and not _means_none(full_key, default, value):
            raise UserError(
                f"{source}: {full_key} is {value!r}; it must be of type {type(default).__name__}, like its default {default!r}."
            )
        converted[key] = value
    return converted


def _decoded(value: Any, where: str) -> Any:
    """Decode a string that is a Python literal, as yacs does for overrides."""
    try:
        return CN._decode_cfg_value(value)
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{where} is nested too deeply.") from error


def _same_kind(default: Any, value: Any) -> bool:
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    return default is None or type(value) is type(default)


def _means_none(key: str, default: Any, value: Any) -> bool:
    """Return whether None is allowed, as for Detectron2's model names, such as norms."""
    return value is None and isinstance(default, str) and key.startswith("MODEL.") and not key.startswith("MODEL.KD.")
