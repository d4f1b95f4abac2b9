"""Keypoint R-CNNs on datasets with another number of keypoints than COCO's 17, registered and in DATASETS.COCO_JSON."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_d2.analysis import load_models
from kd_d2.analysis.features import FeatureAnalysis
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config import add_kd_config
from kd_d2.data import build_stream_loader, register_coco_json
from kd_d2.data.coco.keypoints import mirrored_keypoints
from kd_d2.data_check.check import check_sets
from kd_d2.data_check.sets import DataSet
from kd_d2.engine.checks import check_datasets
from kd_d2.errors import UserError
from kd_d2.memory_format import to_channels_last

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from helpers import CLASSES, WIDE, Project, clean_process, make_coco, make_project, save_fixed_weights, train
from torch import nn

POINTS = ("left", "middle", "right")
NARROW_HEAD = (32, 32)
"""In place of eight convolutions to 512 channels."""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Return the project of a Faster R-CNN with three keypoints in every box."""
    project = make_project(tmp_path, "faster-rcnn", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    tree = json.loads(project.annotations.read_text())
    for annotation in tree["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["keypoints"] = [v for part in (0.25, 0.5, 0.75) for v in (x + part * w, y + 0.5 * h, 2)]
        annotation["num_keypoints"] = 3
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(tree))
    name = f"{project.name}_keypoints"
    register_coco_instances(name, {}, str(path), str(project.annotations.parent / "images"))
    MetadataCatalog.get(name).set(keypoint_names=POINTS, keypoint_flip_map=(("left", "right"),))
    MetadataCatalog.get(name).thing_classes = list(CLASSES)
    project.change(
        DATASETS__TRAIN=(name,),
        DATASETS__TEST=(name,),
        MODEL__KEYPOINT_ON=True,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0,
        MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=3,
        MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS=NARROW_HEAD,
        TEST__KEYPOINT_OKS_SIGMAS=[0.1, 0.1, 0.1],
    )
    yield project
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_training_resuming_and_evaluation(project: Project) -> None:
    results = project.main()
    assert "AP" in results["keypoints"]
    project.main("--resume", "SOLVER.MAX_ITER", 3)
    content = read_checkpoint(str(project.output / "model_final.pth"))
    assert content["iteration"] == 2
    assert any("keypoint_head" in name for name in content["model"])
    models = load_models([project.output])
    assert models[0].detections(str(project.output / "analysis"))
    features = FeatureAnalysis.run(models, str(project.output / "features"), images=1, pictures=0, channels=0)
    assert features.images == 1


def test_channels_last(project: Project) -> None:
    """Check that training, evaluation and the teacher's keypoints are those of the contiguous format."""
    head = {"MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 3, "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": NARROW_HEAD}
    project.change_teacher(MODEL__KEYPOINT_ON=True, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0, **head, **WIDE)
    save_fixed_weights(project.teacher, project.teacher_weights, seed=1)
    project.change(SEED=1, SOLVER__MAX_ITER=1, SOLVER__EMA_DECAY=0.9, **WIDE)
    runs = [
        train(project, "SOLVER.CHANNELS_LAST", choice, "MODEL.KD.TEACHER.CHANNELS_LAST", choice)
        for choice in (False, True)
    ]
    expected, ours = (run.losses[0] for run in runs)
    assert ours["loss_keypoint"] > 0
    assert ours == pytest.approx(expected, rel=2e-3, abs=1e-5)
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    for name in ("student", "teacher"):
        found = []
        for run in runs:
            model = run.trainer.bare_model
            detector = (model.student if name == "student" else model.teacher.model).eval()
            with torch.no_grad():
                found.append(detector([{"image": image}])[0]["instances"])
        assert len(found[0])
        torch.testing.assert_close(found[1].pred_keypoints, found[0].pred_keypoints, rtol=1e-2, atol=1e-2)


class FlatHeatmaps(BaseKeypointRCNNHead):
    """A keypoint head of one's own, of one convolution."""

    def __init__(self) -> None:
        super().__init__(num_keypoints=3)
        self.heatmaps = nn.Conv2d(16, 3, 3, padding=1)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        return self.heatmaps(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_heads_of_ones_own_have_contiguous_heatmaps(copied: Callable) -> None:
    """Check features in both formats, and that a copy of the head has its own weights."""
    head = FlatHeatmaps()
    features = torch.rand(2, 16, 8, 8)
    expected = head.layers(features)
    to_channels_last(head)
    copy_of_head = copied(head)
    weight, own = next(head.parameters()), next(copy_of_head.parameters())
    nn.init.zeros_(weight)
    for maps in (features, features.to(memory_format=torch.channels_last)):
        heatmaps = copy_of_head.layers(maps)
        assert heatmaps.is_contiguous()
        torch.testing.assert_close(heatmaps, expected)
    assert own.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (
            ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17),
            "The dataset NAME has 3 keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 17.",
        ),
        (
            ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2),
            "The dataset NAME has 3 keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 2.",
        ),
        (
            ("TEST.KEYPOINT_OKS_SIGMAS", []),
            "TEST.KEYPOINT_OKS_SIGMAS has 0 values, but the dataset NAME needs 3, one for each keypoint; leave it empty for COCO's 17.",
        ),
    ],
)
def test_numbers_that_do_not_fit(project: Project, capfd: pytest.CaptureFixture, opts: tuple, expected: str) -> None:
    with pytest.raises(SystemExit):
        project.main(*opts)
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {expected}".replace("NAME", f"{project.name}_keypoints")


