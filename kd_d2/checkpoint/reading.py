"""Safe loading of checkpoint files, without running code from them."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..errors import UserError
from .torchvision import StateDict


class _PlainUnpickler(pickle._Unpickler):
    """Loads pickles of arrays and plain containers, and rejects anything else without running it.

    Based on the Python unpickler: the C one allocates gigabytes if a corrupted byte gives a high memo index.
    """

    ALLOWED = {
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module.replace("numpy._core", "numpy.core"), name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")  # same wording as torch


_scalar = np.float64(0).__reduce__()[0]  # in numpy.core before NumPy 2
NUMPY_SCALARS = [
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
]
"""What torch.load may construct for NumPy scalars, which other programs, and Pascal VOC's evaluator, give as AP."""


class UnreadableCheckpointError(UserError):
    """A checkpoint does not exist or is damaged."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint file without running code from it.

    Args:
        path: a `.pth` file (tensors and plain containers), a model zoo or Caffe2 `.pkl` (arrays, containers), or a
            `.safetensors` file.

    Returns:
        The content of the file, always with an entry "model", with tensors on the CPU.

    Raises:
        UserError: the file does not exist, is damaged, or holds anything other than tensors and plain containers.
    """
    path = os.fspath(path)
    with _errors_that_name(path):
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = _PlainUnpickler(file, encoding="latin1").load()
        elif path.endswith(".safetensors"):
            content = _load_safetensors(path)
        else:
            _check_size(path)
            content = _load_safely(path)
    _check_names(content, path)
    if path.endswith(".pkl") and not ("model" in content and "__author__" in content):
        content = content.get("blobs", content)
        _check_names(content, path)
        weights = {k: v for k, v in content.items() if not k.endswith("_momentum")}
        content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    if isinstance(content.get("model_state"), dict):  # pycls
        _check_names(content["model_state"], path)
        weights = {k: v for k, v in content["model_state"].items() if not k.endswith("num_batches_tracked")}
        content = {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    if not isinstance(content.get("model"), dict):
        content = {"model": content}
    check_weights(content["model"], path)
    return content


def check_weights(weights: Any, path: str) -> None:
    """Check that an entry of a checkpoint is a dictionary of weights by name.

    Raises:
        UserError: it is not; the message names the first entry that is no weight.
    """
    _check_names(weights, path)
    for name, value in weights.items():
        reason = _why_no_weight(value)
        if reason:
            raise UserError(f"Checkpoint {path} is not a dictionary of weights: its entry {name!r} {reason}.")


def read_tensors_and_text(path: str) -> Any:
    """Load a `.pth` file of another program without running code from it.

    Returns:
        The content: tensors on the CPU, plain containers, numbers and text, and an `Omitted` in place of any other object.

    Raises:
        UserError: the file does not exist, is damaged, or is a TorchScript program.
    """
    with _errors_that_name(path):
        _check_size(path)
        _check_no_program(path)
        return torch.load(path, map_location="cpu", pickle_module=_OmittingPickle, weights_only=False)


class Omitted:
    """Stands for an object of a type that is not loaded: takes any arguments, state and items, and keeps none."""

    def __init__(self, *args: Any, **arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _OmittingPickle:
    """What `torch.load` needs of the module pickle."""

    class Unpickler(pickle._Unpickler):
        ALLOWED = {
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_tensor"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }

        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(module, name) if (module, name) in self.ALLOWED else Omitted

    @classmethod
    def load(cls, file: Any, **arguments: Any) -> Any:
        return cls.Unpickler(file, **arguments).load()


@contextlib.contextmanager
def _errors_that_name(path: str) -> Iterator[None]:
    """Raise a UserError that names the file in place of any error from reading it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UnreadableCheckpointError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # a damaged file can make torch.load and pickle raise any error
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise UserError(
                f"Checkpoint {path} was not loaded: it holds more than tensors and plain data ({refused[1]}), which could run "
                "code."
            ) from error
        # For a file that it cannot unpickle, torch's message recommends unsafe loading.
        reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0].partition(". ")[0]
        raise UnreadableCheckpointError(
            f"Checkpoint {path} is damaged or not a checkpoint: it cannot be read ({reason or type(error).__name__})."
        ) from error


def check_readable(state: dict[str, Any]) -> None:
    """Check that `read_checkpoint` will accept a state that is to be saved.

    Args:
        state: content of a checkpoint, with the weights of the model under "model".

    Raises:
        UserError: it will not; the message names the entry and its type.
    """
    for name, value in state["model"].items():
        reason = _why_no_weight(value) if isinstance(value, Tensor) else f"is a {_type_name(value)}"
        if reason:
            raise UserError(f"The weights of a model in a checkpoint must be dense tensors; {name!r} {reason}.")
    for key, entries in state.items():
        for name, value in entries.items() if isinstance(entries, dict) else [("", entries)]:
            refused = None if key == "model" else _first_unreadable(value)
            if refused:
                raise UserError(
                    f"A checkpoint may contain only tensors and plain data (numbers, strings, None, lists, tuples and dicts of these); "
                    f"{f'{name} of {key}' if name else key} contains a {refused}."
                )


def _first_unreadable(value: Any) -> str | None:
    """Return the type of the first object, in dicts, lists and tuples, that cannot be read back; None if all can."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        found = map(_first_unreadable, itertools.chain(value.keys(), value.values()))
        return next(filter(None, found), None)
    if kind in (list, tuple):
        return next(filter(None, map(_first_unreadable, value)), None)
    if kind in (Tensor, nn.Parameter, bool, int, float, str, type(None)):
        return None
    is_readable = _is_readable_scalar(value.dtype) if isinstance(value, np.generic) else _is_readable(value)
    return None if is_readable else _type_name(value)


@functools.cache
def _is_readable_scalar(dtype: np.dtype) -> bool:
    return _is_readable(np.zeros((), dtype)[()])


def _is_readable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        _load_safely(file)
    except Exception:  # pickle calls methods of the object, which can raise any error
        return False
    return True


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _load_safely(file: str | io.BytesIO) -> Any:
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_safetensors(path: str) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path} needs safetensors, which is not installed: pip install safetensors") from error
    return load_file(path)


def _why_no_weight(value: Any) -> str | None:
    """Return why a value cannot be a weight of a model, or None if it can."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind in "biuf" else f"is an array of {value.dtype}"
    if not isinstance(value, Tensor):
        return "is not a tensor"
    if value.is_meta:
        return "is a tensor without data (on the meta device)"
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
        return f"is a {kind} tensor"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "is an expanded tensor, which repeats its data"
    return None


def _check_size(path: str) -> None:
    """Reject a zip file that unpacks to many times its size, which PyTorch checkpoints never do."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 10 * os.path.getsize(path) + 2**20:
        raise UserError(f"Checkpoint {path} of {os.path.getsize(path)} bytes unpacks to {unpacked}; it is not loaded.")


def _check_no_program(path: str) -> None:
    """Reject a TorchScript archive, of which `torch.load` runs code, with the reader and criterion of `torch.load`."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and "constants.pkl" in torch._C.PyTorchFileReader(path).get_all_records():
        raise UserError(
            f"{path} is a TorchScript program, not a checkpoint; it is not loaded, since this could run code."
        )


def distiller_states(path: str) -> dict[str, StateDict]:
    """Return the state dict of each distiller's own layers in a checkpoint of this library, by distiller; {} if none.

    Raises:
        UserError: see `read_checkpoint`.
    """
    states: dict[str, StateDict] = defaultdict(dict)
    for key, value in (read_checkpoint(path).get("distillers") or {}).items():
        distiller, _, name = key.partition(".")
        states[distiller][name] = value
    return states


def _check_names(content: Any, path: str) -> None:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"Checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights by name.")


def local_path(path: str) -> str:
    """Return the local file of a path or URL, downloading it if needed."""
    try:
        return PathManager.get_local_path(path)
    except Exception as error:  # the libraries that handle URLs raise various errors
        raise UserError(f"Weights {path} cannot be downloaded: {str(error).rstrip('.')}.") from error
