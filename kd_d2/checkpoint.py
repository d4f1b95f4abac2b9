"""Checkpoints: student-only files, safe reading, torchvision's formats."""

from __future__ import annotations

import glob
import logging
import os
import pickle
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor, nn

from .errors import UserError
from .files import atomic_write
from .torchvision_weights import StateDict, TorchvisionFormat, check_torchvision_input, torchvision_format

logger = logging.getLogger(__name__)

CLASS_NAMES = "class_names"
"""The entry of a checkpoint that has the names of the classes, a list by class index. Detectron2 passes over it."""


class _PlainUnpickler(pickle._Unpickler):
    """Reads pickles of arrays and plain containers; anything else in them is refused, not run.

    Python's own unpickler, not the one in C: that one takes gigabytes where one damaged byte names a high place of its memo.
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
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")  # worded as torch does


class UnreadableCheckpointError(UserError):
    """A checkpoint is not there, or damaged."""


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint file without ever running code from it.

    Args:
        path: a `.pth` file (tensors and plain containers), or a model-zoo or Caffe2 `.pkl` file (arrays and plain containers).

    Returns:
        What the file holds, always with an entry "model"; tensors on the CPU.

    Raises:
        UserError: the file is not there, damaged, or holds more than tensors and plain containers.
    """
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = _PlainUnpickler(file, encoding="latin1").load()
        else:
            _check_size(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UnreadableCheckpointError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # torch.load and pickle raise whatever a damaged byte leads them to
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise UserError(
                f"Checkpoint {path} was not loaded: it holds more than tensors and plain data ({refused[1]}), which could run "
                "code."
            ) from error
        # What torch says of a file that it cannot unpickle recommends to load it unsafely.
        reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0].partition(". ")[0]
        raise UnreadableCheckpointError(
            f"Checkpoint {path} is damaged or no checkpoint: it cannot be read ({reason or type(error).__name__})."
        ) from error
    _check_names(content, path)
    if path.endswith(".pkl") and not ("model" in content and "__author__" in content):
        content = content.get("blobs", content)
        _check_names(content, path)
        weights = {k: v for k, v in content.items() if not k.endswith("_momentum")}
        content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    if isinstance(content.get("model_state"), dict):  # pycls
        weights = {k: v for k, v in content["model_state"].items() if not k.endswith("num_batches_tracked")}
        content = {"model": weights, "__author__": "pycls", "matching_heuristics": True}
    if not isinstance(content.get("model"), dict):
        content = {"model": content}
    _check_names(content["model"], path)
    for name, value in content["model"].items():
        reason = _why_no_weight(value)
        if reason:
            raise UserError(f"Checkpoint {path} holds no dictionary of weights: its entry {name!r} {reason}.")
    return content


def _why_no_weight(value: Any) -> str | None:
    """Why a value cannot be a weight of a model, or None."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind in "biuf" else f"is an array of {value.dtype}"
    if not isinstance(value, Tensor):
        return "is no tensor"
    if value.is_meta:
        return "is a tensor without data (on the meta device)"
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
        return f"is a {kind} tensor"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "is an expanded tensor, which repeats its data"
    return None


def _check_size(path: str) -> None:
    """Refuse a zip file that takes many times its size when it is unpacked, which no checkpoint of PyTorch does."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 10 * os.path.getsize(path) + 2**20:
        raise UserError(f"Checkpoint {path} of {os.path.getsize(path)} bytes unpacks to {unpacked}; it is not loaded.")


