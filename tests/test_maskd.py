"""MasKD: masks, their shares, and losses by hand. tests/test_tokens.py has the numbers of the authors' programs."""

from __future__ import annotations

from kd_d2.distillers import MasKD
from kd_d2.distillers.maskd import ReceptiveTokens
from kd_d2.losses import mask_overlap, masked_imitation_loss

import pytest
import torch
from helpers import make, spec_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_shares_are_those_of_a_convolution(size: tuple[int, int]) -> None:
    tokens, maps = ReceptiveTokens(4, 3), torch.randn(2, 4, *size)
    expected = tokens.share(tokens.context(maps).mean((2, 3))).softmax(1)
    torch.testing.assert_close(tokens.shares(maps), expected)


def test_overlap_by_hand() -> None:
    """Check an image with three masks, of which two are equal and one is disjoint, and an image with equal masks."""
    first = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]]])
    assert mask_overlap(first).item() == pytest.approx(1 / 3)
    assert mask_overlap(torch.cat([first, torch.full_like(first, 0.5)])).item() == pytest.approx((1 / 3 + 1) / 2)


def test_imitation_by_hand() -> None:
    """Check two masks of two positions whose mean squared errors are 4 and 1."""
    student = torch.tensor([[[[2.0, 1.0]], [[2.0, 1.0]]]])
    masks = torch.tensor([[[[1.0, 1.0]], [[0.5, 0.0]]]])
    loss = masked_imitation_loss(student, torch.zeros_like(student), masks, torch.tensor([[0.25, 0.75]]))
    assert loss.item() == pytest.approx(0.25 * (4 + 1) / 2 + 0.75 * (0.25 * 4) / 0.5)


def test_imitation_in_empty_masks() -> None:
    """Check that masks of 0 everywhere give a loss of 0, not NaN."""
    student = torch.ones(1, 2, 1, 2)
    assert masked_imitation_loss(student, 0 * student, torch.zeros(1, 2, 1, 2), torch.full((1, 2), 0.5)) == 0


def test_masks_of_selected_channels() -> None:
    """Check that a student with every second channel of the teacher's has the same masks if these are equal in pairs."""
    method = make(MasKD, spec_of({8: 2}), spec_of({8: 4}), adaptation="select", token_iters=0, teacher_mask_iters=0)
    tokens = method.levels["8"]
    maps = torch.randn(1, 2, 3, 5)
    with torch.no_grad():
        tokens.tokens.copy_(torch.randn(6, 2).repeat_interleave(2, 1))
    selected = method.adaptation.selections["8"].channels
    torch.testing.assert_close(tokens.masks(maps, selected), tokens.masks(maps.repeat_interleave(2, 1)))


@pytest.mark.parametrize(
    ("family", "name", "weight"),
    [("one-stage", "RetinaNet", 7), ("one-stage", "FCOS", 10), ("two-stage", "GeneralizedRCNN", 1)],
)
def test_published_weights(family: str, name: str, weight: float) -> None:
    assert make(MasKD, spec_of({8: 2}, family, name)).weight == weight


@pytest.mark.parametrize(
    ("max_iter", "keys", "expected"),
    [(180_000, {}, 9200), (800, {"start_iter": 100}, 212), (800, {"token_iters": 5, "teacher_mask_iters": 0}, 5)],
)
def test_iterations_of_the_masks_of_the_teacher(max_iter: int, keys: dict, expected: int) -> None:
    assert make(MasKD, spec_of({8: 2}), max_iter=max_iter, **keys).teacher_masks_until == expected
