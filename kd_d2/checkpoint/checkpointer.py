"""Training checkpoints: a plain Detectron2 student, and the state to resume from."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError, system_error
from ..files import atomic_write, write_text
from .fitting import load_torchvision
from .reading import UnreadableCheckpointError, check_readable, local_path, read_checkpoint
from .timm_weights import load_timm, timm_network
from .torchvision import torchvision_format

CLASS_NAMES = "class_names"
"""The checkpoint entry for the class names, a list ordered by class index. Detectron2 ignores it."""


class KDCheckpointer(DetectionCheckpointer):
    """Writes checkpoints with a plain Detectron2 student as `model`, and reads files without running code from them.

    Args:
        model: the student itself, not the meta-architecture around it.
        save_dir: folder of the checkpoints.
        checkpointables: other objects to save and resume, such as `distillers` and `trainer`.

    Attributes:
        asynchronous: whether `save` returns before the file is written, by another thread.
        class_names: class names by class index, saved with the model; None if unknown.
        incompatible: incompatible keys of the model and the last loaded file; None for files in torchvision's or timm's format.
    """

    class_names: list[str] | None = None
    incompatible: Any = None
    asynchronous = False
    _writing: Future | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `<name>.pth` atomically: if the process is killed, the last complete file stays usable.

        Raises:
            UserError: a weight is not finite, or the state holds what cannot be read back, in which cases nothing is
                written; or the file, or with `asynchronous` an earlier one, cannot be written.
        """
        self.wait()
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        if self.class_names:
            data[CLASS_NAMES] = list(self.class_names)
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        try:
            check_readable(data)
        except UserError as error:
            raise UserError(f"Checkpoint {name}.pth is not written; {self._earlier()}. {error}") from error
        broken = [k for k, v in data["model"].items() if not v.isfinite().all()]
        if broken:
            raise UserError(
                f"Checkpoint {name}.pth is not written, since the weight {broken[0]} is not finite; {self._earlier()}."
            )
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if self.asynchronous:
            thread = ThreadPoolExecutor(1)
            self._writing = thread.submit(self._write, copy_to_cpu(data), path)
            thread.shutdown(wait=False)
        else:
            self._write(data, path)

    def wait(self) -> None:
        """Wait until the last file is written.

        Raises:
            UserError: the file cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, data: dict[str, Any], path: str) -> None:
        try:
            with atomic_write(path, "wb") as file:
                torch.save(data, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError if the disk is full
            system = system_error(error)
            reason = (system and system.strerror) or str(error).partition("\n")[0]
            raise UserError(f"Checkpoint {path} cannot be written ({reason}); {self._earlier()}.") from error

    def _earlier(self) -> str:
        exists = any(map(os.path.isfile, checkpoint_files(self.save_dir)))
        return "checkpoints already written are intact" if exists else "there is no checkpoint yet"

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        return next(iter(checkpoint_files(self.save_dir)), "")

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_checkpoint(filename)
        url = self._parsed_url_during_load
        if parse_qs(url.query).get("matching_heuristics") == ["True"]:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        path = self._parsed_url_during_load._replace(query="").geturl()
        if network := timm_network(self.model, checkpoint["model"]):
            load_timm(self.model, network, checkpoint["model"], path)
            return None
        if source := torchvision_format(checkpoint["model"]):
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


def checkpoint_files(folder: str) -> list[str]:
    """Return the checkpoints of a training: the one named in `last_checkpoint`, if any, and the others, newest first."""
    found = glob.glob(os.path.join(glob.escape(folder), "model_*.pth"))
    newest_first = sorted(found, key=lambda path: (os.path.getmtime(path), path), reverse=True)
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8", errors="replace") as file:
            last = os.path.join(folder, file.read().strip())
    except (FileNotFoundError, NotADirectoryError):
        return newest_first
    return [last, *(file for file in newest_first if file != last)]


def copy_to_cpu(tree: Any) -> Any:
    """Copy a tree of dicts, lists and tuples, with its tensors in new CPU memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        kind = OrderedDict if isinstance(tree, OrderedDict) else dict
        return kind((key, copy_to_cpu(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(map(copy_to_cpu, tree))
    return tree


def load_complete(model: nn.Module, path: str | os.PathLike[str], whose: str) -> None:
    """Load a trained detector, whose checkpoint must fill every parameter.

    Args:
        model: the detector.
        path: file or URL.
        whose: name of the detector in messages, such as "the teacher".

    Raises:
        UserError: no file is given, it cannot be read, or leaves parameters of the model unfilled.
    """
    path = os.fspath(path)
    if not path:
        raise UserError(
            f"There are no weights for {whose}: name the checkpoint after the config (--model CONFIG WEIGHTS), or set MODEL.WEIGHTS."
        )
    checkpointer = KDCheckpointer(model, save_to_disk=False)
    checkpointer._log_incompatible_keys = lambda incompatible: None  # reported below, in one sentence
    checkpointer.load(path)
    incompatible = checkpointer.incompatible
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {n for n, _ in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    needed = parameters | buffers
    if incompatible is None:
        raise UserError(f"{path} has initial weights of a classifier, but {whose} must be a trained detector.")
    wrong_shape = {name: f"{tuple(a)} instead of {tuple(b)}" for name, a, b in incompatible.incorrect_shapes}
    unfilled = sorted(needed & ({*incompatible.missing_keys} | wrong_shape.keys()))
    if unfilled:
        first = unfilled[0] + (f" (shape {wrong_shape[unfilled[0]]})" if unfilled[0] in wrong_shape else "")
        raise UserError(
            f"{path} fills {len(needed) - len(unfilled)} of {len(needed)} parameters of {whose} ({type(model).__name__}); the "
            f"first one not filled is {first}. Do its config and weights match?"
        )
