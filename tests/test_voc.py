"""Pascal VOC's own format, with Detectron2's reader and evaluator."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from kd_d2.distillers.icd.priors import read_priors
from kd_d2.evaluation import build_evaluator

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, register_pascal_voc
from detectron2.structures import Boxes, Instances
from helpers import NARROW, TINY, merged, run_train_net, tree_of, write_yaml

SIZE = (64, 96)
ANNOTATION = """<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"""
OBJECT = (
    "<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def voc(tmp_path: Path) -> Iterator[str]:
    """Create and register ten images with two objects each; every class occurs once."""
    folder = tmp_path / "VOC2007"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    random = np.random.RandomState(0)
    for image in range(10):
        objects = []
        for name in CLASS_NAMES[2 * image : 2 * image + 2]:
            x, y = random.randint(1, 40), random.randint(1, 20)
            objects.append(OBJECT.format(x, y, x + random.randint(16, 50), y + random.randint(16, 40), name=name))
        text = ANNOTATION.format(height=SIZE[0], width=SIZE[1], objects="".join(objects))
        (folder / "Annotations" / f"{image:06d}.xml").write_text(text)
        pixels = random.randint(0, 255, (*SIZE, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / "JPEGImages" / f"{image:06d}.jpg"), pixels)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{i:06d}\n" for i in range(10)))
    name = f"voc_2007_tiny_{zlib.crc32(str(tmp_path).encode()):08x}"
    register_pascal_voc(name, str(folder), "test", 2007)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(("moved", "expected"), [(0, 100.0), (4, 60.0)])
def test_mean_average_precision_at_half_overlap(voc: str, moved: int, expected: float) -> None:
    """Check a perfect detector that misses both objects, and thus both classes, of the first `moved` images."""
    evaluator = build_evaluator(get_cfg(), voc)
    evaluator.reset()
    for index, entry in enumerate(DatasetCatalog.get(voc)):
        boxes = torch.tensor([a["bbox"] for a in entry["annotations"]])
        found = Instances(SIZE, pred_boxes=Boxes(boxes + (1000 if index < moved else 0)))
        found.scores = torch.full((2,), 0.9)
        found.pred_classes = torch.tensor([a["category_id"] for a in entry["annotations"]])
        evaluator.process([entry], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(expected)


def test_training_and_evaluation_on_voc_folders(voc: str, tmp_path: Path) -> None:
    """Check train_net.py on a dataset without a JSON file, a resumable file after an evaluation, and ICD's statistics."""
    config = merged(
        {"_BASE_": str(TINY / "retinanet-student.yaml")},
        NARROW,
        tree_of(
            MODEL__RETINANET__NUM_CLASSES=20,
            DATASETS__TRAIN=(voc,),
            DATASETS__TEST=(voc,),
            SOLVER__MAX_ITER=2,
            SOLVER__STEPS=(),
            TEST__EVAL_PERIOD=1,
            OUTPUT_DIR=str(tmp_path / "output"),
        ),
    )
    results = run_train_net("--config-file", write_yaml(tmp_path / "voc.yaml", config))
    assert set(results["bbox"]) == {"AP", "AP50", "AP75"}
    torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    frequencies, _, _ = read_priors((voc,), 20)
    torch.testing.assert_close(frequencies / frequencies.sum(), torch.full((20,), 0.05, dtype=frequencies.dtype))
