"""Batch size, learning rate and iterations: scaling, gradient accumulation, and advice on mismatches."""

from __future__ import annotations

from pathlib import Path

from kd_d2 import UserError
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config import load_config
from kd_d2.engine.checks import check_schedule
from kd_d2.engine.learning_rate import build_lr_scheduler, learning_rate_advice, scale_to_world_size

import pytest
import torch
from detectron2 import model_zoo
from helpers import ROOT, clean_process, make_project, make_trainer, train, write_yaml

CONFIGS = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "projects").rglob("configs/*.yaml")]


def test_scaling_to_the_number_of_processes(tmp_path: Path) -> None:
    """Check a config for 8 processes on 2: a quarter of the batch and the rate, 4 times the iterations, also of methods."""
    keys = {
        "SOLVER__REFERENCE_WORLD_SIZE": 8,
        "SOLVER__IMS_PER_BATCH": 16,
        "SOLVER__BASE_LR": 0.02,
        "SOLVER__MAX_ITER": 100,
    }
    icd = {"MODEL__KD__ICD__DETACH_STUDENT_ITERS": 5, "MODEL__KD__ICD__LR": 0.001, "MODEL__KD__ICD__END_ITER": 50}
    cfg = load_config(str(make_project(tmp_path, MODEL__KD__DISTILLERS=("ICD",), **keys, **icd).student))
    cfg.MODEL.KD.PFI.update({"DROP_ITERS": (5, 50), "OTHER_ITERS": [], "BAD_ITER": "x"})
    cfg.freeze()
    scaled = scale_to_world_size(cfg, 2)
    solver, node = scaled.SOLVER, scaled.MODEL.KD.ICD
    assert (4, pytest.approx(0.005), 400) == (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER)
    assert (node.DETACH_STUDENT_ITERS, node.END_ITER, node.LR, node.START_ITER) == (20, 200, 0.001, 0)
    pfi = scaled.MODEL.KD.PFI
    assert (pfi.DROP_ITERS, pfi.OTHER_ITERS, pfi.BAD_ITER) == ((20, 200), [], "x")
    assert pfi.END_ITER is None and scaled.is_frozen()
    assert scale_to_world_size(cfg, 8) is cfg and cfg.MODEL.KD.ICD.END_ITER == 50
    # more processes than written for: 5 / 3 and 50 / 3, rounded
    node = scale_to_world_size(cfg, 24).MODEL.KD.ICD
    assert (node.DETACH_STUDENT_ITERS, node.END_ITER) == (2, 17)


def test_a_training_of_fewer_processes_than_its_config_is_for(tmp_path: Path) -> None:
    """Check that it has half the images in twice the iterations, also without loading weights first."""
    keys = {"SOLVER__REFERENCE_WORLD_SIZE": 2, "SOLVER__IMS_PER_BATCH": 4, "SOLVER__STEPS": (), "DATASETS__TEST": ()}
    project = make_project(tmp_path, **keys, SOLVER__MAX_ITER=1, SOLVER__BASE_LR=0.002)
    with clean_process():
        trainer = make_trainer(project)
        trainer.train()
    assert read_checkpoint(str(project.output / "model_final.pth"))["iteration"] == 1
    assert trainer._trainer.data_loader.batch_sampler.batch_size == 2
    assert trainer.scheduler.base_lrs[0] == 0.001


@pytest.mark.parametrize(
    ("keys", "processes", "expected"),
    [
        ({"IMS_PER_BATCH": 3}, 2, "SOLVER.IMS_PER_BATCH is 3; it must be a multiple of 2 (processes)."),
        (
            {"IMS_PER_BATCH": 8, "GRADIENT_ACCUMULATION_STEPS": 3},
            2,
            "SOLVER.GRADIENT_ACCUMULATION_STEPS is 3; it must divide the 4 images per process.",
        ),
        (
            {"IMS_PER_BATCH": 8, "GRADIENT_ACCUMULATION_STEPS": 8},
            2,
            "SOLVER.GRADIENT_ACCUMULATION_STEPS is 8; it must divide the 4 images per process.",
        ),
        (
            {"IMS_PER_BATCH": 8, "GRADIENT_ACCUMULATION_STEPS": 0},
            1,
            "SOLVER.GRADIENT_ACCUMULATION_STEPS is 0; it must divide the 8 images per process.",
        ),
    ],
)
def test_batches_that_cannot_be_divided(tmp_path: Path, keys: dict, processes: int, expected: str) -> None:
    cfg = load_config(str(make_project(tmp_path).student))
    cfg.SOLVER.update(keys)
    with pytest.raises(UserError) as caught:
        check_schedule(cfg, processes)
    assert str(caught.value) == expected


@pytest.mark.parametrize("reference", [3, -1])
def test_processes_that_a_batch_was_not_written_for(tmp_path: Path, reference: int) -> None:
    cfg = load_config(
        str(make_project(tmp_path, SOLVER__IMS_PER_BATCH=8, SOLVER__REFERENCE_WORLD_SIZE=reference).student)
    )
    with pytest.raises(
        UserError, match=f"REFERENCE_WORLD_SIZE is {reference}; it must be 0, or divide the 8 images of"
    ):
        scale_to_world_size(cfg, 2)


