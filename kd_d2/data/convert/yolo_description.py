"""Classes and splits of a YOLO dataset, from data.yaml as written by Ultralytics and Roboflow, or a list of names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ...plain_yaml import read_plain_yaml
from ...text import composed
from ..coco.ids import whole_number
from .labels import REMEDY
from .source import SPLIT, Source

NAME_LISTS = ("classes.txt", "obj.names", "predefined_classes.txt", "_darknet.labels")
YAML_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


@dataclass
class Description:
    """Content of a data.yaml or a list of names.

    Attributes:
        file: path relative to the dataset's folder.
        names: class names by number.
        splits: unresolved folders and image lists by split name.
        folder: `path` in the YAML file.
        keypoint_values: count of keypoint values after the box on each line; 0 without keypoints.
    """

    file: str
    names: dict[int, str]
    splits: dict[str, list[str]] = field(default_factory=dict)
    folder: str = ""
    keypoint_values: int = 0


def name_lists(source: Source) -> list[str]:
    """Return the files that are lists of names, by their own names."""
    return [file for file in source.files if os.path.basename(file) in NAME_LISTS]


def read_description(source: Source) -> Description:
    """Read the YAML file that has `names`, or the first list of names.

    Raises:
        UserError: there is none, there are several YAML files with `names`, or the file cannot be read.
    """
    found = [(file, _read_yaml(source, file)) for file in source.having(".yaml", ".yml")]
    described = [(file, tree) for file, tree in found if "names" in tree]
    if len(described) > 1:
        raise UserError(
            f"IN: {source.folder} has several yaml files with names, {described[0][0]} and {described[1][0]}: convert the folder "
            "of one dataset."
        )
    if described:
        return _from_yaml(source, *described[0])
    if lists := name_lists(source):
        return _from_lists(source, lists)
    raise UserError(f"IN: {source.folder} has no data.yaml with class names: create one, such as 'names: [cat, dog]'.")


def _from_lists(source: Source, files: list[str]) -> Description:
    """Read the first list of names. Files of the same name in other folders must list the same classes."""
    first = files[0]
    names = _lines(source, first)
    for other in files[1:]:
        if os.path.basename(other) == os.path.basename(first) and _lines(source, other) != names:
            raise UserError(
                f"IN: {source.path(first)} and {source.path(other)} list different classes: convert the folder of one dataset."
            )
    return _checked(source, Description(first, {number: name for number, name in enumerate(names) if name}))


def _lines(source: Source, file: str) -> list[str]:
    return [composed(line.strip()) for line in source.read_text(file).rstrip().splitlines()]


def _read_yaml(source: Source, file: str) -> dict[str, Any]:
    tree = read_plain_yaml(source.path(file), source.path(file), as_text=True)
    return tree if isinstance(tree, dict) else {}


def _from_yaml(source: Source, file: str, tree: dict[str, Any]) -> Description:
    path, names = source.path(file), tree["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(
        whole_number(key) is not None and isinstance(name, str | None) for key, name in names.items()
    ):
        raise UserError(f"{path}: its names must be a list, or map numbers to names, such as '0: cat'.")
    numbered = {whole_number(key): composed((name or "").strip()) for key, name in names.items()}
    description = Description(file, dict(sorted(numbered.items())), folder=str(tree.get("path") or ""))
    for split, keys in YAML_SPLITS.items():
        written = next((tree[key] for key in keys if tree.get(key)), [])
        entries = [str(entry) for entry in (written if isinstance(written, list) else [written]) if entry]
        if entries:
            description.splits[split] = entries
    shape = tree.get("kpt_shape")
    sides = [whole_number(side) for side in shape] if isinstance(shape, list) else []
    if len(sides) == 2 and None not in sides:
        description.keypoint_values = sides[0] * sides[1]
    return _checked(source, description)


def _checked(source: Source, description: Description) -> Description:
    names, path = list(description.names.values()), source.path(description.file)
    if not names or "" in names:
        raise UserError(f"{path} has no class names, or an empty one; each class needs a name.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two classes are named {twice!r}; class names must be unique.")
    return description


def images_of_splits(source: Source, description: Description) -> dict[str, list[str]]:
    """Return the images by split, according to the YAML file or, if it has no splits, to the folder names.

    Raises:
        UserError: the training images are missing, or different entries of two splits are the same folder or list.
    """
    splits: dict[str, list[str]] = {}
    first_of: dict[str, tuple[str, str]] = {}
    for split, entries in description.splits.items():
        images: list[str] = []
        for entry in entries:
            place = _place_of(source, description, entry)
            if place is None:
                continue
            first_split, first = first_of.setdefault(place, (split, entry))
            if first_split != split and _parts(first) != _parts(entry):
                raise UserError(
                    f"{source.path(description.file)}: its images for {first_split}, {first}, and for {split}, {entry}, would both be "
                    f"{place}; correct the paths."
                )
            images += _images_of(source, place)
        if images:
            splits[split] = list(dict.fromkeys(images))
        elif split == "train":
            raise UserError(
                f"{source.path(description.file)}: its images for {split} are not in {source.folder}: {entries[0]}; correct the path."
            )
        else:
            source.note("splits of the yaml file without images skipped", f"{split}, {entries[0]}")
    if not splits:
        for image in source.images:
            splits.setdefault(source.split_of(image), []).append(image)
    return splits


def _images_of(source: Source, place: str) -> list[str]:
    """Return the images in a folder or in a text file with one path per line."""
    if place in source.files:
        names = [line.strip() for line in source.read_text(place).splitlines() if line.strip()]
        images = [source.find_image(name, place) for name in names]
        for name, image in zip(names, images):
            if image is None:
                with source.may_be_broken():
                    raise UserError(f"{source.path(place)} lists {name}, which is not in {source.folder}: {REMEDY}.")
        return [image for image in images if image is not None]
    return [image for image in source.images if place == "." or image.startswith(place + os.sep)]


def _parts(entry: str) -> list[str]:
    return [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _place_of(source: Source, description: Description, entry: str) -> str | None:
    """Return the folder or file of a split's entry, or None if there is none.

    Leading folders that do not exist are ignored, except the last one that is named like a split: valid/images is not
    images.
    """
    base, parts = os.path.dirname(description.file), _parts(entry)
    named = [start for start, part in enumerate(parts) if SPLIT.fullmatch(part)]
    tails = [os.path.join(*parts[start:]) for start in range(named[-1] + 1 if named else len(parts))]
    for name in (os.path.join(description.folder, entry), entry, *tails):
        place = os.path.normpath(os.path.join(base, name))
        if place in source.files or (os.path.isdir(source.path(place)) and not place.startswith(("..", os.sep))):
            return place
    return None