class KeypointFile:
    """A file with the keypoints POINTS in every box, of which the first annotation has none."""

    def __init__(self, folder: Path):
        self.path = make_coco(folder, 2)
        self.images = folder / "images"
        self.change(self._add_keypoints)

    def _add_keypoints(self, tree: dict) -> None:
        for category in tree["categories"]:
            category["keypoints"] = list(POINTS)
        for annotation in tree["annotations"][1:]:
            x, y = annotation["bbox"][:2]
            annotation["keypoints"] = [x, y, 2, x + 4, y + 4, 1, 0, 0, 0]

    def change(self, code: Callable[[dict], object]) -> None:
        tree = json.loads(self.path.read_text())
        code(tree)
        self.path.write_text(json.dumps(tree))

    def config(self, name: str = "mine") -> CfgNode:
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.DATASETS.COCO_JSON = [[name, str(self.path), str(self.images)]]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        cfg.MODEL.KEYPOINT_ON = True
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 3
        cfg.SOLVER.IMS_PER_BATCH = 1
        cfg.DATALOADER.NUM_WORKERS = 0
        return cfg

    def refused(self, code: Callable[[dict], object]) -> str:
        """Return why the file is refused after this change."""
        self.change(code)
        cfg = self.config()
        with clean_process(), pytest.raises(UserError) as caught:
            register_coco_json(cfg)
            check_datasets(cfg, train=True)
        return str(caught.value).removeprefix(f"{self.path}: ")


@pytest.fixture
def file(tmp_path: Path) -> KeypointFile:
    return KeypointFile(tmp_path)


def test_keypoints_in_coco_json(file: KeypointFile, caplog: pytest.LogCaptureFixture) -> None:
    """Check what Detectron2 reads: half a pixel is added to coordinates, and flips swap the first and the last keypoint."""
    cfg = file.config()
    x, y = json.loads(file.path.read_text())["annotations"][1]["bbox"][:2]
    with clean_process(), caplog.at_level(logging.INFO):
        register_coco_json(cfg)
        check_datasets(cfg, train=True)
        annotations = [a for image in DatasetCatalog.get("mine") for a in image["annotations"]]
        assert create_keypoint_hflip_indices(["mine"]) == [2, 1, 0]
        batch = next(iter(build_stream_loader(cfg, seed=0)))
    assert annotations[0]["keypoints"] == [0.5, 0.5, 0] * 3
    assert annotations[1]["keypoints"] == [x + 0.5, y + 0.5, 2, x + 4.5, y + 4.5, 1, 0.5, 0.5, 0]
    assert batch[0]["instances"].gt_keypoints.tensor.shape[1:] == (3, 3)
    assert "mine: horizontal flips swap the keypoints left and right" in caplog.messages
    assert (
        f"{file.path}: annotations without keypoints read as having none that is labeled (1; the first: with id 1)."
        in caplog.messages
    )


