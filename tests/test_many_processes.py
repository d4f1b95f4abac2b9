"""Two processes with half a batch each against one process with the whole batch, and resuming."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kd_d2 import KDMetaArch, Teacher
from kd_d2.checkpoint import KDCheckpointer
from kd_d2.config import load_config
from kd_d2.data import register_coco_json
from kd_d2.distillers import Distiller
from kd_d2.distillers.batch_norm import BatchNormOverAllRanks
from kd_d2.distillers.icd.queries import ObservedFakeInstances
from kd_d2.distributed import mean_count_across_ranks, sum_across_ranks
from kd_d2.engine.checkpoints import Checkpoints
from kd_d2.engine.rank_states import get_rank_state, own_state, set_distiller_state, set_rank_state
from kd_d2.engine.step import DistillationStep
from kd_d2.engine.stop_request import StopRequest, TrainingStopped
from kd_d2.engine.trainer import _distributed
from kd_d2.errors import UserError
from kd_d2.random_state import preserved_random_state

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import KillAt, Project, clean_process, make_project, make_trainer, methods_of, train
from torch import Tensor, nn

SIZE = (64, 96)
FROZEN = {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__FPN__NORM": ""}
SMALL = {
    "MODEL__KD__ICD__DIM": 16,
    "MODEL__KD__ICD__NUM_HEADS": 2,
    "MODEL__KD__ICD__FFN_DIM": 32,
    "MODEL__KD__ICD__DETACH_STUDENT_ITERS": 0,
    "MODEL__KD__DIFFKD__NUM_LEVELS": 2,  # coarser ones have too few positions for its normalizations to be well-conditioned
}
ALL_PROPOSALS = {"MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 64, "MODEL__ROI_HEADS__POSITIVE_FRACTION": 1.0}
"""So many that nothing is sampled: an R-CNN's box head sees the same proposals in two processes as in one."""
EQUAL, UNEQUAL = (2, 2, 2, 2), (3, 1, 0, 0)
"""Numbers of objects of four images. UNEQUAL leaves the second process without any."""


def _inputs(counts: tuple[int, ...]) -> list[dict]:
    random = torch.Generator().manual_seed(0)
    inputs = []
    for number, count in enumerate(counts):
        corners = torch.rand(count, 2, generator=random) * 30
        sizes = 15 + torch.rand(count, 2, generator=random) * 18
        objects = Instances(SIZE, gt_boxes=Boxes(torch.cat([corners, corners + sizes], 1)))
        objects.gt_classes = torch.randint(3, (count,), generator=random)
        image = (torch.rand(3, *SIZE, generator=random) * 255).byte()
        inputs.append({"image": image, "instances": objects, "height": SIZE[0], "width": SIZE[1], "image_id": number})
    return inputs


class _SharedDraws:
    """Random numbers that give each process those of its images, if every image draws equally many."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.calls = itertools.count()
        for name in ("rand", "randn"):
            patch.setattr(torch, name, self.drawing(getattr(torch, name)))

    def drawing(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(*size: int, device: object = None, dtype: object = None) -> Tensor:
            first, *rest = size[0] if isinstance(size[0], (tuple, list)) else size
            generator = torch.Generator().manual_seed(next(self.calls))
            whole = function(first * comm.get_world_size(), *rest, generator=generator, dtype=dtype)
            return whole[first * comm.get_rank() :][:first].to(device)

        return draw


def _constant_draws(patch: pytest.MonkeyPatch) -> None:
    for name in ("rand", "randn"):
        patch.setattr(
            torch, name, lambda *size, device=None, dtype=None: torch.full(size, 0.5, device=device, dtype=dtype)
        )


OVER_ALL_RANKS = ("loss_atss_", "loss_gfl_", "loss_fsaf_", "loss_reppoints_")
"""Prefixes of the losses of our own detectors; those of Detectron2's divide by the counts of one worker."""


