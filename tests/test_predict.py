"""kd-d2 predict: detections, output files, drawings, and messages for unusable input."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import Predictor, UserError, load_config
from kd_d2.analysis.drawing import PALETTE, draw_instances, titled
from kd_d2.export import export_detector
from kd_d2.files import check_inputs_are_kept
from kd_d2.prediction import PredictOptions, find_inputs
from kd_d2.prediction import predict as run_predict
from kd_d2.prediction.predict import to_annotations
from kd_d2.prediction.video import VideoReader, VideoWriter
from kd_d2.predictor import ImageDetector, read_categories

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import CLASSES, Project, clean_process, make_project, run_command, save_fixed_weights
from PIL import Image
from pycocotools.coco import COCO

LOW = 0.02  # below the thresholds of the configs


@pytest.fixture(scope="module", params=["retinanet", "faster-rcnn"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Create a distillation with the student's checkpoint `student.pth` and without the teacher's files."""
    return _project(tmp_path_factory.mktemp("project"), request.param)


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return _project(tmp_path_factory.mktemp("retinanet"), "retinanet")


def _project(folder: Path, detector: str) -> Project:
    project = make_project(folder, detector)
    weights = save_fixed_weights(project.teacher, folder / "student.pth", seed=2).state_dict()
    for name, tensor in weights.items():
        if "cls_score.weight" in name or "bbox_pred.weight" in name:
            tensor *= 0.03  # scores between 0 and 1, boxes that do not fill the whole image
    torch.save({"model": weights}, folder / "student.pth")
    project.teacher.unlink()
    project.teacher_weights.unlink()
    return project


