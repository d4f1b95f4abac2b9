"""Compiled and channels-last detectors: equal results, unchanged weights, and a fallback if compilation fails."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType

from kd_d2 import Teacher
from kd_d2.checkpoint import read_checkpoint
from kd_d2.compiled import compile_backbone
from kd_d2.errors import UserError

import pytest
import torch
from helpers import WIDE, fixed_weights, make_project, train
from torch import Tensor, nn
from torch._dynamo.utils import counters

SIZES = {"MIN_SIZE_TRAIN": (256, 288), "MAX_SIZE_TRAIN": 512, "MIN_SIZE_TEST": 256, "MAX_SIZE_TEST": 512}
LARGE_IMAGES = {f"INPUT__{key}": size for key, size in SIZES.items()}  # no level is a single row or column
WANT = frozenset({"features", "dense"})
compiles = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture
def model(tiny_detector: Callable) -> nn.Module:
    detector = tiny_detector("retinanet")
    fixed_weights(detector)
    return detector


def _inputs(height: int, width: int) -> list[dict]:
    generator = torch.Generator().manual_seed(height)
    return [{"image": (255 * torch.rand(3, height, width, generator=generator)).byte()} for _ in range(2)]


def _assert_same(teacher: Teacher, expected: Teacher) -> None:
    for size in ((64, 96), (96, 64), (64, 64)):
        ours, theirs = (t(_inputs(*size), WANT) for t in (teacher, expected))
        for stride in theirs.features:
            _assert_close(ours.features[stride], theirs.features[stride])
            _assert_close(ours.dense.logits[stride], theirs.dense.logits[stride])


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """Assert equality within 1e-4 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_channels_last(model: nn.Module) -> None:
    teacher = Teacher(copy.deepcopy(model), channels_last=True)
    maps = teacher(_inputs(64, 96), WANT).features[8]
    assert maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    _assert_same(teacher, Teacher(model))


