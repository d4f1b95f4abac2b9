"""Supported formats and their detection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

from ...errors import UserError
from . import coco_files, cvat, labelme, open_images, voc, yolo
from .source import Source
from .trees import Split, build_splits


@dataclass(frozen=True)
class Format:
    """A dataset format.

    Attributes:
        title: name for messages.
        recognizes: function that returns whether a folder seems to have this format.
        read: function that returns the splits by name.
        options: names of the ConvertOptions fields that have an effect.
        suffixes: suffixes of the files with labels or class names.
    """

    title: str
    recognizes: Callable[[Source], bool]
    read: Callable[[Source], dict[str, Split]]
    options: frozenset[str]
    suffixes: tuple[str, ...]


def _through_globox(title: str, module: ModuleType, suffixes: tuple[str, ...], *options: str) -> Format:
    def read(source: Source) -> dict[str, Split]:
        if find_spec("globox") is None:
            raise UserError(f"{title} needs the package globox: pip install 'kd_d2[convert]'.")
        return build_splits(module.read(source), source)

    all_options = frozenset({"unlabelled", "drop_broken", "val_share", *options})
    return Format(title, module.recognizes, read, all_options, suffixes)


FORMATS = {
    "voc": _through_globox("Pascal VOC", voc, (".xml", ".txt"), "difficult", "first_pixel"),
    "yolo": _through_globox("YOLO", yolo, (".txt", ".yaml", ".yml", ".names")),
    "labelme": _through_globox("LabelMe", labelme, (".json",), "difficult"),
    "cvat": _through_globox("CVAT for images", cvat, (".xml",)),
    "openimages": _through_globox("Open Images", open_images, (".csv",)),
    "coco": Format(
        "COCO", coco_files.recognizes, coco_files.read_splits, frozenset({"drop_broken", "val_share"}), (".json",)
    ),
}


def find_format(source: Source, name: str | None) -> Format:
    """Return the named format, or detect the format of a folder if `name` is None.

    Raises:
        UserError: no format or more than one matches.
    """
    if name is not None:
        return FORMATS[name]
    found = [name for name, form in FORMATS.items() if form.recognizes(source)]
    if len(found) > 1:
        raise UserError(f"IN: {source.folder} may be {' or '.join(found)}: choose one with --format.")
    if not found:
        raise UserError(f"IN: {source.folder} has no labels in any of the formats {', '.join(FORMATS)}.")
    return FORMATS[found[0]]
