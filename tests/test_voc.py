"""Pascal VOC's own format, with Detectron2's reader and evaluator."""

from __future__ import annotations

import contextlib
import logging
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

from kd_d2.distillers.icd.priors import read_priors
from kd_d2.evaluation import build_evaluator, metrics_of

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from helpers import NARROW, TINY, clean_process, merged, run_train_net, tree_of, write_yaml

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
    results = evaluator.evaluate()
    assert results["bbox"]["AP50"] == pytest.approx(expected)
    assert {task: [*metrics] for task, metrics in results.items()} == metrics_of(voc)


PLAIN = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>{}</object>"
)
DIFFICULT = "<difficult>1</difficult>"


@contextlib.contextmanager
def registered(folder: Path, images: list[str], classes: tuple[str, ...], year: int) -> Iterator[str]:
    """Register images 0, 1, ... with these objects in XML."""
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for number, objects in enumerate(images):
        text = ANNOTATION.format(height=SIZE[0], width=SIZE[1], objects=objects)
        (folder / "Annotations" / f"{number}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("".join(f"{i}\n" for i in range(len(images))) + "\n")
    with clean_process():
        register_pascal_voc("small", str(folder), "test", year, classes)
        MetadataCatalog.get("small").evaluator_type = "pascal_voc"
        yield "small"


def evaluated(evaluator: PascalVOCDetectionEvaluator, detections: dict[str, list[tuple]]) -> dict[str, float]:
    """Return results of detections (class, score, xmin, ymin, xmax, ymax in pixels from 1) by image."""
    evaluator.reset()
    for image, found in detections.items():
        boxes = torch.tensor([box for _, _, *box in found]).float() - torch.tensor([1, 1, 0, 0])
        instances = Instances(SIZE, pred_boxes=Boxes(boxes), scores=torch.tensor([score for _, score, *_ in found]))
        instances.pred_classes = torch.tensor([number for number, *_ in found])
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize(("year", "expected"), [(2007, 100 * 6 / 11 / 2), (2012, 25)])
def test_classes_without_objects_that_count(tmp_path: Path, caplog, year: int, expected: float) -> None:
    """Check a class of which one of two objects is found, one not found, one of difficult objects, and one without any."""
    images = [
        PLAIN.format("car/truck", 1.5, 1.5, 20.5, 30.5, "") + PLAIN.format("cow", 40, 10, 60, 60, DIFFICULT),
        PLAIN.format("car/truck", 1, 1, 30, 30, "") + PLAIN.format("boat", 1, 1, 9, 9, "<difficult/>"),
    ]
    found = {"0": [(0, 0.9, 1.5, 1.5, 20.5, 30.5), (2, 0.9, 40, 10, 60, 60), (3, 0.9, 1, 1, 9, 9)]}
    found["1"] = [(0, 0.8, 50, 30, 90, 60)]
    caplog.set_level(logging.INFO, "kd_d2")
    with registered(tmp_path, images, ("car/truck", "boat", "cow", "sheep"), year) as name:
        results = evaluated(build_evaluator(get_cfg(), name), found)
    assert results == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), expected))
    assert caplog.messages[-1].endswith("small has no objects of them that are not difficult: cow, sheep")


@pytest.mark.parametrize(("difficult", "expected"), [("1", 100), (" True ", 100), ("0", 50), ("Unspecified", 50)])
def test_ways_to_write_difficult(tmp_path: Path, difficult: str, expected: float) -> None:
    """Check two objects, of which the one that may be difficult is missed."""
    images = [
        PLAIN.format("cow", 1, 1, 20, 20, "")
        + PLAIN.format("cow", 40, 10, 60, 60, f"<difficult>{difficult}</difficult>")
    ]
    with registered(tmp_path, images, ("cow",), 2012) as name:
        results = evaluated(build_evaluator(get_cfg(), name), {"0": [(0, 0.9, 1, 1, 20, 20)]})
    assert results["AP50"] == pytest.approx(expected)


def test_a_test_set_without_objects_that_count_has_no_ap(tmp_path: Path) -> None:
    with registered(tmp_path, [PLAIN.format("cow", 40, 10, 60, 60, DIFFICULT)], ("cow", "sheep"), 2012) as name:
        results = evaluated(build_evaluator(get_cfg(), name), {"0": [(0, 0.9, 40, 10, 60, 60)]})
    assert results == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), math.nan), nan_ok=True)


@pytest.mark.parametrize("year", [2007, 2012])
def test_results_are_those_of_detectron2_if_every_class_has_objects(tmp_path: Path, year: int) -> None:
    """Check 40 images with difficult objects, and with detections that are double, shifted or of nothing."""
    random, images, found = np.random.RandomState(0), [], {}
    scores = iter(random.permutation(1000) / 1000)  # Detectron2 does not define the order of equal scores
    for image in range(40):
        text, found[str(image)] = "", []
        for _ in range(random.randint(1, 6)):
            number, (x, y), (w, h) = random.randint(3), random.randint(1, 30, 2), random.randint(5, 30, 2)
            box = np.array([x, y, x + w, y + h])
            text += OBJECT.format(*box, name=CLASS_NAMES[number]).replace(
                "<difficult>0", f"<difficult>{int(random.rand() < 0.3)}"
            )
            for shift in random.normal(0, 2, (random.randint(1, 4), 4)):
                found[str(image)].append((number, float(next(scores)), *(box + shift).tolist()))
        images.append(text)
    with registered(tmp_path, images, CLASS_NAMES[:3], year) as name:
        ours = evaluated(build_evaluator(get_cfg(), name), found)
        test_set = tmp_path / "ImageSets" / "Main" / "test.txt"
        test_set.write_text(test_set.read_text().rstrip("\n") + "\n")
        theirs = evaluated(PascalVOCDetectionEvaluator(name), found)
    assert ours == pytest.approx(theirs, abs=1e-9) and 10 < ours["AP"] < ours["AP50"] < 90


def test_detections_with_equal_scores_keep_their_order(tmp_path: Path) -> None:
    """Check two scores that alternate: of the 50 detections with the higher one, the first 25 are right."""
    box, elsewhere = (1, 1, 20, 20), (40, 10, 60, 60)
    images = [PLAIN.format("cow", *box, "")] * 25 + [""] * 25
    found = {str(image): [(0, 0.9, *box), (0, 0.8, *elsewhere)] for image in range(50)}
    with registered(tmp_path, images, ("cow",), 2012) as name:
        results = evaluated(build_evaluator(get_cfg(), name), found)
    assert results == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), 100))


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