@pytest.fixture
def predict() -> Callable[..., dict]:
    """Return a function that runs the command and returns the content of detections.json."""

    def run(
        project: Project, output: Path, *inputs: object, options: tuple = (), opts: tuple = (), weights: object = None
    ) -> dict:
        model = ("--model", project.student, weights or project.folder / "student.pth")
        run_command("predict", *model, "--input", *inputs, "--output", output, *options, *opts)
        return json.loads((output / "detections.json").read_text())

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Create a folder of typical images: color, grayscale, with alpha, with a palette, and rotated by EXIF."""
    random = np.random.RandomState(3)
    picture = Image.fromarray(random.randint(0, 255, (12, 16, 3)).astype(np.uint8)).resize((96, 64))
    folder = tmp_path / "photos"
    folder.mkdir()
    picture.save(folder / "color.png")
    picture.convert("L").save(folder / "gray.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("P").save(folder / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees
    picture.save(folder / "turned.jpg", exif=exif)
    return folder


def test_detections_are_those_of_the_default_predictor(
    project: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    higher = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.5, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5)
    tree = predict(project, tmp_path / "out", photos, options=("--score-thresh", LOW), opts=higher)
    cfg = load_config(str(project.student), ["MODEL.WEIGHTS", str(project.folder / "student.pth")], student_only=True)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = LOW
    predictor = DefaultPredictor(cfg)
    files = {Path(image["file_name"]).name: image for image in tree["images"]}
    assert files.keys() == {"color.png", "gray.png", "alpha.png", "palette.gif", "turned.jpg"}
    for name, image in files.items():
        expected = predictor(read_image(str(photos / name), "BGR"))["instances"]
        found = [a for a in tree["annotations"] if a["image_id"] == image["id"]]
        assert len(found) == len(expected) > 5
        boxes = BoxMode.convert(expected.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        assert [a["bbox"] for a in found] == boxes.tolist()
        assert [a["score"] for a in found] == expected.scores.tolist()
        assert [a["category_id"] - 1 for a in found] == expected.pred_classes.tolist()
        assert (image["width"], image["height"]) == ((64, 96) if name == "turned.jpg" else (96, 64))
    assert LOW <= min(a["score"] for a in tree["annotations"]) < 0.5


def test_only_detections_from_the_threshold_on_are_kept(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    image = photos / "color.png"
    every = [
        a["score"] for a in predict(retinanet, tmp_path / "a", image, options=("--score-thresh", 0))["annotations"]
    ]
    middle = float(np.median(every))
    some = predict(retinanet, tmp_path / "b", image, options=("--score-thresh", middle))
    assert [a["score"] for a in some["annotations"]] == [s for s in every if s >= middle]
    none = predict(retinanet, tmp_path / "c", image, options=("--score-thresh", 1))
    assert len(none["images"]) == 1 and none["annotations"] == []
    assert Image.open(tmp_path / "c" / "color.jpg").size == (720, 480)


def test_the_file_is_one_that_pycocotools_reads(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    tree = predict(retinanet, tmp_path / "out", photos, options=("--score-thresh", LOW))
    assert [image["id"] for image in tree["images"]] == [1, 2, 3, 4, 5]
    assert [a["id"] for a in tree["annotations"]] == list(range(1, len(tree["annotations"]) + 1))
    assert [(c["id"], c["name"]) for c in tree["categories"]] == list(enumerate(CLASSES, 1))
    coco = COCO(str(tmp_path / "out" / "detections.json"))
    assert sum(len(coco.getAnnIds(imgIds=i, catIds=c)) for i in coco.imgs for c in coco.cats) == len(coco.anns)
    assert len(coco.loadRes(tree["annotations"]).anns) == len(coco.anns)


def test_without_the_data_classes_are_numbers(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    gone = f"[['gone', '{tmp_path}/gone.json', '{tmp_path}/gone']]"
    opts = ("DATASETS.COCO_JSON", gone, "DATASETS.TEST", "('gone',)", "DATASETS.TRAIN", "('coco_2017_train',)")
    tree = predict(retinanet, tmp_path / "out", photos / "gray.png", options=("--score-thresh", LOW), opts=opts)
    assert [(c["id"], c["name"]) for c in tree["categories"]] == [(0, "class 0"), (1, "class 1"), (2, "class 2")]
    assert {a["category_id"] for a in tree["annotations"]} <= {0, 1, 2}


def test_built_in_data_sets_give_their_own_category_ids() -> None:
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    categories = read_categories(cfg, 80)
    assert [(c.id, c.name) for c in categories][-2:] == [(89, "hair drier"), (90, "toothbrush")]
    assert read_categories(cfg, 3)[2].name == "class 2"


def test_ids_of_sets_that_are_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check synthetic sets, one of register_coco_instances, LVIS, and a set without ids."""
    categories = [{"id": 7, "name": "red"}, {"id": 2, "name": "blue"}]
    tree = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [], "categories": categories}
    (tmp_path / "own.json").write_text(json.dumps(tree))
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["DATASETS.TRAIN", "()", "MODEL.WEIGHTS", ""])

    def found(name: str, count: int) -> list[tuple[int, str]]:
        cfg.DATASETS.TEST = (name,)
        return [(category.id, category.name) for category in read_categories(cfg, count)]

    with clean_process(), caplog.at_level("INFO", "kd_d2.predictor"):
        register_coco_instances("own", {}, str(tmp_path / "own.json"), str(tmp_path))
        assert found("own", 2) == [(2, "blue"), (7, "red")]
        MetadataCatalog.get("own").thing_classes = ["blue", "red"]
        assert found("own", 2) == [(2, "blue"), (7, "red")]
        assert [number for number, _ in found("shapes_val", 8)] == list(range(1, 9))
        assert found("lvis_v1_val", 1203)[0] == (1, "aerosol_can")
        assert not caplog.messages
        assert found("voc_2007_val", 20)[0] == (0, "aeroplane")
        assert caplog.messages == [
            "No dataset of the config gives the category ids of the model's classes: class indices are used as ids."
        ]
        MetadataCatalog.get("others").set(thing_classes=["red", "blue"], json_file=str(tmp_path / "own.json"))
        assert found("others", 2) == [(0, "red"), (1, "blue")]  # not in the order of the file


