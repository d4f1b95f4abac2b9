"""Base of methods whose masks come from tokens that the teacher's detection losses train: MasKD and FreeKD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Protocol

from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..errors import UserError
from ..keys import Above, AtLeast
from .adaptation import Adaptation, AdaptationLayers
from .base import Distiller, Losses, OptimizerSettings, ParamGroup
from .pair import Pair

MOST_TOKEN_ITERS, TRAINING_OVER_TOKENS = 2000, 10
"""The default of TOKEN_ITERS: the most iterations, and the fraction of the training."""


class LevelTokens(Protocol):
    """Tokens of one level of the teacher's features, a module."""

    def masked(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masked maps (B, C, H, W), and how much the masks of an image overlap, a scalar."""


class TokenDistiller(Distiller):
    """Base of methods that learn tokens in the first TOKEN_ITERS iterations, and then imitate features inside their masks.

    The tokens are trained by the detection losses of the teacher with masked features, plus the overlap of the masks.
    The first of `loss_names` is the loss of imitation, the other two train the tokens.
    """

    needs = frozenset({"features", "targets"})

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        num_tokens: Annotated[int, AtLeast(2), "Number of tokens of each level."] = 6
        token_iters: Annotated[
            int | None,
            AtLeast(0),
            "Iterations, starting at START_ITER, in which the tokens are learned and the student imitates nothing; None means 2000, at "
            "most a tenth of SOLVER.MAX_ITER.",
        ] = None
        lr: Annotated[
            float, Above(0), "Learning rate of AdamW for the tokens, with cosine decay to zero after TOKEN_ITERS."
        ] = 0.01
        weight_decay: Annotated[float, AtLeast(0), "Weight decay of AdamW for the tokens."] = 1e-3
        adaptation: Adaptation = "1x1"

    def __init__(self, config: Config, pair: Pair, default_weight: float | None = None):
        super().__init__(config, pair, default_weight)
        most = min(MOST_TOKEN_ITERS, pair.max_iter // TRAINING_OVER_TOKENS)
        learning = self.iterations("token_iters", most, pair)
        self.learn_until = config.start_iter + learning
        end = pair.max_iter if config.end_iter is None else config.end_iter
        if end and learning and self.learn_until >= end:
            raise UserError(
                f"MODEL.KD.{self.CONFIG_NODE}.START_ITER {config.start_iter} and TOKEN_ITERS {learning} leave no iteration before {end} in "
                "which the student imitates the teacher: lower them."
            )
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        channels = {stride: theirs for stride, (_, theirs) in pair.channels.items()}
        self.levels = nn.ModuleDict({str(stride): self.tokens_for(number) for stride, number in channels.items()})

    def iterations(self, key: str, default: int, pair: Pair) -> int:
        """Return a number of iterations of the config, or the default, which depends on the length of the training.

        Raises:
            UserError: neither is known.
        """
        value = getattr(self.config, key)
        if value is None and not pair.max_iter:
            name = type(self).__name__
            raise UserError(
                f"{name} needs the number of training iterations, as in `Pair(student, teacher, max_iter=90000)`, or `{key}` of "
                f"`{name}.Config`."
            )
        return default if value is None else value

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        return frozenset({"features", "losses"})

    @property
    def compares_classes(self) -> bool:
        return True  # the teacher's detection losses are those of the student's annotations

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        config = self.config
        name = self.CONFIG_NODE.lower()
        optimizer = OptimizerSettings(
            name, config.lr, config.weight_decay, start_iter=config.start_iter, end_iter=self.learn_until
        )
        (others,) = super().param_groups(cfg)
        others.params = list(self.adaptation.parameters())
        return [ParamGroup(list(self.levels.parameters()), optimizer), others]

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses = self.idle_losses(like=student.images.tensor)
        if get_event_storage().iter < self.learn_until:
            return losses | self._token_losses(teacher, targets)
        return losses | {self.loss_names[0]: self.imitation(student, teacher)}

    def _token_losses(self, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        features, overlaps = dict(teacher.features), []
        for stride, tokens in self.tokens():
            maps = teacher.features[stride]
            masked, overlap = tokens.masked(maps)
            features[stride] = masked.to(maps.dtype)
            overlaps.append(overlap)
        detection = sum(teacher.losses_of(features, targets).values())
        return dict(zip(self.aux_loss_names, (detection, sum(overlaps)), strict=True))

    def tokens(self) -> Iterator[tuple[int, LevelTokens]]:
        """Iterate over strides and their tokens, in the order of the levels of `adaptation`."""
        return ((stride, self.levels[str(stride)]) for stride in self.adaptation.strides)

    @abstractmethod
    def tokens_for(self, channels: int) -> nn.Module:
        """Build the tokens of a level whose teacher's maps have this number of channels; see `LevelTokens`."""

    @abstractmethod
    def imitation(self, student: DetectorOutputs, teacher: DetectorOutputs) -> Tensor:
        """Compute the loss of features inside the masks, once the tokens are learned."""
