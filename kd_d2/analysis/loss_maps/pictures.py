"""Pictures of loss maps, and the fraction of a loss inside the objects' boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances

from ...errors import UserError
from ..base import nanmean
from ..drawing import draw_instances, enlarged, overlay_heat, per_pixel, sheet, titled
from .files import are_equal, check_stride, mean_loss_maps, read_saved_examples, recorded_strides

SIDE = 320  # shorter side of a picture, in pixels


@dataclass
class RunShare:
    """Results of one training.

    Attributes:
        records: number of times the maps were recorded.
        share_in_boxes: fraction of the loss inside the objects' boxes, averaged over the images in which the loss is not
            zero; None or NaN if there are none.
        images: number of these images; None in files from before it was added.
        box_area: fraction of these images that the boxes cover; None in files from before it was added.
    """

    records: int
    share_in_boxes: float | None
    images: int | None = None
    box_area: float | None = None


def draw_loss_maps(folders: dict[str, str], stride: int) -> tuple[np.ndarray, float, dict[str, RunShare]]:
    """Draw trainings side by side, one row per image; return the picture, the mean box area, and the results by title.

    Args:
        folders: output folders of the trainings by title.
        stride: stride of the level.

    Raises:
        UserError: a training has no records, records of different images, or no such level.
    """
    maps, records = {}, {}
    for title, folder in folders.items():
        maps[title], records[title] = mean_loss_maps(folder)
    first = next(iter(folders.values()))
    examples, names = read_saved_examples(first)
    for title, levels in maps.items():
        if not are_equal(examples, read_saved_examples(folders[title])[0]):
            raise UserError(f"{folders[title]} has different images than {first}.")
        check_stride(stride, recorded_strides(levels), folders[title])
    rows, covered, shares = [], [], {title: [] for title in folders}  # NaN: the loss is zero
    for number, (image, truth) in enumerate(examples):
        inside = inside_boxes(truth)
        covered.append(inside.mean())
        row = [titled(draw_instances(image, truth, names, min_side=SIDE), "objects")]
        for title, levels in maps.items():
            heat = per_pixel(levels[f"{number}/{stride}"], stride, image.shape[:2])
            shares[title].append((heat * inside).sum() / heat.sum() if heat.any() else np.nan)
            row.append(titled(overlay_heat(enlarged(image, SIDE), heat), title))
        rows.append(row)
    runs = {}
    for title, of_images in shares.items():
        counts = ~np.isnan(of_images)
        area = float(nanmean(np.where(counts, covered, np.nan)))
        runs[title] = RunShare(records[title], float(nanmean(of_images)), int(counts.sum()), area)
    return sheet(rows), float(np.mean(covered)), runs


def inside_boxes(truth: Instances) -> np.ndarray:
    """Return a bool mask (H, W) of the pixels inside any box."""
    mask = np.zeros(truth.image_size, bool)
    for left, top, right, bottom in truth.gt_boxes.tensor.round().int().tolist():
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask
