"""Speed and size of detectors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from kd_d2 import benchmark
from kd_d2.benchmark import Candidate, table
from kd_d2.modeling.building import build_detector
from kd_d2.operations import multiply_adds

import numpy as np
import pytest
import torch
from helpers import data_arguments, make_project, run_command
from torch import nn


class Clock:
    """A time that passes only where a stand-in for a detector says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: self.now)


class Slow:
    """Takes a given time to resize and to detect, the first time ten times as long, and logs its calls."""

    input_format = "BGR"

    def __init__(self, name: str, clock: Clock, resizing: float, detecting: list[float], calls: list[str]):
        self.name, self.clock, self.resizing, self.detecting, self.calls = (
            name,
            clock,
            resizing,
            [10.0, *detecting],
            calls,
        )

    def prepare(self, image: np.ndarray) -> dict:
        self.clock.now += self.resizing
        return {"image": torch.zeros(3, *image.shape[:2])}

    def model(self, batch: list[dict]) -> None:
        self.calls.append(self.name)
        self.clock.now += self.detecting.pop(0) * len(batch)


def test_times_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check medians, ratios in the same round, turns, and that the first round does not count."""
    clock, calls = Clock(monkeypatch), []
    files = [tmp_path / "a", tmp_path / "b"]
    for size, file in enumerate(files, 1):
        file.write_bytes(b"x" * 1000 * size)
    first = Slow("first", clock, 0.001, [0.010, 0.020, 0.030], calls)
    second = Slow("second", clock, 0.002, [0.005, 0.010, 0.060], calls)
    candidates = [
        Candidate("first", "ONNX Runtime", first, (str(files[0]),)),
        Candidate("second", "OpenVINO", second, tuple(map(str, files))),
    ]
    ours, theirs = benchmark.benchmark(candidates, {"BGR": [np.zeros((4, 6, 3), np.uint8)]}, rounds=3, batch=2)
    assert calls == ["first", "second"] * 4
    assert (ours.ms, ours.resizing_ms, ours.ratio) == pytest.approx((20, 1, 1))
    assert (theirs.ms, theirs.resizing_ms, theirs.ratio) == pytest.approx((10, 2, 0.5))
    assert theirs.ms_90 == pytest.approx(10 + 0.8 * 50)
    assert (ours.input_size, ours.size_bytes, theirs.size_bytes) == ((4, 6), 1000, 3000)
    assert (ours.parameters, ours.multiply_adds) == (None, None)
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table([ours, theirs]).splitlines()]
    assert rows[3] == ["second", "OpenVINO", "4 x 6", "", "", "0.0", "2.0", "10.0", "50.0", "0.50"]


def test_multiply_adds_of_a_padded_image() -> None:
    """Check a convolution of 3 x 3 with stride 2 on 5 x 8 pixels, padded to 8 x 8."""
    backbone = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
    backbone.size_divisibility = 4
    model = nn.Module()
    model.backbone = backbone
    assert multiply_adds(model, 5, 8) == 4 * 4 * 2 * 3 * 9


@torch.no_grad()
def test_multiply_adds_of_a_deformable_resnet(tiny_cfg: Callable) -> None:
    """Check that a deformable stage adds the convolutions of the offsets and masks: 27 outputs for 3x3 inputs."""
    cfg = tiny_cfg("retinanet", {"MODEL": {"BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone"}}})
    cfg.MODEL.RESNETS.update(DEPTH=50, RES2_OUT_CHANNELS=8, WIDTH_PER_GROUP=2)
    plain = multiply_adds(build_detector(cfg).eval(), 64, 96)
    cfg.MODEL.RESNETS.update(DEFORM_ON_PER_STAGE=[False, False, False, True], DEFORM_MODULATED=True)
    channels, blocks, positions = 2 * 2**3, 3, (64 // 32) * (96 // 32)
    assert multiply_adds(build_detector(cfg).eval(), 64, 96) - plain == blocks * 27 * 9 * channels * positions


@torch.no_grad()
def test_multiply_adds_of_a_detector_with_masks(tiny_detector: Callable[..., nn.Module]) -> None:
    """Check that detections do not count, and that the thresholds are restored, also after an error."""
    model = tiny_detector("mask").eval()
    predictor = model.roi_heads.box_predictor
    counts = set()
    for threshold in (0.0, 1.0):
        predictor.test_score_thresh = threshold
        counts.add(multiply_adds(model, 64, 96))
        assert (predictor.test_score_thresh, model.proposal_generator.nms_thresh) == (threshold, 0.7)
    assert len(counts) == 1
    model.roi_heads.forward = None
    with pytest.raises(TypeError):
        multiply_adds(model, 64, 96)
    assert (predictor.test_score_thresh, model.proposal_generator.nms_thresh) == (1.0, 0.7)


def test_trained_and_exported_detectors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Check the program's table and file, with images of the config, and with named ones for an exported file alone."""
    project = make_project(tmp_path)
    data = data_arguments(project)
    model = ["--model", project.teacher, project.teacher_weights]
    exported = tmp_path / "student.ts"
    run_command("export", *model, "--output", exported, *data)
    capsys.readouterr()
    run_command("benchmark", *model, "--model", exported, "--rounds", 1, "--output", tmp_path / "speed.json", *data)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\| teacher +\| PyTorch, cpu +\| \d+ x \d+ ", lines[-4])
    assert re.match(r"\| student\.ts +\| TorchScript +\| \d+ x \d+ +\| +\| +\| ", lines[-3])
    assert lines[-1].startswith("6 images, 1 rounds; ")
    first, second = json.loads((tmp_path / "speed.json").read_text())["detectors"]
    weights = torch.load(project.teacher_weights)["model"]
    assert first["parameters"] == sum(
        x.numel() for n, x in weights.items() if not n.endswith(("running_mean", "running_var", "tracked"))
    )
    assert first["size_bytes"] == sum(x.numel() * x.element_size() for x in weights.values()) and first["ratio"] == 1
    assert second["size_bytes"] == exported.stat().st_size and second["input_size"] == first["input_size"]
    run_command("benchmark", "--model", exported, "--rounds", 1, "--images", tmp_path / "data" / "images")
    assert "6 images" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "a.onnx"], "Name images with --images: exported models name no dataset"),
    (["--model", "a.onnx", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
    (["--model", "a.onnx", "--batch", "-1"], "--batch is -1; it must be at least 1"),
    (["--model", "a.onnx", "--images", "b", "SOLVER.BASE_LR", "1"], "All models are exported, on which the override SOLVER.BASE_LR has no effect"),
    (["--model", "a.onnx", "--images", "nowhere"], "--images: there is no file or folder nowhere"),
])  # fmt: skip
def test_what_cannot_be_measured(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    """Check the sentence that names the option."""
    with pytest.raises(SystemExit):
        run_command("benchmark", *arguments)
    assert message in capsys.readouterr().err


def test_a_config_without_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    project = make_project(tmp_path)
    with pytest.raises(SystemExit):
        run_command("benchmark", "--model", project.teacher, project.teacher_weights, "DATASETS.TEST", "()")
    assert f"Name images with --images: {project.teacher} has no dataset in DATASETS.TEST" in capsys.readouterr().err