def test_accumulated_gradients_are_those_of_the_batch(tmp_path: Path) -> None:
    """Check that losses that are means over images give the same weights in one part and in four."""
    keys = {
        "SOLVER__IMS_PER_BATCH": 4,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__STEPS": (),
        "SOLVER__WARMUP_ITERS": 0,
        "SEED": 3,
    }
    frozen = {
        "MODEL__RESNETS__NORM": "FrozenBN",
        "MODEL__FPN__NORM": "",
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "INPUT__RANDOM_FLIP": "none",
    }
    small = {"MODEL__KD__FEATURE_IMITATION__WEIGHT": 1.0, "SOLVER__BASE_LR": 0.01, "SOLVER__WEIGHT_DECAY": 0.0}
    weights, losses = [], []
    for parts in (1, 4):
        project = make_project(tmp_path / str(parts), **keys, **frozen, **small)
        project.change_annotations(lambda tree: tree["images"].__setitem__(slice(None), tree["images"][::2]))
        project.change_annotations(_only_known_images)
        trainer = make_trainer(project, "SOLVER.GRADIENT_ACCUMULATION_STEPS", parts)
        _only_distillation(trainer.bare_model)
        trainer.resume_or_load(resume=False)
        trainer.train()
        weights.append(trainer.bare_model.student.state_dict())
        losses.append(trainer.storage.latest()["loss_feature_imitation"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def _only_known_images(tree: dict) -> None:
    """Drop the annotations of removed images."""
    known = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in known]


def _only_distillation(model: torch.nn.Module) -> None:
    """Drop the detection losses, which are normalized by counts of a part."""
    forward = model.forward

    def only_distillation(inputs: list[dict]) -> dict | list:
        outputs = forward(inputs)
        return {"loss_feature_imitation": outputs["loss_feature_imitation"]} if model.training else outputs

    model.forward = only_distillation


def test_accumulation_trains_every_optimizer_and_resumes(tmp_path: Path) -> None:
    """Check two parts and two optimizers: a resumed training has the losses of an uninterrupted one."""
    keys = {"MODEL__KD__DISTILLERS": ("ICD", "StructuralKD"), "SOLVER__GRADIENT_ACCUMULATION_STEPS": 2, "SEED": 1}
    small = {
        "MODEL__KD__ICD__DIM": 16,
        "MODEL__KD__ICD__NUM_HEADS": 2,
        "MODEL__KD__ICD__FFN_DIM": 32,
        "SOLVER__BASE_LR": 0.001,
    }
    unbroken = train(make_project(tmp_path / "unbroken", **keys, **small))
    project = make_project(tmp_path / "broken", SOLVER__CHECKPOINT_PERIOD=2, **keys, **small)
    train(project, "SOLVER.MAX_ITER", 2)
    resumed = train(project, resume=True)
    for iteration in (2, 3):
        assert resumed.losses[iteration] == pytest.approx(unbroken.losses[iteration], rel=1e-3)


@pytest.mark.parametrize(("end", "expected"), [(0.0, 0.25), (0.1, 0.3), (0.5, 0.5)])
def test_cosine_schedules(end: float, expected: float) -> None:
    """Check the middle between a learning rate of 0.5 and that of the end, which may be 0 or the same."""
    keys = {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR": 0.5, "BASE_LR_END": end, "WARMUP_ITERS": 0, "MAX_ITER": 4}
    cfg = load_config("", [part for key, value in keys.items() for part in (f"SOLVER.{key}", value)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_advice_by_hand(tmp_path: Path) -> None:
    """Check a child file that changes the batch size, and a command line with the batch size, the rate, or both."""
    base = write_yaml(tmp_path / "base.yaml", {"SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02}})
    child = write_yaml(tmp_path / "child.yaml", {"_BASE_": "base.yaml", "SOLVER": {"IMS_PER_BATCH": 4}})
    plain = write_yaml(tmp_path / "plain.yaml", {"_BASE_": "base.yaml", "MODEL": {"MASK_ON": False}})
    assert learning_rate_advice(str(child), []) == (
        f"SOLVER.BASE_LR 0.02 comes from {base}, where SOLVER.IMS_PER_BATCH is 16; the batch size is now 4. The linear "
        "scaling rule gives SOLVER.BASE_LR 0.005, with 4 times the iterations."
    )
    assert learning_rate_advice(str(plain), []) is None
    assert "gives SOLVER.BASE_LR 0.04, with 0.5 times" in learning_rate_advice(
        str(plain), ["SOLVER.IMS_PER_BATCH", "32"]
    )
    for opts in (
        ["SOLVER.IMS_PER_BATCH", 32, "SOLVER.BASE_LR", 0.04],
        ["SOLVER.BASE_LR", 0.01],
        ["SOLVER.MAX_ITER", 5],
    ):
        assert learning_rate_advice(str(plain), opts) is None
    assert learning_rate_advice(str(child), ["SOLVER.BASE_LR", "0.005"]) is None
    for value in ("8.0", "0x8", "(8)"):
        assert "the batch size is now 8." in learning_rate_advice(str(plain), ["SOLVER.IMS_PER_BATCH", value])


def test_advice_on_the_model_zoo() -> None:
    """Check a base config with anchors computed by a YAML tag, which plain YAML does not have."""
    path = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert learning_rate_advice(path, []) is None
    assert "SOLVER.BASE_LR 0.01 comes from" in learning_rate_advice(path, ["SOLVER.IMS_PER_BATCH", 8])


@pytest.mark.parametrize("path", [p for p in CONFIGS if "matrix" not in p.name], ids=lambda p: str(p.relative_to(ROOT)))
def test_our_configs_need_no_advice(path: Path) -> None:
    assert learning_rate_advice(str(path), []) is None


def test_changed_keys_and_advice_are_in_the_log(tmp_path: Path) -> None:
    project = make_project(tmp_path, SOLVER__BASE_LR=0.01)
    project.main("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    log = (project.output / "log.txt").read_text()
    assert "where SOLVER.IMS_PER_BATCH is 2; the batch size is now 4." in log
    assert "\n  SOLVER.IMS_PER_BATCH: 4\n" in log
    assert "SOLVER.NESTEROV" not in log  # as by default
    assert "\x1b" not in log
