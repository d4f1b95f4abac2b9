"""The training stream: batch n is the same, whatever was read before it and however many processes read it."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from kd_d2.config import add_kd_config
from kd_d2.data import build_stream_loader, register_coco_json
from kd_d2.data.images import build_test_loader
from kd_d2.data.sampling import _repeat_factors
from kd_d2.data.stream import BatchStream, MappedDataset
from kd_d2.data.workers import configure_workers
from kd_d2.errors import UserError
from kd_d2.image_files import DataError
from kd_d2.random_state import seeded

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import SizeMismatchError
from helpers import clean_process, make_coco
from torch.utils.data import DataLoader

GROUPS = [0, 1, 1, 0, 1, 1, 0]  # of a dataset of seven images


def indices() -> itertools.chain:
    """Return the endless stream 0, 1, ... 6, 6, 5, ... 0, repeated."""
    return itertools.cycle([*range(7), *reversed(range(7))])


def batches(count: int, start: int = 0, **options: object) -> list[list[tuple[int, int]]]:
    stream = BatchStream(indices, **({"group_of": GROUPS, "batch_size": 3} | options))
    stream.start = start
    return list(itertools.islice(stream, count))


# --------------------------------------------------------------------------------------- batches of positions


def test_batches_worked_out_by_hand() -> None:
    """Check the first batches: filled in the order of the stream, each from one group, without losing any position."""
    assert batches(4) == [
        [(1, 1), (2, 2), (4, 4)],
        [(0, 0), (3, 3), (6, 6)],
        [(5, 5), (8, 5), (9, 4)],
        [(7, 6), (10, 3), (13, 0)],
    ]
    assert batches(2, group_of=None) == [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4), (5, 5)]]


def test_every_position_is_in_one_batch_at_most() -> None:
    """Check that in many batches no position occurs twice, and that missing ones still wait for a full batch."""
    seen = [position for batch in batches(500) for position, _ in batch]
    assert len(set(seen)) == len(seen)
    assert max(seen) - len(seen) < 2 * 3


@pytest.mark.parametrize("start", [1, 3, 10])
def test_entering_at_n_equals_skipping_n(start: int) -> None:
    """Check that a stream started at batch n yields the same batches as one from the beginning does from batch n."""
    assert batches(6, start=start) == batches(start + 6)[start:]


def test_the_parts_of_two_processes_make_the_batch_of_one() -> None:
    """Check that each process has half of every batch, and that both halves make up the batch."""
    whole = batches(8, batch_size=4)
    parts = [batches(8, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(batch)


# ---------------------------------------------------------------------------------------------- mapped images


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_mapping_depends_on_seed_and_position_alone() -> None:
    """Check that the mapper's random numbers are the same for one position, and differ for another position or seed."""
    dataset = MappedDataset(["a", "b"], lambda entry: draws(), seed=3)
    first = dataset[(5, 0)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert dataset[(5, 0)] == first
    assert dataset[(5, 1)] == first  # independent of the image
    for other in (dataset[(6, 0)], MappedDataset(["a"], lambda entry: draws(), seed=4)[(5, 0)]):
        assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_mapping_leaves_the_global_generators_alone(fails: bool) -> None:
    """Check that all three generators continue as if nothing had been mapped, also if the mapper fails."""

    def mapper(entry: str) -> tuple:
        if fails:
            raise KeyError(entry)
        return draws()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draws() for _ in range(3)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    found = [draws()]
    for position in range(2):
        if fails:
            with pytest.raises(KeyError):
                MappedDataset(["a"], mapper, seed=0)[(position, 0)]
        else:
            MappedDataset(["a"], mapper, seed=0)[(position, 0)]
        found.append(draws())
    assert found == expected


def test_positions_beyond_a_word_and_seed_zero() -> None:
    """Check that large positions of the endless stream have distinct random numbers."""
    seen = set()
    for position in (0, 1, 2**32, 2**40):
        with seeded(0, position):
            seen.add(draws())
    assert len(seen) == 4


def test_a_refused_image_is_replaced_by_the_next() -> None:
    """Check that if the mapper returns None the next index is used, also past the end; only Nones are an error."""
    dataset = MappedDataset([{}, {"image_id": 1}, {"image_id": 2}], lambda entry: None if entry else "first", seed=0)
    assert [dataset[(0, i)] for i in range(3)] == ["first"] * 3
    dataset = MappedDataset(["a", "b", "c", "d"], lambda entry: None if entry == "b" else entry, seed=0)
    assert [dataset[(0, i)] for i in range(4)] == ["a", "c", "c", "d"]
    with pytest.raises(DataError, match="100 training images in a row cannot be used, starting at number 1"):
        MappedDataset([{}] * 3, lambda entry: None, seed=0)[(0, 1)]


# ------------------------------------------------------------------------------------------------- the loader


@pytest.fixture
def cfg(tmp_path: Path):
    """Yield a config of ten images, half landscape and half portrait, in batches of four with flips and three sizes."""
    cfg = get_cfg()
    add_kd_config(cfg)
    annotations = make_coco(tmp_path / "data", 10)
    cfg.DATASETS.COCO_JSON = [["stream", str(annotations), str(annotations.parent / "images")]]
    cfg.DATASETS.TRAIN = ("stream",)
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    with clean_process():
        register_coco_json(cfg)
        yield cfg


def signature(batch: list[dict]) -> list[tuple]:
    """Return everything in a batch that training uses, in comparable form."""
    return [
        (
            item["file_name"],
            tuple(item["image"].shape),
            item["image"].long().sum().item(),
            item["image"][:, :, 0].flatten().tolist(),
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_classes.tolist(),
        )
        for item in batch
    ]


def read(cfg: CfgNode, count: int, start: int = 0, seed: int = 1) -> list[list[tuple]]:
    loader = build_stream_loader(cfg, seed)
    loader.batch_sampler.start = start
    return [signature(batch) for batch in itertools.islice(loader, count)]


def test_batches_do_not_depend_on_the_number_of_workers(cfg: CfgNode) -> None:
    """Check that images, augmentation and order are the same with 0, 1 and 2 workers."""
    expected = read(cfg, 6)
    for cfg.DATALOADER.NUM_WORKERS in (1, 2):
        assert read(cfg, 6) == expected


def test_the_loader_enters_anywhere(cfg: CfgNode) -> None:
    """Check that batches 7 to 11 are the same whether or not batches 0 to 6 are read first."""
    assert read(cfg, 5, start=7) == read(cfg, 12)[7:]


def test_images_do_not_seed_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that loading an image in the main process leaves the random state of the GPUs to the training."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    with seeded(1, 2):
        first = torch.rand(3)
    with seeded(1, 2):
        torch.testing.assert_close(torch.rand(3), first, rtol=0, atol=0)


def test_the_stream_is_shuffled_augmented_and_seeded(cfg: CfgNode) -> None:
    """Check that images are flipped or not, in all sizes and in varying order, and that another seed changes them."""
    whole = read(cfg, 40)
    items = [item for batch in whole for item in batch]
    assert {min(shape[1:]) for _, shape, *_ in items} == {48, 64, 80}
    of_one = [item for item in items if item[0] == items[0][0]]
    assert len({str(item) for item in of_one}) > 3  # three sizes, each flipped or not
    orders = {tuple(item[0] for item in items[i : i + 10]) for i in (0, 10, 20)}
    assert len(orders) == 3
    assert read(cfg, 3, seed=2) != whole[:3]


def test_a_batch_is_landscape_or_portrait(cfg: CfgNode) -> None:
    """Check the aspect ratios in each batch, and that they are mixed without grouping."""
    for cfg.DATALOADER.ASPECT_RATIO_GROUPING in (True, False):
        shapes = [{shape[1] < shape[2] for _, shape, *_ in batch} for batch in read(cfg, 12)]
        assert all(len(kinds) == 1 for kinds in shapes) == cfg.DATALOADER.ASPECT_RATIO_GROUPING


def test_square_images_are_grouped_with_portraits(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the groups of a landscape, a portrait and a square, which are those of Detectron2's loader."""
    entries = [{"file_name": "a", "width": w, "height": h, "annotations": []} for w, h in ((3, 2), (2, 3), (2, 2))]
    monkeypatch.setattr("kd_d2.data.stream.get_detection_dataset_dicts", lambda *names, **options: entries)
    landscape, portrait, square = build_stream_loader(cfg, 0).batch_sampler.group_of
    assert landscape != portrait == square


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(cfg: CfgNode, workers: int) -> None:
    """Check that the same random numbers are drawn with and without reading images before."""
    cfg.DATALOADER.NUM_WORKERS = workers
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    read(cfg, 2)
    assert draws() == expected


def test_processes_read_disjoint_parts(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the loaders of two processes each yield half of the images, augmented as in one process."""
    whole = read(cfg, 5)
    monkeypatch.setattr("kd_d2.data.stream.comm.get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("kd_d2.data.stream.comm.get_rank", lambda rank=rank: rank)
        parts.append(read(cfg, 5))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == sorted(batch)


def test_samplers(cfg: CfgNode) -> None:
    """Check what each sampler draws: all images equally often, a fixed part of the images, rare classes more often."""
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def files(count: int) -> list[str]:
        return [item[0] for batch in read(cfg, count) for item in batch]

    seen = files(5)
    assert [seen.count(name) for name in set(seen)] == [2] * 10
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.RANDOM_SUBSET_RATIO = "RandomSubsetTrainingSampler", 0.3
    assert len(set(files(6))) == 3
    dicts = DatasetCatalog.get("stream")
    for entry in dicts:
        entry["annotations"] = [{**dicts[0]["annotations"][0], "category_id": 0}]
    dicts[4]["annotations"][0]["category_id"] = 1
    DatasetCatalog.register("rare", lambda: dicts)
    MetadataCatalog.get("rare").thing_classes = MetadataCatalog.get("stream").thing_classes
    cfg.DATASETS.TRAIN = ("rare",)
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.9
    seen = files(60)
    often = seen.count(dicts[4]["file_name"])
    others = (len(seen) - often) / 9
    assert 2.2 < often / others < 3.8  # sqrt(0.9 / 0.1) = 3
    cfg.DATALOADER.REPEAT_SQRT = False
    seen = files(180)
    often = seen.count(dicts[4]["file_name"])
    assert 7 < often / ((len(seen) - often) / 9) < 11  # 0.9 / 0.1 = 9


@pytest.fixture
def two_sets(cfg: CfgNode) -> CfgNode:
    """Train on the ten images of "stream" and on three others, of which the first has another class."""
    dicts = [{**entry, "file_name": f"{i}.png"} for i, entry in enumerate(DatasetCatalog.get("stream")[:3])]
    for i, entry in enumerate(dicts):
        entry["annotations"] = [{"bbox": [0, 0, 9, 9], "bbox_mode": 1, "category_id": int(i == 0), "iscrowd": 0}]
    DatasetCatalog.register("others", lambda: dicts)
    MetadataCatalog.get("others").thing_classes = MetadataCatalog.get("stream").thing_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_REPEAT_FACTOR = ("stream", "others"), [["others", 2]]
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    return cfg


def drawn_indices(cfg: CfgNode, count: int) -> list[int]:
    stream = build_stream_loader(cfg, 0).batch_sampler
    return list(itertools.islice(stream.indices(), count))


def test_repeat_factors_of_sets(two_sets: CfgNode) -> None:
    """Check epochs of 16 images: each of the first set once, of the second one twice; and half of the first set."""
    for start in (0, 16):
        epoch = drawn_indices(two_sets, 32)[start : start + 16]
        assert [epoch.count(index) for index in range(13)] == [1] * 10 + [2] * 3
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = [["stream", 0.5]]
    seen = drawn_indices(two_sets, 800)
    assert 0.4 < sum(seen.count(i) for i in range(10)) / 10 / (sum(seen.count(i) for i in (10, 11, 12)) / 3) < 0.6


def test_repeat_factors_of_sets_and_categories(two_sets: CfgNode) -> None:
    """Check classes in 1/3 and 2/3 of the images of the second set: sqrt(0.9 / frequency) times the set's factor."""
    two_sets.DATALOADER.SAMPLER_TRAIN, two_sets.DATALOADER.REPEAT_THRESHOLD = "WeightedCategoryTrainingSampler", 0.9
    sets = [DatasetCatalog.get(name) for name in two_sets.DATASETS.TRAIN]
    factors = _repeat_factors(two_sets, sets)
    frequency = torch.tensor([1 / 3, 2 / 3, 2 / 3])
    torch.testing.assert_close(factors[10:], 2 * (0.9 / frequency).sqrt())


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([["others", 0]], "An entry of DATASETS.TRAIN_REPEAT_FACTOR is ['others', 0]; it must be the name of a set in DATASETS.TRAIN and a"),
        ([["other", 2.0]], "An entry of DATASETS.TRAIN_REPEAT_FACTOR is ['other', 2.0]; it must be"),
        (["others", 2.0], "An entry of DATASETS.TRAIN_REPEAT_FACTOR is 'others'; it must be"),
        ([["others", 2.0], ["others", 3.0]], "DATASETS.TRAIN_REPEAT_FACTOR has several entries for 'others'."),
    ],
)  # fmt: skip
def test_repeat_factors_that_are_none(two_sets: CfgNode, factors: list, message: str) -> None:
    two_sets.DATASETS.TRAIN_REPEAT_FACTOR = factors
    with pytest.raises(UserError) as caught:
        build_stream_loader(two_sets, 0)
    assert str(caught.value).startswith(message)


def test_sets_with_other_classes(two_sets: CfgNode) -> None:
    """Check that the sampler that reads sets one by one refuses them as the one that reads them together."""
    names = MetadataCatalog.get("stream").thing_classes
    MetadataCatalog.pop("others")
    MetadataCatalog.get("others").thing_classes = names[::-1]
    messages = []
    for sampler, factors in (("WeightedTrainingSampler", [["others", 2]]), ("TrainingSampler", [])):
        two_sets.DATALOADER.SAMPLER_TRAIN, two_sets.DATASETS.TRAIN_REPEAT_FACTOR = sampler, factors
        with pytest.raises(UserError) as caught:
            build_stream_loader(two_sets, 0)
        messages.append(str(caught.value))
    expected = "DATASETS.TRAIN stream, others cannot be trained on: Datasets have different metadata 'thing_classes'!"
    assert messages == [expected, expected]


def test_repeat_factors_of_another_sampler(two_sets: CfgNode) -> None:
    two_sets.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    with pytest.raises(
        UserError, match=r"TRAIN_REPEAT_FACTOR needs .* WeightedCategoryTrainingSampler, not TrainingSampler\.$"
    ):
        build_stream_loader(two_sets, 0)


def test_images_without_sizes(cfg: CfgNode) -> None:
    """Check the same batches as with the sizes, and unreadable images."""
    expected, dicts = read(cfg, 4), DatasetCatalog.get("stream")
    DatasetCatalog.register("unsized", lambda: dicts)
    MetadataCatalog.get("unsized").thing_classes = MetadataCatalog.get("stream").thing_classes
    for entry in dicts:
        del entry["width"], entry["height"]
    cfg.DATASETS.TRAIN = ("unsized",)
    assert read(cfg, 4) == expected
    Path(dicts[0]["file_name"]).write_text("no image")
    with pytest.raises(UserError, match=rf"{dicts[0]['file_name']} cannot be read"):
        build_stream_loader(cfg, 0)
    cfg.DATALOADER.SKIP_UNUSABLE_IMAGES = True
    assert dicts[0]["file_name"] not in {item[0] for batch in read(cfg, 6) for item in batch}


def test_random_subsets(cfg: CfgNode) -> None:
    """Check that the seed determines the subset, and that 0.9 images are too few."""
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.RANDOM_SUBSET_RATIO = "RandomSubsetTrainingSampler", 0.3
    first, other = ({item[0] for batch in read(cfg, 4, seed=seed) for item in batch} for seed in (1, 2))
    assert first != other
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.09
    with pytest.raises(UserError, match=r"RATIO is 0\.09, which is less than one of the 10 images"):
        build_stream_loader(cfg, 0)


RLE = {"size": [64, 96], "counts": "0`^1"}
POLYGON = [[1, 1, 9, 1, 9, 9]]


@pytest.mark.parametrize(
    ("segmentation", "key", "expected"),
    [
        (RLE, "INPUT.MASK_FORMAT", "has a run-length encoded mask (RLE), but INPUT.MASK_FORMAT is 'polygon'; set it to 'bitmask'."),
        (POLYGON, "INPUT.CROP.ENABLED", "is a polygon, and to crop it (INPUT.CROP.ENABLED) needs the package shapely: pip install shapely"),
        (
            POLYGON,
            "INPUT.LARGE_SCALE_JITTER.ENABLED",
            "is a polygon, and to crop it (INPUT.LARGE_SCALE_JITTER.ENABLED) needs the package shapely: pip install shapely",
        ),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_trained_on(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, segmentation: object, key: str, expected: str
) -> None:
    """Check masks of the wrong format and a missing package, also with SKIP_UNUSABLE_IMAGES; crowds may have any mask."""
    dicts = DatasetCatalog.get("stream")
    DatasetCatalog.register("masks", lambda: dicts)
    MetadataCatalog.get("masks").thing_classes = MetadataCatalog.get("stream").thing_classes
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON, cfg.DATALOADER.SKIP_UNUSABLE_IMAGES = ("masks",), True, True
    if key != "INPUT.MASK_FORMAT":
        cfg.merge_from_list([key, True])
    for entry in dicts:
        entry["annotations"] = [{**a, "iscrowd": 1, "segmentation": segmentation} for a in entry["annotations"]]
    build_stream_loader(cfg, 0)
    dicts[1]["annotations"][0]["iscrowd"] = 0
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, 0)
    assert str(caught.value) == f"DATASETS.TRAIN masks: an object of {dicts[1]['file_name']} {expected}"


def test_entries_without_annotations(cfg: CfgNode) -> None:
    """Check that only the entries of a semantic segmentation, whose instances are then empty, may lack annotations."""
    dicts = DatasetCatalog.get("stream")
    for entry in dicts:
        del entry["annotations"]
        entry["sem_seg_file_name"] = entry["file_name"]
    DatasetCatalog.register("stuff", lambda: dicts)
    MetadataCatalog.get("stuff").thing_classes = MetadataCatalog.get("stream").thing_classes
    cfg.DATASETS.TRAIN = ("stuff",)
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, 0)
    assert str(caught.value) == (
        f"DATASETS.TRAIN stuff: the entry of {dicts[0]['file_name']} has no annotations; that of an image without objects has an empty list."
    )
    build_stream_loader(cfg, 0, mapper=lambda entry: entry)  # which may read objects from elsewhere
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    assert [len(entry["instances"]) for entry in next(iter(build_stream_loader(cfg, 0)))] == [0] * 4
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    assert sorted(drawn_indices(cfg, 10)) == [*range(10)]  # there are no classes to repeat


@pytest.mark.parametrize("detector", ["PanopticFPN", "SemanticSegmentor", "GeneralizedRCNN"])
def test_more_classes_of_semantic_segmentation_than_are_predicted(cfg: CfgNode, detector: str) -> None:
    dicts = [{**entry, "sem_seg_file_name": entry["file_name"]} for entry in DatasetCatalog.get("stream")]
    DatasetCatalog.register("stuff", lambda: dicts)
    metadata = MetadataCatalog.get("stuff")
    metadata.set(thing_classes=MetadataCatalog.get("stream").thing_classes, stuff_classes=["sky", "grass", "road"])
    cfg.DATASETS.TRAIN, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = ("stuff",), detector, 3
    build_stream_loader(cfg, 0)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2
    if detector == "GeneralizedRCNN":
        build_stream_loader(cfg, 0)
        return
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, 0)
    assert str(caught.value) == (
        "The semantic segmentation of the dataset stuff has 3 classes (stuff_classes), but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 2."
    )


