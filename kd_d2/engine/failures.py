"""Messages for errors that end a training."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode

from ..checkpoint import checkpoint_files
from ..errors import DISK_IS_FULL, UserError, explain_lack_of_resources, system_error
from ..image_files import DataError
from .lost_ranks import explain_lost_ranks
from .step import NonFiniteLossError

LESS_MEMORY = "raise SOLVER.GRADIENT_ACCUMULATION_STEPS, or lower SOLVER.IMS_PER_BATCH or the image sizes in INPUT"

CHECK_WEIGHTS = (
    "no parameter has been updated yet, so check the initial weights (MODEL.WEIGHTS), the teacher's weights, and the code of methods "
    "of your own"
)


class Failures:
    """Explains errors that end a training.

    Args:
        cfg: config of the training, which is about to begin.
        resumed: whether it continues from a checkpoint.
    """

    def __init__(self, cfg: CfgNode, *, resumed: bool):
        self.folder = cfg.OUTPUT_DIR
        self.slower = "lower SOLVER.BASE_LR"
        if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            self.slower += " or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        self.of_earlier_training = None if resumed else _last_checkpoint(self.folder)

    def explain(self, error: BaseException | None) -> UserError | None:
        """Return a UserError for an error that the user can fix, or None for any other error."""
        if isinstance(error, DataError):
            return UserError(f"{str(error).rstrip('.')}; {self._saved()}.")
        if isinstance(error, NonFiniteLossError):
            advice = CHECK_WEIGHTS if error.in_first_iteration else self.slower
            return NonFiniteLossError(f"{error}: {advice}; {self._saved()}.")
        if isinstance(error, UserError):
            return error
        if isinstance(error, FloatingPointError):
            sentence = f"{str(error).rstrip('.')}: {self.slower}"
        else:
            sentence = (
                explain_lack_of_resources(error, LESS_MEMORY)
                or self._of_system(system_error(error))
                or explain_lost_ranks(error)
                or _of_batch_norm(error)
            )
        return UserError(f"{sentence}; {self._saved()}.") if sentence else None

    def _saved(self) -> str:
        if self.of_earlier_training and self.of_earlier_training == _last_checkpoint(self.folder):
            return f"the checkpoints in {self.folder} are from an earlier training"
        return saved(self.folder)

    def _of_system(self, error: OSError | None) -> str | None:
        if error is None:
            return None
        if error.errno in DISK_IS_FULL:
            return f"The disk of OUTPUT_DIR is full ({error.strerror})"
        if not os.path.isdir(self.folder):
            return f"OUTPUT_DIR {self.folder} no longer exists"
        if not os.access(self.folder, os.W_OK):
            return f"OUTPUT_DIR {self.folder} is no longer writable ({error.strerror})"
        return None

    def log_as_sentence(self, record: logging.LogRecord) -> bool:
        """Replace the traceback of an error that the user can fix with one sentence, as a logging filter."""
        sentence = self.explain(record.exc_info[1]) if record.exc_info else None
        if sentence is not None:
            record.msg, record.args, record.exc_info = str(sentence), (), None
        return True


def _of_batch_norm(error: BaseException | None) -> str | None:
    if not isinstance(error, ValueError) or "more than 1 value per channel when training" not in str(error):
        return None
    return (
        "A batch norm layer got a single value per channel, of one image: use more images per process and accumulation step, larger "
        "images, or another norm, such as FrozenBN or GN"
    )


def saved(folder: str) -> str:
    """Return a clause that says which checkpoint --resume would continue from."""
    last = _last_checkpoint(folder)
    return f"--resume continues from {last[0]}" if last else "there is no checkpoint yet"


def _last_checkpoint(folder: str) -> tuple[str, int] | None:
    """Return the path and the time of the checkpoint that --resume would continue from, or None if there is none."""
    file = next(filter(os.path.isfile, checkpoint_files(folder)), None)
    return (file, os.stat(file).st_mtime_ns) if file else None