@pytest.mark.parametrize(
    ("names", "pairs", "alone"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")], []),
        (["Hip right", "Hip Left", "Tail"], [("Hip right", "Hip Left")], []),
        (["top", "bottom"], [], []),
        (["left_eye", "right_ear"], [], ["left_eye", "right_ear"]),
    ],
)
def test_keypoints_that_a_flip_swaps(names: list[str], pairs: list, alone: list[str]) -> None:
    assert mirrored_keypoints(names) == (pairs, alone)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            lambda tree: tree["annotations"][1].update(keypoints=[1, 2, 2]),
            "the annotation with id 2 has the keypoints [1, 2, 2]; they must be 9 numbers: x, y and visibility (0, 1 or 2) of each of 3.",
        ),
        (
            lambda tree: tree["annotations"][1].update(keypoints=[1, 2, 3] * 3),
            "the annotation with id 2 has the keypoints [1, 2, 3, 1, 2, 3, 1, 2, 3]; they must be 9 numbers: x, y and visibility (0, 1 or 2) of "
            "each of 3.",
        ),
        (
            lambda tree: tree["categories"][1].update(keypoints=["a", "b"]),
            f"the keypoints of the category {CLASSES[1]!r} are a, b, but those of {CLASSES[0]!r} are left, middle, right; a detector predicts the "
            "same keypoints for all classes.",
        ),
        (
            lambda tree: [c.update(keypoints=["left", "left", "right"]) for c in tree["categories"]],
            f"the keypoints of the category {CLASSES[0]!r} have a name twice: left, left, right.",
        ),
        (
            lambda tree: [c.update(keypoints=["nose", "left eye", "tail"]) for c in tree["categories"]],
            "the keypoint 'left eye' has no counterpart of the other side, so that it is unclear what a horizontal flip swaps; rename it, or set "
            "INPUT.RANDOM_FLIP 'none'.",
        ),
        (
            lambda tree: [c.update(keypoints=["left", "right"]) for c in tree["categories"]],
            "the annotation with id 2 has the keypoints KEYPOINTS; they must be 6 numbers: x, y and visibility (0, 1 or 2) of each of 2.",
        ),
    ],
)
def test_keypoints_that_are_refused(file: KeypointFile, code: Callable, expected: str) -> None:
    keypoints = json.loads(file.path.read_text())["annotations"][1]["keypoints"]
    expected = expected.replace("KEYPOINTS", str(keypoints))
    findings = [f.text for f in errors_of_data_check(file, code)]
    assert file.refused(code) == expected
    assert "counterpart" in expected or findings == [f"{file.path}: {expected}"]


def errors_of_data_check(file: KeypointFile, code: Callable) -> list:
    """Return the errors of `kd-d2 data check` after a change."""
    file.change(code)
    return [
        f
        for f in check_sets([DataSet("train", "mine", str(file.path), str(file.images), keypoints=3)]).findings
        if f.is_error
    ]


def test_keypoints_without_sides(file: KeypointFile, caplog: pytest.LogCaptureFixture) -> None:
    """Check the warning that flips swap nothing, which is left out where no image is flipped."""
    file.change(lambda tree: [c.update(keypoints=["a", "b", "c"]) for c in tree["categories"]])
    cfg = file.config()
    for flip, warnings in (("horizontal", 1), ("none", 0)):
        caplog.clear()
        cfg.INPUT.RANDOM_FLIP = flip
        with clean_process():
            register_coco_json(cfg)
            assert create_keypoint_hflip_indices(["mine"]) == [0, 1, 2]
        assert sum("swap no keypoints" in message for message in caplog.messages) == warnings


def test_test_sets_with_another_order_of_keypoints(file: KeypointFile, tmp_path: Path) -> None:
    other = KeypointFile(tmp_path / "other")
    other.change(lambda tree: [c.update(keypoints=["left", "right", "middle"]) for c in tree["categories"]])
    cfg = file.config()
    cfg.DATASETS.COCO_JSON += [["other", str(other.path), str(other.images)]]
    cfg.DATASETS.TEST = ("other",)
    with clean_process(), pytest.raises(UserError) as caught:
        register_coco_json(cfg)
        check_datasets(cfg, train=True)
    assert str(caught.value) == (
        "The dataset other has the keypoints left, right, middle, but mine has left, middle, right: give both the same names in the same order."
    )


def test_registered_datasets_without_flips_or_keypoints(file: KeypointFile) -> None:
    """Check the metadata, and that each object has its keypoints, in training and test sets."""
    with clean_process():
        register_coco_instances("mine", {"keypoint_names": POINTS}, str(file.path), str(file.images))
        cfg = file.config()
        cfg.DATASETS.COCO_JSON, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = [], 0
        with pytest.raises(
            UserError, match=r"DATASETS.TRAIN names 'mine', whose metadata have no keypoint_flip_map: set it"
        ):
            check_datasets(cfg, train=True)
        MetadataCatalog.get("mine").keypoint_flip_map = (("left", "right"),)
        with pytest.raises(
            UserError, match="The dataset mine: annotation 1 has the keypoints None; they must be 9 numbers"
        ):
            check_datasets(cfg, train=True)
        with pytest.raises(
            UserError, match=r"DATASETS.TRAIN mine: an object of .*000.png has the keypoints None; they must"
        ):
            build_stream_loader(cfg, seed=0)
