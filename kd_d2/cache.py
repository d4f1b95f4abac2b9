"""Files in the user's cache folder, which several processes may write at once."""

from __future__ import annotations

import os
import tempfile

from .errors import UserError


def cache_folder(kind: str) -> str:
    """Return a writable folder `kind` of the user in XDG_CACHE_HOME, ~/.cache or the folder for temporary files.

    Raises:
        UserError: none of them is writable.
    """
    caches = filter(os.path.isabs, (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")))
    error = None
    for cache in (*caches, None):
        try:
            folder = os.path.join(_private_folder() if cache is None else os.path.join(cache, "kd_d2"), kind)
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as failure:
            error = failure
    raise UserError(f"There is no writable cache folder ({error}); set XDG_CACHE_HOME to one.")


def _private_folder() -> str:
    """Make a temporary folder that only this user can write to; a PermissionError is raised if another user has made it."""
    folder = os.path.join(tempfile.gettempdir(), f"kd_d2-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.lstat(folder).st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
