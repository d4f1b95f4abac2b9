"""FreeKD: the wavelet transform and its loss by hand. tests/test_tokens.py has the numbers of the authors' program."""

from __future__ import annotations

from pathlib import Path

from kd_d2.distillers.freekd import FrequencyPrompts
from kd_d2.losses import detail_loss, haar_transform, inverse_haar_transform

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.unit

FIXTURE = Path(__file__).parent / "fixtures" / "methods" / "freekd.npz"


def test_haar_transform_by_hand() -> None:
    """Check a 2 x 2 map: half of its sum, and half of the differences of rows, of columns and of diagonals."""
    approximation, (details,) = haar_transform(torch.tensor([[[[1.0, 2.0], [4.0, 9.0]]]]), 1)
    assert approximation.flatten().tolist() == [8]
    assert details.flatten().tolist() == [-5, -3, 2]


def test_haar_transform_of_odd_sizes() -> None:
    """Compare with PyWavelets, as the authors' program uses it."""
    with np.load(FIXTURE) as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    approximation, details = haar_transform(values["odd.maps"], 3)
    torch.testing.assert_close(approximation, values["odd.approximation"])
    for scale, detail in enumerate(details):
        torch.testing.assert_close(detail, values[f"odd.details.{scale}"])


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 3), (8, 12), (7, 9)])
def test_the_inverse_transform_restores_the_maps(size: tuple[int, int]) -> None:
    """Check also that the transform keeps the norm."""
    maps = torch.randn(2, 4, *size, dtype=torch.float64)
    approximation, details = haar_transform(maps, 3)
    torch.testing.assert_close(inverse_haar_transform(approximation, details, size), maps)
    norm = approximation.square().sum() + sum(detail.square().sum() for detail in details)
    torch.testing.assert_close(norm, maps.square().sum())


def test_detail_loss_by_hand() -> None:
    """Check two scales of a 4 x 4 map: a position differs at the finest scale, a quarter of the map at the next."""
    difference = torch.zeros(1, 1, 4, 4)
    difference[..., :2, :2] = torch.tensor([[3.0, 1.0], [1.0, 1.0]])  # sum 6, differences 2, 2, 2
    fine = torch.tensor([[[[0.5, 1.0], [1.0, 1.0]]]])
    coarse = torch.tensor([[[[0.25]]]])
    loss = detail_loss(difference, torch.zeros_like(difference), [fine, coarse])
    assert loss.item() == pytest.approx(0.5 * 3 * (2 / 2) / 12 + 0.25 * 3 * (3 / 2) / 3)


def test_a_constant_difference_is_no_detail() -> None:
    maps = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    masks = [torch.ones(1, 1, size, size) for size in (4, 2, 1)]
    assert detail_loss(maps + 5, maps, masks) == pytest.approx(0, abs=1e-12)


def test_gradients_reach_only_the_student() -> None:
    student, teacher = (torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    masks = [torch.rand(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda maps: detail_loss(maps, teacher, masks), student)
    detail_loss(student, teacher, masks).backward()
    assert teacher.grad is None and masks[0].grad is None


def test_masks_of_zero_tokens_halve_the_features_per_token() -> None:
    """Check that every mask of tokens of zero is 1/2, so that four tokens double the features, and that all masks overlap."""
    prompts = FrequencyPrompts(channels=3, number=4, scales=2)
    torch.nn.init.zeros_(prompts.tokens)
    maps = torch.randn(2, 3, 5, 6)
    masked, overlap = prompts.masked(maps)
    torch.testing.assert_close(masked, 2 * maps)
    assert overlap.item() == pytest.approx(3)
    assert [mask.unique().tolist() for mask in prompts.mean_masks(maps)] == [[0.5], [0.5]]
