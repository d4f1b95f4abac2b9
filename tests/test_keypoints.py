"""Keypoint R-CNNs on a registered dataset with another number of keypoints than COCO's 17."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_d2.analysis import load_models
from kd_d2.analysis.features import FeatureAnalysis
from kd_d2.checkpoint import read_checkpoint
from kd_d2.memory_format import to_channels_last

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from helpers import CLASSES, WIDE, Project, make_project, save_fixed_weights, train
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