def test_an_unknown_sampler(cfg: CfgNode) -> None:
    """Check that the message lists the available samplers."""
    cfg.DATALOADER.SAMPLER_TRAIN = "Shuffler"
    with pytest.raises(UserError) as caught:
        build_stream_loader(cfg, 0)
    assert str(caught.value) == (
        "DATALOADER.SAMPLER_TRAIN is 'Shuffler'; it must be 'TrainingSampler', 'RepeatFactorTrainingSampler', "
        "'RandomSubsetTrainingSampler', 'WeightedTrainingSampler' or 'WeightedCategoryTrainingSampler'."
    )


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("broken", 0), ("cut", 0), ("gone", 0), ("other size", 0), pytest.param("broken", 1, marks=pytest.mark.slow)],
)
def test_an_image_that_cannot_be_used(cfg: CfgNode, kind: str, workers: int) -> None:
    """Check that an unusable image is reported in one line with its name, also from a worker process."""
    cfg.DATALOADER.NUM_WORKERS = workers
    entry = DatasetCatalog.get("stream")[0]
    path = Path(entry["file_name"])
    if kind == "broken":
        path.write_text("no image")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "gone":
        path.unlink()
    else:
        path.write_bytes(path.with_name("001.png").read_bytes())
    with pytest.raises(DataError) as caught:
        read(cfg, 10)
    assert isinstance(caught.value, UserError)
    said = str(caught.value)
    assert said.startswith(f"The image {path} cannot be used: ")
    assert "\n" not in said
    if kind == "other size":
        assert isinstance(caught.value.__cause__, SizeMismatchError) or workers
        assert "got (64, 96), expect (96, 64)" in said


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_of_a_test_set_that_cannot_be_used(cfg: CfgNode, workers: int) -> None:
    """Check the same message in evaluation, where images must not be replaced."""
    path = Path(DatasetCatalog.get("stream")[3]["file_name"])
    path.write_text("no image")
    with pytest.raises(
        DataError, match=f"^The image {re.escape(str(path))} cannot be used: its format is none of JPEG, PNG, "
    ):
        list(build_test_loader(cfg, "stream", num_workers=workers))


