"""Every config key of the library, its detectors and the registered methods, with its type, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import LIBRARY_KEYS
from .distillers import DISTILLER_REGISTRY
from .keys import Keys, keys_of
from .modeling import MODELING_KEYS


@dataclass(frozen=True)
class KeyReference:
    """A config key as the reference shows it.

    Attributes:
        name: in full, such as "MODEL.KD.ICD.DIM".
        values: its type and range in words, such as "a whole number at least 1".
        default: its default value.
        description: what it means.
    """

    name: str
    values: str
    default: Any
    description: str


def config_reference() -> list[KeyReference]:
    """The keys of the library, of its backbones and detectors, and of each registered method, in order of the methods' names."""
    nodes: dict[str, type[Keys]] = LIBRARY_KEYS | {f"MODEL.{name}": keys for name, keys in MODELING_KEYS.items()}
    for _, method in sorted(DISTILLER_REGISTRY):
        nodes[f"MODEL.KD.{method.CONFIG_NODE}"] = method.Config
    return [entry for path, keys in nodes.items() for entry in _entries(path, keys)]


def _entries(path: str, keys: type[Keys]) -> Iterator[KeyReference]:
    for key in keys_of(keys):
        yield KeyReference(f"{path}.{key.name}", key.words, key.default, key.description)
