"""Samplers of training images: Detectron2's, by the names in DATALOADER.SAMPLER_TRAIN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from torch import Tensor

from ..config import reads_annotations
from ..errors import UserError, is_finite_number

ALL, OF_CATEGORIES, SUBSET = "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
OF_SETS, OF_SETS_AND_CATEGORIES = "WeightedTrainingSampler", "WeightedCategoryTrainingSampler"
NAMES = (ALL, OF_CATEGORIES, SUBSET, OF_SETS, OF_SETS_AND_CATEGORIES)
FACTORS = "DATASETS.TRAIN_REPEAT_FACTOR"


def check_sampler(cfg: CfgNode) -> None:
    """Raise a UserError if the config has no such sampler, or repeat factors that do not belong to it or to its datasets."""
    name, factors = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATASETS.TRAIN_REPEAT_FACTOR
    if name not in NAMES:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {name!r}; it must be {', '.join(map(repr, NAMES[:-1]))} or {NAMES[-1]!r}."
        )
    if name in (OF_CATEGORIES, OF_SETS_AND_CATEGORIES) and not reads_annotations(cfg):
        raise UserError(f"DATALOADER.SAMPLER_TRAIN {name} needs annotations, but MODEL.KD.PSEUDO_LABELS ignores them.")
    if factors and not samples_by_set(cfg):
        raise UserError(f"{FACTORS} needs DATALOADER.SAMPLER_TRAIN {OF_SETS} or {OF_SETS_AND_CATEGORIES}, not {name}.")
    for entry in factors:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not is_pair or entry[0] not in cfg.DATASETS.TRAIN or not is_finite_number(entry[1]) or entry[1] <= 0:
            raise UserError(
                f"An entry of {FACTORS} is {entry!r}; it must be the name of a set in DATASETS.TRAIN and a number above 0, such as "
                f"{[cfg.DATASETS.TRAIN[0], 2.0]!r}."
            )
    names = [name for name, _ in factors]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{FACTORS} has several entries for {twice[0]!r}.")


def samples_by_set(cfg: CfgNode) -> bool:
    """Return whether the sampler needs to know the set of each image."""
    return cfg.DATALOADER.SAMPLER_TRAIN in (OF_SETS, OF_SETS_AND_CATEGORIES)


def repeat_factors_of_sets(cfg: CfgNode) -> list[float]:
    """Return how often images of each set in DATASETS.TRAIN are seen in an epoch, without factors of categories."""
    factors = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    return [float(factors.get(name, 1.0)) for name in cfg.DATASETS.TRAIN]


def images_per_epoch(cfg: CfgNode, sets: Sequence[list[dict]]) -> float:
    """Return how many images the sampler draws in an epoch: those of its subset, or each as often as it is repeated, on average.

    Args, Raises: see `index_stream`.
    """
    check_sampler(cfg)
    name, count = cfg.DATALOADER.SAMPLER_TRAIN, sum(map(len, sets))
    if name == ALL:
        return count
    if name == SUBSET:
        return _subset_size(cfg, count)
    return _repeat_factors(cfg, sets).sum(dtype=torch.float64).item()


def index_stream(cfg: CfgNode, sets: Sequence[list[dict]], seed: int) -> Callable[[], Iterator[int]]:
    """Return a function that returns the infinite stream of indices into the concatenated sets, from its start.

    Args:
        sets: dataset dictionaries, of each set in DATASETS.TRAIN if `samples_by_set`, otherwise of all together.
        seed: must be the same in all processes.

    Raises:
        UserError: see `check_sampler`; or DATALOADER.RANDOM_SUBSET_RATIO selects no image.
    """
    check_sampler(cfg)
    name, count = cfg.DATALOADER.SAMPLER_TRAIN, sum(map(len, sets))
    if name == ALL:
        return TrainingSampler(count, seed=seed)._infinite_indices
    if name == SUBSET:
        _subset_size(cfg, count)
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        return RandomSubsetTrainingSampler(count, ratio, seed_shuffle=seed, seed_subset=seed)._infinite_indices
    return RepeatFactorTrainingSampler(_repeat_factors(cfg, sets), seed=seed)._infinite_indices


def _subset_size(cfg: CfgNode, count: int) -> int:
    """Return how many images RandomSubsetTrainingSampler selects; raise a UserError if it is none."""
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if int(count * ratio) < 1:
        raise UserError(f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}, which is less than one of the {count} images.")
    return int(count * ratio)


def _repeat_factors(cfg: CfgNode, sets: Sequence[list[dict]]) -> Tensor:
    """Return how often each image is seen in an epoch."""
    factors = torch.ones(sum(map(len, sets)))
    if samples_by_set(cfg):
        lengths = torch.tensor([*map(len, sets)])
        factors = factors * torch.tensor(repeat_factors_of_sets(cfg)).repeat_interleave(lengths)
    if cfg.DATALOADER.SAMPLER_TRAIN in (OF_CATEGORIES, OF_SETS_AND_CATEGORIES):
        factors = factors * torch.cat(
            [
                RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                    dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
                )
                for dicts in sets
            ]
        )
    return factors
