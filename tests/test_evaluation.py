"""Evaluation: equal results of faster-coco-eval and pycocotools, and of one process and several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_d2.errors import as_user_error
from kd_d2.evaluation import build_evaluator, metrics_of
from kd_d2.evaluation.coco import complete
from kd_d2.evaluation.coco_evaluator import CocoEvaluator, faster_evaluation
from kd_d2.evaluation.lvis_evaluator import LvisEvaluator
from kd_d2.text import file_stem

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from helpers import ROOT, clean_process, make_coco, make_project
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytestmark = pytest.mark.unit

FAKE_DETECTIONS = Path(__file__).resolve().parent / "fixtures" / "coco"


def _evaluations(truth: COCO, detections: COCO) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return summary, precision and recall of pycocotools and of faster-coco-eval; both print their summaries."""
    evaluations = []
    for evaluation in (COCOeval(truth, detections, "bbox"), faster_evaluation(truth, detections, "bbox")):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        evaluations.append((evaluation.stats[:12], evaluation.eval["precision"], evaluation.eval["recall"]))
    return evaluations


@pytest.fixture
def summary_lines(capsys: pytest.CaptureFixture) -> Callable[[], tuple[list[str], list[str]]]:
    """Return a function for the lines printed by pycocotools and by faster-coco-eval, which adds two."""

    def read() -> tuple[list[str], list[str]]:
        lines = [line for line in capsys.readouterr().out.splitlines() if "Average" in line]
        return lines[:12], lines[12:]

    return read


def test_faster_coco_eval_on_real_annotations(summary_lines: Callable) -> None:
    """Check the 12 recorded numbers of pycocotools, and every line printed by both."""
    truth = COCO(str(FAKE_DETECTIONS / "fakebbox45_gt.json"))
    detections = truth.loadRes(str(FAKE_DETECTIONS / "fakebbox45_dt.json"))
    (official, *_), (faster, *_) = _evaluations(truth, detections)
    recorded = json.loads((FAKE_DETECTIONS / "fakebbox45_expected.json").read_text())["stats"]
    np.testing.assert_allclose(official, recorded, rtol=0, atol=1e-12)
    np.testing.assert_allclose(faster, recorded, rtol=0, atol=1e-12)
    official_lines, faster_lines = summary_lines()
    assert len(official_lines) == 12 and faster_lines[:12] == official_lines


def test_faster_coco_eval_on_random_boxes(tmp_path: Path, summary_lines: Callable) -> None:
    """Check precision and recall at every threshold on 40 images with crowds, ties, small and large boxes."""
    random = np.random.RandomState(0)
    tree = json.loads(make_coco(tmp_path, 40).read_text())
    sizes = np.exp(random.uniform(np.log(8), np.log(200), (400, 2)))
    tree["annotations"] = [
        {"id": i + 1, "image_id": int(random.randint(1, 41)), "category_id": int(random.randint(1, 4))}
        | {"bbox": [*random.uniform(0, 300, 2), *size], "area": float(size.prod()), "iscrowd": int(i % 17 == 0)}
        for i, size in enumerate(sizes)
    ]
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"] if random.rand() < 0.8 else 1}
        | {"bbox": list(np.array(a["bbox"]) + random.normal(0, 6, 4)), "score": round(float(random.rand()), 1)}
        for a in tree["annotations"] * 3
    ]
    path = tmp_path / "crowds.json"
    path.write_text(json.dumps(tree))
    truth = COCO(str(path))
    detections = truth.loadRes(found)
    (stats, precision, recall), (other_stats, other_precision, other_recall) = _evaluations(truth, detections)
    assert 0.05 < stats[0] < 0.95
    np.testing.assert_allclose(other_stats, stats, rtol=0, atol=1e-12)
    np.testing.assert_allclose(other_precision, precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(other_recall, recall, rtol=0, atol=1e-12)
    official_lines, faster_lines = summary_lines()
    assert faster_lines[:12] == official_lines


def test_evaluator_counts_with_faster_coco_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the evaluator's AP by class, without area and iscrowd, with and without faster-coco-eval."""
    path = make_coco(tmp_path)
    tree = json.loads(path.read_text())
    for annotation in tree["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    for entry in tree["categories"] + tree["annotations"]:  # ids do not start at 1; COCO's have gaps, too
        key = "id" if "name" in entry else "category_id"
        entry[key] += 10
    path.write_text(json.dumps(tree))
    results = []
    with clean_process():
        register_coco_instances("tiny_evaluated", {}, str(path), str(tmp_path / "images"))
        images = DatasetCatalog.get("tiny_evaluated")
        MetadataCatalog.get("tiny_evaluated")
        for fast in (True, False):
            if not fast:
                monkeypatch.setattr("kd_d2.evaluation.coco_evaluator.COCOeval_faster", None)
            evaluator = CocoEvaluator("tiny_evaluated", str(tmp_path / f"out{fast}"))
            evaluator.reset()
            for image in images:
                boxes = torch.tensor([a["bbox"] for a in image["annotations"]]).float().view(-1, 4)
                boxes[:, 2:] += boxes[:, :2]
                classes = torch.tensor([a["category_id"] for a in image["annotations"]], dtype=torch.int64)
                found = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes), pred_classes=classes)
                found.scores = torch.where(classes == 0, 0.9, 0.8)
                found.pred_classes[classes == 2] = 1  # every blue object is classified as green
                evaluator.process([image], [{"instances": found}])
            results.append(evaluator.evaluate()["bbox"])
    saved = [
        json.loads((tmp_path / f"out{fast}" / "coco_instances_results.json").read_text()) for fast in (True, False)
    ]
    assert saved[0] == saved[1] and {entry["category_id"] for entry in saved[0]} == {11, 12}
    assert results[0] == pytest.approx(results[1], nan_ok=True)
    assert results[0]["AP-red"] == pytest.approx(100) and results[0]["AP-blue"] == 0
    assert 0 < results[0]["AP-green"] < 100