def test_inputs_are_files_and_folders_in_order_and_each_once(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a folder may contain other files, and that images with the same name get separate drawings."""
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_text("no image")
    (photos / "cut.png").write_bytes((photos / "color.png").read_bytes()[:200])
    (photos / "deeper").mkdir()
    other = tmp_path / "color.png"
    other.write_bytes((photos / "color.png").read_bytes())
    tree = predict(retinanet, tmp_path / "out", other, photos, photos / "gray.png")
    assert [(Path(image["file_name"]).parent.name, image["drawing"]) for image in tree["images"]] == [
        (tmp_path.name, "color.jpg"),
        ("photos", "alpha.jpg"),
        ("photos", "color-2.jpg"),
        ("photos", "gray.jpg"),
        ("photos", "palette.jpg"),
        ("photos", "turned.jpg"),
    ]
    drawings = {image["drawing"] for image in tree["images"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == drawings | {"detections.json"}
    printed = capsys.readouterr().out
    skipped = "Skipped 2 files that cannot be read as images or videos: cut.png, notes.txt; the first: "
    assert f"{skipped}The image {photos / 'cut.png'} cannot be used: image file is truncated" in printed
    assert f"[3/6] {photos / 'color.png'}: " in printed


def test_unusable_input_is_one_sentence_and_nothing_is_written(
    retinanet: Project,
    photos: Path,
    tmp_path: Path,
    predict: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes((photos / "color.png").read_bytes()[:400])
    image, out = photos / "color.png", tmp_path / "out"
    low = ("--score-thresh", "1.5")
    cases = [
        ((out, tmp_path / "none.jpg"), {}, "there is no file or folder", "none.jpg"),
        (
            (out, tmp_path / "notes.txt"),
            {},
            "notes.txt cannot be used",
            "its format is none of JPEG, PNG, BMP, WEBP, TIFF, GIF, PPM.",
        ),
        ((out, image, tmp_path / "cut.png"), {}, "cut.png cannot be used", "runcated"),
        ((out, tmp_path / "empty"), {}, "there is no image or video.", "empty: "),
        ((tmp_path / "notes.txt" / "out", image), {}, "--output", "cannot be written"),
        ((photos, photos / "turned.jpg"), {}, "--output", "would overwrite an input"),
        ((out, image), {"options": low}, "--score-thresh is 1.5", "between 0 and 1"),
        ((out, image), {"weights": "none.pth"}, "MODEL.WEIGHTS: there is no file", "none.pth"),
        (
            (out, image),
            {"opts": ("MODEL.DEVICE", "cpu", *low)},
            "--score-thresh must come before the KEY VALUE overrides",
            "",
        ),
        ((out, image), {"opts": ("MODEL.RETINANET.NUM_CONVS", "2")}, "fills", "parameters of the detector"),
        ((out, image), {"opts": ("MODEL.FPN.OUT_CHANEL", "2")}, "Did you mean MODEL.FPN.OUT_CHANNELS", ""),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, options, *words in cases:
        with pytest.raises(SystemExit) as ended:
            predict(retinanet, *arguments, **options)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and error.count("error: ") == 1
        assert all(word in error.splitlines()[-1] for word in words), error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not out.exists()


def test_a_run_and_the_class(retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]) -> None:
    """Check that a training's folder provides config and checkpoint, and that kd_d2.Predictor detects the same."""
    run = tmp_path / "run"
    run.mkdir()
    weights = retinanet.folder / "student.pth"
    cfg = load_config(str(retinanet.student), ["MODEL.WEIGHTS", str(weights)], student_only=True)
    (run / "config.yaml").write_text(cfg.dump())
    (run / "model_final.pth").write_bytes(weights.read_bytes())
    image, out = photos / "color.png", tmp_path / "out"
    # overrides may follow the list of inputs
    run_command("predict", "--score-thresh", LOW, "--model", run, "--output", out, "--input", image, "MODEL.DEVICE=cpu")
    found = Predictor(cfg, LOW)(str(image))
    tree = json.loads((out / "detections.json").read_text())
    assert [a["score"] for a in tree["annotations"]] == found.scores.tolist() != []
    cfg.MODEL.META_ARCHITECTURE = "KDMetaArch"
    with pytest.raises(
        UserError, match=r"MODEL.META_ARCHITECTURE is KDMetaArch, .* load_config\(..., student_only=True\)"
    ):
        Predictor(cfg)


def detections(size: tuple[int, int], boxes: list[list[float]], classes: list[int]) -> Instances:
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes))
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.full((len(boxes),), 0.9)
    return found


