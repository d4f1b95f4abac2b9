"""Names of keypoints in COCO annotation files, and checks of their coordinates."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from .segmentation import is_coordinate

VISIBILITIES = (0, 1, 2)
"""Not labeled, labeled but hidden, visible."""
SIDES = {"left": "right", "right": "left"}


def keypoint_names(path: str, categories: list[dict[str, Any]]) -> list[str]:
    """Return the keypoint names of a file, which its categories list in `keypoints`; empty without any.

    Raises:
        UserError: the names are not text or not unique, or two categories have different ones.
    """
    named = [category for category in categories if category.get("keypoints")]
    for category in named:
        names = category["keypoints"]
        where = f"{path}: the keypoints of the category {category['name']!r}"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where} must be a list of names, not {str(names)[:80]}.")
        if len({*names}) < len(names):
            raise UserError(f"{where} have a name twice: {', '.join(names)}.")
        if names != named[0]["keypoints"]:
            raise UserError(
                f"{where} are {', '.join(names)}, but those of {named[0]['name']!r} are {', '.join(named[0]['keypoints'])}; "
                "a detector predicts the same keypoints for all classes."
            )
    return list(named[0]["keypoints"]) if named else []


def mirrored_keypoints(names: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return pairs of names that a horizontal flip swaps, and names of one side that lack their counterpart.

    Such pairs differ only in "left" and "right", in any letter case, such as `left_eye` and `right_eye`.
    """
    by_folded = {name.casefold(): name for name in names}
    pairs, alone = [], []
    for name in names:
        folded = name.casefold()
        counterparts = {folded.replace(side, other) for side, other in SIDES.items() if side in folded}
        found = [by_folded[counterpart] for counterpart in counterparts if counterpart in by_folded]
        if counterparts and not found:
            alone.append(name)
        pairs += [(name, other) for other in found if names.index(name) < names.index(other)]
    return pairs, alone


def check_keypoints(what: str, keypoints: Any, count: int) -> None:
    """Raise a UserError, which begins with `what`, unless these are `count` keypoints: x, y, visibility of each."""
    is_complete = isinstance(keypoints, list) and len(keypoints) == 3 * count and all(map(is_coordinate, keypoints))
    if not is_complete or not {*keypoints[2::3]} <= {*VISIBILITIES}:
        raise UserError(
            f"{what} has the keypoints {str(keypoints)[:80]}; they must be {3 * count} numbers: x, y and visibility (0, 1 or 2) of "
            f"each of {count}."
        )
