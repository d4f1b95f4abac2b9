"""KDMetaArch: a student detector, a frozen teacher, and any number of distillers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .adapters import PARTS, DetectorOutputs, DetectorSpec, build_adapter
from .balance import GradientBalance, shared_parameters
from .distillers import DISTILLER_REGISTRY, Distiller, Losses, Pair, Schedule, build_distiller
from .distillers.base import LOG_PERIOD
from .distillers.matching import check_same_classes, in_words, without_adapter
from .errors import UserError
from .modeling.building import building_from
from .pseudo_labels import Annotations, PseudoLabels
from .teacher import Teacher
from .transfer import instances_on_device

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class KDMetaArch(nn.Module):
    """Trains a student with its detection losses and those of the distillers; at inference, it is the student alone."""

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        distillers: dict[str, Distiller],
        schedules: dict[str, Schedule] | None = None,
        labels: Annotations | None = None,
        balance: GradientBalance | None = None,
    ):
        """
        Args:
            student: any Detectron2 detector.
            teacher: the frozen detector; not a submodule.
            distillers: distillers by registered name.
            schedules: schedules by the same names; distillers without one are always active.
            labels: source of the ground truth; None for the data's annotations.
            balance: scales the distillers' losses by their gradients; None to disable.

        Raises:
            UserError: a distiller needs outputs that a detector does not have; the class counts differ; the detectors
                cannot take images of one size; there is a balance, but nothing in the student's backbone is trained;
                a schedule or a weight of the balance names no distiller; two distillers have a loss of the same name.
            TypeError: a distiller lacks `loss_names` or `needs`, or `teacher` is not a `Teacher`.
        """
        super().__init__()
        for argument, named in (("schedules", schedules), ("balance.weights", balance.weights if balance else None)):
            unknown = sorted({*(named or {})} - distillers.keys())
            if unknown:
                raise UserError(f"{argument} names {unknown}, but the distillers are {sorted(distillers)}.")
        if not isinstance(teacher, Teacher):
            raise TypeError(
                f"teacher is a {type(teacher).__name__}; pass a Teacher, as in KDMetaArch(teacher=Teacher(model))"
            )
        if teacher.model is student:
            raise UserError("The student and the teacher are the same module, whose parameters are frozen: build two.")
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.schedules = {name: (schedules or {}).get(name, Schedule()) for name in distillers}
        self.labels = labels or Annotations()
        self.balance = balance
        self.adapter = build_adapter(student)
        self._without_gradient: set[str] = set()
        self._check_pair()
        divisibility = math.lcm(self.adapter.size_divisibility, teacher.adapter.size_divisibility)
        if distillers or self.labels.needs:
            square = max(self.adapter.square_size, teacher.adapter.square_size)
            self.adapter.pad_to(divisibility, square)
            teacher.adapter.pad_to(divisibility, square)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        kd = cfg.MODEL.KD
        teacher = Teacher.from_config(cfg)
        if kd.PSEUDO_LABELS.ENABLED:
            teacher.check_detects()
        with building_from("MODEL", cfg):
            student = META_ARCH_REGISTRY.get(kd.STUDENT)(cfg)
        pair = Pair.from_config(cfg, build_adapter(student).spec, teacher.spec)
        distillers = {name: build_distiller(cfg, name, pair) for name in kd.DISTILLERS}
        nodes = {name: kd[DISTILLER_REGISTRY.get(name).CONFIG_NODE] for name in distillers}
        return {
            "student": student,
            "teacher": teacher,
            "distillers": distillers,
            "labels": PseudoLabels(kd.PSEUDO_LABELS.SCORE_THRESH) if kd.PSEUDO_LABELS.ENABLED else Annotations(),
            "schedules": {name: Schedule.from_node(node) for name, node in nodes.items()},
            "balance": GradientBalance.from_node(
                kd.BALANCE,
                {name: distiller.relative_weight for name, distiller in distillers.items()},
                {name: distiller.weight for name, distiller in distillers.items()},
            ),
        }

    def _check_pair(self) -> None:
        student, teacher = self.adapter.spec, self.teacher.spec
        users = [name for name, distiller in self.distillers.items() if distiller.compares_classes]
        users += ["MODEL.KD.PSEUDO_LABELS"] if self.labels.needs else []
        if users:
            check_same_classes(" and ".join(users), student, teacher)
        self.labels.check(student, teacher)
        if self.balance:
            shared_parameters(self.student)  # raises if nothing is trained
        owners: dict[str, str] = {}
        for name, distiller in self.distillers.items():
            self._check_distiller(name, distiller, student, teacher)
            for loss in distiller.loss_names:
                if owners.setdefault(loss, name) != name:
                    raise UserError(
                        f"The distillers {owners[loss]} and {name} both have a loss {loss!r}: one of them must rename its losses."
                    )
        if (
            self.labels.needs
            and isinstance(self.student, SemanticSegmentor)
            and not any("targets" in distiller.needs for distiller in self.distillers.values())
        ):
            raise UserError(
                f"MODEL.KD.PSEUDO_LABELS has no effect: the student ({student.name}) is trained on semantic segmentation, and no method of "
                "MODEL.KD.DISTILLERS uses objects."
            )

    @staticmethod
    def _check_distiller(name: str, distiller: Distiller, student: DetectorSpec, teacher: DetectorSpec) -> None:
        for attribute in ("loss_names", "needs"):
            if not hasattr(distiller, attribute):
                raise TypeError(f"{name} does not set the attribute {attribute!r}")
        for loss in distiller.loss_names:
            if not loss.startswith("loss_"):
                logger.warning(
                    f"The distiller {name} has a loss {loss!r}, which curves and plots leave out: only names that begin with 'loss_' are losses there."
                )
        for part in distiller.needs - student.provides - teacher.provides:
            if part.partition("/")[0] not in PARTS:
                raise UserError(
                    f"The distiller {name} needs {part!r}, which is no part that the detectors have; known parts are "
                    f"{', '.join(sorted(PARTS))}."
                )
        if not {*distiller.aux_loss_names} <= {*distiller.loss_names}:
            raise RuntimeError(
                f"{name} declares the auxiliary losses {sorted(distiller.aux_loss_names)}, which are not all among its losses "
                f"{sorted(distiller.loss_names)}"
            )
        for whose, spec, needs in (
            ("student", student, distiller.needs),
            ("teacher", teacher, distiller.needs_of_teacher),
        ):
            lacking = needs - spec.provides
            if lacking:
                raise UserError(
                    f"The distiller {name} needs {in_words(lacking)}, which the {whose} ({spec.name}) does not have{without_adapter(spec)}."
                )

    @property
    def device(self):
        return next(self.student.parameters()).device

    def forward(self, batched_inputs: list[dict]) -> Losses | list[dict]:
        """Return detection and distillation losses by name in training, the student's detections in eval mode."""
        if not self.training:
            return self.student(batched_inputs)
        iteration = get_event_storage().iter
        active = {n: d for n, d in self.distillers.items() if self.schedules[n].is_active(iteration)}
        teacher = None
        if active or self.labels.needs:
            batched_inputs = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batched_inputs]
            self.teacher.to(self.device)
        of_teacher = self.labels.needs.union(*(d.needs_of_teacher for d in active.values()))
        if self.labels.needs:
            teacher = self.teacher(batched_inputs, of_teacher)
        targets = [instances_on_device(target, self.device) for target in self.labels(batched_inputs, teacher)]
        inputs = [{**x, "instances": target} for x, target in zip(batched_inputs, targets, strict=True)]
        student = self.adapter.run(inputs, frozenset().union(*(d.needs for d in active.values())), targets)
        if active and teacher is None:
            # The student's losses synchronize with the GPU. The distillers are launched while the GPU runs the teacher.
            teacher = self.teacher(batched_inputs, of_teacher)
        if teacher is not None:
            self._check_same_input(student, teacher)
            if not all(distiller.resizes for distiller in active.values()):
                self._check_same_maps(student, teacher)
        losses = dict(student.losses)
        distilled = {
            n: _scalars(n, distiller(self._seen_by(n, student), teacher, targets)) for n, distiller in active.items()
        }
        if (iteration + 1) % LOG_PERIOD == 0:  # reading a loss synchronizes with the GPU
            for name, own in distilled.items():
                self._warn_without_gradient(name, own)
        factors = self._factors(iteration, student, distilled)
        for name, distiller in self.distillers.items():
            if name in active:
                new = distiller.scaled(distilled[name], factors[name])
                if comm.get_world_size() > 1 and next(distiller.parameters(), None) is not None:
                    # DistributedDataParallel waits for a gradient of every parameter.
                    zeros = distiller.idle_losses(like=student.images.tensor)
                    new = {loss: value + zeros.get(loss, 0.0) for loss, value in new.items()}
            else:
                new = distiller.idle_losses(like=student.images.tensor)
            self._add(losses, new, name, distiller)
        return losses

    def _seen_by(self, distiller: str, student: DetectorOutputs) -> DetectorOutputs:
        """Return the student's outputs as passed to a distiller."""
        if not self.balance or not self.balance.levels:
            return student
        return self.balance.levels.gated(distiller, student)

    def _factors(self, iteration: int, student: DetectorOutputs, distilled: dict[str, Losses]) -> dict[str, float]:
        """Return, by active distiller, the factor of its losses except auxiliary ones, in addition to the weight."""
        factors = {name: self.schedules[name].factor(iteration) for name in distilled}
        if self.balance:
            totals = {name: self.distillers[name].total(losses) for name, losses in distilled.items()}
            multipliers = self.balance.multipliers(
                iteration,
                shared_parameters(self.student),
                sum(student.losses.values()),
                totals,
                student.features,
            )
            for name, multiplier in multipliers.items():
                factors[name] *= multiplier
                get_event_storage().put_scalar(f"kd/balance/{name}", multiplier, smoothing_hint=False)
        return factors

    def _warn_without_gradient(self, name: str, losses: Losses) -> None:
        """Log each loss that trains nothing, once. A loss of 0 needs no gradient, as of images without objects."""
        for loss, value in losses.items():
            is_constant = torch.is_grad_enabled() and not value.requires_grad
            if is_constant and loss not in self._without_gradient and value.item() != 0:
                self._without_gradient.add(loss)
                logger.warning(
                    f"The loss {loss} of {name} has no gradient and trains nothing: it is computed from detached tensors or under "
                    "torch.no_grad, or the student's layers that it depends on are frozen."
                )

    @staticmethod
    def _add(losses: Losses, new: Losses, name: str, distiller: Distiller) -> None:
        if new.keys() != set(distiller.loss_names) or new.keys() & losses.keys():
            raise RuntimeError(
                f"{name} returned the losses {sorted(new)}; it declares {sorted(distiller.loss_names)}, and "
                f"{sorted(losses)} already exist"
            )
        losses.update(new)

    def _check_same_input(self, student: DetectorOutputs, teacher: DetectorOutputs) -> None:
        sizes = tuple(student.images.tensor.shape[-2:]), tuple(teacher.images.tensor.shape[-2:])
        if sizes[0] != sizes[1]:
            raise UserError(
                f"The student ({type(self.student).__name__}) saw images of {sizes[0]} pixels and the teacher "
                f"({type(self.teacher.model).__name__}) of {sizes[1]}: their padding does not agree."
            )

    def _check_same_maps(self, student: DetectorOutputs, teacher: DetectorOutputs) -> None:
        for stride in sorted(student.features.keys() & teacher.features.keys()):
            sizes = tuple(student.features[stride].shape[-2:]), tuple(teacher.features[stride].shape[-2:])
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"At stride {stride} the student ({type(self.student).__name__}) has a map of {sizes[0]} cells and the "
                    f"teacher ({type(self.teacher.model).__name__}) one of {sizes[1]}: they cannot be compared."
                )

    @contextlib.contextmanager
    def without_distillers(self) -> Iterator[None]:
        """Train the student alone within this context: no method runs, and no gradient is balanced."""
        kept = self.distillers, self.balance
        self.distillers, self.balance = nn.ModuleDict(), None
        try:
            yield
        finally:
            self.distillers, self.balance = kept

    def idle_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Return parameters of distillers outside their schedule, which must not change in this iteration."""
        return [
            parameter
            for name, distiller in self.distillers.items()
            if not self.schedules[name].is_active(iteration)
            for parameter in distiller.parameters()
        ]


def _scalars(method: str, losses: Losses) -> Losses:
    """Return a distiller's losses with no dimension; raise a TypeError if one is not a single number."""
    if not isinstance(losses, dict):
        raise TypeError(f"{method} returned a {type(losses).__name__} instead of a dict of losses")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
            raise TypeError(f"{method} returned {found} as {name}; a loss is a scalar tensor")
    return {name: loss.reshape(()) for name, loss in losses.items()}


def student_of(model: nn.Module) -> nn.Module:
    """Return the detector: the student of a KDMetaArch, or the model itself."""
    return model.student if isinstance(model, KDMetaArch) else model
