"""Keypoint R-CNNs on a registered dataset with another number of keypoints than COCO's 17."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kd_d2.checkpoint import read_checkpoint

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import CLASSES, Project, make_project

POINTS = ("left", "middle", "right")


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
