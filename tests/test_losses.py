"""The pure losses: against kornia, against a slow independent implementation, and numbers worked out by hand."""

from kd_d2.losses import min_max_normalize, ssim_loss

import kornia
import numpy as np
import pytest
import torch
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2


def _maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher


def _slow_ssim_loss(student: np.ndarray, teacher: np.ndarray, window_size: int, max_val: float = 1.0) -> float:
    """(1 - SSIM) / 2 of one (H, W) pair, cell by cell, from the formula in the thesis."""
    half = window_size // 2
    offsets = np.arange(window_size) - half
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    s_padded, t_padded = (np.pad(x, half, mode="reflect") for x in (student, teacher))
    c1, c2 = C1 * max_val**2, C2 * max_val**2
    losses = []
    for y in range(student.shape[0]):
        for x in range(student.shape[1]):
            s = s_padded[y : y + window_size, x : x + window_size]
            t = t_padded[y : y + window_size, x : x + window_size]
            mean_s, mean_t = (window * s).sum(), (window * t).sum()
            var_s, var_t = (window * (s - mean_s) ** 2).sum(), (window * (t - mean_t) ** 2).sum()
            covariance = (window * (s - mean_s) * (t - mean_t)).sum()
            luminance = (2 * mean_s * mean_t + c1) / (mean_s**2 + mean_t**2 + c1)
            structure = (2 * covariance + c2) / (var_s + var_t + c2)
            losses.append((1 - luminance * structure) / 2)
    return float(np.mean(losses))


@pytest.mark.parametrize("window_size", [1, 3, 5, 11, 13])
def test_ssim_loss_equals_kornia_in_value_and_gradient(window_size: int) -> None:
    """Check that the loss and both gradients are kornia's to 1e-5."""
    ours = [x.requires_grad_() for x in _maps(2, 3, 9, 12)]
    theirs = [x.requires_grad_() for x in _maps(2, 3, 9, 12)]
    loss = ssim_loss(*ours, window_size=window_size)
    expected = kornia.losses.ssim_loss(*theirs, window_size=window_size, max_val=1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # A mean over n cells has gradients of the order of 1/n: compare those of the sum.
    (loss * ours[0].numel()).backward()
    (expected * theirs[0].numel()).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window_size", "max_val"), [(11, 1.0), (5, 1.0), (5, 4.0)])
def test_ssim_loss_equals_the_formula_cell_by_cell(window_size: int, max_val: float) -> None:
    """Check against an independent NumPy implementation with explicit windows: every channel is an image of its own."""
    student, teacher = (x * max_val for x in _maps(2, 2, 6, 7))
    expected = np.mean(
        [
            _slow_ssim_loss(student[b, c].double().numpy(), teacher[b, c].double().numpy(), window_size, max_val)
            for b in range(2)
            for c in range(2)
        ]
    )
    assert ssim_loss(student, teacher, window_size, max_val).item() == pytest.approx(expected, rel=1e-4)


def test_ssim_loss_gradient_is_the_slope_of_the_formula() -> None:
    """Check the gradient against finite differences of the slow implementation in float64."""
    student, teacher = _maps(1, 1, 5, 6)
    student.requires_grad_()
    ssim_loss(student, teacher, 5).backward()
    s, t = student.detach()[0, 0].double().numpy(), teacher[0, 0].double().numpy()
    step = 1e-5
    for y, x in [(0, 0), (2, 3), (4, 5), (1, 4)]:
        up, down = s.copy(), s.copy()
        up[y, x] += step
        down[y, x] -= step
        slope = (_slow_ssim_loss(up, t, 5) - _slow_ssim_loss(down, t, 5)) / (2 * step)
        assert student.grad[0, 0, y, x].item() == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_ssim_loss_of_constant_maps() -> None:
    """Check flat maps, where variances vanish and only the luminance term is left: hand-worked, finite gradients."""
    shape = (1, 2, 8, 8)
    zero, one = torch.zeros(shape, requires_grad=True), torch.ones(shape)
    loss = ssim_loss(zero, one)
    loss.backward()
    # l = C1 / (1 + C1), c = s = 1
    assert loss.item() == pytest.approx((1 - C1 / (1 + C1)) / 2, abs=1e-5)
    # d/da of -l/2 at a = 0, b = 1 is -1 / (1 + C1), spread over all cells
    assert zero.grad.sum().item() == pytest.approx(-1 / (1 + C1), rel=1e-3)
    half = torch.full(shape, 0.5, requires_grad=True)
    same = ssim_loss(half, half.detach().clone())
    same.backward()
    assert same.item() == pytest.approx(0.0, abs=1e-5)
    assert half.grad.abs().max().item() < 1e-3


def test_ssim_loss_ranges_from_equal_to_inverted() -> None:
    """Check that equal maps cost nothing, and inverted stripes more than unrelated ones, close to the largest value."""
    stripes = (torch.arange(12) % 2).float().expand(1, 1, 12, 12)
    noise = _maps(1, 1, 12, 12)[0]
    assert ssim_loss(stripes, stripes).item() == pytest.approx(0.0, abs=1e-5)
    inverted = ssim_loss(stripes, 1 - stripes).item()
    # in the middle mu = 1/2 and var = 1/4 for both, covariance -1/4
    assert inverted == pytest.approx((1 + (0.5 - C2) / (0.5 + C2)) / 2, abs=5e-3)
    assert 0.3 < ssim_loss(stripes, noise).item() < inverted - 0.2


@pytest.mark.parametrize("window_size", [0, -1, 2, 10, 9])
def test_ssim_loss_refuses_windows_that_do_not_fit(window_size: int) -> None:
    """Check even, empty and too large windows: on a side of 4 the largest is 7."""
    student, teacher = _maps(1, 1, 4, 9)
    with pytest.raises(
        ValueError, match=rf"window_size is {window_size}; on a map of \(4, 9\) it must be odd and at most 7"
    ):
        ssim_loss(student, teacher, window_size)
    assert 0 < ssim_loss(student, teacher, 7) < 1


def test_ssim_loss_refuses_maps_of_different_shape() -> None:
    """Check that maps which would broadcast are refused, naming both shapes."""
    with pytest.raises(ValueError, match=r"student \(1, 2, 8, 8\) and teacher \(1, 1, 8, 8\)"):
        ssim_loss(torch.rand(1, 2, 8, 8), torch.rand(1, 1, 8, 8))


def test_ssim_loss_is_float32_under_autocast_and_on_bfloat16_maps() -> None:
    """Check that mixed precision does not reach the loss: nearly equal maps, where bfloat16 would round it away."""
    student = _maps(1, 2, 12, 12)[0]
    teacher = student + 0.01 * _maps(1, 2, 12, 12, seed=1)[0]
    expected = ssim_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ssim_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    rounded = [x.bfloat16() for x in (student, teacher)]
    loss = ssim_loss(*rounded)
    assert loss.dtype == torch.float32
    assert loss.item() == ssim_loss(*(x.float() for x in rounded)).item()


STUDENT = torch.tensor([[0.0, 2.0], [4.0, 8.0]]).view(1, 2, 1, 2)
TEACHER = torch.tensor([[1.0, 1.0], [3.0, 5.0]]).view(1, 2, 1, 2)
NORMALIZED = {
    "sample": ([0.0, 0.25, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]),
    "channel": ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]),
    "joint": ([0.0, 0.25, 0.5, 1.0], [0.125, 0.125, 0.375, 0.625]),
    "none": ([0.0, 2.0, 4.0, 8.0], [1.0, 1.0, 3.0, 5.0]),
}


