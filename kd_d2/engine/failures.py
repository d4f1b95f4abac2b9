"""Messages for errors that end a training."""

from __future__ import annotations

import logging
import os

from ..checkpoint import checkpoint_files
from ..data.images import DataError
from ..errors import DISK_IS_FULL, UserError, explain_lack_of_memory, system_error
from .lost_ranks import explain_lost_ranks
from .step import NonFiniteLossError

LESS_MEMORY = "raise SOLVER.GRADIENT_ACCUMULATION_STEPS, or lower SOLVER.IMS_PER_BATCH or the image sizes in INPUT"


class Failures:
    """Explains errors that end a training.

    Args:
        folder: OUTPUT_DIR of the training.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def explain(self, error: BaseException | None) -> UserError | None:
        """Return a UserError for an error that the user can fix, or None for any other error."""
        if isinstance(error, DataError):
            return UserError(f"{str(error).rstrip('.')}; {saved(self.folder)}.")
        if isinstance(error, NonFiniteLossError):
            return NonFiniteLossError(f"{error}; {saved(self.folder)}.")
        if isinstance(error, UserError):
            return error
        if system := system_error(error):
            sentence = self._of_system(system)
        elif isinstance(error, FloatingPointError):
            sentence = f"{str(error).rstrip('.')}: lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        else:
            sentence = explain_lack_of_memory(error, LESS_MEMORY) or explain_lost_ranks(error)
        return UserError(f"{sentence}; {saved(self.folder)}.") if sentence else None

    def _of_system(self, error: OSError) -> str | None:
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


def saved(folder: str) -> str:
    """Return a clause that says which checkpoint --resume would continue from."""
    files = [path for path in checkpoint_files(folder) if os.path.isfile(path)]
    return f"--resume continues from {files[0]}" if files else "there is no checkpoint yet"
