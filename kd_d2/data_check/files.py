"""Checks of image files: duplicates within a set, overlap of training and test sets, and unreadable files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import product

from tqdm import tqdm

from ..data import evenly_spaced
from ..data.coco import CocoData
from ..errors import UserError
from ..files import checksum
from ..image_files import DataError, read_image
from .findings import Finding
from .sets import DataSet


def find_repeated(sets: list[tuple[DataSet, CocoData]]) -> Iterator[Finding]:
    """Find images with identical bytes: a warning within a set, an error if they are in both a training and a test set.

    Only files that share their size with another file are read.

    Raises:
        UserError: a file cannot be read.
    """
    paths = [[os.path.join(dataset.folder, i["file_name"]) for i in data.tree["images"]] for dataset, data in sets]
    digests = _digests([path for of_set in paths for path in of_set])
    names: list[dict[str, list[str]]] = []
    for (dataset, _), of_set in zip(sets, paths):
        names.append(defaultdict(list))
        for path in of_set:
            if path in digests:
                names[-1][digests[path]].append(os.path.relpath(path, dataset.folder))
        twice = [found for found in names[-1].values() if len(found) > 1]
        if twice:
            count = sum(len(found) - 1 for found in twice)
            text = f"{count} images are duplicates of others in the set, such as {twice[0][1]} of {twice[0][0]}."
            yield Finding(False, dataset.name, text)
    roles = [[number for number, (dataset, _) in enumerate(sets) if dataset.role == role] for role in ("train", "test")]
    for train, test in product(*roles):
        both = [digest for digest in names[test] if digest in names[train]]
        if both:
            count, first = sum(len(names[test][digest]) for digest in both), names[test][both[0]][0]
            yield Finding(
                True,
                f"{sets[train][0].name}, {sets[test][0].name}",
                f"{count} of {len(paths[test])} test images are also in the training set, such as {first} "
                f"({names[train][both[0]][0]}): remove them from one set.",
            )


def _digests(paths: list[str]) -> dict[str, str]:
    """Return content digests by path, for files that share their size with another file."""
    of_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        of_size[os.path.getsize(path)].append(path)
    alike = [path for found in of_size.values() if len(found) > 1 for path in found]
    return {path: _digest(path) for path in dict.fromkeys(alike)}


def _digest(path: str) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from error


def find_unreadable(dataset: DataSet, data: CocoData, count: int | None, skips: bool) -> Iterator[Finding]:
    """Find images that are unreadable or differ in size from their annotations, among `count` evenly spaced images.

    Args:
        count: number of images to read; None for all.
        skips: whether such images are skipped, which makes the finding a warning.
    """
    images = data.tree["images"]
    chosen = images if count is None else evenly_spaced(images, count)
    problems = []
    for image in tqdm(chosen, f"images of {dataset.name}", unit="image", disable=None):
        path = os.path.join(dataset.folder, image["file_name"])
        try:
            height, width = read_image(path, "RGB").shape[:2]
        except DataError as error:
            problems.append(str(error))
            continue
        if (width, height) != (image["width"], image["height"]):
            problems.append(
                f"The image {path} has {width} x {height} pixels, but its annotations say {image['width']} x {image['height']}."
            )
    if problems:
        text = f"{len(problems)} of {len(chosen)} images cannot be used, the first: {problems[0]}"
        yield Finding(not skips, dataset.name, text)
