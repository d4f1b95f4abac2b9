"""The mark of drawings, by which later runs recognize the files that they may replace."""

from __future__ import annotations

import os
import struct

from ..image_files import READING_ERRORS, open_image

COMMENT = "Drawn by kd-d2 predict"
"""Comment in JPEG files."""
FREE_BOX = struct.pack(">I4s", 8 + len(COMMENT), b"free") + COMMENT.encode()
"""Box at the end of MP4 files, which programs skip."""


def mark_video(path: str) -> None:
    """Append the mark to an MP4 file."""
    with open(path, "ab") as file:
        file.write(FREE_BOX)


def is_drawing(path: str) -> bool:
    """Return whether a JPEG or MP4 file has the mark."""
    try:
        if path.endswith(".mp4"):
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - len(FREE_BOX)))
                return file.read() == FREE_BOX
        with open_image(path) as image:
            return image.info.get("comment") == COMMENT.encode()
    except READING_ERRORS:
        return False
