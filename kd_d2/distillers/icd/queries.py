"""Instance queries: ground-truth instances, and fake ones sampled from class priors.

Shape suffixes: B images, Q queries, K classes, N instances or fakes of all images together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ...distributed import sum_across_ranks
from ...transfer import on_device
from .priors import priors_of_sums

FAKE_SIZE_RANGE = (0.002, 0.7)
FAKE_CENTER_RANGE = (0.03, 0.97)
FAKE_SIGMAS = 2.0


@dataclass
class InstanceQueries:
    """Queries of a batch; in each image, the real ones come first, then the fakes, then padding.

    Attributes:
        boxes: (B, Q, 4) center x, y, width, height as fractions of the image.
        centers: (B, Q, 2) jittered centers x, y as fractions of the image.
        classes: (B, Q) int64.
        is_real: (B, Q) bool, whether from the ground truth.
        is_padding: (B, Q) bool, neither real nor fake.
        image_sizes: (B, 2) height and width of the images in pixels, without padding.
        most_real: largest number of real queries of an image.
    """

    boxes: Tensor
    centers: Tensor
    classes: Tensor
    is_real: Tensor
    is_padding: Tensor
    image_sizes: Tensor
    most_real: int


class FakeInstances(nn.Module):
    """Samples fake instances with classes and sizes distributed as in the training set, at random positions.

    Args:
        frequencies: (K,) class frequencies, in any unit.
        mean_sizes, deviations: (K, 2) mean and standard deviation of width and height, as fractions of the image.
    """

    def __init__(self, frequencies: Tensor, mean_sizes: Tensor, deviations: Tensor):
        super().__init__()
        self.register_buffer("cumulative", _cumulative(frequencies))
        self.register_buffer("mean_sizes", mean_sizes.float())
        self.register_buffer("deviations", deviations.float())

    def observe(self, targets: list[Instances], image_sizes: list[tuple[int, int]]) -> None:
        """Update the priors from a batch (no-op: annotations determine them). Arguments as in `build_queries`."""

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Sample `count` instances with the device's default torch generator.

        Returns:
            boxes (N, 4) center x, y, width, height as fractions of the image, and classes (N,).
        """
        device = self.cumulative.device
        classes = torch.searchsorted(self.cumulative, torch.rand(count, dtype=torch.float32, device=device), right=True)
        classes.clamp_(max=len(self.cumulative) - 1)
        inside = math.erf(FAKE_SIGMAS / math.sqrt(2))
        sigmas = math.sqrt(2) * torch.erfinv(
            inside * (2 * torch.rand(count, 2, dtype=torch.float32, device=device) - 1)
        )
        sizes = (self.mean_sizes[classes] + sigmas * self.deviations[classes]).clamp(*FAKE_SIZE_RANGE)
        centers = torch.rand(count, 2, dtype=torch.float32, device=device).clamp(*FAKE_CENTER_RANGE)
        return torch.cat([centers, sizes], 1), classes