@pytest.mark.parametrize("image_id", [lambda n: f"val-{n}", lambda n: 2**60 + n, lambda n: n])
def test_image_ids_that_are_no_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_id: Callable) -> None:
    """Check ids as text and above 2^53, of all images and of the first four, with and without faster-coco-eval."""
    path, results, saved = make_coco(tmp_path), [], []
    tree = json.loads(path.read_text())
    for entry in tree["images"] + tree["annotations"]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = image_id(entry[key])
    path.write_text(json.dumps(tree))
    with clean_process():
        register_coco_instances("named", {}, str(path), str(tmp_path / "images"))
        images = DatasetCatalog.get("named")
        ids = [image["image_id"] for image in images]
        for fast, chosen in ((True, None), (True, ids[:4]), (False, None), (False, ids[:4])):
            if not fast:
                monkeypatch.setattr("kd_d2.evaluation.coco_evaluator.COCOeval_faster", None)
            evaluator = CocoEvaluator("named", str(tmp_path / "out"))
            evaluator.reset()
            for image, other in zip(images, images[1:] + images[:1], strict=True):
                objects = [*image["annotations"][:1], *other["annotations"]]  # also sees what is in the next image
                x, y, w, h = torch.tensor([a["bbox"] for a in objects]).float().view(-1, 4).T
                found = Instances((image["height"], image["width"]), scores=torch.full((len(objects),), 0.5))
                found.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1))
                found.pred_classes = torch.tensor([a["category_id"] for a in objects])
                evaluator.process([image], [{"instances": found}])
            results.append(evaluator.evaluate(img_ids=chosen)["bbox"])
            saved.append(json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()))
    assert saved[0] == saved[2] and {entry["image_id"] for entry in saved[0]} == set(ids)
    assert 0 < results[0]["AP"] < 100 and results[0]["AP"] != results[1]["AP"]
    assert results[:2] == [pytest.approx(result, nan_ok=True) for result in results[2:]]


