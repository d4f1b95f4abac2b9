"""DiffKD: numbers of the authors' program, and the diffusion model by hand."""

from __future__ import annotations

from pathlib import Path

from kd_d2.adapters import DetectorOutputs
from kd_d2.distillers import DiffKD, Pair, diffusion
from kd_d2.distillers.diffusion import TIMES, Denoiser, NoisePredictor, signal_shares
from kd_d2.errors import UserError

import numpy as np
import pytest
import torch
from helpers import make, spec_of
from torch import Tensor, nn

pytestmark = pytest.mark.unit

FIXTURE = Path(__file__).parent / "fixtures" / "methods" / "diffkd.npz"


def outputs(maps: Tensor) -> DetectorOutputs:
    return DetectorOutputs(images=None, features={16: maps})


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=max(2e-6 * expected.abs().max().item(), 5e-6))


def test_losses_and_gradients_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the three losses, and the gradients of their sum, with the program's noise and times."""
    with np.load(FIXTURE) as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    noise = [values["noise.denoising"], values["noise.diffusion"]]
    monkeypatch.setattr(diffusion, "normal", lambda maps: noise.pop(0))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: (values["times"] + 0.5) / TIMES)
    method = make(DiffKD, spec_of({16: 6}), spec_of({16: 16}))
    rows = values["rows"]
    with torch.no_grad():
        for name, parameter in method.levels["16"].named_parameters():
            target = parameter[rows] if "time_embedding" in name else parameter
            assert target.shape == values[f"param.16.{name}"].shape
            if "time_embedding" in name:
                parameter[rows] = values[f"param.16.{name}"]
            else:
                parameter.copy_(values[f"param.16.{name}"])
    student = values["student.16"].requires_grad_()
    losses = method.scaled(method(outputs(student), outputs(values["teacher.16"]), []))
    sum(losses.values()).backward()
    for name in losses:
        assert_equal(losses[name], values[name.replace("_diffkd", "").replace("_aux", "")])
    assert_equal(student.grad, values["grad_student.16"])
    for name, parameter in method.levels["16"].named_parameters():
        gradient = parameter.grad[rows] if "time_embedding" in name else parameter.grad
        assert_equal(gradient, values[f"grad_param.16.{name}"])
    assert sum("grad_param" in name for name in values) == sum(1 for _ in method.parameters())


class Oracle(nn.Module):
    """Predicts the noise in maps whose clean version is known, at given times."""

    def __init__(self, clean: Tensor, times: list[int]):
        super().__init__()
        self.clean = clean
        self.times = iter(times)

    def forward(self, noisy: Tensor) -> Tensor:
        share = signal_shares()[next(self.times)]
        return (noisy - share.sqrt() * self.clean) / (1 - share).sqrt()


@pytest.mark.parametrize(("steps", "times"), [(1, [0]), (5, [400, 300, 200, 100, 0]), (3, [332, 166, 0])])
def test_denoising_with_an_oracle(steps: int, times: list[int]) -> None:
    """Check that maps become the clean ones if the noise at the time of each step is predicted perfectly."""
    denoiser, clean = Denoiser(4, steps), torch.randn(1, 4, 3, 5)
    denoiser.noise = oracle = Oracle(clean, times)
    torch.testing.assert_close(denoiser(torch.randn(1, 4, 3, 5)), clean, atol=1e-3, rtol=1e-3)
    assert next(oracle.times, None) is None