def distiller_states(path: str) -> dict[str, StateDict]:
    """The distillers' own layers in a checkpoint of this library: by distiller, by its own names; {} for one without any.

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
    """The local file of a path or URL, fetched where needed."""
    try:
        return PathManager.get_local_path(path)
    except Exception as error:  # whatever the libraries behind a URL raise
        raise UserError(f"Weights {path} cannot be downloaded: {error}.") from error


@dataclass
class Fit:
    """How a state dictionary fits a model.

    Attributes:
        filled: names that were copied.
        misfits: names with the reason why they were not.
        missing: names of the model that nothing was offered for.
    """

    filled: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def has_weights(self) -> bool:
        """Whether more was copied than batch counters, which fit everywhere."""
        return not all(name.endswith("num_batches_tracked") for name in self.filled)

    def table(self) -> str:
        """One row a module (first two name parts): how many tensors were filled, and what did not fit."""
        total = Counter(_module_of(k) for k in [*self.filled, *self.misfits, *self.missing])
        filled = Counter(_module_of(k) for k in self.filled)
        missing = Counter(_module_of(k) for k in self.missing)
        rows = [[m, f"{filled[m]} of {n}", missing[m] or ""] for m, n in sorted(total.items())]
        table = tabulate(rows, headers=["module", "filled", "not offered"], tablefmt="simple")
        if self.misfits:
            table += "\n" + tabulate(sorted(self.misfits.items()), headers=["does not fit", "why"], tablefmt="simple")
        return table


def _module_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[0] == "backbone" and "bottom_up" in parts else 2])


@torch.no_grad()
def fill(model: nn.Module, offered: StateDict, names: Iterable[str] | None = None) -> Fit:
    """Copy tensors into a model by name, as far as shapes agree.

    Args:
        model: changed in place.
        offered: tensors by the model's names; dtype and device are converted.
        names: which of the model's tensors to fill; None for all.
    """
    own = model.state_dict()
    fit = Fit()
    for name in own if names is None else names:
        if name not in offered:
            fit.missing.append(name)
        elif own[name].shape != offered[name].shape:
            fit.misfits[name] = f"shape {tuple(offered[name].shape)} offered, {tuple(own[name].shape)} needed"
        else:
            own[name].copy_(torch.as_tensor(offered[name]))
            fit.filled.append(name)
    return fit


def load_torchvision(model: nn.Module, weights: StateDict, source: TorchvisionFormat, path: str) -> Fit:
    """Fill a detector's bottom-up network from weights under torchvision's names, and log a table of what fitted.

    Raises:
        UserError: the model has no such network or nothing fits it; or its input format is not that of torchvision's weights.
    """
    what = f"a {source.architecture} in torchvision's format"
    starts = [n.removesuffix(source.first) for n in model.state_dict() if n.endswith(source.first)]
    if len(starts) != 1:
        raise UserError(
            f"{path} holds {what}, but {type(model).__name__} has {len(starts)} {source.architecture}s to fill."
        )
    check_torchvision_input(model, path)
    prefix = starts[0]
    offered = source.rename(weights, prefix)
    fit = fill(model, offered, [n for n in model.state_dict() if n.startswith(prefix)])
    if not fit.has_weights:
        raise UserError(f"{path} holds {what}, of which nothing fits the model's.")
    unused = Counter(_module_of(n) for n in offered if n not in fit.filled and n not in fit.misfits)
    logger.info(f"Initial weights in torchvision's {source.architecture} format from {path}:\n{fit.table()}")
    if unused:
        logger.info(
            "Not used, since the model has no such block: " + ", ".join(f"{n} of {m}" for m, n in unused.items())
        )
    return fit


class KDCheckpointer(DetectionCheckpointer):
    """Writes files whose `model` is a plain Detectron2 student, and reads files without running code from them.

    Args:
        model: the student itself, not the meta-architecture around it.
        save_dir: folder of the checkpoints.
        checkpointables: what else to save and resume, such as `distillers` and `trainer`.

    Attributes:
        asynchronous: whether `save` returns before its file is written, which another thread does.
        class_names: by class index; saved with the model. None where they are unknown.
        incompatible: names of the model and of the last file that did not fit together; None after torchvision's format.
    """

    class_names: list[str] | None = None
    incompatible: Any = None
    asynchronous = False
    _writing: Future | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<name>.pth` so that a kill at any moment leaves the last good file usable.

        Raises:
            UserError: a weight is not finite, nothing is written; or a file, with `asynchronous` also an earlier one, cannot be
                written.
        """
        self.wait()
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        broken = [k for k, v in data["model"].items() if not v.isfinite().all()]
        if broken:
            raise UserError(
                f"Checkpoint {name}.pth is not written, since the weight {broken[0]} is not finite; checkpoints already written are intact."
            )
        if self.class_names:
            data[CLASS_NAMES] = list(self.class_names)
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if self.asynchronous:
            thread = ThreadPoolExecutor(1)
            self._writing = thread.submit(self._write, copy_to_cpu(data), path)
            thread.shutdown(wait=False)
        else:
            self._write(data, path)

    def wait(self) -> None:
        """Until the last file is written.

        Raises:
            UserError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, data: dict[str, Any], path: str) -> None:
        try:
            with atomic_write(path, "wb") as file:
                torch.save(data, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError where the disk is full
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"Checkpoint {path} cannot be written ({reason}); checkpoints already written are intact."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "wb") as file:
            file.write(last_filename_basename.encode())

    def resumable_files(self) -> list[str]:
        """The last checkpoint, then the others of the folder, the youngest first."""
        last = self.get_checkpoint_file()
        others = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        return [last, *sorted(set(others) - {last}, key=os.path.getmtime, reverse=True)]

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename)
        url = self._parsed_url_during_load
        if parse_qs(url.query).get("matching_heuristics") == ["True"]:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if source := torchvision_format(checkpoint["model"]):
            path = urlparse(self._parsed_url_during_load.geturl()).path
            load_torchvision(self.model, checkpoint["model"], source, path)
            return None
        incompatible = self.incompatible = super()._load_model(checkpoint)
        unfilled = {*incompatible.missing_keys} | {name for name, _, _ in incompatible.incorrect_shapes}
        if unfilled >= {name for name, _ in self.model.named_parameters()}:
            source = self._parsed_url_during_load.geturl()
            raise UserError(
                f"{source} fills no parameter of {type(self.model).__name__}: it is another model's checkpoint."
            )
        return incompatible

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        if path and not os.path.isfile(local := local_path(urlparse(path)._replace(query="").geturl())):
            raise UnreadableCheckpointError(f"There is no checkpoint {local}.")
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None


def copy_to_cpu(tree: Any) -> Any:
    """A tree of dicts, lists and tuples whose tensors are copied into memory of their own, on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(copy_to_cpu, tree))
    return tree