def test_class_names_are_sorted_by_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check category ids 13, 11, 12 of a dataset in the order of another one: Detectron2 names the results by sorted ids."""
    path, named = make_coco(tmp_path), []
    monkeypatch.setattr(COCOEvaluator, "_derive_coco_results", lambda *args: named.append(args[-1]) or {})
    with clean_process():
        register_coco_instances("ordered", {}, str(path), str(tmp_path / "images"))
        DatasetCatalog.get("ordered")
        evaluator = CocoEvaluator("ordered", str(tmp_path / "out"))
    evaluator._metadata = Metadata(thing_dataset_id_to_contiguous_id={13: 0, 11: 1, 12: 2})
    evaluator._derive_coco_results(object(), "bbox", ["blue", "red", "green"])
    assert named == [["red", "green", "blue"]]


def test_a_model_without_detections_has_an_ap_of_zero(tmp_path: Path) -> None:
    """Check zero for the sizes that have objects, and NaN for the others and for a dataset without objects."""
    path = make_coco(tmp_path)
    tree = json.loads(path.read_text())
    for area, annotation in zip((32**2, 2000), tree["annotations"], strict=False):
        annotation["area"] = area
    tree["annotations"] = [*tree["annotations"][:2], {**tree["annotations"][2], "area": 10000, "iscrowd": 1}]
    (tmp_path / "some.json").write_text(json.dumps(tree))
    (tmp_path / "none.json").write_text(json.dumps({**tree, "annotations": []}))
    with clean_process():
        for name, expected in (("some", [0, 0, 0, 0, 0, np.nan]), ("none", [np.nan] * 6)):
            register_coco_instances(name, {}, str(tmp_path / f"{name}.json"), str(tmp_path / "images"))
            images = DatasetCatalog.get(name)
            evaluator = CocoEvaluator(name, str(tmp_path / "out"))
            evaluator.reset()
            empty = Instances((10, 10), pred_boxes=Boxes(torch.zeros(0, 4)), pred_classes=torch.zeros(0))
            empty.scores = torch.zeros(0)
            evaluator.process(images, [{"instances": empty}] * len(images))
            np.testing.assert_equal([*evaluator.evaluate()["bbox"].values()][:6], expected)


@pytest.mark.parametrize("classes", [("red", "green", "blue"), ("one",)])
def test_metrics_are_those_of_an_evaluation(tmp_path: Path, classes: tuple[str, ...]) -> None:
    """Check boxes, masks, keypoints and proposals; a single class has no metric of its own."""
    path = make_coco(tmp_path, classes=classes)
    tree = json.loads(path.read_text())
    for annotation in tree["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation.update(segmentation=[[x, y, x + w, y, x + w, y + h]], num_keypoints=1, keypoints=[x, y, 2] * 17)
    path.write_text(json.dumps(tree))
    with clean_process():
        register_coco_instances("all_tasks", {}, str(path), str(tmp_path / "images"))
        MetadataCatalog.get("all_tasks").evaluator_type = "coco"
        evaluator = build_evaluator(get_cfg(), "all_tasks", str(tmp_path / "out"))
        evaluator.reset()
        for entry in DatasetCatalog.get("all_tasks"):
            size = entry["height"], entry["width"]
            found = Instances(size, scores=torch.ones(1), pred_classes=torch.tensor([0]))
            found.pred_boxes, found.pred_keypoints = Boxes(torch.tensor([[0.0, 0, 9, 9]])), torch.zeros(1, 17, 3)
            found.pred_masks = torch.ones(1, *size, dtype=torch.bool)
            proposals = Instances(size, proposal_boxes=found.pred_boxes, objectness_logits=found.scores)
            evaluator.process([entry], [{"instances": found, "proposals": proposals}])
        results = evaluator.evaluate()
        assert {task: [*metrics] for task, metrics in results.items()} == metrics_of("all_tasks")


def _detected(boxes: list, classes: list[int], score: float = 0.9) -> dict[str, Instances]:
    """Return detections with the boxes (x, y, width, height)."""
    x, y, w, h = torch.tensor(boxes).float().reshape(-1, 4).T
    found = Instances((200, 200), pred_boxes=Boxes(torch.stack([x, y, x + w, y + h], 1)))
    found.scores, found.pred_classes = torch.full((len(boxes),), score), torch.tensor(classes, dtype=torch.int64)
    return {"instances": found}


def test_detections_of_several_test_sets_are_kept(tmp_path: Path) -> None:
    path, cfg = make_coco(tmp_path), get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    with clean_process():
        for names in (("one",), ("one", "two/b")):
            cfg.DATASETS.TEST = names
            for name in names:
                if name not in DatasetCatalog.list():
                    register_coco_instances(name, {}, str(path), str(tmp_path / "images"))
                image = DatasetCatalog.get(name)[0]
                evaluator = build_evaluator(cfg, name)
                evaluator.reset()
                evaluator.process([image], [_detected([[1, 1, 9, 9]], [len(names) - 1])])
                evaluator.evaluate()
    saved = sorted((tmp_path / "output").rglob("coco_instances_results.json"))
    folders = [str(file.parent.relative_to(tmp_path / "output")) for file in saved]
    assert folders == ["inference", "inference/one", f"inference/{file_stem('two/b')}"]
    assert [json.loads(file.read_text())[0]["category_id"] for file in saved] == [1, 2, 2]


def test_the_folder_on_a_full_disk_is_named(tmp_path: Path) -> None:
    """Check detections whose file is on a device without space."""
    path, output = make_coco(tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "instances_predictions.pth").symlink_to("/dev/full")
    with clean_process():
        register_coco_instances("full", {}, str(path), str(tmp_path / "images"))
        evaluator = CocoEvaluator("full", str(output))
        evaluator.reset()
        evaluator.process([DatasetCatalog.get("full")[0]], [_detected([[1, 1, 9, 9]], [0])])
        with pytest.raises((OSError, RuntimeError)) as caught:
            evaluator.evaluate()
    assert str(as_user_error(caught.value)) == f"{output} cannot be written: No space left on device."


@pytest.fixture
def lvis_set(tmp_path: Path) -> Iterator[str]:
    """Register a rare, large object on an image and two common, medium ones on another; frequent and small ones lack."""
    boxes = {1: [0, 0, 150, 150], 2: [10, 10, 50, 50], 3: [100, 100, 60, 60]}
    annotations = [
        {"id": i, "image_id": min(i, 2), "category_id": min(i, 2), "bbox": box, "area": box[2] * box[3]}
        for i, box in boxes.items()
    ]
    image = {"width": 200, "height": 200, "neg_category_ids": [3], "not_exhaustive_category_ids": []}
    categories = [
        {"id": i, "name": name, "frequency": name[0]} for i, name in enumerate(("rare", "common", "frequent"), 1)
    ]
    tree = {"images": [{"id": i, **image} for i in (1, 2)], "annotations": annotations, "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(tree))
    with clean_process():
        DatasetCatalog.register("few", list)
        MetadataCatalog.get("few").set(json_file=str(tmp_path / "lvis.json"), evaluator_type="lvis")
        yield "few"


def _evaluated_with_lvis(name: str, output: Path, detections: list[dict[str, Instances]]) -> dict[str, float]:
    evaluator = LvisEvaluator(name, output_dir=str(output))
    evaluator.reset()
    evaluator.process([{"image_id": 1}, {"image_id": 2}], detections)
    return evaluator.evaluate()["bbox"]


NO_DETECTIONS = [_detected([], []), _detected([], [])]
WITHOUT_DETECTIONS = dict.fromkeys(("AP", "AP50", "AP75", "APm", "APl", "APr", "APc"), 0)
LACKING = {"APs": np.nan, "APf": np.nan}


def test_the_released_lvis(lvis_set: str, tmp_path: Path) -> None:
    """Check the rare object found and one of the two common ones: precision 1 up to recall 0.5, 51 of 101 points."""
    pytest.importorskip("lvis")
    half = 100 * 51 / 101
    found = [_detected([[0, 0, 150, 150]], [0]), _detected([[10, 10, 50, 50]], [1])]
    results = _evaluated_with_lvis(lvis_set, tmp_path, found)
    means = dict.fromkeys(("AP", "AP50", "AP75"), (100 + half) / 2)
    assert results == pytest.approx(
        {**means, **LACKING, "APm": half, "APl": 100, "APr": 100, "APc": half}, nan_ok=True, abs=1e-6
    )
    assert _evaluated_with_lvis(lvis_set, tmp_path, NO_DETECTIONS) == pytest.approx(
        {**WITHOUT_DETECTIONS, **LACKING}, nan_ok=True
    )


def test_lvis_with_current_numpy(lvis_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check with a stand-in for lvis 0.5.3, which uses np.float and marks metrics without objects with -1."""

    class LVIS:
        def __init__(self, path: str):
            tree = json.loads(Path(path).read_text())
            self.anns, self.cats = (
                {entry["id"]: entry for entry in tree[key]} for key in ("annotations", "categories")
            )

        def get_ann_ids(self) -> list[int]:
            return list(self.anns)

    class LVISEval:
        def __init__(self, *args: object):
            self.results = {}

        def run(self) -> None:
            self.results = {**dict.fromkeys(WITHOUT_DETECTIONS, np.float(0.5)), **dict.fromkeys(LACKING, -1)}

        def print_results(self) -> None:
            pass

        def get_results(self) -> dict[str, float]:
            return self.results

    stand_in = types.SimpleNamespace(LVIS=LVIS, LVISEval=LVISEval, LVISResults=lambda *args, **options: None)
    monkeypatch.setitem(sys.modules, "lvis", stand_in)
    results = _evaluated_with_lvis(lvis_set, tmp_path, [_detected([[0, 0, 150, 150]], [0]), NO_DETECTIONS[1]])
    assert results == pytest.approx({**dict.fromkeys(WITHOUT_DETECTIONS, 50), **LACKING}, nan_ok=True)
    assert results.keys() == {*LvisEvaluator.metrics(lvis_set)["bbox"]}
    assert _evaluated_with_lvis(lvis_set, tmp_path, NO_DETECTIONS) == pytest.approx(
        {**WITHOUT_DETECTIONS, **LACKING}, nan_ok=True
    )
    assert not hasattr(np, "float") and stand_in.LVISEval is LVISEval