@pytest.fixture
def forkserver() -> Iterator[None]:
    """Make the start method of Python 3.14 the default."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize("folder", ["", "x" * 80])
def test_workers_need_a_short_temporary_folder(tmp_path: Path, folder: str) -> None:
    """Check, in a new process, a folder for temporary files whose path is too long for the name of a socket."""
    script = (
        "import torch\n"
        "from torch.utils.data import DataLoader\n"
        "from kd_d2.data.workers import configure_workers\n"
        "from kd_d2.errors import exit_on_user_error\n"
        "with exit_on_user_error():\n"
        "    print(len(list(configure_workers(DataLoader(torch.zeros(4, 3), num_workers=1)))))\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        os.makedirs(place := os.path.join(short, folder), exist_ok=True)
        done = _run_script(script, TMPDIR=place)
    if folder and done.returncode:  # later versions of Python use another folder themselves
        assert done.stderr.startswith("error: DATALOADER.NUM_WORKERS: data loading processes need sockets in the temp")
        assert done.stderr.endswith("set TMPDIR to another folder with a shorter path, such as /tmp.\n")
    else:
        assert done.stdout == "4\n"


def test_workers_need_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a machine whose /dev/shm cannot be written to."""

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(multiprocessing.get_context("fork"), "Lock", refuse)
    with pytest.raises(UserError, match=r"need semaphores in /dev/shm \(Permission denied\); make it writable, or set"):
        configure_workers(DataLoader([0], num_workers=1))
    configure_workers(DataLoader([0], num_workers=0))