def test_drawing_shows_box_mask_and_label_in_the_enlarged_image() -> None:
    gray = np.full((48, 64, 3), 128, np.uint8)
    found = detections((48, 64), [[16.0, 24.0, 48.0, 40.0]], [0])
    found.pred_masks = torch.zeros(1, 48, 64, dtype=torch.bool)
    found.pred_masks[0, 30:34, 20:44] = True
    drawn = draw_instances(gray, found, ["Bäcker"])
    assert drawn.shape == (480, 640, 3)
    changed = (drawn != 128).any(2)
    assert all(changed[240, 160:480]) and all(changed[400, 160:480]) and all(changed[240:400, 160])  # the box's sides
    assert changed[305:335, 205:435].all()  # the mask
    assert changed[226:238, 162:220].all()  # the label's background, above the box
    assert not changed[260:290, 200:440].any() and not changed[:200].any() and not changed[410:].any()


def test_the_area_of_an_annotation_is_that_of_its_mask() -> None:
    found = detections((48, 64), [[16.0, 24.0, 48.0, 40.0]], [0])
    assert to_annotations(found, 1, None, 1)[0]["area"] == 32 * 16
    found.pred_masks = torch.zeros(1, 48, 64, dtype=torch.bool)
    found.pred_masks[0, 30:34, 20:44] = True
    [annotation] = to_annotations(found, 1, None, 1)
    assert json.loads(json.dumps(annotation))["area"] == 4 * 24


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (("TEST.AUG.ENABLED", True), "TEST.AUG.ENABLED is True: test-time augmentation is not supported."),
        (
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE is ROIAlignRotated: rotated",
        ),
    ],
)
def test_what_eval_refuses_is_refused(retinanet: Project, tmp_path: Path, opts: tuple, sentence: str) -> None:
    cfg = load_config(str(retinanet.student), opts, student_only=True)
    for use in (Predictor, lambda cfg: export_detector(cfg, str(tmp_path / "student.ts"))):
        with pytest.raises(UserError, match=sentence):
            use(cfg)


def test_labels_of_nested_boxes_do_not_hide_each_other() -> None:
    """Check that labels of boxes with nearly the same corner are drawn below one another, each complete."""
    gray = np.full((480, 640, 3), 128, np.uint8)
    boxes = [[10.0, 0.0, 400.0, 300.0], [11.0, 1.0, 399.0, 299.0], [12.0, 2.0, 398.0, 298.0]]
    drawn = draw_instances(gray, detections((480, 640), boxes, [0, 1, 2]), ["a", "b", "c"])
    areas = [int((drawn[:80, 14:60] == color).all(2).sum()) for color in PALETTE[:3]]
    assert min(areas) > 0.7 * max(areas)


def test_a_title_is_written_whole_where_there_is_room_and_cut_where_there_is_none() -> None:
    """Check non-ASCII letters, a long title in a smaller font, and one that does not fit at any font size."""
    white = np.full((10, 200, 3), 255, np.uint8)
    strip = {title: titled(white, title)[:34] for title in ("äöü", "???", "a" * 24, "a" * 24 + "b", "a" * 99, "a" * 98)}
    for drawn in strip.values():
        assert (drawn[:, :6] == 255).all() and (drawn[:, 194:] == 255).all() and (drawn < 128).any()
    assert (strip["äöü"] != strip["???"]).any()
    assert (strip["a" * 24] != strip["a" * 24 + "b"]).any()
    assert (strip["a" * 99] == strip["a" * 98]).all()


