"""Resuming with changed settings: one line in the log lists the differences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kd_d2 import UserError, load_config
from kd_d2.engine.run_record import RunRecord
from kd_d2.engine.trainer import _first_reason

import pytest
import torch
import yaml
from helpers import KillAt, Project, clean_process, make_project, make_trainer, save_fixed_weights, train, write_yaml
from torch import nn

WRITTEN_WITH = (
    "--resume: the losses may differ from those of an uninterrupted training, since the checkpoint was written with: "
)
KEYS = {"SEED": 7, "SOLVER__MAX_ITER": 4, "SOLVER__STEPS": (), "SOLVER__BASE_LR": 0.002, "SOLVER__CHECKPOINT_PERIOD": 2}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Run a training up to the checkpoint of its second iteration."""
    project = make_project(tmp_path_factory.mktemp("stopped"), **KEYS)
    train(project, hooks=(KillAt(1),))
    return project


def resumed(project: Project, caplog: pytest.LogCaptureFixture, *opts: object):
    """Return the resumed trainer, and the differences that the log reports."""
    with clean_process():
        trainer = make_trainer(project, *opts)
        trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    lines = [record.message for record in caplog.records if record.message.startswith("--resume")]
    assert len(lines) <= 1
    caplog.clear()
    return trainer, lines[0].removeprefix(WRITTEN_WITH) if lines else ""


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ([], ""),
        (["DATALOADER.NUM_WORKERS", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3], ""),
        (["SOLVER.MAX_ITER", 8], "SOLVER.MAX_ITER 4, now 8."),
        (["SOLVER.STEPS", (3,)], "SOLVER.STEPS [], now [3]."),
        (["SOLVER.WARMUP_ITERS", 1], "SOLVER.WARMUP_ITERS 2, now 1."),
        (["SOLVER.IMS_PER_BATCH", 4], "SOLVER.IMS_PER_BATCH 2, now 4."),
        (["SOLVER.BASE_LR", 0.5, "SEED", 8], "SOLVER.BASE_LR 0.002, which is kept, not 0.5; SEED 7, which is kept, not 8."),
        (["MODEL.KD.DISTILLERS", ("StructuralKD",)], "MODEL.KD.DISTILLERS ['FeatureImitation'], now ['StructuralKD']."),
        (["MODEL.KD.FEATURE_IMITATION.WEIGHT", 9.0], "MODEL.KD.FEATURE_IMITATION.WEIGHT its default, now 9.0."),
        (["INPUT.MIN_SIZE_TRAIN", (64,)], "INPUT.MIN_SIZE_TRAIN [64, 80], now [64]."),
        (["SOLVER.AMP.ENABLED", True], "SOLVER.AMP.ENABLED its default, now True."),
    ],
)  # fmt: skip
def test_other_keys(stopped: Project, caplog: pytest.LogCaptureFixture, opts: list, expected: str) -> None:
    """Check the line, and that SEED and BASE_LR keep their values."""
    trainer, line = resumed(stopped, caplog, *opts)
    assert line == expected
    assert trainer.seed == 7
    assert trainer.scheduler.base_lrs[0] == 0.002


def test_weight_decays_keep_their_parameters(stopped: Project, caplog: pytest.LogCaptureFixture) -> None:
    """Check a new config that has biases in a group of their own."""
    trainers = []
    for opts, expected in (
        ([], ""),
        (["SOLVER.WEIGHT_DECAY_BIAS", 0.5], "SOLVER.WEIGHT_DECAY_BIAS its default, which is kept, not 0.5."),
    ):
        trainer, line = resumed(stopped, caplog, *opts)
        assert line == expected
        named = {p: name for name, p in trainer.bare_model.named_parameters()}
        trainers.append(
            {
                named[p]: (group["weight_decay"], trainer.optimizer.state[p]["momentum_buffer"].tolist())
                for group in trainer.optimizer.param_groups
                for p in group["params"]
            }
        )
    assert trainers[0] == trainers[1]
    assert {decay for decay, _ in trainers[0].values()} == {0.0, 0.0001}


def test_another_optimizer_is_refused(stopped: Project, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=r"has the state of SOLVER\.OPTIMIZER SGD, not of AdamW; resume with SGD, or start from"
    ):
        resumed(stopped, caplog, "SOLVER.OPTIMIZER", "AdamW")


