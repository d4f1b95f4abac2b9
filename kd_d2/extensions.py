"""Import of user modules and files that register methods, detectors or datasets."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable

from .errors import UserError

HINT = "if it is your own, import the file that registers it with --import"
"""Part of messages about names that are not registered."""


def import_extensions(names: Iterable[str]) -> None:
    """Import each module or file once, to register its methods, detectors or datasets.

    Args:
        names: module names, also from the working directory, or paths of Python files, which may import each other
            from there in any order.

    Raises:
        UserError: a module or file does not exist or has no valid name, or a file has the name of another module.
    """
    names = list(names)
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` adds it, but the kd-d2 program does not
    for name in names:
        if name.endswith(".py") or os.sep in name:
            _import_file(os.path.abspath(os.path.expanduser(name)))
        else:
            _import_module(name)


def _import_file(path: str) -> None:
    name = os.path.splitext(os.path.basename(path))[0]
    loaded = sys.modules.get(name)
    if loaded is not None:
        if os.path.realpath(getattr(loaded, "__file__", None) or "") == os.path.realpath(path):
            return
        raise UserError(f"--import: the file {path} has the name of another module, {name}: rename it.")
    if not os.path.isfile(path):
        raise UserError(f"--import: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"--import: the file {path} is not a Python file: its name must end with .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as `import` does, for pickling and circular imports
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import_module(name: str) -> None:
    if not name or name.startswith("."):
        raise UserError(f"--import: {name!r} is neither the name of a module nor the path of a Python file.")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one that it imports does not
        raise UserError(f"--import: there is no module {name}.") from error
