"""Files in the user's cache folder, which several processes may write at once."""

from __future__ import annotations

import os
import tempfile

from .errors import UserError


def cache_folder(kind: str) -> str:
    """Return a writable folder kd_d2/`kind` in XDG_CACHE_HOME, ~/.cache or the folder for temporary files.

    Raises:
        UserError: none of them is writable.
    """
    caches = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir()]
    error = None
    for cache in filter(os.path.isabs, caches):
        folder = os.path.join(cache, "kd_d2", kind)
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as failure:
            error = failure
    raise UserError(f"There is no writable cache folder ({error}); set XDG_CACHE_HOME to one.")