@pytest.mark.parametrize("scope", NORMALIZED)
def test_min_max_normalize_by_hand(scope: str) -> None:
    """Check every scope on two channels of two cells; a second sample of another range does not disturb the first."""
    student, teacher = (torch.cat([x, 10 * x + 5]) for x in (STUDENT, TEACHER))
    for normalized, expected in zip(min_max_normalize(student, teacher, scope), NORMALIZED[scope], strict=True):
        torch.testing.assert_close(normalized[0].flatten(), torch.tensor(expected))
        if scope != "none":
            torch.testing.assert_close(normalized[1], normalized[0])


def test_min_max_normalize_joint_takes_the_extremes_of_either() -> None:
    """Check a map that reaches above and one that reaches below, each as student and as teacher."""
    above, below = (torch.tensor(x).view(1, 1, 1, 2) for x in ([0.0, 3.0], [-1.0, 1.0]))
    for maps in ((above, below), (below, above)):
        normalized = {id(x): y.flatten().tolist() for x, y in zip(maps, min_max_normalize(*maps, "joint"), strict=True)}
        assert normalized == {id(above): [0.25, 1.0], id(below): [0.0, 0.5]}


@pytest.mark.parametrize("scope", ["sample", "channel", "joint"])
def test_min_max_normalize_gradient(scope: str) -> None:
    """Check the gradient, which also runs through smallest and largest value, numerically in float64."""
    student, teacher = _maps(2, 2, 3, 3, dtype=torch.float64)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: min_max_normalize(s, t, scope), inputs)


@pytest.mark.parametrize("scope", ["sample", "channel", "joint"])
def test_min_max_normalize_of_constant_maps(scope: str) -> None:
    """Check that a map without any range becomes zeros, with finite gradients."""
    student = torch.full((1, 2, 3, 3), 7.0, requires_grad=True)
    normalized, other = min_max_normalize(student, torch.full((1, 2, 3, 3), 7.0), scope)
    assert normalized.tolist() == torch.zeros(1, 2, 3, 3).tolist() == other.tolist()
    ((normalized - torch.rand(1, 2, 3, 3)) ** 2).mean().backward()
    assert student.grad.isfinite().all()


def test_min_max_normalize_refuses_an_unknown_scope() -> None:
    """Check that the error names the value and the choices."""
    with pytest.raises(ValueError, match="'batch'; it must be one of sample, channel, joint, none"):
        min_max_normalize(STUDENT, TEACHER, "batch")
