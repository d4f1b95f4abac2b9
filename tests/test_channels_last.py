"""Training with channels last in memory: the same losses and weights, before and after a stop, for every method."""

from __future__ import annotations

from pathlib import Path

from kd_d2 import DISTILLER_REGISTRY, KDMetaArch

import pytest
import torch
from helpers import Run, detector_of, make_project, train

SMALL_ICD = {"MODEL__KD__ICD__DIM": 16, "MODEL__KD__ICD__NUM_HEADS": 2, "MODEL__KD__ICD__FFN_DIM": 32}
BOTH = ("SOLVER.CHANNELS_LAST", True, "MODEL.KD.TEACHER.CHANNELS_LAST", True)


def _assert_same(ours: Run, expected: Run, iterations: range) -> None:
    for iteration in iterations:
        assert ours.losses[iteration] == pytest.approx(expected.losses[iteration], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("method", [name for name, _ in DISTILLER_REGISTRY])
def test_same_losses(tmp_path: Path, method: str) -> None:
    keys = {"MODEL__KD__DISTILLERS": (method,), "SOLVER__BASE_LR": 0.001, "SOLVER__MAX_ITER": 2, "SEED": 1, **SMALL_ICD}
    detector = detector_of(method)
    expected = train(make_project(tmp_path / "plain", detector, **keys, SOLVER__STEPS=()))
    ours = train(make_project(tmp_path / "last", detector, **keys, SOLVER__STEPS=()), *BOTH)
    _assert_same(ours, expected, range(2))


def test_resumed_training(tmp_path: Path) -> None:
    """Check the losses after a stop, the layout, and that the checkpoint is the plain student's."""
    keys = {"SOLVER__BASE_LR": 0.001, "SOLVER__CHECKPOINT_PERIOD": 2, "SEED": 1}
    expected = train(make_project(tmp_path / "plain", **keys))
    project = make_project(tmp_path / "last", **keys)
    train(project, *BOTH, "SOLVER.MAX_ITER", 2)
    resumed = train(project, *BOTH, resume=True)
    _assert_same(resumed, expected, range(2, len(expected.losses)))
    model = resumed.trainer.bare_model
    assert isinstance(model, KDMetaArch)
    for detector in (model.student, model.teacher.model):
        weight = next(p for p in detector.parameters() if p.ndim == 4 and min(p.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in expected.trainer.bare_model.student.state_dict().items():
        torch.testing.assert_close(model.student.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
