"""Distillation of values, weighted by instance attention (ICD, Kang et al. 2021).

Shape suffixes: B images, M heads, Q queries, L positions over all levels, D dims of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .derivatives import first_derivative_only
from .shapes import check_same_shape

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Elements of a value tensor processed at a time, by device: few enough for a CPU's cache."""
LAYER_NORM_EPS = 1e-5
ATTENTION_EPS = 1e-6


def icd_distill_loss(student_value: Tensor, teacher_value: Tensor, attention_logits: Tensor, is_real: Tensor) -> Tensor:
    """Compute the distance of normalized values, weighted by the attention of the real instances, without lambda.

    mean over b, m of sum_l w * mean_d (LN(V_S) - LN(V_T))^2 / sum_l w, with w = sum over real q of softmax_l(logits).
    An image without real instances contributes 0. Gradients flow only to `student_value`. Computed in at least float32.

    Args:
        student_value, teacher_value: (B, M, L, D).
        attention_logits: (B, M, Q, L), -inf at padded positions.
        is_real: (B, Q), true (or 1) for instances of the ground truth.

    Raises:
        ValueError: the values differ in shape.
    """
    return attended_value_loss(student_value, teacher_value, instance_attention(attention_logits, is_real))


@torch.no_grad()
def instance_attention(attention_logits: Tensor, is_real: Tensor) -> Tensor:
    """Return w (B, M, L), softmax attention over L summed over the real queries, in at least float32.

    Arguments as in `icd_distill_loss`.
    """
    attention_BMQL = attention_logits.softmax(-1, dtype=_accumulation_type(attention_logits))
    with torch.autocast(attention_BMQL.device.type, enabled=False):
        return torch.einsum("bmql,bq->bml", attention_BMQL, is_real.to(attention_BMQL.dtype))


def attended_value_loss(
    student_value: Tensor, teacher_value: Tensor, attention: Tensor, *, overwrite_student: bool = False
) -> Tensor:
    """Compute `icd_distill_loss` from the attention w (B, M, L), already summed over the instances.

    The loss is a scalar, so its gradient is computed in the forward pass, chunk by chunk, and nothing else is stored.

    Args:
        overwrite_student: write the gradient to the student's values, for callers that no longer need them. They must
            not be a leaf of the graph.
    """
    check_same_shape(student_value, teacher_value)
    return _AttendedValueLoss.apply(student_value, teacher_value.detach(), attention.detach(), overwrite_student)


class _AttendedValueLoss(torch.autograd.Function):
    """With centered values s, t of a position and head, reciprocal deviations r_s, r_t, and <.,.> the mean over D:

    |LN(V_S) - LN(V_T)|^2 / D = r_s^2 <s,s> + r_t^2 <t,t> - 2 r_s r_t <s,t>, and its gradient w.r.t. V_S is
    2 / D * r_s * ((1 - r_s^2 <s,s> + r_s r_t <s,t>) r_s s - r_t t), so no normalized tensor is materialized.
    """

    @staticmethod
    def forward(
        ctx, student_BMLD: Tensor, teacher_BMLD: Tensor, attention_BML: Tensor, overwrite_student: bool
    ) -> Tensor:
        B, M, L, D = student_BMLD.shape
        dtype = _accumulation_type(student_BMLD)
        attention_BML = attention_BML.to(dtype)
        weight_BML = attention_BML / attention_BML.sum(-1, keepdim=True).clamp(min=ATTENTION_EPS)
        gradient_BMLD = None
        if ctx.needs_input_grad[0]:
            gradient_BMLD = student_BMLD if overwrite_student else torch.empty_like(student_BMLD)
        loss = student_BMLD.new_zeros((), dtype=dtype)
        rows, chunk = max(1, B * M), CHUNK_ELEMENTS.get(student_BMLD.device.type, 2**20)
        # Each part is several images, or a part of one.
        images, step = max(1, chunk // max(1, M * L * D)), max(1, chunk // max(1, M * D))
        for first in range(0, B, images):
            for start in range(0, L, step):
                part = (slice(first, first + images), slice(None), slice(start, start + step))
                student, student_rstd, student_square = _centered(student_BMLD[part].to(dtype))
                teacher, teacher_rstd, teacher_square = _centered(teacher_BMLD[part].to(dtype))
                weight = weight_BML[part]
                correlation = student_rstd * teacher_rstd * (student * teacher).mean(-1)
                loss += (weight * (student_square + teacher_square - 2 * correlation)).sum()
                if gradient_BMLD is not None:
                    factor = weight * student_rstd
                    student *= (factor * (1 - student_square + correlation) * student_rstd)[..., None]
                    gradient_BMLD[part] = student.addcmul_(teacher, (factor * teacher_rstd)[..., None], value=-1)
        ctx.gradient_BMLD, ctx.factor = gradient_BMLD, 2 / (rows * D)
        return loss / rows

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient_BMLD = ctx.gradient_BMLD
        if gradient_BMLD is None:
            raise RuntimeError("Trying to backward through the graph a second time without retain_graph=True")
        retains_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retains_graph:
            ctx.gradient_BMLD = None
        # The stored gradient is that of a sum; it is divided only here, together with a gradient scaler's factor.
        scale = grad_loss * ctx.factor
        if gradient_BMLD.dtype == scale.dtype and not retains_graph:
            return gradient_BMLD.mul_(scale), None, None, None
        return (gradient_BMLD.to(scale.dtype) * scale).to(gradient_BMLD.dtype), None, None, None


def _centered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, over the last dimension, the centered x, its reciprocal deviation r, and the mean square of r * x."""
    x = x - x.mean(-1, keepdim=True)
    variance = torch.linalg.vector_norm(x, dim=-1).square_() / x.shape[-1]
    rstd = (variance + LAYER_NORM_EPS).rsqrt()
    return x, rstd, variance * rstd.square()


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
