"""AdamW and the averaged student: values by hand, checkpoints, and exact resuming."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import UserError, load_config
from kd_d2.checkpoint import read_checkpoint
from kd_d2.engine.averaging import AveragedStudent, PreciseStatisticsOfAverage
from kd_d2.engine.optimizers import build_optimizers

import pytest
import torch
from helpers import KillAt, make_project, make_trainer, train
from torch import nn

KEYS = {
    "SEED": 3, "SOLVER__MAX_ITER": 6, "SOLVER__STEPS": (), "SOLVER__CHECKPOINT_PERIOD": 3, "SOLVER__EMA_DECAY": 0.9,
    "SOLVER__BASE_LR": 0.001,
}  # fmt: skip


def test_the_average_by_hand() -> None:
    """Check weights 0, 10, 20 with decays 1/10 (iteration 0) and 2/11, a buffer, and the exchange with the student."""
    student = nn.BatchNorm1d(1)
    averaged = AveragedStudent(student, decay=0.9)
    averaged.trainer = SimpleNamespace(iter=0)
    student.weight.data.zero_()  # as initial weights do, which are loaded later
    averaged.before_train()
    student.weight.data.fill_(10)
    student.running_mean.fill_(7)
    averaged.after_step()
    assert averaged.average.weight.item() == pytest.approx(9)
    averaged.trainer.iter = 1
    student.weight.data.fill_(20)
    averaged.after_step()
    expected = 9 * 2 / 11 + 20 * 9 / 11
    assert averaged.average.weight.item() == pytest.approx(expected)
    with averaged.in_place_of_student():
        assert student.weight.item() == pytest.approx(expected) and averaged.average.weight.item() == 20
    assert student.weight.item() == 20 and averaged.average.running_mean.item() == 7


def test_the_average_is_saved_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, **KEYS)
    seen = []
    trainer = make_trainer(project)
    monkeypatch.setattr(
        trainer, "test", lambda cfg, model: seen.append({k: v.clone() for k, v in model.student.state_dict().items()})
    )
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = read_checkpoint(str(project.output / "model_final.pth"))
    own = trainer.bare_model.student.state_dict()
    average = trainer.averaged.average.state_dict()
    assert any(not torch.equal(tensor, average[name]) for name, tensor in own.items())
    for name in own:
        torch.testing.assert_close(saved["model"][name], average[name], rtol=0, atol=0)
        torch.testing.assert_close(saved["unaveraged"][name], own[name], rtol=0, atol=0)
        torch.testing.assert_close(seen[0][name], average[name], rtol=0, atol=0)


def test_precise_statistics_are_those_of_the_average() -> None:
    """Check the weights that Detectron2's hook sees, that the student has its own again, and the statistics of both."""
    student, seen = nn.BatchNorm1d(1), []

    class Precise:
        def after_step(self) -> None:
            seen.append((student.weight.item(), self.trainer))
            student.running_mean.fill_(5)

    averaged = AveragedStudent(student, decay=0.9)
    averaged.average.weight.data.fill_(3)
    hook = PreciseStatisticsOfAverage(averaged, Precise())
    hook.trainer = "trainer"
    hook.after_step()
    assert seen == [(3, "trainer")] and student.weight.item() == 1
    assert student.running_mean.item() == averaged.average.running_mean.item() == 5


def test_precise_statistics_follow_the_average(tmp_path: Path) -> None:
    project = make_project(tmp_path, **KEYS, TEST__PRECISE_BN__ENABLED=True, TEST__PRECISE_BN__NUM_ITER=2)
    hooks = [type(hook).__name__ for hook in make_trainer(project)._hooks]
    order = [hooks.index(name) for name in ("AveragedStudent", "PreciseStatisticsOfAverage", "Checkpoints")]
    assert order == sorted(order) and "PreciseBN" not in hooks


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_precise_statistics_are_of_the_student_alone(tmp_path: Path, decay: float) -> None:
    """Check how often layers ran in an iteration and two further batches, also beside those of DiffKD, which run several times in each."""
    keys = {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2, "SOLVER__EMA_DECAY": decay}
    project = make_project(
        tmp_path, **keys, MODEL__KD__DISTILLERS=["ReviewKD", "DiffKD"], MODEL__KD__BALANCE__ENABLED=True
    )
    model = train(project, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()).trainer.bare_model
    runs = {int(n) for name, n in model.distillers.named_buffers() if name.endswith("num_batches_tracked")}
    assert runs == {1}
    assert model.student.backbone.fpn_output3.norm.num_batches_tracked == 3


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_an_averaged_training_is_resumed_exactly(tmp_path: Path, optimizer: str) -> None:
    keys = {**KEYS, "SOLVER__OPTIMIZER": optimizer}
    unbroken = train(make_project(tmp_path / "unbroken", **keys))
    project = make_project(tmp_path / "killed", **keys)
    train(project, hooks=(KillAt(4),))
    resumed = train(project, resume=True, seed=99)
    assert sorted(resumed.losses) == [3, 4, 5]
    for part in (lambda trainer: trainer.averaged.average, lambda trainer: trainer.bare_model.student):
        expected = part(unbroken.trainer).state_dict()
        for name, tensor in part(resumed.trainer).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_resumed_without_the_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the log reports what the training continues from."""
    project = make_project(tmp_path, **KEYS)
    train(project, hooks=(KillAt(4),))
    with caplog.at_level(logging.WARNING):
        train(project, "SOLVER.EMA_DECAY", 0.0, resume=True)
    assert "this one has none: it continues from the averaged weights" in caplog.text


def test_adamw_has_detectron2s_groups(tmp_path: Path) -> None:
    """Check the type, the weight decay of norms, and gradient clipping."""
    project = make_project(
        tmp_path, SOLVER__OPTIMIZER="AdamW", SOLVER__WEIGHT_DECAY=0.05, SOLVER__WEIGHT_DECAY_NORM=0.0
    )
    optimizer = make_trainer(project, "SOLVER.CLIP_GRADIENTS.ENABLED", True)._trainer.optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and "GradientClip" in type(optimizer).__name__
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_adamw_has_detectron2s_values_for_biases() -> None:
    """Check that SOLVER's weight decay and learning rate factor apply to biases alone."""
    biases = ["SOLVER.WEIGHT_DECAY_BIAS", 0.01, "SOLVER.BIAS_LR_FACTOR", 2.0]
    cfg = load_config("", ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.25, "SOLVER.WEIGHT_DECAY", 0.05, *biases])
    layer = nn.Linear(2, 3)
    optimizer, _ = build_optimizers(cfg, layer)
    values = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert values == {id(layer.weight): (0.25, 0.05), id(layer.bias): (0.5, 0.01)}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.OPTIMIZER", "Adam", "SOLVER.OPTIMIZER is 'Adam'; it must be one of 'SGD', 'AdamW'"),
        ("SOLVER.EMA_DECAY", 1.0, "SOLVER.EMA_DECAY is 1.0; it must be a number from 0 to below 1"),
    ],
)
def test_wrong_values(key: str, value: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config("", [key, value])
