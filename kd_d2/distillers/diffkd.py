"""DiffKD: the student's features, denoised by a diffusion model of the teacher's, imitate them (Huang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from detectron2.structures import Instances
from torch import Tensor, nn
from torch.func import functional_call

from ..adapters import DetectorOutputs
from ..keys import AtLeast, AtMost
from .adaptation import AdaptationLayers, Selection
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .batch_norm import BatchNormWithoutState, check_positions
from .diffusion import TIMES, Denoiser, mean_squared_error
from .pair import NumLevels, Pair


@DISTILLER_REGISTRY.register()
class DiffKD(Distiller):
    """Knowledge diffusion for distillation (Huang et al. 2023), of neck features.

    L = WEIGHT * sum over levels of the mean of (P(D(phi(F_S))) - E(F_T))^2

    E encodes the teacher's features in fewer channels; E is trained together with a decoder of them. D denoises the student's features phi(F_S), of
    as many channels, with a diffusion model that is trained on E(F_T) (see `Denoiser`). phi and P are 1x1 convolutions. The
    losses of the autoencoder and the diffusion model are auxiliary: they train only these.

    With RESIDUAL (not in the paper) phi is E, and E(F_S) is added to P's output, which starts as zero: L starts as the mean of
    (E(F_S) - E(F_T))^2.

    A public config of the authors does the same with the class logits of RetinaNet; here other methods distill predictions.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_diffkd", "loss_diffkd_aux_diffusion", "loss_diffkd_aux_autoencoder")
    aux_loss_names = ("loss_diffkd_aux_diffusion", "loss_diffkd_aux_autoencoder")
    CONFIG_NODE = "DIFFKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[float, AtLeast(0), "Weight of the method's losses, except auxiliary ones."] = 5.0
        latent_channels: Annotated[
            int | None,
            AtLeast(1),
            "Channels in which the teacher's features are encoded; None means half as many as are imitated.",
        ] = None
        steps: Annotated[int, AtLeast(1), AtMost(TIMES // 2), "Number of denoising steps."] = 5
        residual: Annotated[
            bool | None,
            "Whether the student's features are encoded like the teacher's and added to the denoised ones, which start as zero; the paper's "
            "are not. None means True if they have as many channels as are imitated.",
        ] = False
        num_levels: NumLevels = None
        adaptation: Selection = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        pair = pair.with_levels(config.num_levels)
        self.adaptation = AdaptationLayers.without_convolutions(config.adaptation, pair, self.CONFIG_NODE)
        residual = self.adaptation.is_residual(config.residual, self.CONFIG_NODE)
        self.levels = nn.ModuleDict()
        for stride, theirs in self.adaptation.compared_channels.items():
            latent = config.latent_channels or max(theirs // 2, 1)
            ours, _ = pair.channels[stride]
            self.levels[str(stride)] = _Level(ours, theirs, latent, config.steps, residual)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        pairs = self.adaptation.pairs(student, teacher)
        losses = [level(*maps) for level, maps in zip(self.levels.values(), pairs, strict=True)]
        return {
            name: sum(of_levels) for name, of_levels in zip(self.loss_names, zip(*losses, strict=True), strict=True)
        }


class _Level(nn.Module):
    """The layers of one level.

    Args:
        ours, theirs, latent: channels of the student's, of the teacher's and of the encoded features.
        steps: number of denoising steps.
        residual: see MODEL.KD.DIFFKD.RESIDUAL.
    """

    def __init__(self, ours: int, theirs: int, latent: int, steps: int, residual: bool):
        super().__init__()
        self.encoder = _projection(theirs, latent)
        self.decoder = nn.Conv2d(latent, theirs, 1)
        self.reduce = None if residual else nn.Conv2d(ours, latent, 1)
        self.denoiser = Denoiser(latent, steps)
        self.project = _projection(latent, latent)
        if residual:
            nn.init.zeros_(self.project[1].weight)

    def forward(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of distillation, diffusion model and autoencoder for maps (B, C, H, W)."""
        if self.training:
            check_positions(ours, "DiffKD", DiffKD.CONFIG_NODE)
        encoded = self.encoder(theirs)
        autoencoder = mean_squared_error(self.decoder(encoded), theirs)
        encoded = encoded.detach()
        reduced = self._encoded(ours) if self.reduce is None else self.reduce(ours)
        denoised = self.project(self.denoiser(reduced))
        distillation = mean_squared_error(denoised + reduced if self.reduce is None else denoised, encoded)
        return distillation, self.denoiser.loss(encoded), autoencoder

    def _encoded(self, ours: Tensor) -> Tensor:
        """Encode the student's maps, which does not train the encoder."""
        constant = {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}
        return functional_call(self.encoder, constant, ours)


def _projection(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), BatchNormWithoutState(out))