def _losses_and_gradients(model: torch.nn.Module, inputs: list[dict], shared: bool) -> tuple[dict, dict]:
    """Return the losses normalized over all ranks, and their gradients; others are in the graph with factor 0."""
    bare: KDMetaArch = getattr(model, "module", model)
    bare.zero_grad()
    with pytest.MonkeyPatch.context() as patch, EventStorage():
        if shared:
            _SharedDraws(patch)
        else:
            _constant_draws(patch)
        losses = model(inputs)
        names = {name for distiller in bare.distillers.values() for name in distiller.loss_names}
        names |= {name for name in losses if name.startswith(OVER_ALL_RANKS)}
        sum(loss if name in names else 0 * loss for name, loss in losses.items()).backward()
    found = {name: parameter.grad.clone() for name, parameter in bare.named_parameters() if parameter.grad is not None}
    return {name: losses[name].detach() for name in names}, found


def _assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float, floor: float = 1e-7) -> None:
    """Assert equality within the tolerance relative to each value plus a tenth of it relative to the largest, and a floor."""
    absolute = tolerance / 10 * float(expected.abs().max()) + floor
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=absolute, msg=lambda text: f"{what}: {text}")


def _model(project: Project) -> nn.Module:
    torch.manual_seed(0)
    cfg = load_config(str(project.student))
    with clean_process():
        register_coco_json(cfg)
        model = build_model(cfg).train()
    for name, parameter in model.named_parameters():
        if name.endswith("project.1.bias"):
            parameter.data += 0.1  # of DiffKD, whose gradient is 0, except for rounding, if the means are equal
        if name.endswith("cls_score.weight"):
            parameter.data *= 10  # predictions that differ between positions by more than rounding
        if name.endswith("first_points.bias"):
            parameter.data += 0.15  # no RepPoints at whole positions, where the gradient of interpolation jumps
    return model


CASES = [(EQUAL, True), (UNEQUAL, False)]


