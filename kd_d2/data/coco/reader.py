"""Reading a COCO annotation file: what is unambiguous is repaired and counted, the rest is refused in a sentence."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ...text import has_controls, label
from .annotations import Annotations
from .ids import Ids, whole_number
from .image_names import ImageFinder, size_on_disk
from .repairs import Repairs

Entry = dict[str, Any]
LISTS = ("images", "annotations", "categories")
LONGEST_CLASS_NAME = 200
BACKGROUND = ("background", "__background__", "_background_", "bg")


class MissingImagesError(UserError):
    """Images of an annotation file are not on disk.

    Attributes:
        found: how many are.
    """

    def __init__(self, message: str, found: int):
        super().__init__(message)
        self.found = found


@dataclass
class CocoData:
    """An annotation file in clean form.

    Attributes:
        tree: "images" (with files that exist, by name relative to the folder, and sizes), "annotations" (with ids from 1, boxes
            [x, y, width, height] with an area), "categories" in order of id, and whatever else the file has.
        repairs: what is otherwise than in the file.
        is_as_written: whether the file says the same, and can be read by any program in its place.
    """

    tree: dict[str, Any]
    repairs: Repairs
    is_as_written: bool

    @property
    def class_names(self) -> list[str]:
        """In order of category id."""
        return [category["name"] for category in self.tree["categories"]]


def read_coco(
    path: str,
    image_folder: str,
    *,
    annotated: bool = True,
    masks: bool = False,
    boxes: str = "xywh",
    drop_missing: bool = False,
) -> CocoData:
    """Read an annotation file in COCO's format as tools write it.

    Args:
        path: the json file.
        image_folder: where its images lie.
        annotated: False for images alone: annotations need not be there and are not looked at.
        masks: whether segmentations are needed; otherwise they do not matter.
        boxes: the form of its boxes, one of BOX_FORMATS.
        drop_missing: whether images that are not on disk are left out, as long as one is.

    Raises:
        MissingImagesError: images are not on disk.
        UserError: not json, not COCO's format, no images, references to what is not there, or boxes in another form.
    """
    repairs = Repairs(path)
    raw = _read_tree(path, annotated, repairs)
    image_ids = Ids(path, "images", raw["images"], repairs)
    images, missing = _read_images(path, image_folder, raw["images"], image_ids, repairs)
    if missing and not (images and drop_missing):
        raise MissingImagesError(
            f"{path}: {len(missing)} of {len(raw['images'])} images are not in {image_folder}, the first is "
            f"{next(iter(missing.values()))}; name the folder that holds them.",
            found=len(images),
        )
    for name in missing.values():
        repairs.add("images left out that are not on disk", name)
    entries = [a for a in raw["annotations"] if image_ids.find(a.get("image_id")) not in missing]
    categories, category_ids = _read_categories(path, raw["categories"], repairs)
    reader = Annotations(path, {image["id"]: image for image in images}, image_ids, category_ids, repairs)
    annotations = reader.read(entries, masks=masks, boxes=boxes)
    categories = _classes(path, categories, {a["category_id"] for a in annotations}, repairs)
    if annotated and not categories:
        raise UserError(f"{path} has no categories: name the classes in its list 'categories'.")
    tree = {**raw, "images": images, "annotations": annotations, "categories": categories}
    is_as_written = not repairs and tree == {**raw, "categories": sorted(raw["categories"], key=lambda c: c["id"])}
    return CocoData(tree, repairs, is_as_written)


def read_categories(path: str) -> list[Entry]:
    """The categories of an annotation file in order of id; its images need not be there.

    Raises:
        UserError: it is not json, not COCO's format, or its categories are unusable.
    """
    repairs = Repairs(path)
    raw = _read_tree(path, True, repairs)
    categories, ids = _read_categories(path, raw["categories"], repairs)
    used = {ids.find(annotation.get("category_id")) for annotation in raw["annotations"]}
    return _classes(path, categories, used, repairs)


def read_json_bytes(path: str) -> tuple[Any, bool]:
    """What a json file in any Unicode encoding holds, and whether it begins with a byte order mark.

    Raises:
        UserError: it is not readable json.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        return json.loads(content), content[:3] == b"\xef\xbb\xbf" or content[:2] in (b"\xff\xfe", b"\xfe\xff")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable json: {error}.") from error


