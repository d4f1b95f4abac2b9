"""Reader of COCO annotation files that repairs unambiguous problems and rejects all others."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ...image_files import size_on_disk
from ...text import composed, has_controls, label
from .annotations import Annotations
from .ids import Ids, whole_number
from .image_names import ImageFinder
from .keypoints import keypoint_names
from .repairs import Repairs

Entry = dict[str, Any]
LISTS = ("images", "annotations", "categories")
LONGEST_CLASS_NAME = 200
PLACEHOLDERS = "placeholder categories without boxes dropped"
BACKGROUND = ("background", "__background__", "_background_", "bg")


class MissingImagesError(UserError):
    """Raised when images of an annotation file are not on disk.

    Attributes:
        found: number of images on disk.
    """

    def __init__(self, message: str, found: int):
        super().__init__(message)
        self.found = found


@dataclass
class CocoData:
    """A repaired annotation file.

    Attributes:
        tree: "images" (with sizes, and names of existing files relative to the folder), "annotations" (with positive
            ids and boxes [x, y, width, height] of positive area), "categories" sorted by id, and other keys.
        repairs: differences from the file.
        is_as_written: whether the file needs no repairs and can be used directly.
    """

    tree: dict[str, Any]
    repairs: Repairs
    is_as_written: bool

    @property
    def class_names(self) -> list[str]:
        """Class names sorted by category id."""
        return [category["name"] for category in self.tree["categories"]]


def read_coco(
    path: str,
    image_folder: str,
    *,
    annotated: bool = True,
    masks: bool = False,
    keypoints: bool = False,
    boxes: str = "xywh",
    drop_missing: bool = False,
) -> CocoData:
    """Read and repair an annotation file in COCO format.

    Args:
        path: JSON file.
        image_folder: folder of the images.
        annotated: whether annotations are read; if False, they are optional and ignored.
        masks: whether segmentations are required; if False, unusable ones are removed.
        keypoints: whether keypoints are read, if a category names them; otherwise unusable ones are removed.
        boxes: box format of the file, one of BOX_FORMATS.
        drop_missing: whether images that are not on disk are dropped, if at least one image is found.

    Raises:
        MissingImagesError: images are not on disk.
        UserError: not JSON, not in COCO format, no images, invalid references, or boxes in another format.
    """
    repairs = Repairs(path)
    raw = _read_tree(path, repairs, annotated=annotated)
    if not raw["images"]:
        raise UserError(f"{path} has no images.")
    categories, category_ids = _read_categories(path, raw["categories"], repairs)
    used = _used(raw, category_ids)
    if not annotated:
        raw["annotations"] = []
    image_ids = Ids(path, "images", raw["images"], repairs)
    images, missing = _read_images(path, image_folder, raw["images"], image_ids, repairs)
    if missing and not (images and drop_missing):
        raise MissingImagesError(
            f"{path}: {len(missing)} of {len(raw['images'])} images are not in {image_folder}, the first is "
            f"{next(iter(missing.values()))}; specify their folder.",
            found=len(images),
        )
    for name in missing.values():
        repairs.add("missing images dropped", name)
    entries = [a for a in raw["annotations"] if image_ids.find(a.get("image_id")) not in missing]
    reader = Annotations(path, {image["id"]: image for image in images}, image_ids, category_ids, repairs)
    count = len(keypoint_names(path, categories)) if keypoints else 0
    annotations = reader.read(entries, masks=masks, boxes=boxes, keypoints=count)
    categories = _classes(path, categories, used, repairs)
    if annotated and not categories:
        raise UserError(f"{path} has no categories: add the classes to its list 'categories'.")
    tree = {**raw, "images": images, "annotations": annotations, "categories": categories}
    is_as_written = not repairs and tree == {**raw, "categories": sorted(raw["categories"], key=lambda c: c["id"])}
    return CocoData(tree, repairs, is_as_written)


def read_categories(path: str) -> list[Entry]:
    """Return the categories of an annotation file sorted by id. It may have no other list, and its images need not exist.

    Raises:
        UserError: the file is not JSON, not in COCO format, or its categories are invalid.
    """
    repairs = Repairs(path)
    raw = _read_tree(path, repairs, optional=("images", "annotations"))
    categories, ids = _read_categories(path, raw["categories"], repairs)
    return _classes(path, categories, _used(raw, ids), repairs)


def read_json_bytes(path: str) -> tuple[Any, str]:
    """Load a JSON file in any Unicode encoding, and return its content and encoding: "utf-8" without a byte order mark.

    Raises:
        UserError: the file cannot be read or is not valid JSON.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        return json.loads(content), json.detect_encoding(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable json: {error}.") from error


def _read_tree(
    path: str, repairs: Repairs, *, annotated: bool = True, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    tree, encoding = read_json_bytes(path)
    if encoding != "utf-8":
        repairs.add("converted to UTF-8 without a byte order mark", encoding)
    if isinstance(tree, dict) and not annotated:
        annotations = tree.get("annotations")
        entries = [a for a in annotations if isinstance(a, dict)] if isinstance(annotations, list) else []
        tree = {"categories": [], **tree, "annotations": entries}
    if isinstance(tree, dict):
        tree = {**{key: [] for key in optional}, **tree}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in LISTS):
        raise UserError(
            f"{path} is not a COCO annotation file: it needs the lists 'images', 'annotations' and 'categories'."
        )
    for key in LISTS:
        for entry in tree[key]:
            if not isinstance(entry, dict):
                raise UserError(f"{path}: its {key} contain {str(entry)[:120]}; each entry must be a JSON object.")
    return tree


def _read_images(
    path: str, folder: str, entries: list[Entry], ids: Ids, repairs: Repairs
) -> tuple[list[Entry], dict[int, str]]:
    """Return the images that are on disk, and the names of the missing ones by id."""
    finder = ImageFinder(folder)
    images, missing = [], {}
    first_of: dict[str, tuple[str, Any]] = {}
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
        first_name, first_id = first_of.setdefault(found, (name, entry["id"]))
        if first_name != name:
            raise UserError(f"{path}: the images {first_name} and {name} both match {found} in {folder}.")
        if first_id != entry["id"]:
            repairs.add("repeated images merged with the first", f"{name} with id {entry['id']!r}")
            ids.merge(entry["id"], first_id)
            continue
        images.append({**entry, "id": ids.find(entry["id"]), "file_name": found})
    for image in images:
        _complete_size(image, folder, repairs)
    return images, missing


def _complete_size(image: Entry, folder: str, repairs: Repairs) -> None:
    written = image.get("width"), image.get("height")
    sizes = tuple(whole_number(side) for side in written)
    if not all(side is not None and 0 < side < 1e9 for side in sizes):
        repairs.add("image sizes read from the image files", image["file_name"])
        sizes = size_on_disk(os.path.join(folder, image["file_name"]))
    elif any(type(side) is not int for side in written):
        repairs.add("image sizes read as whole numbers", f"{image['file_name']}, {written[0]!r} x {written[1]!r}")
    image["width"], image["height"] = sizes


def _read_categories(path: str, entries: list[Entry], repairs: Repairs) -> tuple[list[Entry], Ids]:
    ids = Ids(path, "categories", entries, repairs)
    categories: list[Entry] = []
    for entry in entries:
        name = entry.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            repairs.add("category names read as text", name)
            name = str(name)
        if not isinstance(name, str):
            raise UserError(f"{path}: a category has no 'name': {str(entry)[:120]}.")
        if has_controls(name) or len(name) > LONGEST_CLASS_NAME:
            raise UserError(
                f"{path}: the category {entry['id']!r} has a name with control characters or more than {LONGEST_CLASS_NAME} characters "
                f"({label(name)}); rename it."
            )
        if name != composed(name):
            repairs.add("category names read in Unicode's form NFC", name)
        categories.append({**entry, "id": ids.find(entry["id"]), "name": composed(name)})
    return sorted(categories, key=lambda category: category["id"]), ids


def _used(raw: dict[str, Any], category_ids: Ids) -> set[int | None]:
    """Return the ids of the categories that annotations refer to."""
    return {category_ids.find(annotation.get("category_id")) for annotation in raw["annotations"]}


def _classes(path: str, categories: list[Entry], used: set[int | None], repairs: Repairs) -> list[Entry]:
    """Return the categories without placeholders, checking that names are unique; for `used` see `_used`."""
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
    """Drop categories without annotations that are not classes: the background, and the root category of Roboflow exports.

    In a file without annotations the root category is kept, since it may be a class, unless a class has its name or all
    categories are as Roboflow writes them: the root with id 0, and all others below it.
    """
    parents = [category.get("supercategory") for category in categories]
    names = Counter(category["name"] for category in categories)
    is_roboflow = len(categories) > 1 and categories[0]["id"] == 0 and parents[0] == "none"
    is_roboflow = is_roboflow and all(parent == categories[0]["name"] for parent in parents[1:])
    kept = []
    for category in categories:
        is_root = category.get("supercategory") in (None, "", "none") and category["name"] in parents
        is_root = is_root and (bool(used) or is_roboflow or names[category["name"]] > 1)
        if category["id"] not in used and (is_root or category["name"].lower() in BACKGROUND):
            repairs.add(PLACEHOLDERS, repr(category["name"]))
        else:
            kept.append(category)
    return kept