def _compare(rank: int, model: nn.Module, alone: list[tuple[dict, dict]], folder: str) -> None:
    """Compare, in one of two processes, the whole batch alone with half of it together with the other process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    wrapped = _distributed(model)
    for (counts, shared), (expected_losses, expected_gradients) in zip(CASES, alone, strict=True):
        losses, gradients = _losses_and_gradients(wrapped, _inputs(counts)[2 * rank : 2 * rank + 2], shared)
        for name, loss in losses.items():
            torch.distributed.all_reduce(loss)
            _assert_close(f"{name} with {counts} objects", loss / 2, expected_losses[name], 1e-4)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            floor = 2e-5 if "DiffKD" in name else 1e-7  # rounding where batch normalization makes a gradient 0
            _assert_close(f"gradient of {name} with {counts} objects", gradient, expected_gradients[name], 1e-3, floor)
    torch.distributed.destroy_process_group()


OPTIONS = {
    "published": {},
    "heads": {
        "MODEL__KD__LD__VALUABLE_WEIGHT": 0.25,
        "MODEL__KD__LD__CLASS_WEIGHT": 10.0,
        "MODEL__KD__CROSSKD__SPLIT": 1,
    },
    "other": {
        "MODEL__KD__PFI__RELATIVE": True,
        "MODEL__KD__RANK_MIMICKING__ON_LOGITS": True,
        "MODEL__KD__RANK_MIMICKING__TEMPERATURE": 2.0,
        "MODEL__KD__SOFT_LABEL__LOSS": "quality_focal",
        "MODEL__KD__SOFT_LABEL__FOCUS": 1.0,
        "MODEL__KD__FKD__NORM": "batch",
        "MODEL__KD__FKD__ATTENTION": "adapted",
        "MODEL__KD__STRUCTURAL__LOSS": "l1_ms_ssim",
        "MODEL__KD__IMA__INSTANCE": "box",
        "MODEL__KD__FEATURE_IMITATION__ADAPTATION": "1x1",
        "MODEL__KD__CWD__MAPS": "logits",
    },
    "masked": {
        "MODEL__KD__PFI__MASK": "positives",
        "MODEL__KD__STRUCTURAL__LOSS": "l2",
        "MODEL__KD__STRUCTURAL__SPATIAL_ATTENTION": True,
    },
}


@pytest.mark.parametrize(
    ("detector", "options"),
    [("retinanet", "published"), ("retinanet", "other"), ("retinanet", "masked"), ("gfl", "heads")]
    + [(detector, "published") for detector in ("faster-rcnn", "fcos", "atss", "gfl", "fsaf", "reppoints")],
)
def test_every_method_normalizes_over_the_whole_batch(tmp_path: Path, detector: str, options: str) -> None:
    """Check losses and gradients of all methods at once under DDP, without a search for unused parameters."""
    dense = detector != "faster-rcnn"
    methods = methods_of(detector)
    keys = {**FROZEN, **SMALL, **(OPTIONS[options] if dense else ALL_PROPOSALS)}
    project = make_project(tmp_path, detector, MODEL__KD__DISTILLERS=methods, **keys)
    model = _model(project)
    alone = [_losses_and_gradients(model, _inputs(counts), shared) for counts, shared in CASES]
    torch.multiprocessing.start_processes(_compare, nprocs=2, args=(model, alone, str(tmp_path)), start_method="fork")


def _count(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for counts, expected in (((3, 4), 3.5), ((1, 0), 0.5), ((0, 0), 0.5)):
        count = torch.tensor(float(counts[rank]))
        assert float(mean_count_across_ranks(count)) == expected
        assert float(count) == counts[rank]
    value = torch.tensor(1.0 + 2 * rank, requires_grad=True)
    total = sum_across_ranks(value)
    (total.square() / 2).backward()
    assert (float(total), float(value.grad)) == (4, 8)  # the slopes of both ranks' losses
    torch.distributed.destroy_process_group()


def test_counts_of_workers_by_hand(tmp_path: Path) -> None:
    """Check counts averaged over workers, at least 1 in total, and sums with the gradients of all workers."""
    assert (
        float(mean_count_across_ranks(torch.tensor(0.0))) == 1
        and float(mean_count_across_ranks(torch.tensor(3.0))) == 3
    )
    torch.multiprocessing.start_processes(_count, nprocs=2, args=(str(tmp_path),), start_method="fork")


def _normalize(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norm = BatchNormOverAllRanks(1, eps=0.0)
    maps = ([[1.0, 3.0]], [[8.0]])[rank]
    found = norm(torch.tensor([[maps]])).flatten().tolist()
    # The mean of 1, 3 and 8 is 4, and their squared deviations 9, 1 and 16 add up to 26.
    assert found == pytest.approx([(value - 4) / math.sqrt(26 / 3) for value in maps[0]])
    assert norm.running_mean.item() == pytest.approx(0.1 * 4)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 26 / 2)
    torch.distributed.destroy_process_group()


def test_normalization_over_all_ranks_by_hand(tmp_path: Path) -> None:
    """Check maps with two positions on one rank and one on the other."""
    torch.multiprocessing.start_processes(_normalize, nprocs=2, args=(str(tmp_path),), start_method="fork")


def _observe(rank: int, folder: str) -> None:
    targets, sizes = [entry["instances"] for entry in _inputs(UNEQUAL)], [SIZE] * 4
    alone, shared = ObservedFakeInstances(3), ObservedFakeInstances(3)
    alone.observe(targets, sizes)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared.observe(targets[2 * rank : 2 * rank + 2], sizes[:2])
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], expected)
    torch.distributed.destroy_process_group()


def test_observed_instances_are_those_of_all_processes(tmp_path: Path) -> None:
    """Check ICD's priors with pseudo-labels, of which a checkpoint holds only one copy for all processes."""
    torch.multiprocessing.start_processes(_observe, nprocs=2, args=(str(tmp_path),), start_method="fork")


