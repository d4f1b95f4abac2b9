"""The length of a training in epochs."""

from __future__ import annotations

from typing import Any

from ..config import load_config
from ..data.sampling import check_sampler, repeat_factors_of_sets
from .check import DataCheck

EPOCHS = 12
"""Length of Detectron2's 1x schedule on COCO."""


def schedule_of_config(config_file: str, opts: list[Any], check: DataCheck) -> str | None:
    """Return a sentence with the epochs of a config's schedule, and the keys of one of 12 epochs in proportion.

    None if there are no training images that can be read, or no iterations.
    """
    cfg = load_config(config_file, opts, student_only=True, needs_data=False, needs_weights=False)
    check_sampler(cfg)
    drops_empty, factors = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, repeat_factors_of_sets(cfg)
    counts = [
        statistics.images - (statistics.empty if drops_empty and dataset.annotated else 0)
        for (dataset, _), statistics in zip(check.sets, check.statistics, strict=True)
        if dataset.role == "train"
    ]
    images = round(sum(factor * count for factor, count in zip(factors, counts, strict=True)))
    last, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    if min(images, last, batch) < 1:
        return None
    iterations = max(1, round(EPOCHS * images / batch))
    steps = tuple(round(step / last * iterations) for step in cfg.SOLVER.STEPS)
    return (
        f"SOLVER.MAX_ITER {last} with batches of {batch} is {last * batch / images:.1f} epochs of {images} training images. The same "
        f'schedule for {EPOCHS} epochs: SOLVER.MAX_ITER {iterations} SOLVER.STEPS "{steps}"'
    )
