"""`kd-d2 analyze ranks`: anchors of detections, pictures of datasets and files, and error messages."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kd_d2.adapters import DensePredictions, DetectorOutputs, build_adapter
from kd_d2.analysis import ranks
from kd_d2.analysis.drawing import PALETTE, TITLE_HEIGHT
from kd_d2.analysis.ranks import (
    SIDE,
    Pair,
    detect_with_anchors,
    difference_rows,
    differences,
    draw_detections,
    draw_ranks,
    instance_ranks,
)
from kd_d2.distillers.adaptation import AdaptationLayers

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from helpers import Project, make_project, run_command, save_fixed_weights, train


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Train Rank Mimicking and PFI for one iteration."""
    keys = {
        "MODEL__KD__DISTILLERS": ("RankMimicking", "PFI"),
        "MODEL__KD__PFI__ADAPTATION": "1x1",
        "SOLVER__MAX_ITER": 1,
        "SOLVER__STEPS": (),
    }
    project = make_project(tmp_path_factory.mktemp("ranks"), "retinanet", **keys)
    train(project)
    return project


@pytest.fixture
def draw(distilled: Project, tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs the command and returns the names of its pictures."""

    def run(*more: object, config: Path = distilled.student, weights: Path | None = None) -> list[str]:
        weights = weights or distilled.output / "model_final.pth"
        run_command("analyze", "ranks", "--model", config, weights, "--output", tmp_path / "out", *more)
        return sorted(p.name for p in (tmp_path / "out").glob("*.png"))

    return run


@pytest.mark.parametrize("kind", ["retinanet", "reversed retinanet", "fcos", "atss", "gfl"])
def test_detections_come_from_their_anchors(kind: str, tiny_detector: Callable, make_inputs: Callable) -> None:
    """Check that each detection has the box and the score of its anchor."""
    model = tiny_detector(kind).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.5)
        model.head.bbox_pred.weight.normal_(std=0.2)
        outputs = build_adapter(model).run(make_inputs()[:1], frozenset({"features", "dense"}))
    found, anchors = detect_with_anchors(model, outputs, 0.0)
    assert len(found) == len(anchors) > 10
    boxes = torch.cat([*outputs.dense.boxes.values()], 1)[0][found.anchor]
    expected = boxes.clamp(min=0).minimum(torch.tensor([80.0, 64.0]).repeat(2))
    torch.testing.assert_close(found.pred_boxes.tensor, expected, rtol=1e-4, atol=1e-2)
    scores = torch.cat([*outputs.dense.ranking_scores.values()], 1)[0][found.anchor]
    torch.testing.assert_close(found.scores, scores[torch.arange(len(found)), found.pred_classes])
    assert torch.equal(anchors.tensor, Boxes.cat([*outputs.dense.anchors.values()]).tensor[found.anchor])


def _known(logits: dict[int, list[list[float]]], features: dict[int, torch.Tensor]) -> DetectorOutputs:
    """Return outputs for an image of 32 x 16 pixels: cells of 8 and 16 pixels, one anchor per position, one class."""
    dense = DensePredictions(
        logits={s: torch.tensor(rows).flatten()[None, :, None] for s, rows in logits.items()},
        box_regression={},
        anchors={s: Boxes(_cells(s, *np.shape(rows))) for s, rows in logits.items()},
        decode=lambda regression, anchors: regression,
    )
    return DetectorOutputs(images=None, features=features, dense=dense)


def _cells(side: int, rows: int, columns: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(rows) * side, torch.arange(columns) * side, indexing="ij")
    return torch.stack([x, y, x + side, y + side], -1).view(-1, 4).float()


def test_detections_with_two_equal_boxes_come_from_the_anchor_with_their_score() -> None:
    """Check an image in which every anchor predicts the same box, so that only scores tell them apart."""
    logits = torch.tensor([[-1.0, 2.0, 1.0]])
    outputs = _known({8: logits.tolist()}, {8: torch.zeros(1, 1, 1, 3)})
    same = torch.tensor([[2.0, 3.0, 20.0, 11.0]])
    outputs.dense.decode = lambda regression, anchors: same.repeat(1, 3, 1)
    outputs.dense.box_regression = {8: torch.zeros(1, 3, 4)}
    outputs.images = SimpleNamespace(image_sizes=[(16, 32)])
    found = Instances((16, 32), pred_boxes=Boxes(same.repeat(3, 1)), pred_classes=torch.zeros(3, dtype=torch.int64))
    found.scores = logits[0, [1, 2, 0]].sigmoid()
    model = SimpleNamespace(head=lambda features: None, forward_inference=lambda *args: [found])
    model.head_in_features = ["p3"]
    model.backbone = SimpleNamespace(output_shape=lambda: {"p3": ShapeSpec(stride=8)})
    shown, anchors = detect_with_anchors(model, outputs, 0.5)
    assert shown.anchor.tolist() == [1, 2]
    assert anchors.tensor.tolist() == [[8, 0, 16, 8], [16, 0, 24, 8]]


def test_detections_are_drawn_with_their_anchors() -> None:
    """Check an image of 60 x 120 pixels, drawn four times as large, and a class beyond the colors."""
    found = Instances((60, 120), pred_boxes=Boxes(torch.tensor([[60.0, 20, 100, 50]])), scores=torch.tensor([0.5]))
    found.pred_classes = torch.tensor([len(PALETTE) + 2])
    anchors = Boxes(torch.tensor([[10.0, 20, 30, 40]]))
    drawn = draw_detections(np.zeros((60, 120, 3), np.uint8), found, anchors, ["thing"] * 13)
    assert drawn.shape == (240, 480, 3)
    expected = {(240, 150): PALETTE[2], (320, 200): PALETTE[2]}  # left and lower side of the box
    expected |= {(80, 120): PALETTE[2], (49, 80): (0, 0, 0)}  # the anchor's center, and a gap of its upper side
    assert {(x, y): tuple(drawn[y, x].tolist()) for x, y in expected} == expected
    assert drawn[80, 43, 1] > 100  # a dash
    assert found.pred_boxes.tensor.tolist() == [[60, 20, 100, 50]]


def test_positives_are_colored_relative_to_the_best_which_is_on_top() -> None:
    """Check scores 0.2 and 0.8 in one place, 0 in another: yellow and violet, at the ends of the color map."""
    centers = torch.tensor([[20.0, 30.0], [20.0, 30.0], [90.0, 10.0]])
    box = torch.tensor([10.0, 20.0, 100.0, 50.0])
    drawn = draw_ranks(np.zeros((60, 120, 3), np.uint8), box, centers, torch.tensor([0.8, 0.2, 0.0]))
    expected = {(80, 120): (240, 249, 33), (360, 40): (13, 8, 135)}
    sides = ((200, 80), (200, 200), (40, 150), (400, 150))  # of the box
    assert {(x, y): tuple(drawn[y, x].tolist()) for x, y in expected} == expected
    assert all(drawn[y, x].min() > 200 for x, y in sides)


def test_each_detector_is_drawn_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair.__new__(Pair)
    pair.cfg, pair.names, pair.layers = get_cfg(), ["thing"], None
    adapter = SimpleNamespace(run=lambda *args: "outputs of the student")

    class TeacherOf(SimpleNamespace):
        def __call__(self, *args: object) -> str:
            return "outputs of the teacher"

    pair.model = SimpleNamespace(adapter=adapter, student="student's model", teacher=TeacherOf(model="teacher's model"))
    monkeypatch.setattr(ranks, "detect_with_anchors", lambda *args: args[:2])
    monkeypatch.setattr(ranks, "draw_detections", lambda image, found, anchors, names: (found, anchors))
    monkeypatch.setattr(ranks, "titled", lambda picture, title: (title, *picture))
    monkeypatch.setattr(ranks, "differences", lambda layers, student, teacher: {"rows": (student, teacher)})
    monkeypatch.setattr(ranks, "difference_rows", lambda image, found: [found["rows"]])
    monkeypatch.setattr(ranks, "sheet", list)
    assert pair.draw({"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}, 3, 0.5) == [
        [
            ("student", "student's model", "outputs of the student"),
            ("teacher", "teacher's model", "outputs of the teacher"),
        ],
        ("outputs of the student", "outputs of the teacher"),
    ]


def test_ranks_are_of_the_right_detector_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the scores above each picture, the ring at the best positive, and the order of the instances."""
    logits = [[0.0, 1, 2, 3], [0, 0, 0, 0]]
    student = _known({8: logits, 16: [[0.0, 0]]}, {})
    teacher = _known({8: [[-x for x in row] for row in logits], 16: [[0.0, 0]]}, {})
    student.dense.assign = lambda: torch.tensor([[1, 0, 0, 0, -1, -1, -1, -1, -1, -1]])
    target = Instances((16, 32), gt_boxes=Boxes(torch.tensor([[8.0, 0, 32, 8], [0, 0, 8, 8]])))
    target.gt_classes = torch.tensor([0, 0])
    found = instance_ranks(student, teacher, target, count=3)
    assert [(of.instance, len(of.centers)) for of in found] == [(0, 3), (1, 1)]
    assert len(instance_ranks(student, teacher, target, count=1)) == 1
    titles: list[str] = []
    monkeypatch.setattr(ranks, "titled", lambda picture, title: titles.append(title) or picture)
    rows = ranks.rank_rows(np.zeros((16, 32, 3), np.uint8), student, teacher, target, ["thing"], count=3)
    # sigmoid of 1, 2, 3 and of -1, -2, -3; of 0
    assert titles == [
        *("3 positives", "student: 0.73 to 0.95", "teacher: 0.05 to 0.27"),
        *("1 positives", "student: 0.50 to 0.50", "teacher: 0.50 to 0.50"),
    ]
    scale = SIDE // 16
    boxed = [tuple(row[0][8 * scale, 20 * scale].tolist()) for row in rows]  # on the lower side of the first box
    assert boxed == [PALETTE[0], (0, 0, 0)]
    ring = [np.argwhere((drawn == 255).all(-1)) for drawn in rows[0][1:]]
    best = [(28 * scale, 4 * scale), (12 * scale, 4 * scale)]  # centers of the student's and of the teacher's best
    for white, (x, y), (other, _) in zip(ring, best, best[::-1], strict=True):
        radius = np.hypot(white[:, 1] - x, white[:, 0] - y)
        assert ((radius > 6.5) & (radius < 9.5)).sum() > 20
        radius = np.hypot(white[:, 1] - other, white[:, 0] - y)
        assert ((radius > 6.5) & (radius < 9.5)).sum() < 5


def test_differences_are_where_they_are() -> None:
    """Check a level's mean squared differences of probabilities and of features, and where they are brightest."""
    features = {8: torch.zeros(1, 2, 2, 4), 16: torch.zeros(1, 2, 1, 2)}
    other = {8: features[8].clone(), 16: features[16]}
    other[8][0, :, 1, 0] = 2.0
    logits = [[0.0] * 4, [0.0] * 4]
    student = _known({8: logits, 16: [[0.0, 0]]}, features)
    teacher = _known({8: [[0.0, 0, 0, 30], [0.0] * 4], 16: [[0.0, 0]]}, other)
    found = differences(AdaptationLayers({8: (2, 2), 16: (2, 2)}, 0), student, teacher)
    expected = torch.zeros(2, 1, 2, 4)
    expected[0, 0, 0, 3] = 0.25
    expected[1, 0, 1, 0] = 4.0
    for kind, level in zip(("predictions", "features"), expected, strict=True):
        torch.testing.assert_close(found[kind][8], level)
        assert not found[kind][16].any()
    rows = difference_rows(np.zeros((16, 32, 3), np.uint8), found)
    assert [len(row) for row in rows] == [3, 3]
    for row, (x, y) in zip(rows, ((28, 4), (4, 12)), strict=True):  # the centers of the brightest cells
        bright = row[1][TITLE_HEIGHT:].astype(int).sum(-1)
        places = np.argwhere(bright == bright.max()) * 16 / SIDE
        assert np.abs(places - (y, x)).max() < 5
    assert list(differences(None, student, teacher)) == ["predictions"]


def test_differences_of_all_levels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a difference in the second of two levels alone, and the mean of each level in its title."""
    titles: list[str] = []
    monkeypatch.setattr(ranks, "titled", lambda picture, title: titles.append(title) or picture)
    levels = {8: torch.zeros(1, 2, 4), 16: torch.tensor([[[0.0, 0.5]]])}
    ((together, first, second),) = difference_rows(np.zeros((16, 32, 3), np.uint8), {"features": levels})
    assert titles == ["features, all levels", "stride 8: 0", "stride 16: 0.25"]
    assert np.array_equal(together, second) and second.max() > first.max()


def test_a_plain_checkpoint_has_no_adaptation_layers(
    draw: Callable, distilled: Project, tmp_path: Path, capsys
) -> None:
    """Check that features are compared directly if the channels are equal, and that mismatched layers are an error."""
    content = torch.load(distilled.output / "model_final.pth")
    torch.save({"model": content["model"]}, tmp_path / "plain.pth")
    assert draw("--images", 1, weights=tmp_path / "plain.pth") == ["000.png"]
    picture = cv2.imread(str(tmp_path / "out" / "000.png"))
    rows_with_features = picture.shape[0]
    with pytest.raises(SystemExit):
        draw("--images", 1, "MODEL.KD.PFI.ADAPTATION", "3x3")
    assert "error: The PFI layers in" in capsys.readouterr().err
    project = make_project(tmp_path / "narrow", "retinanet", **{"MODEL__FPN__OUT_CHANNELS": 8})
    project.change(MODEL__KD__DISTILLERS=("RankMimicking",), SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    train(project)
    draw("--images", 1, config=project.student, weights=project.output / "model_final.pth")
    assert "Features are not drawn: their channels differ" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "out" / "000.png")).shape[0] < rows_with_features
    select = ("MODEL.KD.DISTILLERS", "('PFI',)", "MODEL.KD.PFI.ADAPTATION", "select")
    draw("--images", 1, *select, config=project.student, weights=project.output / "model_final.pth")
    assert cv2.imread(str(tmp_path / "out" / "000.png")).shape[0] == rows_with_features


def test_a_picture_for_each_image_with_instances(
    draw: Callable, distilled: Project, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the names of the pictures, and that features are compared with the trained layers of the checkpoint."""
    seen = []
    monkeypatch.setattr(ranks, "differences", lambda *args: seen.append(args[0].state_dict()) or differences(*args))
    assert draw("--images", 3, "--instances", 1, "--score-thresh", 0.0) == ["000.png", "001.png", "003.png"]
    assert capsys.readouterr().out.count(".png") == 3
    trained = torch.load(distilled.output / "model_final.pth")["distillers"]
    kept = {name.removeprefix("PFI.adaptation."): value for name, value in trained.items() if "adaptation" in name}
    assert len(seen) == 3 and seen[0].keys() == kept.keys() and len(kept) > 0
    assert all(torch.equal(seen[0][name], value) for name, value in kept.items())


def test_a_threshold_below_those_of_the_configs(draw: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that student and teacher return detections down to --score-thresh."""
    drawn = []
    monkeypatch.setattr(ranks, "draw_detections", lambda image, found, *_: drawn.append(len(found)) or image)
    higher = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.9999)
    higher += ("MODEL.KD.TEACHER.OPTS", "['MODEL.RETINANET.SCORE_THRESH_TEST', 0.9999]")
    draw("--images", 1, "--score-thresh", 0.0, *higher)
    assert len(drawn) == 2 and min(drawn) > 0


def test_files_of_ones_own_have_no_ranks(draw: Callable, distilled: Project, tmp_path: Path, capsys) -> None:
    image = distilled.annotations.parent / "images" / "001.png"
    assert draw("--input", image) == ["001.png"]
    other = tmp_path / "other" / "001.png"
    other.parent.mkdir()
    other.write_bytes(image.read_bytes())
    assert draw("--input", image, other) == ["001-2.png", "001.png"]
    picture = cv2.imread(str(tmp_path / "out" / "001.png"))
    with pytest.raises(SystemExit):
        draw("--input", tmp_path / "out" / "001.png")
    assert (
        f"error: --output: the drawing {tmp_path / 'out' / '001.png'} would overwrite an input"
        in capsys.readouterr().err
    )
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / "001.png")), picture)
    assert picture.shape == (
        3 * (360 + 34 + 8),
        6 * (240 + 8),
        3,
    )  # detections, predictions, features; all and P3 to P7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--input", "nowhere.png"), "The image nowhere.png cannot be used"),
        (("--images", 0), "--images is 0; it must be at least 1"),
        (("--instances", 0), "--instances is 0; it must be at least 1"),
        (("--score-thresh", 30), "--score-thresh is 30.0; it must be between 0 and 1"),
        (("MODEL.META_ARCHITECTURE", "RetinaNet"), "MODEL.META_ARCHITECTURE is RetinaNet, not KDMetaArch"),
        (("MODEL.RETINANET.NUM_CLASSES", 4), "The student (RetinaNet) has 4 classes and the teacher (RetinaNet) 3"),
    ],
)
def test_what_cannot_be_drawn(draw: Callable, capsys, more: tuple, message: str) -> None:
    with pytest.raises(SystemExit):
        draw(*more)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_adapters_with_other_anchors(draw: Callable, distilled: Project, capsys) -> None:
    with pytest.raises(SystemExit):
        draw("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "MODEL.KD.DISTILLERS", "('StructuralKD',)")
    assert (
        "error: kd-d2 analyze ranks compares predictions anchor by anchor, but at stride 8" in capsys.readouterr().err
    )


def test_a_teacher_of_other_classes(draw: Callable, tmp_path: Path, capsys) -> None:
    project = make_project(tmp_path / "classes")
    save_fixed_weights(project.change_teacher(MODEL__RETINANET__NUM_CLASSES=5), project.teacher_weights)
    with pytest.raises(SystemExit):
        draw(config=project.student)
    assert (
        "classes and the teacher (RetinaNet) 5; they must be the same for kd-d2 analyze ranks."
        in capsys.readouterr().err
    )


def test_adapters_without_dense_predictions(draw: Callable, tmp_path: Path, capsys) -> None:
    config = make_project(tmp_path / "rcnn", "faster-rcnn").student
    with pytest.raises(SystemExit):
        draw(config=config)
    assert "error: The student (GeneralizedRCNN) has no dense predictions to compare." in capsys.readouterr().err
