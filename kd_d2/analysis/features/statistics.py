"""Statistics of the feature maps of an image: correlation of neighbors, distance between student and teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...losses import fitting_window, min_max_normalize, ssim_loss
from ..base import nanmean

SSIM_WINDOW = 11
COMPONENTS = {"luminance": (1, 0, 0), "contrast": (0, 1, 0), "structure": (0, 0, 1)}
HORIZONTAL, VERTICAL = "horizontal", "vertical"


def neighbor_pairs(maps: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """Return the features of maps (C, H, W) and their right or lower neighbors, (C, N) each."""
    if direction == HORIZONTAL:
        return maps[:, :, :-1].flatten(1), maps[:, :, 1:].flatten(1)
    return maps[:, :-1].flatten(1), maps[:, 1:].flatten(1)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's coefficient (C,) of each row of x and y (C, N), or NaN if a row is constant or N < 2."""
    x, y = (v.double() - v.double().mean(1, keepdim=True) for v in (x, y))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def neighbor_correlation(maps: Tensor) -> dict[str, float]:
    """Return the correlation of neighbors in maps (C, H, W) by direction (de Rijk 2022, table 9).

    Constant channels are left out of the mean; NaN if all are constant or there are fewer than two pairs of neighbors.
    """
    return {d: float(correlation(*neighbor_pairs(maps, d)).nanmean()) for d in (HORIZONTAL, VERTICAL)}


def distances(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return the distances of maps (C, H, W) to the teacher's.

    "relative" is |s - t|^2 / |t|^2. "correlation" is Pearson's over positions, averaged over channels. "l1" and "ssim"
    are the mean absolute difference and the SSIM loss (1 - SSIM) / 2 of both scaled to [0, 1]. "luminance", "contrast"
    and "structure" are the means of SSIM's components, 1 if equal. "range" is max - min relative to the teacher's.
    """
    s, t = min_max_normalize(student[None], teacher[None])
    window = fitting_window(s, SSIM_WINDOW)
    return {
        "relative": float((student - teacher).square().sum() / teacher.square().sum()),
        "correlation": float(correlation(student.flatten(1), teacher.flatten(1)).nanmean()),
        "l1": float((s - t).abs().mean()),
        "ssim": float(ssim_loss(s, t, window)),
        **{name: 1 - 2 * float(ssim_loss(s, t, window, exponents=only)) for name, only in COMPONENTS.items()},
        "range": float((student.max() - student.min()) / (teacher.max() - teacher.min())),
    }


def difference_map(student: Tensor, teacher: Tensor) -> np.ndarray:
    """Return the absolute difference of maps (C, H, W), each scaled to [0, 1], averaged over channels (H, W)."""
    s, t = min_max_normalize(student[None], teacher[None])
    return (s - t).abs().mean(1)[0].cpu().numpy()


@dataclass
class FeatureStatistics:
    """Statistics of a model's levels, collected over images; dictionaries by stride.

    Args:
        points: number of pairs of neighbors to sample per level and image, for histograms.
    """

    points: int = 400
    correlations: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    pairs: dict[int, list[np.ndarray]] = field(default_factory=dict)
    distances: dict[int, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, stride: int, maps: Tensor, random: np.random.RandomState) -> None:
        """Add a level (C, H, W) of an image."""
        self.correlations.setdefault(stride, []).append(neighbor_correlation(maps))
        x, y = (v.flatten() for v in neighbor_pairs(maps, HORIZONTAL))
        if len(x):
            chosen = torch.from_numpy(random.randint(len(x), size=self.points)).to(x.device)
            self.pairs.setdefault(stride, []).append(torch.stack([x[chosen], y[chosen]]).cpu().numpy())

    def add_distances(self, stride: int, maps: Tensor, teacher: Tensor) -> None:
        """Add the distances of a level (C, H, W) of an image to the teacher's, which has the same shape."""
        self.distances.setdefault(stride, []).append(distances(maps, teacher))

    def mean_correlations(self) -> dict[int, dict[str, float]]:
        """Return means over images with neighbors by stride and direction, with the "mean" of both directions."""
        means = {stride: _means(entries) for stride, entries in self.correlations.items()}
        return {stride: {**of, "mean": float(nanmean(list(of.values())))} for stride, of in means.items()}

    def mean_distances(self) -> dict[int, dict[str, float]]:
        """Return means over images by stride and kind."""
        return {stride: _means(entries) for stride, entries in self.distances.items()}


def _means(entries: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(nanmean([entry[key] for entry in entries])) for key in entries[0]}
