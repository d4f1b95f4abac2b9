"""Input images and videos, and the file names of their drawings."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass

from ..errors import UserError
from ..files import check_inputs_are_kept, distinct_name
from ..image_files import DataError, open_image, read_checked
from ..text import LONGEST_FILE_NAME, file_stem, is_unicode, printable
from .drawings import is_drawing
from .video import video_problem

logger = logging.getLogger(__name__)

DETECTIONS = "detections.json"
"""Name of the file of detections in the output folder."""
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class Input:
    """An image or a video.

    Attributes:
        path: path of the file.
        name: path relative to the input folder, or the file's base name; used to name outputs.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.lower().endswith(VIDEO_SUFFIXES)


def find_images(paths: list[str], option: str = "--images") -> list[str]:
    """Return the paths of all images among files and folder trees.

    Raises:
        UserError: there is no image; see also `find_inputs`. `option` is the command-line option named in messages.
    """
    images = [found.path for found in find_inputs(paths, option=option) if not found.is_video]
    if not images:
        raise UserError(f"{option} {' '.join(paths)}: there is no image.")
    return images


def find_inputs(paths: list[str], without: str | None = None, option: str = "--input") -> list[Input]:
    """Return the images and videos among files and folder trees, without duplicates; skip and log other files of trees.

    Args:
        without: folder to exclude from the trees.
        option: command-line option named in messages.

    Raises:
        UserError: a path does not exist, a given file is neither an image nor a video, or nothing is found.
    """
    found, skipped = [], []
    for path in paths:
        if os.path.isdir(path):
            entries = [Input(file, os.path.relpath(file, path)) for file in _files_below(path, without, option)]
            problems = {entry: _problem(entry) for entry in entries}
            found += [entry for entry, problem in problems.items() if problem is None]
            skipped += [(entry.name, problem) for entry, problem in problems.items() if problem is not None]
        elif os.path.isfile(path):
            entry = Input(path, os.path.basename(path))
            problem = _problem(entry)
            if problem is not None:
                raise UserError(f"{option}: {problem}")
            found.append(entry)
        else:
            raise UserError(f"{option}: there is no file or folder {path}.")
    if skipped:
        names = printable(", ".join(name for name, _ in skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        files = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
        logger.info(
            f"Skipped {files} that cannot be read as images or videos: {names}; the first: {printable(skipped[0][1])}"
        )
    if not found:
        raise UserError(f"{option} {' '.join(paths)}: there is no image or video.")
    unique: dict[str, Input] = {}
    for entry in found:
        unique.setdefault(os.path.realpath(entry.path), entry)
    return list(unique.values())


def _files_below(folder: str, without: str | None, option: str) -> list[str]:
    """Return the files of a tree except hidden ones, sorted, those of a folder before those of its subfolders."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{option}: the folder {error.filename} cannot be read: {error.strerror}.") from error

    left_out = without and os.path.realpath(without)
    files, seen = [], {left_out, os.path.realpath(folder)}

    def is_new(subfolder: str) -> bool:
        """Return whether a folder, perhaps a link, is neither left out nor searched already."""
        path = os.path.realpath(subfolder)
        return path not in seen and not seen.add(path)

    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = sorted(name for name in subfolders if name[0] != ".")
        subfolders[:] = [name for name in visible if is_new(os.path.join(place, name))]
        files += [os.path.join(place, name) for name in sorted(names) if name[0] != "."]
    return files


def _problem(entry: Input) -> str | None:
    """Return a sentence that says why a file cannot be read, or None if it can."""
    if not os.path.isfile(entry.path):  # opening a named pipe would block
        return f"{entry.path} is not a regular file."
    if entry.is_video:
        problem = video_problem(entry.path)
        return problem and f"The video {entry.path} cannot be read: {problem}."

    def read() -> None:
        with open_image(entry.path) as image:
            image.load()
            pages = 1
            with contextlib.suppress(Exception):  # of Pillow, for damaged pages after the first
                pages = getattr(image, "n_frames", 1)
            if pages > 1 and image.format != "MPO":  # which is one photo of a phone
                logger.warning(f"{printable(entry.path)} has {pages} pages or frames, of which only the first is used.")

    try:
        return read_checked(entry.path, read)
    except DataError as error:
        return str(error)


def drawing_names(inputs: list[Input], folder: str) -> list[str]:
    """Return the path of each input's drawing below `folder`, with the input's subfolders; equal names are numbered.

    Raises:
        UserError: a drawing would overwrite an input or another file than a drawing, would be in a folder in place of
            detections.json, or is a video whose path is not UTF-8.
    """
    names: dict[str, None] = {}
    for entry in inputs:
        place, file = os.path.split(os.path.splitext(entry.name)[0])
        file = file if len(os.fsencode(file)) <= LONGEST_FILE_NAME else file_stem(file)
        stem, suffix = os.path.join(place, file), ".mp4" if entry.is_video else ".jpg"
        name = distinct_name(stem, suffix, names)
        names[name] = None
        path = os.path.join(folder, name)
        if entry.is_video and not is_unicode(path):
            raise UserError(f"--output: the path of the video {path} is not UTF-8; choose another folder.")
        if name.startswith(os.path.join(DETECTIONS, "")):
            raise UserError(
                f"--output: the drawing {path} needs a folder in place of {DETECTIONS}; rename that of {entry.path}."
            )
    check_inputs_are_kept((os.path.join(folder, name) for name in names), (entry.path for entry in inputs))
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not is_drawing(path):
            raise UserError(
                f"--output: the drawing {path} would overwrite a file that is not an earlier drawing; remove it, or choose another "
                "folder."
            )
    return list(names)
