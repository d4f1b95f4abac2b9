"""Distillation of how a detector ranks the candidates of each instance (Rank Mimicking, Li et al. 2022).

Shape suffixes: P positives of all instances, N instances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import check_same_shape


def rank_kl_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    instance_index: Tensor,
    num_instances: Tensor | float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the divergence of the student's rank distribution from the teacher's (equations 5 and 6).

    For each instance, a softmax is applied to the scores of its positives; the loss is the sum over instances of
    KL(teacher || student), divided by the number of instances. An instance with a single positive has no ranking: it
    contributes nothing and is not counted. Gradients flow only to the student. Computed in at least float32.

    Args:
        student_scores, teacher_scores: (P,) scores of the positives.
        instance_index: (P,) int64, equal for the positives of one instance, in any order.
        num_instances: divisor; None for the number of instances with at least two positives, at least 1.
        temperature: divides the scores; the loss is multiplied by its square to preserve the scale of gradients.

    Returns:
        A scalar; zero, with a gradient of zero, if no instance has a ranking.

    Raises:
        ValueError: the scores differ in shape.
    """
    check_same_shape(student_scores, teacher_scores)
    dtype = torch.promote_types(student_scores.dtype, torch.float32)
    segment_P = consecutive(instance_index)
    student_P = segment_log_softmax(student_scores.to(dtype) / temperature, segment_P)
    teacher_P = segment_log_softmax(teacher_scores.detach().to(dtype) / temperature, segment_P)
    divergence = (teacher_P.exp() * (teacher_P - student_P)).sum()
    if num_instances is None:
        num_instances = count_ranked(instance_index).clamp(min=1)
    return temperature**2 * divergence / num_instances


def count_ranked(instance_index: Tensor) -> Tensor:
    """Count the instances with at least two positives, as a scalar tensor. Argument as in `rank_kl_loss`."""
    segment_P = consecutive(instance_index)
    return (torch.zeros_like(segment_P).index_add_(0, segment_P, torch.ones_like(segment_P)) > 1).sum()


def reordered(scores: Tensor, other_scores: Tensor, instance_index: Tensor) -> Tensor:
    """Redistribute each instance's scores (P,) over its positives in the order of `other_scores`.

    Args:
        scores, other_scores: (P,).
        instance_index: (P,) int64, see `rank_kl_loss`.
    """
    ours_P, theirs_P = (_by_instance_and_score(x, instance_index) for x in (scores, other_scores))
    return torch.empty_like(scores).index_copy_(0, theirs_P, scores[ours_P])


def _by_instance_and_score(scores_P: Tensor, instance_index: Tensor) -> Tensor:
    """Return the indices (P,) that sort the positives by instance, and within it by score."""
    order_P = scores_P.argsort(stable=True)
    return order_P[instance_index[order_P].argsort(stable=True)]


def consecutive(instance_index: Tensor) -> Tensor:
    """Renumber the groups 0, 1, 2, ..., all below P, without synchronizing the device."""
    ordered_P, order_P = instance_index.sort()
    new_P = torch.zeros_like(ordered_P)
    new_P[1:] = (ordered_P[1:] != ordered_P[:-1]).cumsum(0)
    return torch.empty_like(new_P).index_copy_(0, order_P, new_P)


def segment_log_softmax(scores_P: Tensor, segment_P: Tensor) -> Tensor:
    """Compute the log softmax within each segment; segment numbers are below P."""
    largest_P = scores_P.detach().new_full(scores_P.shape, -torch.inf)
    largest_P.scatter_reduce_(0, segment_P, scores_P.detach(), "amax")
    shifted_P = scores_P - largest_P[segment_P]
    total_P = torch.zeros_like(scores_P).index_add(0, segment_P, shifted_P.exp())
    return shifted_P - total_P[segment_P].log()