def _raise_the_limit(rank: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 512))
    for workers, expected in ((0, (128, 512)), (1, (512, 512))):
        configure_workers(DataLoader([0], num_workers=workers))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == expected


def test_the_limit_on_open_files_is_raised() -> None:
    """Check a new process, since a limit that is lowered stays low."""
    torch.multiprocessing.start_processes(_raise_the_limit, nprocs=1, start_method="fork")


def _run_script(script: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=100)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_cannot_be_sent_ends_its_worker(capfd: pytest.CaptureFixture) -> None:
    """Check that the parent process does not wait for the batch forever."""
    loader = configure_workers(DataLoader([0], num_workers=1, collate_fn=lambda _: threading.Lock()))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)
    assert "cannot pickle '_thread.lock' object" in capfd.readouterr().err


def test_workers_are_children_of_this_process(cfg: CfgNode) -> None:
    """Check that both loaders fork their workers where forks are not the default."""
    cfg.DATALOADER.NUM_WORKERS = 1
    for loader in (
        build_stream_loader(cfg, 0, mapper=lambda entry: os.getppid()),
        build_test_loader(cfg, "stream", lambda entry: os.getppid()),
    ):
        assert next(iter(loader))[0] == os.getpid()


def test_a_mapper_of_ones_own(cfg: CfgNode) -> None:
    """Check that a custom mapper replaces Detectron2's."""
    loader = build_stream_loader(cfg, 0, mapper=lambda entry: Path(entry["file_name"]).name)
    assert {len(name) for batch in itertools.islice(loader, 3) for name in batch} == {len("000.png")}