@pytest.mark.slow
@compiles
def test_compiled(model: nn.Module) -> None:
    """Check three image sizes, and that names and values of the weights are unchanged."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = Teacher(copy.deepcopy(model), compiled=True)
    _assert_same(teacher, Teacher(model))
    assert teacher.model.backbone.forward.fast is not teacher.model.backbone.forward.function
    after = teacher.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@compiles
def test_gradients_are_compiled_once_for_all_image_sizes() -> None:
    detector = nn.Module()
    detector.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
    detector.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(detector)
    compile_backbone(detector, "SOLVER.COMPILE", channels_last=True)
    graphs = _compilations()
    for size in ((64, 96), (96, 64), (128, 160)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        for model in (plain, detector):
            model.backbone(images).square().mean().backward()
    assert _compilations() == graphs + 1
    for ours, expected in zip(detector.parameters(), plain.parameters(), strict=True):
        _assert_close(ours.grad, expected.grad)


@compiles
def test_a_compiled_graph_is_retained_after_one_that_was_not() -> None:
    """Check what gradient balancing does after a resume, in a thread as autograd has it on a GPU."""
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    plain = copy.deepcopy(model.backbone)
    compile_backbone(model, "SOLVER.COMPILE")
    inputs = torch.rand(5, 8)

    def measure(backbone: nn.Module) -> list[Tensor]:
        loss = backbone(inputs).square().sum()
        parameters = list(backbone.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        return [*first, *torch.autograd.grad(loss, parameters)]

    model.backbone(inputs).square().sum().backward()
    with ThreadPoolExecutor() as threads:
        found = threads.submit(measure, model.backbone).result()
    for ours, expected in zip(found, measure(plain), strict=True):
        _assert_close(ours, expected)


def test_a_copy_of_a_compiled_backbone_has_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: function(x))
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    compile_backbone(model, "SOLVER.COMPILE")
    other = copy.deepcopy(model)
    nn.init.zeros_(other.backbone.weight)
    nn.init.zeros_(other.backbone.bias)
    images = torch.ones(1, 2)
    assert torch.equal(other.backbone(images), torch.zeros(1, 2))
    assert other.backbone.forward.fast is not other.backbone.forward.function and model.backbone(images).any()


def test_a_backward_pass_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one warning, and the gradients of the uncompiled backbone."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: {"p2": Fails.apply(function(x)["p2"])})
    said = []
    monkeypatch.setattr("kd_d2.compiled.logger.warning", said.append)
    model = nn.Module()
    model.backbone = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    model.backbone.forward = MethodType(lambda self, x: {"p2": self["layer"](x)}, model.backbone)
    compile_backbone(model, "SOLVER.COMPILE")
    for _ in range(2):
        model.backbone(torch.ones(1, 2))["p2"].sum().backward()
    assert said == ["SOLVER.COMPILE: compilation failed (no space left); the backbone runs uncompiled."]
    assert model.backbone["layer"].weight.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_compiler_that_cannot_be_loaded(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one warning, as when Inductor cannot create its cache folder, which it does when it is imported."""

    def fails(function, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/inductor")

    monkeypatch.setattr(torch, "compile", fails)
    said = []
    monkeypatch.setattr("kd_d2.compiled.logger.warning", said.append)
    images = torch.ones(1, 3, 64, 64)
    expected = model.backbone(images)
    compile_backbone(model, "SOLVER.COMPILE")
    for _ in range(2):
        found = model.backbone(images)
        assert all(torch.equal(found[name], x) for name, x in expected.items())
    reason = "[Errno 2] No such file or directory: '/proc/inductor'"
    assert said == [f"SOLVER.COMPILE: compilation failed ({reason}); the backbone runs uncompiled."]


def _compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_compiled_student(tmp_path: Path) -> None:
    """Check losses with images of several sizes, and names in the checkpoint, including averaged weights."""
    project = make_project(tmp_path, SEED=1, SOLVER__EMA_DECAY=0.5, **LARGE_IMAGES, **WIDE)
    graphs = _compilations()
    folders = {compiled: str(tmp_path / f"compiled-{compiled}") for compiled in (False, True)}
    plain, compiled = (
        train(project, "SOLVER.COMPILE", c, "OUTPUT_DIR", folder).losses for c, folder in folders.items()
    )
    assert _compilations() == graphs + 2  # training and evaluation
    for iteration, losses in plain.items():
        assert compiled[iteration] == pytest.approx(losses, rel=2e-3)
    first, second = (read_checkpoint(os.path.join(folder, "model_final.pth")) for folder in folders.values())
    assert first["model"].keys() == second["model"].keys() and first["unaveraged"].keys() == second["unaveraged"].keys()


@pytest.mark.parametrize("key", ["MODEL.KD.TEACHER.COMPILE", "SOLVER.COMPILE"])
def test_compiling_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Check one warning and the losses of uncompiled training."""

    def no_compiler(function, **options: object):
        def fail(*args: object) -> None:
            raise RuntimeError("no compiler\nand more")

        return fail

    project = make_project(tmp_path, SEED=1)
    expected = train(project).losses
    monkeypatch.setattr(torch, "compile", no_compiler)
    said = []
    monkeypatch.setattr("kd_d2.compiled.logger.warning", said.append)
    assert train(project, key, True).losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert said == [f"{key}: compilation failed (no compiler); the backbone runs uncompiled."]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("can't allocate memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_is_not_a_failed_compilation(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    images, calls = torch.zeros(1, 3, 64, 64), []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: calls.append(x) or function(x))
    compile_backbone(model, "SOLVER.COMPILE")
    compiled = model.backbone.forward
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "fast", fail)
        with pytest.raises(type(error)):
            model.backbone(images)
    model.backbone(images)
    assert len(calls) == 1


def test_a_model_without_a_backbone() -> None:
    with pytest.raises(
        UserError,
        match=r"^SOLVER\.COMPILE is True, but Linear has no backbone to compile; set it to False\.$",
    ):
        compile_backbone(nn.Linear(2, 2), "SOLVER.COMPILE")


def test_errors_of_the_backbone_itself_are_not_hidden(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(model.backbone, "forward", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Teacher(model, compiled=True)(_inputs(64, 64), WANT)