def _train_as_one_of_two(
    rank: int, project: Project, name: str, options: tuple, resume: bool, killed_behind: int
) -> None:
    torch.set_num_threads(1)
    store = f"file://{project.folder}/{name}-store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    losses = train(project, *options, resume=resume, hooks=(KillAt(killed_behind),), seed=1000 * resume + rank).losses
    if rank == 0:
        (project.folder / f"{name}.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


class _WithStatistics(nn.Module):
    def __init__(self, rank: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.norm.running_mean.fill_(rank)
        self.register_buffer("own", torch.full((1,), float(rank)))


def _share(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = _WithStatistics(rank + 1)
    hook = Checkpoints(load_config(""), KDCheckpointer(model, folder), model, StopRequest())
    hook.trainer = SimpleNamespace(iter=0, max_iter=1)
    hook.after_step()
    assert model.norm.running_mean.tolist() == [1, 1] and model.own.item() == rank + 1
    for received in ((0, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)):
        hook.stop.number = received[rank]
        with pytest.raises(TrainingStopped) as stopped:
            hook.after_step()
        assert stopped.value.code == 128 + signal.SIGTERM
    torch.distributed.destroy_process_group()


def _record_losses(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.Linear(1, 1)
    step = DistillationStep(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    with EventStorage() as storage:
        step._record({"loss_a": torch.tensor(1.0 + 2 * rank), "loss_b": torch.tensor(5.0)}, data_time=0.0)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert logged == {"data_time": 0.0, "loss_a": 2.0, "loss_b": 5.0, "total_loss": 7.0}
    torch.distributed.destroy_process_group()


def test_logged_losses_are_means_over_the_processes(tmp_path: Path) -> None:
    """Check losses of 1 and 3, hence 2, and of 5 in both processes."""
    torch.multiprocessing.start_processes(_record_losses, nprocs=2, args=(str(tmp_path),), start_method="fork")


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: list[float]) -> dict[str, Tensor]:
        return {"loss": self.weight * inputs[0]}


def _accumulate(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    model = _distributed(_Scaled())
    step = DistillationStep(model, torch.optim.SGD(model.parameters(), lr=1.0), {}, accumulation_steps=2)
    step.data_loader = [[1.0, 2.0] if rank == 0 else [3.0, 6.0]]
    step.iter = 0
    with EventStorage():
        step.run_step()
    assert model.module.weight.item() == -3
    torch.distributed.destroy_process_group()


def test_accumulated_gradients_are_exchanged(tmp_path: Path) -> None:
    """Check gradients of 1 and 2 in one process and 3 and 6 in the other: both step by the mean of all four."""
    torch.multiprocessing.start_processes(_accumulate, nprocs=2, args=(str(tmp_path),), start_method="fork")


class _WithUnused(_Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)


def _train_with_unused(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    model = _distributed(_WithUnused())
    step = DistillationStep(model, torch.optim.SGD(model.parameters(), lr=1.0), {})
    step.data_loader = [[1.0]]
    step.iter = 0
    with (
        EventStorage(),
        pytest.raises(UserError, match=r"^The parameters unused\.weight and 1 more have no gradient, "),
    ):
        step.run_step()
    assert model.module.weight.item() == 0
    torch.distributed.destroy_process_group()


def test_parameters_without_gradient_are_named(tmp_path: Path) -> None:
    """Check that no step is taken: the gradients in the bucket of an unused parameter are not averaged."""
    torch.multiprocessing.start_processes(_train_with_unused, nprocs=2, args=(str(tmp_path),), start_method="fork")


def test_processes_that_had_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that they continue with the first one's normalizer, and with random numbers of their own."""
    model, draws = nn.Identity(), []
    model.loss_normalizer = 5.0
    with clean_process(), preserved_random_state():
        states = [get_rank_state(model)]
        for rank in (1, 2, 1):
            monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
            model.loss_normalizer = 1.0
            set_rank_state(model, states, seed=7)
            assert model.loss_normalizer == 5.0
            draws.append(torch.rand(()).item())
    assert draws[0] == draws[2] != draws[1]


class _Counting(Distiller):
    """Has a buffer, other state and a parameter."""

    needs = frozenset({"features"})
    loss_names = ("loss_counting",)

    def __init__(self):
        super().__init__(self.Config(), pair=None)
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("seen", torch.zeros(()))
        self.history: list[float] = []

    def get_extra_state(self) -> list[float]:
        return list(self.history)

    def set_extra_state(self, state: list[float]) -> None:
        self.history = state


@pytest.mark.parametrize(("rank", "seen"), [(0, 5.0), (1, 22.0), (2, 5.0)])
def test_each_process_has_the_state_of_methods_that_it_had(
    toy_detector: type, monkeypatch: pytest.MonkeyPatch, rank: int, seen: float
) -> None:
    """Check two former processes: the first, and a third, keep what they have. Parameters are not among the state."""
    method = _Counting()
    model = KDMetaArch(student=toy_detector(), teacher=Teacher(toy_detector()), distillers={"Counting": method})
    states = []
    for of_rank, number in enumerate((20.0, 22.0, 5.0)):
        monkeypatch.setattr(comm, "get_rank", lambda of_rank=of_rank: of_rank)
        method.seen.fill_(number)
        method.history = [number]
        states.append(get_rank_state(model))
    assert "distillers" not in states[0]  # they are the checkpoint's own
    assert states[1]["distillers"].keys() == {"Counting.seen", "Counting._extra_state"}
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    set_distiller_state(model.distillers, (own_state(states[:2]) or {}).get("distillers"))
    assert (method.seen.item(), method.history, method.weight.item()) == (seen, [seen], 3.0)


def test_statistics_are_those_of_the_saved_model(tmp_path: Path) -> None:
    """Check also that a signal stops both processes, whether one or both have received it."""
    torch.multiprocessing.start_processes(_share, nprocs=2, args=(str(tmp_path),), start_method="fork")


def _train_in_two(
    project: Project, name: str, *options: object, resume: bool = False, killed_behind: int = 99
) -> dict[str, dict[str, float]]:
    """Train in two processes and return the losses by iteration and name."""
    args = (project, name, options, resume, killed_behind)
    torch.multiprocessing.start_processes(_train_as_one_of_two, nprocs=2, args=args, start_method="fork")
    return json.loads((project.folder / f"{name}.json").read_text())


def test_two_resumed_processes_go_on_as_if_unbroken(tmp_path: Path) -> None:
    """Check that each restores its own random state, which IMA's masks use, and RetinaNet's running normalizer."""
    project = make_project(tmp_path, MODEL__KD__DISTILLERS=("IMA",), SOLVER__IMS_PER_BATCH=2, SOLVER__STEPS=())
    project.change(SOLVER__MAX_ITER=4, SOLVER__CHECKPOINT_PERIOD=2, SOLVER__BASE_LR=0.001)
    unbroken = _train_in_two(project, "unbroken", "OUTPUT_DIR", tmp_path / "unbroken")
    _train_in_two(project, "killed", killed_behind=1)
    resumed = _train_in_two(project, "resumed", resume=True)
    assert resumed.keys() == {"2", "3"}
    for iteration, losses in resumed.items():
        assert losses == pytest.approx(unbroken[iteration], rel=1e-4)


def test_one_process_goes_on_from_a_checkpoint_of_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the training continues, and that one log message names the different number of processes."""
    keys = {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__FPN__NORM": "", "SOLVER__IMS_PER_BATCH": 2, "SOLVER__STEPS": ()}
    project = make_project(tmp_path, "fcos", SEED=3, SOLVER__MAX_ITER=4, SOLVER__CHECKPOINT_PERIOD=2, **keys)
    _train_in_two(project, "killed", killed_behind=1)
    caplog.clear()
    resumed = train(project, resume=True)
    assert sorted(resumed.losses) == [2, 3]
    said = [record.message for record in caplog.records if record.message.startswith("--resume")]
    assert len(said) == 1 and said[0].endswith("since the checkpoint was written with: processes 2, now 1.")


def _resume_from_own_folder(rank: int, project: Project) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{project.folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    folder = () if rank == 0 else ("OUTPUT_DIR", project.folder / "elsewhere")  # another disk without a checkpoint
    sentence = r"ranks resume from different checkpoints \(0: model_final.pth, 1: nothing\); OUTPUT_DIR must be on a file system that all machines share"
    with clean_process(), pytest.raises(UserError, match=sentence):
        make_trainer(project, *folder).resume_or_load(resume=True)
    torch.distributed.destroy_process_group()


def test_synchronized_normalization_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(UserError) as caught:
        _distributed(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)))
    assert str(caught.value) == (
        "The detector has synchronized batch normalization (SyncBN), which several processes can only train on GPUs; set its NORM to 'BN', or "
        "train in one process."
    )


def test_processes_that_would_go_on_from_different_checkpoints_end(tmp_path: Path) -> None:
    """Check that a folder that is not shared raises an error, before different models are averaged."""
    project = make_project(tmp_path, SOLVER__IMS_PER_BATCH=2, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    train(project)
    torch.multiprocessing.start_processes(_resume_from_own_folder, nprocs=2, args=(project,), start_method="fork")