def write_video(path: Path, frames: list[np.ndarray], fps: float = 5.0) -> None:
    with VideoWriter(str(path), fps) as writer:
        for frame in frames:
            writer.write(frame)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Create a video of five 64 x 96 frames, at five frames per second, each brighter than the previous one."""
    path = tmp_path / "clip.mp4"
    cells = np.random.RandomState(4).randint(0, 150, (8, 12, 3)).repeat(8, 0).repeat(8, 1)
    write_video(path, [(cells + 20 * number).astype(np.uint8) for number in range(5)])
    return path


def test_a_tree_of_folders_is_kept_and_the_output_is_not_read_again(
    retinanet: Project, photos: Path, predict: Callable[..., dict]
) -> None:
    deeper = photos / "deeper" / "still"
    deeper.mkdir(parents=True)
    (photos / ".git").mkdir()
    for place in (deeper / "color.png", photos / ".git" / "color.png"):
        place.write_bytes((photos / "color.png").read_bytes())
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.png").write_bytes((photos / "gray.png").read_bytes())
    (photos / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(photos)
    out = photos / "found"
    for _ in range(2):
        tree = predict(retinanet, out, photos)
        names = [image["drawing"] for image in tree["images"]]
        here = ["alpha.jpg", "color.jpg", "gray.jpg", "palette.jpg", "turned.jpg"]
        assert names == [*here, "deeper/still/color.jpg", "linked/far.jpg"]
        assert all((out / name).is_file() for name in names)


def test_without_drawings_there_is_the_file_alone(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    tree = predict(retinanet, tmp_path / "out", photos, options=("--no-drawings",))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]
    assert len(tree["images"]) == 5 and not any("drawing" in image for image in tree["images"])


def test_an_image_of_one_row(retinanet: Project, tmp_path: Path, predict: Callable[..., dict]) -> None:
    """Check that an image is resized to at least one row, and not to none."""
    Image.new("RGB", (5000, 1)).save(tmp_path / "line.png")
    tree = predict(retinanet, tmp_path / "out", tmp_path / "line.png")
    assert [(image["width"], image["height"]) for image in tree["images"]] == [(5000, 1)]


def test_a_batch_detects_what_single_images_do(
    project: Project, photos: Path, clip: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    """Check images of several sizes, which are not padded to a common size, and video frames."""
    options = ("--no-drawings", "--score-thresh", LOW)
    one, four = (
        predict(project, tmp_path / f"{batch}", photos, clip, options=(*options, "--batch", batch)) for batch in (1, 4)
    )
    assert one["images"] == four["images"] and len(one["annotations"]) == len(four["annotations"]) > 20
    for expected, found in zip(one["annotations"], four["annotations"], strict=True):
        assert found["category_id"] == expected["category_id"]
        np.testing.assert_allclose(found["bbox"], expected["bbox"], atol=0.05)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-3)


def test_frames_of_a_video_are_detected_drawn_and_numbered(
    retinanet: Project, photos: Path, clip: Path, tmp_path: Path, predict: Callable[..., dict]
) -> None:
    out = tmp_path / "out"
    tree = predict(retinanet, out, clip, photos / "gray.png", options=("--score-thresh", LOW))
    frames, picture = tree["images"][:5], tree["images"][5]
    assert [(frame["frame"], frame["time"], frame["drawing"]) for frame in frames] == [
        (number, number / 5, "clip.mp4") for number in range(5)
    ]
    assert "frame" not in picture and picture["drawing"] == "gray.jpg" and picture["id"] == 6
    decoded = list(VideoReader(str(clip)))
    cfg = load_config(
        str(retinanet.student), ["MODEL.WEIGHTS", str(retinanet.folder / "student.pth")], student_only=True
    )
    detector = Predictor(cfg, LOW)
    for frame, pixels in zip(frames, decoded, strict=True):
        expected = detector.detect([pixels if detector.input_format == "RGB" else pixels[:, :, ::-1]])[0]
        found = [a["score"] for a in tree["annotations"] if a["image_id"] == frame["id"]]
        assert found == expected.scores.tolist() != []
    drawn = VideoReader(str(out / "clip.mp4"))
    assert (drawn.fps, drawn.length) == (5.0, 5)
    assert [frame.shape for frame in drawn] == [(480, 720, 3)] * 5


def test_times_of_a_variable_frame_rate(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a video whose last three frames are shown for a quarter of the time, and one without timestamps."""
    content = bytearray(clip.read_bytes())
    place = content.find(b"stts") - 4
    size, _, _, _, count, duration = struct.unpack_from(">I4s4I", content, place)
    content[place : place + size] = struct.pack(
        ">I4s6I", size + 8, b"stts", 0, 2, 2, duration, count - 2, duration // 4
    )
    for box in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        start = content.find(box) - 4
        struct.pack_into(">I", content, start, struct.unpack_from(">I", content, start)[0] + 8)
    clip.write_bytes(content)
    reader = VideoReader(str(clip))
    assert len(list(reader)) == 5
    assert reader.times == pytest.approx([0, 0.2, 0.4, 0.45, 0.5])
    monkeypatch.setattr(cv2, "CAP_PROP_POS_MSEC", -1)
    plain = VideoReader(str(clip))
    assert len(list(plain)) == 5
    assert plain.times == pytest.approx([number / plain.fps for number in range(5)])


