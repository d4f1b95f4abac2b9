"""Training data loader as an infinite stream of batches that can be resumed at any position.

Detectron2's loader cannot be resumed exactly: worker seeds are not restored and the aspect-ratio buckets are lost.
Here, batches are grouped by index before any image is read, and the augmentation of an image is seeded with the run's
seed and the image's position in the stream. Batch n is therefore the same in every run, independent of the resume
position and of the numbers of workers and processes.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import detector_of, reads_annotations
from ..errors import UserError
from ..image_files import DataError, size_of_entry
from ..random_state import seeded
from .augmentation import build_mapper
from .coco.keypoints import check_keypoints
from .images import CheckedMapper
from .sampling import index_stream, samples_by_set
from .workers import configure_workers

logger = logging.getLogger(__name__)

Position = tuple[int, int]
"""(position in the stream, index in the dataset)"""

MAX_SKIPPED = 100


class BatchStream(Sampler[list[Position]]):
    """Infinite batch sampler that yields positions; all images of a batch belong to the same group.

    Args:
        indices: function that returns the infinite stream of dataset indices of all processes, from its start.
        group_of: group of each dataset index, such as landscape or portrait; None for a single group.
        batch_size: total batch size over all processes.
        rank, world_size: this process takes every world_size-th image of each batch, starting at rank.

    Attributes:
        start: number of the first batch that iteration yields.
    """

    def __init__(
        self,
        indices: Callable[[], Iterator[int]],
        group_of: list[int] | None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.indices = indices
        self.group_of = group_of
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    def __iter__(self) -> Iterator[list[Position]]:
        for batch in itertools.islice(self._global_batches(), self.start, None):
            yield batch[self.rank :: self.world_size]

    def _global_batches(self) -> Iterator[list[Position]]:
        groups: dict[int, list[Position]] = {}
        for position, index in enumerate(self.indices()):
            key = self.group_of[index] if self.group_of is not None else 0
            batch = groups.setdefault(key, [])
            batch.append((position, index))
            if len(batch) == self.batch_size:
                groups[key] = []
                yield batch


class MappedDataset(Dataset):
    """Applies a mapper to dataset dictionaries as Detectron2 does, with random numbers seeded by (seed, position).

    Args:
        dataset: dataset dictionaries by index.
        mapper: dataset mapper; if it returns None, the next index is used.
        seed: the run's seed.
        skip_unusable: whether the next index is also used if an image cannot be read, instead of raising a DataError.
    """

    def __init__(
        self, dataset: Dataset, mapper: Callable[[dict], dict | None], seed: int, *, skip_unusable: bool = False
    ):
        self.dataset = dataset
        self.mapper = CheckedMapper(mapper)
        self.seed = seed
        self.skip_unusable = skip_unusable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, where: Position) -> dict:
        position, index = where
        with seeded(self.seed, position):
            for offset in range(MAX_SKIPPED):
                entry = _with_fractions(self.dataset[(index + offset) % len(self.dataset)])
                try:
                    mapped = self.mapper(entry)
                except DataError as error:
                    if not self.skip_unusable:
                        raise
                    logger.warning(f"{error} Using the next image instead.")
                    continue
                if mapped is not None:
                    return mapped
        raise DataError(f"{MAX_SKIPPED} training images in a row cannot be used, starting at number {index}.")


def _with_fractions(entry: dict) -> dict:
    """Return an entry with boxes and polygons of floats: Detectron2 resizes those of ints to whole numbers."""
    if "annotations" not in entry:
        return entry
    annotations = [dict(annotation) for annotation in entry["annotations"]]
    for annotation in annotations:
        if "bbox" in annotation:
            annotation["bbox"] = list(map(float, annotation["bbox"]))
        if isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = [np.asarray(p, dtype=np.float64) for p in annotation["segmentation"]]
    return {**entry, "annotations": annotations}


def build_stream_loader(cfg: CfgNode, seed: int, mapper: Callable | None = None) -> DataLoader:
    """Build the training loader, which yields this process's part of batches 0, 1, 2, ... as lists of dictionaries.

    Args:
        cfg: config; DATASETS.TRAIN, SOLVER.IMS_PER_BATCH, INPUT and DATALOADER are read.
        seed: seed of sampling and augmentation; must be the same in all processes.
        mapper: mapper used instead of that of `build_mapper`, for which annotations are not checked.

    Returns:
        A DataLoader whose `batch_sampler.start` may be set before iteration.
    """
    sets = read_training_sets(cfg)
    if reads_annotations(cfg) and mapper is None:
        sets = [_annotated(cfg, entries) for entries in sets]
    dicts = [*itertools.chain(*sets)]
    if len(sets) > 1 and "annotations" in dicts[0]:
        _check_same_classes(cfg)
    _check_semantic_segmentation(cfg, dicts)
    if reads_annotations(cfg) and mapper is None:
        _check_masks(cfg, dicts)
        _check_keypoints(cfg, dicts)
    elif not reads_annotations(cfg):
        dicts = [{key: value for key, value in d.items() if key != "annotations"} for d in dicts]
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    stream = BatchStream(
        index_stream(cfg, sets, seed),
        [_group_of(cfg, entry) for entry in dicts] if grouped else None,
        cfg.SOLVER.IMS_PER_BATCH,
        comm.get_rank(),
        comm.get_world_size(),
    )
    dataset = MappedDataset(
        DatasetFromList(dicts, copy=False),
        mapper or build_mapper(cfg),
        seed,
        skip_unusable=cfg.DATALOADER.SKIP_UNUSABLE_IMAGES,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        # A separate generator, so that starting workers does not change the training's random state.
        generator=torch.Generator(),
    )
    return configure_workers(loader)


def read_training_sets(cfg: CfgNode) -> list[list[dict]]:
    """Return the dataset dictionaries that Detectron2's filters keep: of each set if `samples_by_set`, else of all together.

    Raises:
        UserError: none is kept, or a dataset cannot be read.
    """
    together = [cfg.DATASETS.TRAIN] if not samples_by_set(cfg) else [(name,) for name in cfg.DATASETS.TRAIN]
    return [_read(cfg, names) for names in together]


def _read(cfg: CfgNode, names: Sequence[str]) -> list[dict]:
    try:
        return get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and reads_annotations(cfg),
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        )
    except (AssertionError, ValueError, ImportError) as error:
        raise UserError(f"DATASETS.TRAIN {', '.join(names)} cannot be trained on: {error}") from error


def _check_same_classes(cfg: CfgNode) -> None:
    """Check the class names of all sets, as Detectron2 does only for sets that are read together."""
    try:
        check_metadata_consistency("thing_classes", cfg.DATASETS.TRAIN)
    except AttributeError:  # a set has no class names
        return
    except ValueError as error:
        raise UserError(f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)} cannot be trained on: {error}") from error


def _group_of(cfg: CfgNode, entry: dict) -> int:
    """Return 1 for landscape images and 0 for others, also for unreadable ones without size, which are skipped later."""
    try:
        width, height = size_of_entry(entry)
    except UserError:
        if not cfg.DATALOADER.SKIP_UNUSABLE_IMAGES:
            raise
        return 0
    return int(width > height)


def _annotated(cfg: CfgNode, dicts: list[dict]) -> list[dict]:
    """Return entries that all have annotations; those of a SemanticSegmentor, which does not read any, may lack them."""
    if detector_of(cfg) == "SemanticSegmentor":
        return [{"annotations": [], **entry} for entry in dicts]
    for entry in dicts:
        if "annotations" not in entry:
            raise UserError(
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: the entry of {entry['file_name']} has no annotations; that of an image without "
                "objects has an empty list."
            )
    return dicts


def _check_masks(cfg: CfgNode, dicts: list[dict]) -> None:
    crop = next((key for key in ("CROP", "LARGE_SCALE_JITTER") if cfg.INPUT[key].ENABLED), None)
    crops_polygons = crop is None or importlib.util.find_spec("shapely") is not None
    for image in dicts if cfg.MODEL.MASK_ON else ():
        where = f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: an object of {image['file_name']}"
        if not all(annotation.get("segmentation") for annotation in image["annotations"]):
            raise UserError(
                f"{where} has no segmentation, but MODEL.MASK_ON is True; set it to False to train on boxes only."
            )
        used = [a["segmentation"] for a in image["annotations"] if not a.get("iscrowd")]
        are_polygons = [isinstance(segmentation, list) for segmentation in used]
        if cfg.INPUT.MASK_FORMAT == "polygon" and not all(are_polygons):
            raise UserError(
                f"{where} has a run-length encoded mask (RLE), but INPUT.MASK_FORMAT is 'polygon'; set it to 'bitmask'."
            )
        if any(are_polygons) and not crops_polygons:
            raise UserError(
                f"{where} is a polygon, and to crop it (INPUT.{crop}.ENABLED) needs the package shapely: pip install shapely"
            )


def _check_keypoints(cfg: CfgNode, dicts: list[dict]) -> None:
    for image in dicts if cfg.MODEL.KEYPOINT_ON else ():
        where = f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: an object of {image['file_name']}"
        for annotation in image["annotations"]:
            if not annotation.get("iscrowd"):
                check_keypoints(where, annotation.get("keypoints"), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)


def _check_semantic_segmentation(cfg: CfgNode, dicts: list[dict]) -> None:
    detector, predicted = detector_of(cfg), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if detector not in ("PanopticFPN", "SemanticSegmentor"):
        return
    for image in dicts:
        if "sem_seg_file_name" not in image:
            raise UserError(
                f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: {image['file_name']} has no semantic segmentation (sem_seg_file_name), which "
                f"{detector} is trained on; register the dataset like Detectron2's coco_2017_train_panoptic_separated, in a file passed with --import."
            )
    for name in cfg.DATASETS.TRAIN:
        annotated = len(MetadataCatalog.get(name).get("stuff_classes") or ())
        if annotated > predicted:
            raise UserError(
                f"The semantic segmentation of the dataset {name} has {annotated} classes (stuff_classes), but MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"is {predicted}."
            )
