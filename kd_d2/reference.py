"""Reference of the config keys of the library, its detectors and the registered methods: type, default, description."""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass
from typing import Any

from detectron2.config import get_cfg

from .config import add_kd_config, declared_nodes
from .config_files import leaves
from .errors import UserError
from .keys import keys_of


@dataclass(frozen=True)
class KeyReference:
    """A config key in the reference.

    Attributes:
        name: full name, such as "MODEL.KD.ICD.DIM".
        values: type and range in words, such as "a whole number at least 1".
        default: default value.
        description: meaning of the key.
    """

    name: str
    values: str
    default: Any
    description: str


def config_reference() -> list[KeyReference]:
    """Return the keys of the library, its backbones and detectors, and the registered methods (sorted by name)."""
    return [
        KeyReference(f"{path}.{key.name}", key.words, key.default, key.description)
        for path, keys in declared_nodes().items()
        for key in keys_of(keys)
    ]


def explain(key: str) -> str:
    """Return an explanation of a config key, or of all keys of a node, as text.

    Raises:
        UserError: the key or node does not exist.
    """
    texts = {entry.name: _as_text(entry) for entry in config_reference()}
    for name, default in leaves(get_cfg()):
        text = f"{name}\n    a key of Detectron2, {default!r} by default; see detectron2.config.defaults"
        texts.setdefault(name, text)
    cfg = get_cfg()
    add_kd_config(cfg)
    for name, default in leaves(cfg):
        texts.setdefault(name, f"{name}\n    a key of your own (register_config), {default!r} by default")
    explained = [text for name, text in texts.items() if f"{name}.".startswith(f"{key}.")]
    if explained:
        return "\n\n".join(explained)
    known = [*texts, *({name.rpartition(".")[0] for name in texts} - {""})]
    close = difflib.get_close_matches(key.upper(), known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"There is no config key or node {key}.{hint}")


def _as_text(entry: KeyReference) -> str:
    description = textwrap.fill(entry.description, 100, initial_indent="    ", subsequent_indent="    ")
    return f"{entry.name}\n{description}\n    {entry.values}; default {entry.default!r}"
