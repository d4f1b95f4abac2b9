"""Training in channels-last format, the default on CPUs: equal losses for every method, also after resuming."""

from __future__ import annotations

from pathlib import Path

from kd_d2 import DISTILLER_REGISTRY, KDMetaArch, UserError, load_config
from kd_d2.engine.step import DistillationStep
from kd_d2.memory_format import has_channels_last, trains_with_channels_last

import pytest
import torch
from helpers import WIDE, Run, detector_of, make_project, train
from torch import Tensor, nn

SMALL_ICD = {"MODEL__KD__ICD__DIM": 16, "MODEL__KD__ICD__NUM_HEADS": 2, "MODEL__KD__ICD__FFN_DIM": 32}
NEITHER = ("SOLVER.CHANNELS_LAST", False, "MODEL.KD.TEACHER.CHANNELS_LAST", False)


def _assert_same(ours: Run, expected: Run, iterations: range) -> None:
    for iteration in iterations:
        assert ours.losses[iteration] == pytest.approx(expected.losses[iteration], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("choice", [None, False, True])
def test_default_by_device(choice: bool | None) -> None:
    cfg = load_config("configs/tiny/retinanet-student.yaml")
    assert cfg.SOLVER.CHANNELS_LAST is cfg.MODEL.KD.TEACHER.CHANNELS_LAST is None
    for device in ("cpu", "cuda"):
        cfg.MODEL.DEVICE = device
        assert has_channels_last(cfg, choice) is (device == "cpu" if choice is None else choice)


@pytest.mark.parametrize("choice", [None, False, True])
def test_a_compiled_student_is_trained_with_it(choice: bool | None) -> None:
    cfg = load_config("configs/tiny/retinanet-student.yaml")
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.COMPILE, cfg.SOLVER.CHANNELS_LAST = True, choice
    assert trains_with_channels_last(cfg, nn.Conv2d(3, 4, 1)) is (choice is not False)


def test_narrow_strided_convolutions(tmp_path: Path) -> None:
    """Check that a model whose gradient crashes PyTorch in channels-last format is refused, and trains without it."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    run = train(project)
    weight = run.trainer.bare_model.student.backbone.bottom_up.res3[0].conv1.weight
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError) as caught:
        train(project, "SOLVER.CHANNELS_LAST", True)
    assert str(caught.value) == (
        "SOLVER.CHANNELS_LAST is True, but PyTorch crashes in the gradient of student.backbone.bottom_up.res3.0.shortcut, a strided 1x1 "
        "convolution with fewer than 16 channels, in channels-last format on a CPU; set it to False."
    )


@pytest.mark.parametrize("method", [name for name, _ in DISTILLER_REGISTRY])
def test_same_losses(tmp_path: Path, method: str) -> None:
    keys = {
        "MODEL__KD__DISTILLERS": (method,),
        "DATASETS__TEST": (),
        "SOLVER__BASE_LR": 0.001,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__IMS_PER_BATCH": 4,  # over the two positions that two images have on the last level, correlations are 1 or -1
        "SEED": 1,
        **SMALL_ICD,
        **WIDE,
    }
    detector = detector_of(method)
    expected = train(make_project(tmp_path / "plain", detector, **keys, SOLVER__STEPS=()), *NEITHER)
    ours = train(make_project(tmp_path / "last", detector, **keys, SOLVER__STEPS=()))
    _assert_same(ours, expected, range(2))


def test_resumed_training(tmp_path: Path) -> None:
    """Check the losses after resuming, the memory format, and that the weights are those of a contiguous training."""
    keys = {"SOLVER__BASE_LR": 0.001, "SOLVER__CHECKPOINT_PERIOD": 2, "SEED": 1, **WIDE}
    expected = train(make_project(tmp_path / "plain", **keys), *NEITHER)
    project = make_project(tmp_path / "last", **keys)
    train(project, "SOLVER.MAX_ITER", 2)
    resumed = train(project, resume=True)
    _assert_same(resumed, expected, range(2, len(expected.losses)))
    model = resumed.trainer.bare_model
    assert isinstance(model, KDMetaArch)
    for detector in (model.student, model.teacher.model):
        weight = next(p for p in detector.parameters() if p.ndim == 4 and min(p.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in expected.trainer.bare_model.student.state_dict().items():
        torch.testing.assert_close(model.student.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


class Summed(nn.Module):
    """A convolution whose squared output is the loss; it is called with a keyword."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer = layer

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        output = self.layer(input=maps[0])
        freed = [
            torch.full((size,), 1e30)
            for size in (self.layer.weight.numel(), self.layer.weight.numel() // 2, 4096, 2048, 256)
        ]
        del freed  # PyTorch's wrong gradients are what the memory held
        return {"loss": output.float().square().mean()}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "width", "mode"),
    [
        (3, 2, 1, 1, "zeros"),
        (7, 2, 3, 1, "zeros"),
        (3, 3, 1, 2, "zeros"),
        (2, 2, 1, 1, "zeros"),
        (4, 2, 2, 1, "zeros"),
        (5, 4, 1, 3, "zeros"),
        (7, 4, 2, 3, "zeros"),
        (3, 2, 1, 1, "replicate"),
    ],
)
def test_narrow_maps_in_bfloat16(kernel: int, stride: int, padding: int, width: int, mode: str) -> None:
    """Check the loss and the gradient of the weights under autocast against float32."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, kernel, stride, padding, padding_mode=mode)
    model = Summed(layer)
    maps = torch.randn(2, 64, 7, width)
    [expected] = model([maps]).values()
    [gradient] = torch.autograd.grad(expected, layer.weight)
    step = DistillationStep(model, torch.optim.SGD(layer.parameters()), {}, torch.bfloat16)
    [loss] = step._accumulate([maps]).values()
    torch.testing.assert_close(loss, expected.detach(), rtol=0.01, atol=0)
    assert (layer.weight.grad - gradient).abs().max() < 0.05 * gradient.abs().max()


def test_convolutions_are_unchanged_after_a_step_in_bfloat16() -> None:
    """Check, also after a failed step, that a convolution can be scripted and that a replaced forward pass is kept."""
    own, plain = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
    own.forward = replaced = lambda input: nn.Conv2d.forward(own, input)
    for layer in (own, plain):
        step = DistillationStep(Summed(layer), torch.optim.SGD(layer.parameters()), {}, torch.bfloat16)
        with pytest.raises(RuntimeError, match="to have 8 channels"):
            step._accumulate([torch.randn(1, 3, 2, 1)])
        step._accumulate([torch.randn(1, 8, 2, 1)])
    assert own.forward is replaced
    assert "forward" not in vars(plain)
    torch.jit.script(nn.Sequential(plain))