class ObservedFakeInstances(FakeInstances):
    """Samples fakes like the instances that all ranks have seen so far, if no annotations are available beforehand.

    It starts as if one instance per class, of width and height 0.2 with a deviation of 0.1, had been seen.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        counts = torch.ones(num_classes, dtype=torch.float64)
        sums, squares = (torch.full((num_classes, 2), x, dtype=torch.float64) for x in (0.2, 0.2**2 + 0.1**2))
        super().__init__(*priors_of_sums(counts, sums, squares))
        self.register_buffer("counts", counts)
        self.register_buffer("sums", sums)
        self.register_buffer("squares", squares)

    @torch.no_grad()
    def observe(self, targets: list[Instances], image_sizes: list[tuple[int, int]]) -> None:
        classes = torch.cat([t.gt_classes for t in targets])
        corners = [
            t.gt_boxes.tensor.view(-1, 2, 2) / on_device([width, height], t.gt_boxes.device)
            for t, (height, width) in zip(targets, image_sizes, strict=True)
        ]
        sizes = torch.cat([x[:, 1] - x[:, 0] for x in corners]).double()
        columns = torch.cat([torch.ones_like(sizes[:, :1]), sizes, sizes.square()], 1)
        seen = sum_across_ranks(columns.new_zeros(len(self.counts), 5).index_add_(0, classes, columns))
        self.counts += seen[:, 0]
        self.sums += seen[:, 1:3]
        self.squares += seen[:, 3:]
        frequencies, self.mean_sizes, self.deviations = priors_of_sums(self.counts, self.sums, self.squares)
        self.cumulative = _cumulative(frequencies)


def _cumulative(frequencies: Tensor) -> Tensor:
    return (frequencies.double().cumsum(0) / frequencies.double().sum()).float()


@torch.no_grad()
def build_queries(
    targets: list[Instances],
    image_sizes: list[tuple[int, int]],
    fakes: FakeInstances,
    *,
    fakes_per_instance: float,
    max_queries: int,
    jitter: float,
) -> InstanceQueries:
    """Build the queries of a batch.

    Args:
        targets: ground truth per image, `gt_boxes` in pixels and `gt_classes`.
        image_sizes: height and width of the images in pixels, without padding.
        fakes_per_instance: fakes per real instance; an image without instances gets one fake.
        max_queries: maximum per image, real and fake; if there are more real instances, a random subset is used.
        jitter: the center is shifted by U(-jitter, jitter) times width and height.
    """
    device = targets[0].gt_boxes.device
    targets = [t if len(t) <= max_queries else t[torch.randperm(len(t), device=device)[:max_queries]] for t in targets]
    num_real = [len(t) for t in targets]
    num_fake = [min(round(n * fakes_per_instance), max_queries - n) if n else 1 for n in num_real]
    fake_boxes, fake_classes = fakes.sample(sum(num_fake))
    sizes_B2 = torch.tensor(image_sizes, dtype=torch.float32).to(device, non_blocking=True)

    queries_of = [real + fake for real, fake in zip(num_real, num_fake, strict=True)]
    B, Q = len(targets), max(queries_of)
    rank_Q = torch.arange(Q)
    is_real = rank_Q < torch.tensor(num_real)[:, None]
    is_padding = rank_Q >= torch.tensor(queries_of)[:, None]
    is_fake = ~is_real & ~is_padding
    # Indices are computed on the host to avoid synchronizing the device.
    real_slots, fake_slots = (x.flatten().nonzero()[:, 0].to(device, non_blocking=True) for x in (is_real, is_fake))

    boxes = torch.zeros(B * Q, 4, dtype=torch.float32, device=device)
    classes = torch.zeros(B * Q, dtype=torch.int64, device=device)
    if sum(num_real):
        real_boxes = torch.cat([t.gt_boxes.tensor.float() for t in targets])
        owner = torch.repeat_interleave(torch.arange(B), torch.tensor(num_real)).to(device, non_blocking=True)
        corners = real_boxes.view(-1, 2, 2) / sizes_B2[owner].flip(1)[:, None]
        boxes[real_slots] = torch.cat([corners.mean(1), corners[:, 1] - corners[:, 0]], 1)
        classes[real_slots] = torch.cat([t.gt_classes for t in targets])
    boxes[fake_slots], classes[fake_slots] = fake_boxes, fake_classes
    boxes = boxes.view(B, Q, 4)
    shifts_BQ2 = 2 * torch.rand(B, Q, 2, dtype=torch.float32, device=device) - 1
    centers = boxes[..., :2] + shifts_BQ2 * jitter * boxes[..., 2:]
    return InstanceQueries(
        boxes,
        centers,
        classes.view(B, Q),
        is_real.to(device, non_blocking=True),
        is_padding.to(device, non_blocking=True),
        sizes_B2,
        max(num_real),
    )