def test_denoising_without_noise_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check maps that are mixed one to one with zeros, in which no noise is predicted: they are scaled to the shares of each step."""
    denoiser, maps = Denoiser(4, 5), torch.randn(2, 4, 3, 5)
    monkeypatch.setattr(diffusion, "normal", torch.zeros_like)
    nn.init.zeros_(denoiser.share.logits.weight)
    nn.init.zeros_(denoiser.share.logits.bias)
    nn.init.zeros_(denoiser.noise.layers[3].weight)
    torch.testing.assert_close(denoiser(maps), maps / 2 / signal_shares()[400].sqrt(), rtol=1e-4, atol=1e-5)


def test_only_different_times_change_the_noise() -> None:
    """Check that equal times are not needed: batch normalization removes what the images have in common."""
    torch.manual_seed(0)
    predictor, maps = NoisePredictor(4), torch.randn(2, 4, 6, 5)
    noise = predictor(maps)
    torch.testing.assert_close(predictor(maps, torch.tensor([600, 600])), noise, rtol=1e-3, atol=1e-3)
    assert (predictor(maps, torch.tensor([100, 600])) - noise).abs().max() > 0.1


def test_shares_of_the_signal() -> None:
    """Check the first two, and that at the last time almost only noise is left."""
    shares = signal_shares()
    assert len(shares) == TIMES
    beta = 1e-4 + (0.02 - 1e-4) / 999
    assert shares[:2].tolist() == pytest.approx([1 - 1e-4, (1 - 1e-4) * (1 - beta)])
    assert shares[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_which_loss_trains_what() -> None:
    """Check that only the distillation loss reaches the student, and that neither it nor the diffusion loss reaches the autoencoder."""
    method = make(DiffKD, spec_of({16: 6}), spec_of({16: 8}), latent_channels=3)
    student = torch.randn(2, 6, 4, 4, requires_grad=True)
    losses = method(outputs(student), outputs(torch.randn(2, 8, 4, 4)), [])
    parameters = dict(method.levels["16"].named_parameters())
    reached = {}
    for name, loss in losses.items():
        tensors = {**parameters, "student": student}
        gradients = torch.autograd.grad(loss, tensors.values(), retain_graph=True, allow_unused=True)
        pairs = zip(tensors, gradients, strict=True)
        reached[name] = {key.partition(".")[0] for key, gradient in pairs if gradient is not None}
    assert reached == {
        "loss_diffkd": {"student", "reduce", "denoiser", "project"},
        "loss_diffkd_aux_diffusion": {"denoiser"},
        "loss_diffkd_aux_autoencoder": {"encoder", "decoder"},
    }
    assert method.levels["16"].encoder[0].out_channels == 3
    assert make(DiffKD, spec_of({16: 6}), spec_of({16: 8})).levels["16"].encoder[0].out_channels == 4


def test_the_residual_starts_from_the_encoded_features() -> None:
    """Check the first loss, that of features encoded alike, which does not train the encoder, and that it trains the last layer."""
    method = make(DiffKD, spec_of({16: 6}), residual=True)
    student, teacher = torch.randn(2, 6, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    loss = method(outputs(student), outputs(teacher), [])["loss_diffkd"]
    level = method.levels["16"]
    torch.testing.assert_close(loss, (level.encoder(student) - level.encoder(teacher)).square().mean())
    loss.backward()
    assert student.grad.abs().sum() > 0 and level.project[1].weight.grad.all()
    assert level.encoder[0].weight.grad is None and level.encoder[1].weight.grad is None
    assert method(outputs(teacher), outputs(teacher), [])["loss_diffkd"] == 0


def test_the_residual_needs_equal_channels() -> None:
    """Check the message, the default, and a student that imitates the first and third of four channels."""
    detectors = spec_of({16: 2}), spec_of({16: 4})
    with pytest.raises(UserError, match=r"^MODEL\.KD\.DIFFKD\.RESIDUAL is True, but at stride 16 the student has 2 "):
        make(DiffKD, *detectors, residual=True)
    assert make(DiffKD, *detectors, residual=None).levels["16"].reduce is not None
    method = DiffKD(DiffKD.Config(residual=None), Pair(*detectors, inherits_neck=True))
    teacher = torch.randn(2, 4, 4, 5)
    assert method.levels["16"].reduce is None and method.levels["16"].encoder[0].in_channels == 2
    assert method(outputs(teacher[:, [0, 2]]), outputs(teacher), [])["loss_diffkd"] == 0


def test_one_position() -> None:
    """Check the message if the normalization has nothing to normalize over."""
    method, maps = make(DiffKD, spec_of({16: 2})), torch.rand(1, 2, 1, 1)
    with pytest.raises(UserError, match=r"^DiffKD normalizes over .*MODEL\.KD\.DIFFKD\.NUM_LEVELS"):
        method(outputs(maps), outputs(maps), [])
    losses = method.eval()(outputs(maps), outputs(maps), [])  # as for a map of the loss
    assert losses["loss_diffkd"] == 0  # one value is normalized to 0


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("steps", 501), ("latent_channels", 0), ("weight", -1.0)])
def test_keys_out_of_range(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^DiffKD\.Config\.{key} is {value}; it must be"):
        make(DiffKD, spec_of({16: 2}), **{key: value})