def test_the_folder_of_lvis_on_a_full_disk_is_named(lvis_set: str, tmp_path: Path, monkeypatch) -> None:
    api = types.SimpleNamespace(LVIS=lambda path: types.SimpleNamespace(get_ann_ids=list))
    monkeypatch.setitem(sys.modules, "lvis", api)
    (tmp_path / "instances_predictions.pth").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)) as caught:
        _evaluated_with_lvis(lvis_set, tmp_path, NO_DETECTIONS)
    assert str(as_user_error(caught.value)) == f"{tmp_path} cannot be written: No space left on device."


@pytest.mark.parametrize("is_faster", [True, False])
def test_masks_and_keypoints_that_are_not_annotated(tmp_path: Path, monkeypatch, is_faster: bool) -> None:
    """Check that boxes of a detector with masks and keypoints are evaluated on annotations of boxes."""
    if not is_faster:
        monkeypatch.setattr("kd_d2.evaluation.coco_evaluator.COCOeval_faster", None)
    path = make_coco(tmp_path)
    with clean_process():
        register_coco_instances("boxes", {}, str(path), str(tmp_path / "images"))
        evaluator = CocoEvaluator("boxes", str(tmp_path / "out"))
        evaluator.reset()
        for entry in DatasetCatalog.get("boxes"):
            size = entry["height"], entry["width"]
            count = len(entry["annotations"])
            found = Instances(size, scores=torch.ones(count), pred_masks=torch.ones(count, *size, dtype=torch.bool))
            x, y, w, h = torch.tensor([a["bbox"] for a in entry["annotations"]]).reshape(-1, 4).T
            found.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1))
            found.pred_classes = torch.tensor([a["category_id"] for a in entry["annotations"]])
            found.pred_keypoints = torch.zeros(count, 17, 3)
            evaluator.process([entry], [{"instances": found}])
        results = evaluator.evaluate()
    assert results.keys() == {"bbox"}
    assert results["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ({"keypoints": [4, 5, 2, 6, 7, 1, 0, 0, 0]}, {"num_keypoints": 2}),
        ({"keypoints": [4, 5, 2, 6, 7, 1, 0, 0, 0], "num_keypoints": 1}, {"num_keypoints": 1}),
        ({"keypoints": [0, 0, 0]}, {"num_keypoints": 0}),
        ({}, {}),
    ],
)
def test_labeled_keypoints_are_counted(annotation: dict, expected: dict) -> None:
    """Check the field of COCO that pycocotools needs for keypoints, of which visible and hidden ones count."""
    box = {"bbox": [1, 2, 3, 4]}
    assert complete({**box, **annotation}) == {**box, "area": 12, "iscrowd": 0, **annotation, **expected}


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    keys = ["MODEL.WEIGHTS", str(project.teacher_weights), "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    results = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        output = tmp_path / f"of{processes}"
        command += [str(ROOT / "train_net.py"), "--config-file", str(project.student), "--eval-only", *keys]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "OUTPUT_DIR", str(output)], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((output / "eval.json").read_text())["bbox"])
        assert len(json.loads((output / "inference" / "coco_instances_results.json").read_text())) > 20
    assert results[0] == pytest.approx(results[1], nan_ok=True, abs=1e-9)