def _read_tree(path: str, annotated: bool, repairs: Repairs) -> dict[str, Any]:
    tree, has_mark = read_json_bytes(path)
    if has_mark:
        repairs.add("byte order mark skipped", "at its beginning")
    if isinstance(tree, dict) and not annotated:
        tree = {"categories": [], **tree, "annotations": []}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in LISTS):
        raise UserError(
            f"{path} is not a COCO annotation file: it needs the lists 'images', 'annotations' and 'categories'."
        )
    for key in LISTS:
        for entry in tree[key]:
            if not isinstance(entry, dict):
                raise UserError(f"{path}: its {key} hold {str(entry)[:120]}; each entry must be an object in braces.")
    if not tree["images"]:
        raise UserError(f"{path} has no images.")
    return tree


def _read_images(
    path: str, folder: str, entries: list[Entry], ids: Ids, repairs: Repairs
) -> tuple[list[Entry], dict[int, str]]:
    """The images that are there, and the names of those that are not by id."""
    finder = ImageFinder(folder)
    images, missing = [], {}
    user_of: dict[str, str] = {}
    for entry in entries:
        name = entry.get("file_name") or entry.get("coco_url")
        if not isinstance(name, str):
            raise UserError(f"{path}: an image has no 'file_name': {str(entry)[:120]}.")
        found = finder.find(name)
        if found is None:
            missing[ids.find(entry["id"])] = name
            continue
        if found != entry.get("file_name"):
            repairs.add("images found under another name", f"{name} is {found}")
        if found in user_of and (found != name or found != user_of[found]):
            raise UserError(f"{path}: the images {user_of[found]} and {name} both seem to be {found} in {folder}.")
        user_of[found] = name
        images.append({**entry, "id": ids.find(entry["id"]), "file_name": found})
    for image in images:
        _complete_size(image, folder, repairs)
    return images, missing


def _complete_size(image: Entry, folder: str, repairs: Repairs) -> None:
    written = image.get("width"), image.get("height")
    sizes = tuple(whole_number(side) for side in written)
    if not all(side is not None and 0 < side < 1e9 for side in sizes):
        repairs.add("sizes of images read from their files", image["file_name"])
        sizes = size_on_disk(os.path.join(folder, image["file_name"]))
    elif any(type(side) is not int for side in written):
        repairs.add("sizes of images read as whole numbers", f"{image['file_name']}, {written[0]!r} x {written[1]!r}")
    image["width"], image["height"] = sizes


def _read_categories(path: str, entries: list[Entry], repairs: Repairs) -> tuple[list[Entry], Ids]:
    ids = Ids(path, "categories", entries, repairs)
    categories: list[Entry] = []
    for entry in entries:
        name = entry.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            repairs.add("names of categories read as text", name)
            name = str(name)
        if not isinstance(name, str):
            raise UserError(f"{path}: a category has no 'name': {str(entry)[:120]}.")
        if has_controls(name) or len(name) > LONGEST_CLASS_NAME:
            raise UserError(
                f"{path}: the category {entry['id']!r} has a name with control characters or more than {LONGEST_CLASS_NAME} characters "
                f"({label(name)}); rename it."
            )
        categories.append({**entry, "id": ids.find(entry["id"]), "name": name})
    return sorted(categories, key=lambda category: category["id"]), ids


def _classes(path: str, categories: list[Entry], used: set[int | None], repairs: Repairs) -> list[Entry]:
    """The categories that are classes, each of another name; `used` are the ids that have boxes."""
    classes = _without_placeholders(categories, used, repairs)
    id_of: dict[str, int] = {}
    for category in classes:
        if category["name"] in id_of:
            raise UserError(
                f"{path}: the categories {id_of[category['name']]} and {category['id']} have the same name {category['name']!r}; "
                "rename one, or give its annotations the other's id."
            )
        id_of[category["name"]] = category["id"]
    return classes


def _without_placeholders(categories: list[Entry], used: set[int | None], repairs: Repairs) -> list[Entry]:
    """Without what is no class: the background, and the root that Roboflow puts before the others; neither has boxes."""
    parents = [category.get("supercategory") for category in categories]
    kept = []
    for category in categories:
        is_root = category.get("supercategory") in (None, "", "none") and category["name"] in parents
        if category["id"] not in used and (is_root or category["name"].lower() in BACKGROUND):
            repairs.add("categories left out that only stand for others, without boxes", repr(category["name"]))
        else:
            kept.append(category)
    return kept