def test_another_optimizer_of_added_layers_is_refused(
    stopped: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that LAYER_LR matters only to methods with layers, where the refusal names it."""
    _, line = resumed(stopped, caplog, "MODEL.KD.LAYER_LR", 0.001)
    assert line == "MODEL.KD.LAYER_LR its default, now 0.001."
    project = make_project(tmp_path, **KEYS, MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1", MODEL__KD__LAYER_LR=0.001)
    train(project, hooks=(KillAt(1),))
    resumed(project, caplog, "MODEL.KD.LAYER_LR", 0.002)
    with pytest.raises(
        UserError, match=r"state of the separate optimizers layers, .* no separate optimizer; .*LAYER_LR"
    ):
        resumed(project, caplog, "MODEL.KD.LAYER_LR", None)


@pytest.mark.parametrize(
    ("methods", "now"),
    [(("MGD", "FeatureImitation"), "MGD, FeatureImitation"), (("FeatureImitation",), "FeatureImitation")],
    ids=["another order", "fewer"],
)
def test_layers_of_other_methods_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, methods: tuple[str, ...], now: str
) -> None:
    project = make_project(
        tmp_path,
        **KEYS,
        MODEL__KD__FEATURE_IMITATION__ADAPTATION="1x1",
        MODEL__KD__DISTILLERS=("FeatureImitation", "MGD"),
    )
    train(project, hooks=(KillAt(1),))
    with pytest.raises(
        UserError,
        match=rf"not those of the checkpoint \(methods with layers: FeatureImitation, MGD, now {now}\); resume with the methods",
    ):
        resumed(project, caplog, "MODEL.KD.DISTILLERS", methods)


def test_other_parameters_of_the_student_are_refused(stopped: Project, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        resumed(stopped, caplog, "MODEL.BACKBONE.FREEZE_AT", 2)
    assert str(caught.value) == (
        f"--resume: {stopped.output / 'model_0000001.pth'} does not fit a training with this config (it trained other parameters of the "
        "student); resume with the config that it was started with, or train in another OUTPUT_DIR."
    )


def test_a_buffer_of_another_shape_is_named() -> None:
    bank, grown = nn.Module(), nn.Module()
    bank.register_buffer("bank", torch.zeros(0, 64))
    grown.register_buffer("bank", torch.zeros(8, 64))
    with pytest.raises(RuntimeError) as caught:
        nn.ModuleDict({"Bank": bank}).load_state_dict(nn.ModuleDict({"Bank": grown}).state_dict())
    assert _first_reason(caught.value) == (
        "size mismatch for Bank.bank: copying a param with shape torch.Size([8, 64]) from checkpoint, the shape in "
        "current model is torch.Size([0, 64])"
    )
    assert _first_reason(ValueError("first line\nsecond line")) == "first line"
    assert _first_reason(KeyError()) == ""


def test_another_config_of_the_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = make_project(tmp_path, **KEYS)
    train(project, hooks=(KillAt(1),))
    config = yaml.safe_load(project.teacher.read_text())
    config["MODEL"]["PIXEL_MEAN"] = [0.0, 0.0, 0.0]
    write_yaml(project.teacher, config)
    assert resumed(project, caplog)[1] == "other config of the teacher."


def test_other_data_and_another_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that files are compared by content, so that moved ones are the same."""
    project = make_project(tmp_path / "a", **KEYS)
    train(project, hooks=(KillAt(1),))
    moved = tmp_path / "moved"
    shutil.copytree(project.folder / "data", moved / "data")
    shutil.copyfile(project.teacher, moved / "teacher.yaml")
    shutil.copyfile(project.teacher_weights, moved / "teacher.pth")
    sets = [[project.name, str(moved / "data" / "annotations.json"), str(moved / "data" / "images")]]
    keys = ["DATASETS.COCO_JSON", sets, "MODEL.KD.TEACHER.CONFIG_FILE", moved / "teacher.yaml"]
    keys += ["MODEL.KD.TEACHER.WEIGHTS", moved / "teacher.pth"]
    assert resumed(project, caplog, *keys)[1] == ""
    tree = json.loads((moved / "data" / "annotations.json").read_text())
    tree["annotations"][0]["bbox"][0] += 1
    (moved / "data" / "annotations.json").write_text(json.dumps(tree))
    save_fixed_weights(project.teacher, moved / "teacher.pth", seed=2)
    assert resumed(project, caplog, *keys)[1] == "other annotations of DATASETS.TRAIN; other weights of the teacher."


def test_another_number_of_processes(stopped: Project, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Check a checkpoint edited to be of four processes; tests/test_many_processes.py has real ones."""
    output = tmp_path / "output"
    shutil.copytree(stopped.output, output)
    path = output / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    content["run"]["processes"] = 4
    torch.save(content, path)
    assert resumed(stopped, caplog, "OUTPUT_DIR", output)[1] == "processes 4, now 1."


def test_a_checkpoint_without_a_record(stopped: Project, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(stopped.output, output)
    path = output / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    del content["run"], content["trainer"]["_trainer"]["parameters"]
    torch.save(content, path)
    assert resumed(stopped, caplog, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 9)[1] == ""


def record(project: Project, *opts: object) -> RunRecord:
    return RunRecord(load_config(str(project.student), list(opts)), None)


def test_a_checkpoint_of_release_0_1(stopped: Project, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Check a checkpoint without what later releases added."""
    output = tmp_path / "output"
    shutil.copytree(stopped.output, output)
    path = output / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    del content["run"]["config of the teacher"], content["trainer"]["_trainer"]["parameters"]
    torch.save(content, path)
    assert resumed(stopped, caplog, "OUTPUT_DIR", output)[1] == ""


@pytest.mark.parametrize(("node", "former"), [("PKD", "1x1"), ("ICD", "none")])
def test_selected_channels_are_not_the_default_of_release_0_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, node: str, former: str
) -> None:
    """Check a narrower student that inherits, with the former meaning of ADAPTATION None and with today's."""
    key = f"MODEL.KD.{node}.ADAPTATION"
    project = make_project(
        tmp_path, **KEYS, MODEL__FPN__OUT_CHANNELS=8, MODEL__KD__DISTILLERS=(node,), MODEL__KD__INHERIT__ENABLED=True
    )
    train(project, key, former, hooks=(KillAt(1),))
    path = project.output / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    del content["run"], content["trainer"]["_trainer"]["parameters"]
    torch.save(content, path)
    assert resumed(project, caplog, key, former)[1] == ""
    with pytest.raises(UserError, match=rf"is of kd_d2 0\.1, .*; resume with {key} '1x1', or 'none' for ICD\.$"):
        resumed(project, caplog)
    torch.save({"model": content["model"]}, path)
    with pytest.raises(UserError, match=r"does not fit a training with this config \(it holds only weights\)"):
        resumed(project, caplog)


def test_keys_that_do_not_affect_a_resumed_training(stopped: Project) -> None:
    keys = {
        "VIS_PERIOD": 5, "CUDNN_BENCHMARK": True, "SOLVER.CHANNELS_LAST": False, "SOLVER.COMPILE": True,
        "SOLVER.CHECKPOINT_MINUTES": 3.0, "SOLVER.CHECKPOINT_ASYNC": True, "SOLVER.CHECKPOINTS_TO_KEEP": 1,
        "MODEL.WEIGHTS": str(stopped.teacher_weights), "MODEL.KD.INHERIT.ENABLED": True, "MODEL.KD.TEACHER.COMPILE": True,
        "MODEL.KD.TEACHER.CHANNELS_LAST": False,
    }  # fmt: skip
    opts = [part for item in keys.items() for part in item]
    assert record(stopped, *opts).state_dict() == record(stopped).state_dict()


@pytest.mark.parametrize(
    ("key", "now"),
    [("BIAS_LR_FACTOR", 2.0), ("MOMENTUM", 0.5), ("NESTEROV", True), ("WEIGHT_DECAY", 0.5)]
    + [("WEIGHT_DECAY_NORM", 0.5), ("WEIGHT_DECAY_BIAS", 0.5)],
)
def test_keys_that_the_state_of_the_optimizer_restores(stopped: Project, key: str, now: object) -> None:
    changed = record(stopped, f"SOLVER.{key}", now)
    changed.load_state_dict(record(stopped).state_dict())
    assert changed.another_training == [f"SOLVER.{key} its default, which is kept, not {now}"]


def test_a_finished_training_may_be_scaled_to_other_processes(stopped: Project) -> None:
    """Check that keys which SOLVER.REFERENCE_WORLD_SIZE scales do not make it another training."""
    before = record(stopped, "SOLVER.BASE_LR", 0.5).state_dict()
    for reference, processes, expected in ((1, 2, 0), (0, 2, 1), (1, 1, 1)):
        now = record(stopped, "SOLVER.REFERENCE_WORLD_SIZE", reference)
        now.load_state_dict({**before, "processes": processes})
        assert len(now.another_training) == expected
