"""`kd-d2 analyze gradients`: gradient norms and cosines, by hand and from the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from kd_d2.analysis import Distillation, gradients
from kd_d2.analysis.gradients import DETECTION, GradientAnalysis, GradientStats, MethodWeight, measure_gradients
from kd_d2.config import load_config
from kd_d2.distillers import Schedule
from kd_d2.errors import UserError

import pytest
import torch
from detectron2.utils.events import get_event_storage
from helpers import make_project, run_command, save_fixed_weights, train
from torch import Tensor, nn

analyze = functools.partial(run_command, "analyze", "gradients")


class Neck(nn.Module):
    """Two levels with one position each, whose values are weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self) -> dict[str, Tensor]:
        return {"p3": self.weight[:1], "p4": self.weight[1:]}


class Slopes(nn.Module):
    """Losses that are linear in the backbone's weights (1, 1), with slopes from the batch, and a loss of a decoder."""

    def __init__(self):
        super().__init__()
        self.student = nn.Module()
        self.student.backbone = Neck()
        self.student.head = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.student.head.weight)
        self.adapter = SimpleNamespace(by_stride=lambda named: {8: named["p3"], 16: named["p4"]})
        self.decoder = nn.Parameter(torch.ones(()))
        self.distillers = {
            "One": SimpleNamespace(
                loss_names=("loss_one", "loss_one_aux_own", "loss_one_idle"), aux_loss_names=("loss_one_aux_own",)
            )
        }
        self.iterations: list[int] = []

    def forward(self, batch: dict[str, list[float]]) -> dict[str, Tensor]:
        self.iterations.append(get_event_storage().iter)
        backbone, head = torch.cat([*self.student.backbone().values()]), self.student.head.weight[0]
        return {
            "loss_cls": backbone @ torch.tensor(batch["cls"]) + 100 * head.sum(),
            "loss_box": backbone @ torch.tensor(batch["box"]),
            "loss_one": backbone @ torch.tensor(batch["one"]),
            "loss_one_aux_own": 3 * self.decoder,
            "loss_one_idle": torch.zeros(()),
        }


def test_gradients_are_means_of_ratios_and_cosines_over_the_shared_parameters() -> None:
    """Check two batches: detection gradients (3, 0) and (0, 4); the method's (6, 0), which is parallel, and (6, -2)."""
    model = Slopes()
    batches = [
        {"cls": [1.0, 0.0], "box": [2.0, 0.0], "one": [6.0, 0.0]},
        {"cls": [0.0, 3.0], "box": [0.0, 1.0], "one": [6.0, -2.0]},
    ]
    found = measure_gradients(model, batches, iteration=7)
    assert list(found) == [DETECTION, "loss_one", "loss_one_aux_own", "loss_one_idle", "One"]
    assert found["One"] == found["loss_one"]
    assert (found[DETECTION].norm_ratio, found[DETECTION].cosine) == pytest.approx((1, 1))
    assert found[DETECTION].loss == pytest.approx((203 + 204) / 2)
    one = found["loss_one"]
    assert one.loss == pytest.approx((6 + 4) / 2)
    assert one.norm_ratio == pytest.approx((6 / 3 + 40**0.5 / 4) / 2)
    assert one.cosine == pytest.approx((1 - 2 / 40**0.5) / 2)
    for name, loss in (("loss_one_aux_own", 3), ("loss_one_idle", 0)):
        assert (found[name].loss, found[name].norm_ratio, found[name].cosine) == (loss, 0, 0)
    assert found[DETECTION].levels == pytest.approx({"8": 0.5, "16": 0.5})
    assert one.levels == pytest.approx({"8": (1 + 6 / 40**0.5) / 2, "16": 2 / 40**0.5 / 2})
    assert found["loss_one_idle"].levels == {"8": 0.0, "16": 0.0}
    assert model.iterations == [7, 7]
    assert all(p.grad is None and (p == 1).all() for p in model.parameters())