def load_complete(model: nn.Module, path: str, whose: str) -> None:
    """Load a trained detector of which every parameter must be filled.

    Args:
        model: the detector.
        path: file or URL.
        whose: for messages, such as "the teacher".

    Raises:
        UserError: the file cannot be read, or leaves parameters of the model unfilled.
    """
    checkpointer = KDCheckpointer(model, save_to_disk=False)
    checkpointer._log_incompatible_keys = lambda incompatible: None  # said below, in one sentence
    checkpointer.load(path)
    incompatible = checkpointer.incompatible
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {n for n, _ in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    needed = parameters | buffers
    if incompatible is None:
        raise UserError(f"{path} has initial weights in torchvision's format, not a trained detector for {whose}.")
    wrong_shape = {name: f"{tuple(a)} instead of {tuple(b)}" for name, a, b in incompatible.incorrect_shapes}
    unfilled = sorted(needed & ({*incompatible.missing_keys} | wrong_shape.keys()))
    if unfilled:
        first = unfilled[0] + (f" (shape {wrong_shape[unfilled[0]]})" if unfilled[0] in wrong_shape else "")
        raise UserError(
            f"{path} fills {len(needed) - len(unfilled)} of {len(needed)} parameters of {whose} ({type(model).__name__}); the "
            f"first that it does not fill is {first}. Do its config and weights belong together?"
        )