def test_times_of_a_video_without_timestamps_in_opencv_5(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that -1, OpenCV 5's value of an unknown property, is neither a time nor a frame rate."""
    capture = cv2.VideoCapture(str(clip))
    without_properties = SimpleNamespace(read=capture.read, release=capture.release, get=lambda property: -1.0)
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: without_properties)
    reader = VideoReader(str(clip))
    assert len(list(reader)) == 5 and (reader.fps, reader.length) == (25, 0)
    assert reader.times == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])


def test_frames_that_a_video_of_variable_frame_rate_never_had(clip: Path) -> None:
    """Check that frames are missing only if the last one is before the end of the video."""
    reader = VideoReader(str(clip))
    assert len(list(reader)) == 5 and not reader.is_cut()
    reader.length = 6
    assert reader.is_cut()
    reader.fps, reader.length, reader.times = 25.0, 126, [0.0, 0.04, 1.0, 1.04, 5.0]
    assert not reader.is_cut()


def test_a_video_that_is_cut_off_or_none_is_named(
    retinanet: Project, clip: Path, tmp_path: Path, predict: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.mp4").write_text("no video")
    (tmp_path / "empty.avi").write_bytes(b"")
    for name in ("none.mp4", "empty.avi"):
        with pytest.raises(SystemExit):
            predict(retinanet, tmp_path / "out", tmp_path / name)
        assert f"{name} cannot be read: it is damaged" in capsys.readouterr().err
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("none.mp4", "clip.mp4"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    tree = predict(retinanet, tmp_path / "out", folder)
    assert (
        len(tree["images"]) == 5
        and "Skipped 1 file that cannot be read as images or videos: none.mp4" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        predict(retinanet, tmp_path / "out", clip, options=("--batch", 0))
    assert "--batch is 0; it must be at least 1" in capsys.readouterr().err


def test_names_that_are_not_utf_8(
    retinanet: Project,
    photos: Path,
    clip: Path,
    tmp_path: Path,
    predict: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that images may have them, and that videos, for which OpenCV would crash, are skipped or refused."""
    folder = tmp_path / "names"
    folder.mkdir()
    bad = os.fsdecode(b"bad\xff")
    (folder / f"{bad}.png").write_bytes((photos / "gray.png").read_bytes())
    video = folder / f"{bad}.mp4"
    video.write_bytes(clip.read_bytes())
    tree = predict(retinanet, tmp_path / "out", folder)
    assert [image["drawing"] for image in tree["images"]] == [f"{bad}.jpg"]
    assert "Skipped 1 file that cannot be read as images or videos: bad\\udcff.mp4" in capsys.readouterr().out
    for output, given, words in (
        (tmp_path / "out", video, "bad\\udcff.mp4 cannot be read: its path is not UTF-8; rename it."),
        (tmp_path / bad, clip, "--output: the path of the video"),
    ):
        with pytest.raises(SystemExit):
            predict(retinanet, output, given)
        assert words in capsys.readouterr().err


def test_drawings_that_cannot_be_written_lose_no_detections(
    retinanet: Project,
    photos: Path,
    clip: Path,
    tmp_path: Path,
    predict: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check an image longer than a JPEG may be, names that are folders in the output, and drawings as parent folders."""
    Image.new("RGB", (65501, 1)).save(photos / "long.png")
    (photos / "gray.jpg").mkdir()
    (photos / "gray.jpg" / "below.png").write_bytes((photos / "gray.png").read_bytes())
    out = tmp_path / "out"
    for name in ("color.jpg", "clip.mp4"):
        (out / name).mkdir(parents=True)
    tree = predict(retinanet, out, photos, clip, options=("--score-thresh", LOW))
    drawings = {Path(image["file_name"]).name: image.get("drawing") for image in tree["images"]}
    assert drawings == {
        "alpha.png": "alpha.jpg",
        "color.png": None,
        "gray.png": "gray.jpg",
        "long.png": None,
        "palette.gif": "palette.jpg",
        "turned.jpg": "turned.jpg",
        "below.png": None,
        "clip.mp4": None,
    }
    assert {a["image_id"] for a in tree["annotations"]} >= {1, 2, 3, 5, 6, 7, 8, 12}
    printed = capsys.readouterr().out
    for name in ("color.jpg", "long.jpg", "gray.jpg/below.jpg", "clip.mp4"):
        assert printed.count(f"The drawing {out / name} cannot be written: ") == 1


def nothing(input_format: str = "RGB", seen: list | None = None) -> ImageDetector:
    """Create a detector that finds nothing and appends its input images to `seen`."""

    def model(batch: list[dict]) -> list[dict]:
        if seen is not None:
            seen.extend(entry["image"].permute(1, 2, 0).numpy() for entry in batch)
        return [{"instances": detections((entry["height"], entry["width"]), [[0.0] * 4], [0])[:0]} for entry in batch]

    return ImageDetector(model, input_format, lambda *_: T.NoOpTransform(), None, 0.5)


def test_a_drawing_replaces_only_drawings(photos: Path, clip: Path, tmp_path: Path) -> None:
    """Check photos beside an input, skipped and in another folder, and reruns that earlier ones or an interruption precede."""
    photo, own = photos / "turned.jpg", photos / "color.jpg"
    own.write_bytes(photo.read_bytes())
    (photos / "gray.jpg").write_bytes(b"raw data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for given, output, taken in (
        (photos / "color.png", photos, own),
        (photos / "gray.png", photos, photos / "gray.jpg"),
        (photos, elsewhere, elsewhere / "alpha.jpg"),
        (clip, elsewhere, elsewhere / "clip.mp4"),
    ):
        if not taken.exists():
            taken.write_bytes(photo.read_bytes())
        before = taken.read_bytes()
        with pytest.raises(UserError, match=f"the drawing {taken} would overwrite a file that is not"):
            run_predict(nothing(), find_inputs([str(given)]), str(output), {})
        assert taken.read_bytes() == before
    out = tmp_path / "out"
    for inputs, options in (
        ((photos, clip), PredictOptions()),
        ((clip,), None),
        ((photos,), PredictOptions(drawings=False)),
    ):
        run_predict(nothing(), find_inputs(list(map(str, inputs))), str(out), {}, options)
    with pytest.raises(KeyboardInterrupt), VideoWriter(str(out / "clip.mp4"), 10) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        raise KeyboardInterrupt
    (out / "detections.json").unlink()
    tree = run_predict(nothing(), find_inputs([str(photos), str(clip)]), str(out), {})
    assert {image["drawing"] for image in tree["images"]} >= {"clip.mp4", "turned.jpg"}
    frames = cv2.VideoCapture(str(out / "clip.mp4"))
    assert frames.get(cv2.CAP_PROP_FRAME_COUNT) == sum(image.get("drawing") == "clip.mp4" for image in tree["images"])


def test_a_drawing_in_place_of_a_linked_input(tmp_path: Path) -> None:
    (tmp_path / "input.jpg").symlink_to(tmp_path / "photo.jpg")
    check_inputs_are_kept([str(tmp_path / "other.jpg")], [str(tmp_path / "input.jpg")])
    with pytest.raises(UserError, match=rf"^--output: the drawing {tmp_path}/photo\.jpg would overwrite an input"):
        check_inputs_are_kept([str(tmp_path / "photo.jpg")], [str(tmp_path / "input.jpg")])


@pytest.mark.parametrize("input_format", ["RGB", "BGR", "L", "YUV-BT.601"])
def test_images_are_converted_to_the_input_format(photos: Path, tmp_path: Path, input_format: str) -> None:
    seen: list[np.ndarray] = []
    inputs = find_inputs([str(photos)])
    run_predict(nothing(input_format, seen), inputs, str(tmp_path / "out"), {})
    for image, source in zip(seen, inputs, strict=True):
        np.testing.assert_array_equal(image, read_image(source.path, input_format).astype(np.float32))


@pytest.mark.parametrize("type_", [np.uint8, np.float16, np.float64])
def test_arrays_of_values_from_0_to_255(type_: type) -> None:
    pixels = np.arange(60, dtype=type_).reshape(4, 5, 3)
    for image in (pixels, pixels[:, :, ::-1]):
        seen: list[np.ndarray] = []
        assert len(nothing(seen=seen).detect([image])) == 1
        np.testing.assert_array_equal(seen[0], image.astype(np.float32))


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((4, 5, 3), np.uint8), "of shape (5, 3) and type uint8"),
        ([np.zeros((4, 5), np.uint8)], "of shape (4, 5) and type uint8"),
        ([np.zeros((4, 5, 1), np.uint8)], "of shape (4, 5, 1) and type uint8"),
        ([np.zeros((4, 5, 4), np.uint8)], "of shape (4, 5, 4) and type uint8"),
        ([np.zeros((0, 5, 3), np.uint8)], "of shape (0, 5, 3) and type uint8"),
        ([np.zeros((4, 5, 3), np.int64)], "of shape (4, 5, 3) and type int64"),
        ([np.zeros((4, 5, 3), bool)], "of shape (4, 5, 3) and type bool"),
        ([torch.zeros(4, 5, 3)], "of type Tensor"),
    ],
)
def test_arrays_that_are_no_images(images: object, found: str) -> None:
    with pytest.raises(UserError) as caught:
        nothing().detect(images)
    assert str(caught.value) == (
        "`detect` takes a list of images, each a NumPy array of shape (height, width, 3) and type uint8 or float; "
        f"one is {found}."
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_an_image_that_is_gone_loses_no_detections_of_others(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: int
) -> None:
    inputs = find_inputs([str(photos)])
    (photos / "gray.png").unlink()
    with caplog.at_level("WARNING", "kd_d2"):
        tree = run_predict(nothing(), inputs, str(tmp_path / "out"), {}, PredictOptions(batch))
    assert [image["drawing"] for image in tree["images"]] == ["alpha.jpg", "color.jpg", "palette.jpg", "turned.jpg"]
    assert f"The image {photos / 'gray.png'} cannot be used: No such file or directory. It is left out." in caplog.text


def test_a_folder_in_place_of_the_file_is_refused_first(
    retinanet: Project, photos: Path, tmp_path: Path, predict: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "detections.json").mkdir(parents=True)
    with pytest.raises(SystemExit):
        predict(retinanet, tmp_path / "out", photos)
    assert "detections.json is a folder; remove it, or choose another output folder." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]
    (photos / "detections.json").mkdir()
    (photos / "color.png").rename(photos / "detections.json" / "color.png")
    with pytest.raises(UserError, match=r"color\.jpg needs a folder in place of detections\.json; rename that of"):
        run_predict(nothing(), find_inputs([str(photos)]), str(tmp_path / "other"), {})
    assert not (tmp_path / "other").exists()


@pytest.mark.timeout(60)
def test_named_pipes_are_skipped(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a folder's named pipe, which no process writes, is not opened."""
    os.mkfifo(photos / "pipe.png")
    os.mkfifo(photos / "pipe.mp4")
    with caplog.at_level("INFO", "kd_d2"):
        assert len(find_inputs([str(photos)])) == 5
    assert "Skipped 2 files that cannot be read as images or videos: pipe.mp4, pipe.png" in caplog.text


def test_only_the_first_page_is_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    pages[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert [found.name for found in find_inputs([str(tmp_path)])] == ["one.tif", "phone.jpg", "scan.tif"]
    cut = (tmp_path / "scan.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(cut[: len(cut) - 257])
    assert "cut.tif" in [found.name for found in find_inputs([str(tmp_path)])]
    said = [record.message for record in caplog.records if "scan.tif has" in record.message][:1]
    assert said == [f"{tmp_path / 'scan.tif'} has 3 pages or frames, of which only the first is used."]
