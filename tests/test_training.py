"""End-to-end training and evaluation, on images of 64 to 96 pixels and detectors of a few thousand parameters."""

import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

from kd_d2 import Teacher, UserError
from kd_d2.adapters import RetinaNetAdapter
from kd_d2.checkpoint import CLASS_NAMES, read_checkpoint
from kd_d2.distillers import DISTILLER_REGISTRY, ICD, Distiller, feature_imitation, gid
from kd_d2.engine import KDTrainer, setup
from kd_d2.engine import trainer as trainer_module
from kd_d2.engine.folder_lock import unlock_folder
from kd_d2.engine.step import NonFiniteLossError
from kd_d2.inheritance import component_of
from kd_d2.random_state import get_random_state, preserved_random_state, set_random_state

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from helpers import (
    META_ARCHITECTURES,
    ROOT,
    KillAt,
    Project,
    Run,
    clean_process,
    detector_of,
    make_project,
    make_trainer,
    methods_of,
    run_train_net,
    save_fixed_weights,
    train,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DETECTORS = ("retinanet", "faster-rcnn")
OWN_LOSSES = {
    "retinanet": {"loss_cls", "loss_box_reg"},
    "fcos": {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"},
    "atss": {"loss_atss_cls", "loss_atss_box", "loss_atss_centerness"},
    "gfl": {"loss_gfl_quality", "loss_gfl_box", "loss_gfl_distribution"},
    "fsaf": {"loss_fsaf_cls", "loss_fsaf_box"},
    "reppoints": {"loss_reppoints_cls", "loss_reppoints_init", "loss_reppoints_refine"},
    "faster-rcnn": {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"},
}
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
SMALL_ICD = {
    "MODEL__KD__ICD__DIM": 16,
    "MODEL__KD__ICD__NUM_HEADS": 2,
    "MODEL__KD__ICD__FFN_DIM": 32,
    "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 2,
}
SEVERAL_METHODS = {
    "MODEL__KD__DISTILLERS": ("FeatureImitation", "StructuralKD", "ICD"),
    "MODEL__KD__FEATURE_IMITATION__ADAPTATION": "1x1",
    "MODEL__KD__FEATURE_IMITATION__WEIGHT": 0.1,
    "MODEL__KD__STRUCTURAL__WARMUP_ITERS": 4,
    **SMALL_ICD,
}


@pytest.fixture(params=DETECTORS)
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    return make_project(tmp_path, request.param)


@pytest.fixture
def retinanet(tmp_path: Path) -> Project:
    return make_project(tmp_path, "retinanet")


def assert_same(found: dict, expected: dict, iterations: range, tolerance: float = 1e-5) -> None:
    assert list(found) == list(iterations)
    for iteration in iterations:
        assert found[iteration] == pytest.approx(expected[iteration], rel=tolerance, abs=tolerance), iteration


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.trainer.checkpointer.model.state_dict()


# --------------------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_goes_on_as_if_unbroken(project: Project) -> None:
    """Check losses and final weights of a training killed after a checkpoint, with evaluations in between.

    The resumed process starts with other random numbers, which would reveal any state that is not restored.
    """
    project.change(**SEVERAL_METHODS, SOLVER__MAX_ITER=7, SOLVER__STEPS=(5,), SOLVER__CHECKPOINT_PERIOD=3)
    # Small steps: even on a CPU, equal trainings are not bitwise equal, and large steps amplify the differences.
    project.change(SOLVER__BASE_LR=0.001, TEST__EVAL_PERIOD=2)
    unbroken = train(project, "OUTPUT_DIR", project.folder / "unbroken")
    killed = train(project, hooks=(KillAt(4),))
    assert (project.output / "last_checkpoint").read_text() == "model_latest.pth"  # evaluated after iteration 3
    resumed = train(project, resume=True, seed=12345)
    assert_same(killed.losses, unbroken.losses, range(5))
    assert_same(resumed.losses, unbroken.losses, range(4, 7))
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, weights(unbroken)[name], rtol=1e-5, atol=1e-6)
    assert resumed.losses[6]["loss_feature_imitation"] > 0


def names_of_losses(run: Run) -> set[str]:
    """Return the names of all methods' losses."""
    return {name for distiller in run.trainer.bare_model.distillers.values() for name in distiller.loss_names}


@pytest.mark.parametrize("detector", ["fcos", "atss", "gfl", "fsaf", "reppoints"])
def test_dense_detectors_are_distilled_and_resumed(tmp_path: Path, detector: str) -> None:
    """Check methods that use predictions, and ICD, on each detector; resuming must not change the losses."""
    project = make_project(tmp_path, detector, **SMALL_ICD)
    methods = ("RankMimicking", "PFI", "SoftLabel", "ICD")
    project.change(MODEL__KD__DISTILLERS=methods, MODEL__KD__INHERIT__ENABLED=True, SOLVER__BASE_LR=0.001)
    project.change(SOLVER__MAX_ITER=4, SOLVER__STEPS=(), SOLVER__CHECKPOINT_PERIOD=2)
    unbroken = train(project, "OUTPUT_DIR", project.folder / "unbroken")
    train(project, hooks=(KillAt(2),))
    resumed = train(project, resume=True, seed=12345)
    assert_same(resumed.losses, unbroken.losses, range(2, 4), tolerance=1e-4)
    own = names_of_losses(unbroken)
    assert unbroken.losses[0].keys() == OWN_LOSSES[detector] | own
    assert all(math.isfinite(value) for losses in unbroken.losses.values() for value in losses.values())


@pytest.mark.parametrize("detector", ["retinanet", "faster-rcnn"])
def test_all_methods_at_once(tmp_path: Path, detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check all methods of a detector together: one teacher forward pass and at most one assignment per iteration."""
    methods = methods_of(detector)
    assert len(methods) == (23 if detector == "retinanet" else 19)
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=methods, **SMALL_ICD)
    project.change(SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SOLVER__BASE_LR=0.001)
    calls = {"teacher": 0, "assignment": 0}

    def counted(what: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            calls[what] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Teacher, "__call__", counted("teacher", Teacher.__call__))
    monkeypatch.setattr(RetinaNetAdapter, "assign", counted("assignment", RetinaNetAdapter.assign))
    run = train(project)
    own = names_of_losses(run)
    assert run.losses[1].keys() == OWN_LOSSES[detector] | own
    assert all(math.isfinite(value) for losses in run.losses.values() for value in losses.values())
    assert calls == {"teacher": 2, "assignment": 2 if detector == "retinanet" else 0}
    layers = {name.split(".")[0] for name in read_checkpoint(str(project.output / "model_final.pth"))["distillers"]}
    assert layers >= {
        "IMA",
        "FGFI",
        "DeFeat",
        "FKD",
        "ICD",
        "MGD",
        "FGD",
        "ReviewKD",
        "DiffKD",
        "FRS",
        "MasKD",
        "FreeKD",
    }


class Waits(TorchDispatchMode):
    """Counts operations that make a CPU wait for its GPU, since it needs the size or the value of their result."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, operator = torch.ops.aten, function.overloadpacket
        waiting = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, torch.ops.torchvision.nms)
        self.count += operator in waiting
        if operator in (aten.index, aten.index_put, aten.index_put_):
            self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


def test_methods_do_not_wait_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check each method's forward pass after label assignment: only GID's NMS waits, as the size of its result varies.

    Two of ICD's are on data that is already on the CPU; the other four are checks of `one_hot` that run only on a CPU.
    """
    monkeypatch.setattr(gid, "CANDIDATES", 200)  # with more boxes, torchvision's NMS takes another path, only on a CPU
    methods = methods_of("retinanet")
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=methods, **SMALL_ICD)
    project.change(SOLVER__MAX_ITER=1, SOLVER__STEPS=(), MODEL__KD__ICD__DETACH_STUDENT_ITERS=0)
    waits: dict[str, Waits] = {name: Waits() for name in methods}

    class Watched(HookBase):
        def before_train(self) -> None:
            for name, distiller in self.trainer.bare_model.distillers.items():
                distiller.register_forward_pre_hook(self.begin(waits[name]))
                distiller.register_forward_hook(lambda *_, wait=waits[name]: wait.__exit__(None, None, None))

        @staticmethod
        def begin(wait: Waits) -> Callable:
            def begin(distiller: Distiller, inputs: tuple) -> None:
                student = inputs[0]
                assert len(student.dense.positives.image)
                wait.__enter__()

            return begin

    train(project, hooks=(Watched(),))
    assert {name: wait.count for name, wait in waits.items()} == {**dict.fromkeys(methods, 0), "GID": 1, "ICD": 2 + 4}


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    """Check that all three generators are restored, including the cached second number of a normal pair."""

    def draws() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(())), random.random(), np.random.rand()]

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    draws()
    torch.save(get_random_state(), tmp_path / "state.pth")
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draws() == expected
    with preserved_random_state():
        draws()
    after = draws()
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    draws()
    assert draws() == after


def test_a_run_with_a_random_seed_is_resumed_with_it(retinanet: Project) -> None:
    """Check that SEED -1 draws a seed once, and that a resumed training keeps it."""
    retinanet.change(SEED=-1, SOLVER__MAX_ITER=6, SOLVER__CHECKPOINT_PERIOD=3, SOLVER__BASE_LR=0.001)
    killed = train(retinanet, hooks=(KillAt(4),), seed=1)
    resumed = train(retinanet, resume=True, seed=2)
    both = {iteration: resumed.losses[iteration] for iteration in (3, 4)}
    assert_same(both, killed.losses, range(3, 5))
    other = train(retinanet, "OUTPUT_DIR", retinanet.folder / "other", seed=3)
    assert other.trainer.seed != killed.trainer.seed == resumed.trainer.seed


def test_evaluation_leaves_the_training_alone(tmp_path: Path) -> None:
    """Check that a training with random sampling has the same losses with and without evaluations."""
    project = make_project(tmp_path, "faster-rcnn", SOLVER__BASE_LR=0.001)
    without = train(project, "OUTPUT_DIR", tmp_path / "without")
    between = train(project, "TEST.EVAL_PERIOD", 1)
    assert_same(between.losses, without.losses, range(4))


def test_seeds(retinanet: Project) -> None:
    """Check that SEED determines the order of the data."""
    retinanet.change(SOLVER__BASE_LR=0.001)
    first, second = (train(retinanet, "SOLVER.MAX_ITER", 2) for _ in range(2))
    assert first.trainer.seed == 0
    other = train(retinanet, "SEED", 1, "SOLVER.MAX_ITER", 2)
    assert_same(second.losses, first.losses, range(2))
    assert other.losses[0] != first.losses[0]


def test_each_process_draws_its_own_numbers(retinanet: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that SEED and the rank determine the random numbers of a training; also keys for speed."""
    draws, precise = [], []
    monkeypatch.setattr(sys.modules[setup.__module__], "set_float32_precision", precise.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        args = {"config_file": str(retinanet.student), "opts": ["SEED", "0", "CUDNN_BENCHMARK", "True"]}
        with clean_process(), preserved_random_state():
            setup(Namespace(**args, resume=False, eval_only=False, eval_teacher=False))
            draws.append(torch.rand(()).item())
    unlock_folder(str(retinanet.output))
    assert [cfg.SEED for cfg in precise] == [0, 0] and torch.backends.cudnn.benchmark
    with preserved_random_state():
        assert draws == [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in (0, 1)]


def test_resuming_never_inherits(retinanet: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the teacher's neck and head are copied only before the first iteration, not on resume."""
    calls = []

    def count(student, teacher, modules, inherit=trainer_module.inherit, **options):
        calls.append(modules)
        return inherit(student, teacher, modules, **options)

    monkeypatch.setattr(trainer_module, "inherit", count)
    retinanet.change(MODEL__KD__INHERIT__ENABLED=True, SOLVER__CHECKPOINT_PERIOD=2)
    train(retinanet, hooks=(KillAt(2),))
    train(retinanet, resume=True)
    assert len(calls) == 1


def test_inherited_weights_are_where_training_starts(retinanet: Project) -> None:
    """Check the student with a learning rate of 0: neck and head are the teacher's, the stem is not."""
    retinanet.change(MODEL__KD__INHERIT__ENABLED=True, SOLVER__BASE_LR=0.0, SOLVER__WEIGHT_DECAY=0.0)
    run = train(retinanet, "SOLVER.MAX_ITER", 1)
    teacher = read_checkpoint(str(retinanet.teacher_weights))["model"]
    own = dict(run.trainer.bare_model.student.named_parameters())
    same = {name for name, tensor in own.items() if torch.equal(tensor, teacher[name])}
    inherited = {name for name in own if not name.startswith("backbone.bottom_up")}
    assert inherited <= same
    assert "backbone.bottom_up.stem.conv1.weight" not in same


def test_a_narrower_neck_inherits_unless_the_key_is_false(retinanet: Project) -> None:
    save_fixed_weights(retinanet.change_teacher(MODEL__FPN__OUT_CHANNELS=24), retinanet.teacher_weights)
    retinanet.change(MODEL__KD__INHERIT__ENABLED=True, SOLVER__BASE_LR=0.0, SOLVER__WEIGHT_DECAY=0.0)
    retinanet.change(MODEL__KD__FEATURE_IMITATION__ADAPTATION=None)
    own = train(retinanet, "SOLVER.MAX_ITER", 1).trainer.bare_model.student.state_dict()["head.cls_score.weight"]
    teacher = read_checkpoint(str(retinanet.teacher_weights))["model"]["head.cls_score.weight"]
    assert torch.equal(own, teacher[:, [channel for channel in range(24) if channel % 3 != 2]])
    with pytest.raises(UserError, match="no weight of the teacher's neck and head"):
        train(retinanet, "MODEL.KD.INHERIT.WEIGHT_SELECTION", False)


@pytest.mark.parametrize("names", [None, ["red", "green", "blue", "cyan", "pink"]])
def test_a_teacher_with_more_classes(
    retinanet: Project, caplog: pytest.LogCaptureFixture, names: list[str] | None
) -> None:
    """Check that features are compared and all layers but those of the classes inherited, with and without known names."""
    caplog.set_level("INFO", "kd_d2")
    save_fixed_weights(retinanet.change_teacher(MODEL__RETINANET__NUM_CLASSES=5), retinanet.teacher_weights)
    teacher = read_checkpoint(str(retinanet.teacher_weights))["model"]
    torch.save({"model": teacher, **({CLASS_NAMES: names} if names else {})}, retinanet.teacher_weights)
    retinanet.change(MODEL__KD__INHERIT__ENABLED=True, SOLVER__BASE_LR=0.0, SOLVER__WEIGHT_DECAY=0.0)
    run = train(retinanet, "SOLVER.MAX_ITER", 1)
    assert run.losses[0]["loss_feature_imitation"] > 0
    own = dict(run.trainer.bare_model.student.named_parameters())
    foreign = {
        name
        for name, tensor in own.items()
        if component_of(name) != "bottom_up" and not torch.equal(tensor, teacher[name])
    }
    assert foreign == {"head.cls_score.weight", "head.cls_score.bias"}
    assert (
        f"The teacher has 5 classes and the dataset {retinanet.name} 3: only its features can be used." in caplog.text
    )


@pytest.mark.slow
def test_a_killed_process_can_be_resumed(retinanet: Project) -> None:
    """Check a real SIGKILL at a random moment: the last checkpoint is complete, and training continues from it."""
    retinanet.change(SOLVER__MAX_ITER=2000, SOLVER__CHECKPOINT_PERIOD=1)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(retinanet.student)]
    with open(retinanet.folder / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.time() + 120
        while (
            not (retinanet.output / "model_0000005.pth").exists() and process.poll() is None and time.time() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (retinanet.folder / "log").read_text()[-2000:]
    last = retinanet.output / (retinanet.output / "last_checkpoint").read_text()
    done = read_checkpoint(str(last))["iteration"] + 1
    resumed = train(retinanet, "SOLVER.MAX_ITER", done + 2, resume=True)
    assert list(resumed.losses) == [done, done + 1]


# ---------------------------------------------------------------------------------------------------- the step


def test_training_changes_the_student_alone(project: Project) -> None:
    """Check that student and adaptation layers change, and that the teacher is bitwise unchanged and in eval mode."""
    project.change(MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1", SOLVER__CHECKPOINT_PERIOD=1)
    run = train(project)
    teacher = run.trainer.bare_model.teacher.model
    for name, tensor in read_checkpoint(str(project.teacher_weights))["model"].items():
        assert torch.equal(teacher.state_dict()[name], tensor)
    assert not any(module.training for module in teacher.modules())
    first, last = (read_checkpoint(str(project.output / f"model_{i}.pth")) for i in ("0000000", "final"))
    for part in ("model", "distillers"):
        moved = {name for name, tensor in last[part].items() if not torch.equal(first[part][name], tensor)}
        still = {n for n in last[part].keys() - moved if not n.startswith(("proposal_generator", "roi_heads"))}
        assert not still - {"pixel_mean", "pixel_std"}
        assert moved


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects_train(tmp_path: Path, detector: str) -> None:
    """Check that losses and weights are finite with background only, and that evaluation does not fail."""
    project = make_project(tmp_path, detector)
    project.change_annotations(lambda tree: tree.update(annotations=[]))
    run = train(project)
    for losses in run.losses.values():
        assert losses.keys() == OWN_LOSSES[detector] | {"loss_feature_imitation"}
        assert all(math.isfinite(value) for value in losses.values())
        assert losses["loss_box_reg"] == 0
        assert losses["loss_cls"] > 0
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_a_loss_that_is_not_finite_stops_the_training(retinanet: Project, capfd: pytest.CaptureFixture) -> None:
    """Check message and exit status, and that the last checkpoint is of the previous iteration, with finite weights."""
    broken = read_checkpoint(str(retinanet.teacher_weights))
    broken["model"]["backbone.fpn_output4.weight"][0, 0, 0, 0] = math.nan
    torch.save(broken, retinanet.teacher_weights)
    retinanet.change(MODEL__KD__FEATURE_IMITATION__START_ITER=2, SOLVER__CHECKPOINT_PERIOD=1)
    with pytest.raises(SystemExit) as caught:
        retinanet.main()
    out, err = capfd.readouterr()
    said = (
        "In iteration 2 the loss loss_feature_imitation is nan: lower SOLVER.BASE_LR; "
        f"--resume continues from {retinanet.output / 'model_0000001.pth'}."
    )
    assert caught.value.code == 2
    assert err.splitlines()[-1] == f"error: {said}"
    assert "Traceback" not in out + err
    assert said in (retinanet.output / "log.txt").read_text()
    assert (retinanet.output / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (retinanet.output / "model_0000002.pth").exists()
    assert not (retinanet.output / "train.json").exists()
    saved = read_checkpoint(str(retinanet.output / "model_0000001.pth"))["model"]
    assert all(tensor.isfinite().all() for tensor in saved.values())


class Remember(HookBase):
    """Keeps the detector, which would be lost with the exception."""

    def before_train(self) -> None:
        self.detector = self.trainer.checkpointer.model


def test_a_bad_iteration_does_not_reach_the_weights(retinanet: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that after the error all parameters are those of the previous iteration."""
    calls = []

    def turns_infinite(student, teacher, original=feature_imitation.mean_squared_error):
        calls.append(1)
        return original(student, teacher) * (math.inf if len(calls) > 2 * 5 else 1)  # five levels; the third iteration

    monkeypatch.setattr(feature_imitation, "mean_squared_error", turns_infinite)
    memory = Remember()
    with pytest.raises(NonFiniteLossError, match=r"^In iteration 2 the loss loss_feature_imitation is inf: lower "):
        train(retinanet, "SOLVER.CHECKPOINT_PERIOD", 1, hooks=(memory,))
    saved = read_checkpoint(str(retinanet.output / "model_0000001.pth"))["model"]
    for name, tensor in memory.detector.named_parameters():
        assert torch.equal(tensor, saved[name])


def test_weights_that_are_not_finite_are_never_saved(retinanet: Project) -> None:
    """Check that weights broken by a NaN gradient, with finite losses, do not replace the last checkpoint."""

    class BreakWeights(HookBase):
        def before_step(self) -> None:
            if self.trainer.iter == 2:
                for parameter in self.trainer.checkpointer.model.head.parameters():
                    parameter.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(UserError) as caught:
        train(retinanet, "SOLVER.CHECKPOINT_PERIOD", 1, hooks=(BreakWeights(),))
    assert str(caught.value) == (
        "Checkpoint model_0000002.pth is not written, since the weight head.cls_subnet.0.weight is not finite; checkpoints "
        "already written are intact."
    )
    assert sorted(p.name for p in retinanet.output.glob("model*")) == ["model_0000000.pth", "model_0000001.pth"]
    assert (retinanet.output / "last_checkpoint").read_text() == "model_0000001.pth"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_mixed_precision(project: Project, dtype: str, device: str) -> None:
    """Check that losses under autocast are close to those in float32, and that weights stay in float32."""
    project.change(MODEL__DEVICE=device)
    # Images so large that no map is 1x1, where torch 2.14's gradients of bfloat16 convolutions are not always finite.
    project.change(**SEVERAL_METHODS, INPUT__MIN_SIZE_TRAIN=(256,), INPUT__MAX_SIZE_TRAIN=400, SOLVER__BASE_LR=0.001)
    expected = train(project, "OUTPUT_DIR", project.folder / "float32", "SOLVER.MAX_ITER", 1).losses[0]
    run = train(project, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "SOLVER.MAX_ITER", 2)
    assert run.losses[0] != expected
    for name, value in run.losses[0].items():
        tolerance = 0.5 if name == "loss_box_reg" and "loss_rpn_cls" in expected else 0.03  # proposals differ
        assert value == pytest.approx(expected[name], rel=tolerance, abs=0.01), name
    assert run.losses[1].keys() == expected.keys()
    assert all(t.dtype == torch.float32 for t in weights(run).values() if t.is_floating_point())
    assert run.trainer._trainer.scaler.is_enabled() == (dtype == "float16")


# Rounding changes GID's choice between nearly equal instances, and DIST's logits, which it correlates, by 1 %.
AMP_TOLERANCE = {"GID": 1.0, "DIST": 0.1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", sorted(dict(DISTILLER_REGISTRY)))
def test_every_method_in_mixed_precision(tmp_path: Path, method: str, dtype: str, device: str) -> None:
    """Check that autocast changes a method's losses only by rounding, and that they are finite in the second step."""
    keys = {"MODEL__KD__DISTILLERS": (method,), "MODEL__DEVICE": device, "DATASETS__TEST": (), **SMALL_ICD}
    project = make_project(tmp_path, detector_of(method), **keys)
    # No map is 1x1, see test_mixed_precision.
    project.change(INPUT__MIN_SIZE_TRAIN=(160,), INPUT__MAX_SIZE_TRAIN=240, SOLVER__BASE_LR=0.001, SOLVER__STEPS=())
    expected = train(project, "OUTPUT_DIR", project.folder / "float32", "SOLVER.MAX_ITER", 1).losses[0]
    run = train(project, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "SOLVER.MAX_ITER", 2)
    for name in names_of_losses(run):
        tolerance = AMP_TOLERANCE.get(method, 0.03)
        assert run.losses[0][name] == pytest.approx(expected[name], rel=tolerance, abs=1e-3), name
        assert math.isfinite(run.losses[1][name]), name


# ICD's fake instances and DKD's proposals depend on the device's generator.
DRAWS_ON_ITS_DEVICE = {"ICD", "DKD"}


def equal_on_all_devices(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function of random numbers that draws the same ones on every device."""

    def draw(*size: int, device: object = None, dtype: object = None) -> torch.Tensor:
        return function(*size, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)

    return draw


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", sorted(dict(DISTILLER_REGISTRY)))
def test_every_method_on_a_gpu(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that losses, with balancing and pictures of proposals, are equal on CPU and GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for function in (torch.rand, torch.randn):
        monkeypatch.setattr(torch, function.__name__, equal_on_all_devices(function))
    project = make_project(tmp_path, detector_of(method), MODEL__KD__DISTILLERS=(method,), **SMALL_ICD)
    project.change(MODEL__KD__BALANCE__ENABLED=True, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), VIS_PERIOD=1)
    expected, found = (
        train(project, "MODEL.DEVICE", device, "OUTPUT_DIR", project.folder / device).losses[0]
        for device in ("cpu", "cuda")
    )
    assert found == pytest.approx(expected, rel=0.1 if method in DRAWS_ON_ITS_DEVICE else 5e-3, abs=1e-4)


# ----------------------------------------------------------------------------------------------- golden losses


def golden_run(folder: Path) -> dict[str, dict[str, float]]:
    """Return losses of six iterations of two methods, from weights and images that no library's generator affects."""
    project = make_project(
        folder,
        "retinanet",
        **SEVERAL_METHODS | {"MODEL__KD__DISTILLERS": ("FeatureImitation", "StructuralKD")},
        MODEL__WEIGHTS=str(folder / "student.pth"),
        MODEL__KD__INHERIT__ENABLED=True,
        MODEL__KD__INHERIT__MODULES=("head",),
        SOLVER__MAX_ITER=6,
        SOLVER__STEPS=(4,),
        SOLVER__BASE_LR=0.002,
    )
    save_fixed_weights(project.teacher, folder / "student.pth", seed=2)
    hook = FixedAdaptation()
    return {str(i): losses for i, losses in train(project, hooks=(hook,)).losses.items()}


class FixedAdaptation(HookBase):
    """Sets the adaptation layers, which are initialized randomly, to the identity."""

    def before_train(self) -> None:
        for layer in self.trainer.bare_model.distillers["FeatureImitation"].adaptation.layers.values():
            torch.nn.init.dirac_(layer.weight)
            torch.nn.init.zeros_(layer.bias)


def test_golden_losses(tmp_path: Path) -> None:
    """Check every loss of a tiny training against stored values, so that results do not change unintentionally.

    `python tests/test_training.py` rewrites the file.
    """
    found, expected = golden_run(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == expected.keys()
    for iteration, losses in expected.items():
        assert found[iteration] == pytest.approx(losses, rel=1e-3, abs=1e-4), iteration


# --------------------------------------------------------------------------------------------- the program


def detections(folder: Path) -> list[dict]:
    found = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    return sorted(found, key=lambda d: (d["image_id"], -d["score"]))


def assert_same_detections(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["category_id"] == theirs["category_id"]
        assert ours["bbox"] + [ours["score"]] == pytest.approx(theirs["bbox"] + [theirs["score"]], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("detector", OWN_LOSSES)
def test_the_plain_student_trains_with_the_same_program(tmp_path: Path, detector: str) -> None:
    """Check that META_ARCHITECTURE alone selects plain training: no teacher, distillation loss or distiller."""
    project = make_project(tmp_path, detector)
    project.teacher.unlink()
    project.teacher_weights.unlink()
    results = project.main("MODEL.META_ARCHITECTURE", META_ARCHITECTURES[detector])
    assert "AP" in results["bbox"]
    saved = json.loads((project.output / "train.json").read_text())
    found = results["bbox"]["AP50"]
    assert saved["bbox"]["AP50"] == (None if math.isnan(found) else pytest.approx(found))  # JSON has no NaN
    content = read_checkpoint(str(project.output / "model_final.pth"))
    assert "distillers" not in content
    metrics = json.loads((project.output / "metrics.json").read_text().splitlines()[0])
    assert {key for key in metrics if key.startswith("loss_")} == OWN_LOSSES[detector]


def test_losses_are_logged_apart(retinanet: Project) -> None:
    """Check that the log and the metrics name each loss of the student and of the methods."""
    retinanet.change(**SEVERAL_METHODS)
    retinanet.main()
    names = OWN_LOSSES["retinanet"] | {"loss_feature_imitation", "loss_structural", *ICD.loss_names}
    metrics = json.loads((retinanet.output / "metrics.json").read_text().splitlines()[0])
    assert {key for key in metrics if key.startswith("loss_")} == names
    assert metrics["total_loss"] == pytest.approx(sum(metrics[name] for name in names), rel=0.5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert peak / 2 < metrics["peak_memory_mib"] <= peak
    assert logging.getLogger("detectron2.engine.train_loop").filters == []
    text = (retinanet.output / "log.txt").read_text()
    assert all(f"{name}: " in text for name in names)
    assert list(retinanet.output.glob("events.out.tfevents*"))


def test_eval_only_needs_no_teacher(project: Project) -> None:
    """Check that the student is evaluated from its checkpoint alone, with the detections of the end of training."""
    project.change(MODEL__RETINANET__SCORE_THRESH_TEST=0.0, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    trained = project.main()
    expected = detections(project.output)
    project.teacher.unlink()
    project.teacher_weights.unlink()
    evaluated = project.main(
        "--eval-only", "MODEL.WEIGHTS", project.output / "model_final.pth", "OUTPUT_DIR", project.folder / "eval"
    )
    assert evaluated["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    assert_same_detections(detections(project.folder / "eval"), expected)
    assert json.loads((project.folder / "eval" / "eval.json").read_text()).keys() == {"bbox"}


def test_resuming_a_finished_training_only_evaluates(retinanet: Project) -> None:
    """Check the message, the results, and that they are recorded under the iteration of the end."""
    trained = retinanet.main()
    assert retinanet.main("--resume")["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    assert "The training has already finished: SOLVER.MAX_ITER is 4, " in (retinanet.output / "log.txt").read_text()
    lines = [json.loads(line) for line in (retinanet.output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [4, 4]


def test_a_finished_training_with_other_settings_is_not_taken_for_this_one(retinanet: Project, capsys) -> None:
    """Check that its config stays as it is, and that fewer iterations or other loading processes are accepted."""
    retinanet.main()
    before = (retinanet.output / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        retinanet.main("--resume", "INPUT.FORMAT", "BGR")
    expected = "has done 4 of 4 iterations, with other settings (INPUT.FORMAT RGB, now its default): choose another OUTPUT_DIR."
    assert expected in capsys.readouterr().err
    assert (retinanet.output / "config.yaml").read_text() == before
    retinanet.main("--resume", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "1")


def test_eval_only_with_resume_evaluates_the_last_checkpoint(retinanet: Project) -> None:
    """Check the weights, as in Detectron2, and TEST.EXPECTED_RESULTS, which ends the program if they differ."""
    retinanet.change(MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    trained = retinanet.main()
    retinanet.change(MODEL__WEIGHTS=str(retinanet.teacher_weights))
    assert retinanet.main("--eval-only", "--resume")["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    other = retinanet.main("--eval-only")["bbox"]
    assert other != pytest.approx(trained["bbox"], nan_ok=True)
    with pytest.raises(SystemExit):
        retinanet.main("--eval-only", "TEST.EXPECTED_RESULTS", [["bbox", "AP", other["AP"] + 2, 1]])


def test_results_are_written_before_they_are_verified(retinanet: Project, capfd: pytest.CaptureFixture) -> None:
    """Check a missed value and a task without results after a training."""
    with pytest.raises(SystemExit) as caught:
        retinanet.main("TEST.EXPECTED_RESULTS", [["bbox", "AP", 200, 1]])
    assert caught.value.code == 1
    written = retinanet.output / "train.json"
    assert json.loads(written.read_text()).keys() == {"bbox"}
    written.unlink()
    with pytest.raises(SystemExit) as caught:
        retinanet.main("--resume", "TEST.EXPECTED_RESULTS", [["segm", "AP", 1, 200]])
    assert caught.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: TEST.EXPECTED_RESULTS names the task 'segm', but the results are those of bbox."
    )
    assert written.exists()


def test_eval_teacher(project: Project) -> None:
    """Check that evaluating the teacher before training, alone, and as a plain model gives the same result."""
    thresholds = {"MODEL__RETINANET__SCORE_THRESH_TEST": 0.0, "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    project.change(**thresholds)
    project.change_teacher(**thresholds)
    project.main("--eval-teacher")
    before = detections(project.output / "teacher")
    assert (project.output / "model_final.pth").exists()

    project.main("--eval-only", "--eval-teacher", "OUTPUT_DIR", project.folder / "alone")
    assert_same_detections(detections(project.folder / "alone" / "teacher"), before)
    assert not list((project.folder / "alone").glob("*.pth"))
    results = [json.loads((f / "teacher.json").read_text())["bbox"] for f in (project.output, project.folder / "alone")]
    assert results[0] == pytest.approx(results[1], nan_ok=True)

    data = [
        "DATASETS.COCO_JSON",
        [[project.name, str(project.annotations), str(project.annotations.parent / "images")]],
    ]
    plain = ["OUTPUT_DIR", project.folder / "plain", "MODEL.WEIGHTS", project.teacher_weights, *data]
    run_train_net(
        "--config-file", project.teacher, "--eval-only", *plain, "DATASETS.TEST", [project.name], "DATASETS.TRAIN", ()
    )
    assert_same_detections(detections(project.folder / "plain"), before)


def test_eval_teacher_of_another_channel_order(retinanet: Project) -> None:
    """Check that a BGR teacher of an RGB student has the detections of the equivalent RGB teacher."""
    retinanet.change_teacher(MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    retinanet.main("--eval-only", "--eval-teacher")
    expected = detections(retinanet.output / "teacher")
    content = read_checkpoint(str(retinanet.teacher_weights))
    stem = content["model"]["backbone.bottom_up.stem.conv1.weight"]
    stem.copy_(stem.flip(1))
    for key in ("pixel_mean", "pixel_std"):
        if key in content["model"]:
            content["model"][key] = content["model"][key].flip(0)
    torch.save(content, retinanet.teacher_weights)
    retinanet.change_teacher(
        INPUT__FORMAT="BGR", MODEL__PIXEL_MEAN=[103.53, 116.28, 123.675], MODEL__PIXEL_STD=[57.375, 57.12, 58.395]
    )
    retinanet.main("--eval-only", "--eval-teacher")
    assert_same_detections(detections(retinanet.output / "teacher"), expected)


class OwnTrainer(KDTrainer):
    """Overrides what Detectron2's projects usually do."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(model.parameters(), lr=1e-5)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        return build_detection_train_loader(cfg)


def test_overrides_of_the_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check Detectron2's own loader and another optimizer, and that a resumed training says that its batches begin anew."""
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=["ICD"], **SMALL_ICD)
    opts = "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0
    trainer = make_trainer(project, *opts, trainer=OwnTrainer)
    assert isinstance(trainer.optimizer, torch.optim.RMSprop)
    decoder = {id(p) for p in trainer._trainer.auxiliary["icd"].params}
    assert decoder
    assert not decoder & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainer.resume_or_load(resume=False)
    assert not isinstance(trainer._trainer.data_loader, torch.utils.data.DataLoader)
    trainer.train()
    assert "begin anew" not in caplog.text
    trainer = make_trainer(project, *opts, "SOLVER.MAX_ITER", 4, trainer=OwnTrainer)
    trainer.resume_or_load(resume=True)
    assert "The batches of OwnTrainer.build_train_loader begin anew" in caplog.text


def test_the_seed_of_an_own_loader(tmp_path: Path) -> None:
    """Check that `build_train_loader` gets the seed of the training, also if the config has none, and the batches start there.

    Precise BN has a loader of its own.
    """
    seeds = []

    class Seeded(KDTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
            seeds.append(cfg.SEED)
            return super().build_train_loader(cfg)

    trainer = make_trainer(make_project(tmp_path), "SEED", -1, "TEST.PRECISE_BN.ENABLED", True, trainer=Seeded)
    trainer.start_iter = 3
    trainer.resume_or_load(resume=False)
    assert seeds == [trainer.seed] * 2
    assert trainer.seed >= 0
    assert trainer._trainer.data_loader.batch_sampler.start == 3
    assert trainer.cfg.SEED == -1


def test_metrics_of_an_own_evaluator(tmp_path: Path) -> None:
    """Check one that only its own class knows, and that it is not checked without periodic evaluation."""

    class Counting(KDTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
            evaluator = DatasetEvaluator()
            evaluator.evaluate = lambda: {"images": 6.0}
            return evaluator

    project = make_project(tmp_path)
    metric = "TEST.BEST_METRIC", "images"
    trainer = make_trainer(project, *metric, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 1, trainer=Counting)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert json.loads((project.output / "model_best.json").read_text()) == {"images": 6.0}
    make_trainer(project, *metric)
    with pytest.raises(UserError, match=r"^TEST\.BEST_METRIC is 'images', which the evaluation of"):
        make_trainer(project, *metric, "TEST.EVAL_PERIOD", 1)


@pytest.mark.slow
def test_two_processes_on_a_cpu(retinanet: Project) -> None:
    """Check that torchrun's processes train together: one set of files, and weights that a single process can load."""
    retinanet.change(MODEL__KD__FEATURE_IMITATION__END_ITER=2)  # unused parameters under DDP as well
    retinanet.change(MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "train_net.py"), "--config-file", str(retinanet.student)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((retinanet.output / "metrics.json").read_text().splitlines()[0])
    assert math.isfinite(metrics["total_loss"])
    results = retinanet.main("--eval-only", "MODEL.WEIGHTS", retinanet.output / "model_final.pth")
    assert "AP" in results["bbox"]


if __name__ == "__main__":
    import tempfile

    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(golden_run(Path(folder) / "run"), indent=2) + "\n")


def test_epochs_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = make_project(tmp_path)
    with caplog.at_level("INFO"):
        trainer = make_trainer(project, "SOLVER.MAX_ITER", 15, "SOLVER.IMS_PER_BATCH", 1)
        trainer.resume_or_load(resume=False)
        assert "Training on 15 images in total: 2.5 epochs of the 6 in DATASETS.TRAIN" in caplog.text
        caplog.clear()
        make_trainer(project, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler").resume_or_load(resume=False)
    assert "epochs of" not in caplog.text