def test_what_is_measured_and_the_suggested_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Check batches, seed and iteration, by default the last, weights 4 * 2 / 0.5 and none, and inactive methods."""
    model, seen = (
        SimpleNamespace(distillers={name: SimpleNamespace(weight=w) for name, w in (("A", 4.0), ("B", 1.0))}),
        [],
    )
    model.schedules = {"A": Schedule(), "B": Schedule(end=89)}
    model.train = lambda: model

    def measure(model: SimpleNamespace, batches: Iterable[int], iteration: int) -> dict[str, GradientStats]:
        seen.append((list(batches), iteration, torch.initial_seed()))
        ratios = {DETECTION: 1.0, "loss_a": 0.5, "loss_b": 0.0, "A": 0.5, "B": 0.0}
        return {name: GradientStats(3.0, ratio, -0.25) for name, ratio in ratios.items()}

    monkeypatch.setattr(gradients, "build_for_training", lambda distillation: model)
    monkeypatch.setattr(gradients, "build_stream_loader", lambda cfg, seed: range(10 * seed, 10 * seed + 10))
    monkeypatch.setattr(gradients, "measure_gradients", measure)
    cfg = load_config(str(make_project(tmp_path, SOLVER__MAX_ITER=90, SOLVER__STEPS=()).student))
    before = torch.initial_seed()
    for seed, options in ((7, {}), (-1, {"batches": 2, "iteration": 0})):
        cfg.SEED = seed
        found = GradientAnalysis.run([Distillation("one", cfg, "")], str(tmp_path / "found"), **options)
    assert seen == [([70, 71, 72, 73], 89, 7), ([0, 1], 0, 0)]
    assert torch.initial_seed() == before  # the caller's random numbers go on
    assert capsys.readouterr().out == "B is not active in iteration 89; choose another with --iteration.\n"
    assert found.methods == {"A": MethodWeight(0.5, 4.0, 16.0), "B": MethodWeight(0.0, 1.0, None)}
    losses, methods = found.tables()
    assert losses.rows == [
        ["detection", "3", "1", "-0.250"],
        ["loss_a", "3", "0.5", "-0.250"],
        ["loss_b", "3", "0", "-0.250"],
    ]
    assert methods.rows == [["A", "0.5", "4", "16"], ["B", "0", "1", "-"]]
    assert methods.headers[-1] == "WEIGHT for 2" and "\n\nEach method alone.\n\n| method" in found.summary()


def test_a_backbone_that_is_not_trained_is_refused() -> None:
    model = Slopes()
    model.student.backbone.requires_grad_(False)
    with pytest.raises(UserError, match="FREEZE_AT"):
        measure_gradients(model, [], 0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[dict[str, tuple[float, ...]], str]]:
    """Return a function that runs the command and returns the numbers of its tables by row, and its output."""

    def run(*arguments: object) -> tuple[dict[str, tuple[float, ...]], str]:
        capsys.readouterr()
        analyze(*arguments)
        printed = capsys.readouterr().out
        rows = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
        names = [row[0].strip() for row in rows]
        rows = rows[: names.index("loss, by stride")]
        numbers = {
            row[0].strip(): row[1:] for row in rows if row[0].strip() not in ("loss", "method") and "--" not in row[0]
        }
        return {
            name: tuple(None if n.strip() == "-" else float(n) for n in row) for name, row in numbers.items()
        }, printed

    return run


METHODS = {
    "MODEL__KD__DISTILLERS": ("StructuralKD", "ICD", "FGFI"),
    "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 0,
    "MODEL__KD__INHERIT__ENABLED": True,
    "SOLVER__MAX_ITER": 1,
    "SOLVER__STEPS": (),
}


def test_from_the_beginning_and_from_checkpoints(tmp_path: Path, run: Callable) -> None:
    """Check all rows, the effect of weights, inheritance, and which layers are loaded from a checkpoint."""
    project = make_project(tmp_path, **METHODS)
    call = functools.partial(run, "--output", tmp_path / "found", "--batches", 1)
    begun, _ = call("--model", project.student)
    assert begun.keys() == {
        DETECTION,
        "loss_structural",
        "loss_icd",
        "loss_icd_aux_objectness",
        "loss_icd_aux_box",
        "loss_fgfi",
        *METHODS["MODEL__KD__DISTILLERS"],
    }
    assert begun[DETECTION][1:] == (1, 1)
    assert all(begun[name][1] > 0 for name in ("loss_structural", "loss_icd", "loss_fgfi"))
    assert begun["loss_icd_aux_objectness"][1:] == (0, 0)
    assert not (tmp_path / "output").exists()
    for method, weight, target in (("StructuralKD", 4, 2), ("FGFI", 0.01, 2)):
        ratio, now, wanted = begun[method]
        assert (now, wanted) == (weight, pytest.approx(weight * target / ratio, rel=1e-2))
    balanced, _ = call("--model", project.student, "MODEL.KD.BALANCE.ENABLED", True, "MODEL.KD.BALANCE.TARGET", 4.0)
    assert balanced["loss_fgfi"] == begun["loss_fgfi"]
    assert balanced["FGFI"][2] == pytest.approx(2 * begun["FGFI"][2], rel=1e-2)

    doubled, _ = call("--model", project.student, "MODEL.KD.STRUCTURAL.WEIGHT", 8.0)
    assert doubled["loss_structural"][:2] == pytest.approx([2 * x for x in begun["loss_structural"][:2]], rel=1e-2)
    assert doubled["loss_structural"][2] == pytest.approx(begun["loss_structural"][2], abs=2e-3)
    alone, _ = call("--model", project.student, "MODEL.KD.INHERIT.ENABLED", False)
    assert alone[DETECTION][0] != pytest.approx(begun[DETECTION][0], rel=1e-3)
    for iteration, has_gradient in ((4, False), (5, True)):
        late, _ = call("--model", project.student, "--iteration", iteration, "MODEL.KD.ICD.DETACH_STUDENT_ITERS", 5)
        assert (late["loss_icd"][1] > 0) == has_gradient

    train(project)
    trained, printed = call("--model", project.student, project.output / "model_final.pth")
    assert trained.keys() == begun.keys() and "as a training begins" not in printed
    plain = tmp_path / "plain.pth"
    save_fixed_weights(project.teacher, plain)
    _, printed = call("--model", project.student, plain)
    assert "The layers of ICD keep initial weights" in printed and "layers of StructuralKD" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", 0], "--batches is 0"),
        (["--iteration", -1], "--iteration is -1"),
        (["nowhere.pth"], "nowhere.pth"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "must be the config of a distillation"),
        (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    tmp_path: Path, arguments: list, message: str, capsys: pytest.CaptureFixture
) -> None:
    project = make_project(tmp_path, **METHODS)
    with pytest.raises(SystemExit) as stop:
        analyze("--output", tmp_path / "found", "--model", project.student, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
