"""Reading and writing of videos with OpenCV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import cv2
import numpy as np

from ..text import is_unicode
from .drawings import mark_video


def video_problem(path: str) -> str | None:
    """Return why a file cannot be read as a video, or None if its first frame can be read."""
    if not os.access(path, os.R_OK):
        return "Permission denied"
    if not is_unicode(path):  # OpenCV would crash
        return "its path is not UTF-8; rename it"
    capture = cv2.VideoCapture(path)
    try:
        return (
            None if capture.isOpened() and capture.read()[0] else "it is damaged, or OpenCV does not support its format"
        )
    finally:
        capture.release()


class VideoReader:
    """Iterates over the frames of a video, RGB (H, W, 3) uint8.

    Attributes:
        fps: frames per second.
        length: number of frames according to the file's metadata; a damaged file has fewer, and so may one whose frame
            rate varies.
        times: time of each frame read so far, in seconds.
    """

    def __init__(self, path: str):
        self._capture = cv2.VideoCapture(path)
        self.fps = max(self._capture.get(cv2.CAP_PROP_FPS), 0) or 25.0  # OpenCV 5 returns -1 for unknown values
        self.length = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        self.times: list[float] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            is_there, frame = self._capture.read()
            if not is_there:
                self._capture.release()
                return
            time = max(self._capture.get(cv2.CAP_PROP_POS_MSEC), 0) / 1000
            if self.times and time <= self.times[-1]:  # a format without timestamps
                time = self.times[-1] + 1 / self.fps
            self.times.append(time)
            yield np.ascontiguousarray(frame[:, :, ::-1])

    def is_cut(self) -> bool:
        """Return whether the frames that were read end before the duration in the file's metadata."""
        end = self.times[-1] if self.times else 0.0
        return len(self.times) < self.length and self.length / self.fps - end > 1.5 / self.fps


class VideoWriter(contextlib.AbstractContextManager):
    """Context manager that writes frames of equal size, RGB (H, W, 3) uint8, to an MP4 file, and marks it as a drawing."""

    def __init__(self, path: str, fps: float):
        self._path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, or raise an OSError if OpenCV cannot create the file or has no encoder for it."""
        if self._writer is None:
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(self._path, cv2.VideoWriter_fourcc(*"mp4v"), self._fps, size)
            if not self._writer.isOpened():
                raise OSError("OpenCV cannot create it")
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def __exit__(self, *error: object) -> None:
        if self._writer is not None and self._writer.isOpened():
            self._writer.release()
            with contextlib.suppress(OSError):  # of a full disk
                mark_video(self._path)
