"""Modules that have another name since 0.2: importing the old one says the new one."""

from __future__ import annotations

import importlib.abc
import sys

MODULES = {
    "comparison": "sweep",
    "data.pseudo_labels": "pseudo_labels",
    "detectors": "adapters",
    "engine.random_state": "random_state",
    "engine.schedule": "engine.learning_rate",
    "engine.worker_states": "engine.rank_states",
    "labels": "pseudo_labels",
    "workers": "distributed",
}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str):
        self.names = {f"{package}.{old}": f"{package}.{new}" for old, new in MODULES.items()}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname} is now {self.names[fullname]}", name=fullname)
        return None


def explain(package: str) -> None:
    """Let imports of the package's old modules fail with a message that names the new ones."""
    sys.meta_path.append(_Finder(package))
