"""ICD: losses against a plain implementation of the definition, queries, priors, and gradient flow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_d2 import KDMetaArch, Teacher
from kd_d2.adapters import DetectorSpec
from kd_d2.distillers import OptimizerSettings, Pair
from kd_d2.distillers.icd import decoder as decoder_module
from kd_d2.distillers.icd import priors as priors_module
from kd_d2.distillers.icd.distiller import ICD, SMALLEST_SIZE, auxiliary_losses
from kd_d2.distillers.icd.encoding import InstanceEncoder, sine_waves, size_bins
from kd_d2.distillers.icd.geometry import LevelGeometry
from kd_d2.distillers.icd.priors import compute_priors, read_priors
from kd_d2.distillers.icd.projection import project_levels
from kd_d2.distillers.icd.queries import FakeInstances, InstanceQueries, build_queries
from kd_d2.errors import UserError
from kd_d2.losses import attended_value_loss, icd_distill_loss
from kd_d2.losses import icd as losses_module

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import make, spec_of
from PIL import Image
from torch import Tensor

pytestmark = pytest.mark.unit

REFERENCE = Path(__file__).resolve().parent / "fixtures" / "icd_reference.npz"
NUM_CLASSES = 3
STRIDES = [8, 16]
IMAGE_SIZES = [(64, 96), (52, 70)]
PADDED = (64, 96)


def _targets(*boxes_of: list[list[float]], sizes: list[tuple[int, int]] | None = None) -> list[Instances]:
    """Return the targets of images with boxes x1, y1, x2, y2; box n, from 0, has class n modulo 3."""
    result = []
    for boxes, size in zip(boxes_of, sizes or IMAGE_SIZES, strict=False):
        target = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)))
        target.gt_classes = torch.arange(len(boxes)) % NUM_CLASSES
        result.append(target)
    return result


def _fakes(num_classes: int = NUM_CLASSES, size: float = 0.2, deviation: float = 0.1) -> FakeInstances:
    return FakeInstances(
        torch.ones(num_classes), torch.full((num_classes, 2), size), torch.full((num_classes, 2), deviation)
    )


def _built(
    strides: list[int], student: int, teacher: int, num_classes: int = NUM_CLASSES, dim: int = 16, **keys
) -> ICD:
    """Build a small ICD distiller for detectors with these numbers of channels, with the fakes of `_fakes`."""
    specs = (spec_of(dict.fromkeys(strides, channels), num_classes=num_classes) for channels in (student, teacher))
    icd = make(ICD, *specs, dim=dim, **{"num_heads": 2, "ffn_dim": 24, **keys})
    icd.fakes = _fakes(num_classes)
    return icd


def _icd(channels: int = 16, dim: int = 16, num_layers: int = 1, student: int | None = None, **options) -> ICD:
    torch.manual_seed(1)
    icd = _built(STRIDES, student or channels + 4, channels, dim=dim, num_layers=num_layers, **options)
    for parameter in icd.parameters():  # so that biases are nonzero and every term matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return icd


def _maps(channels: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-PADDED[0] // s), -(-PADDED[1] // s)) for s in STRIDES]
    return [torch.randn(2, channels, *size, generator=generator, dtype=dtype) for size in sizes]


def _geometry(maps: list[Tensor]) -> LevelGeometry:
    return LevelGeometry.of(maps, IMAGE_SIZES, PADDED)


def _queries(jitter: float = 0.3) -> InstanceQueries:
    torch.manual_seed(0)
    targets = _targets([[8.0, 8.0, 40.0, 30.0], [50.0, 20.0, 90.0, 60.0]], [[5.0, 6.0, 65.0, 40.0]])
    return build_queries(targets, IMAGE_SIZES, _fakes(), fakes_per_instance=2, max_queries=300, jitter=jitter)


# ------------------------------------------------------------------------------- the definition, written out


def _sine(value: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    angles = torch.stack([value * 2 * math.pi / 10000 ** (k / dims) for k in range(dims)], -1)
    return angles.sin(), angles.cos()


def _flat(maps: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


def _positions(maps: list[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Return each cell's position encoding as in the authors' code, from counts of valid cells, and which are valid."""
    mask = torch.zeros(2, 1, *PADDED)
    for image, (height, width) in enumerate(IMAGE_SIZES):
        mask[image, :, :height, :width] = 1
    positions, valid = [], []
    for m in maps:
        inside = F.interpolate(mask, m.shape[-2:], mode="nearest")[:, 0]
        parts = []
        for axis in (1, 2):
            count = inside.cumsum(axis)
            wave = _sine((count / (count.amax(axis, keepdim=True) + 1e-6)).double(), dim // 4)
            parts.append(torch.stack(wave, -1).flatten(-2))
        positions.append(torch.cat(parts, -1).flatten(1, 2))
        valid.append(inside.flatten(1) > 0)
    return torch.cat(positions, 1), torch.cat(valid, 1)


def _plain_losses(
    icd: ICD, query: Tensor, queries: InstanceQueries, student: list[Tensor], teacher: list[Tensor]
) -> dict[str, Tensor]:
    """Compute the losses of ICD with dense operations, directly from the definition."""
    decoder, M = icd.decoder, icd.decoder.layers[0].num_heads
    features = compared = _flat(teacher)
    if icd.selection is not None:
        compared = torch.zeros_like(features)
        compared[..., icd.selection.channels] = features[..., icd.selection.channels]
    if decoder.input is not None:
        features, compared = decoder.input(features), decoder.input(compared)
    position, valid = _positions(teacher, decoder.dim)

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], M, -1).transpose(1, 2)

    distances = []
    for layer, student_value in zip(decoder.layers, icd.student_values, strict=True):
        keys, values = heads(layer.key(features + decoder.position(position))), heads(layer.value(features))
        logits = heads(layer.query(query)) @ keys.transpose(2, 3) / math.sqrt(decoder.dim // M)
        logits = logits.masked_fill(~valid[:, None, None], -math.inf)
        attention = logits.softmax(-1)
        found = (attention @ values).transpose(1, 2).flatten(2)
        query = layer.norm1(query + layer.out(found))
        query = layer.norm2(query + layer.ffn(query))
        d = decoder.dim // M
        wanted = heads(layer.value(compared)).detach()
        apart = F.layer_norm(heads(student_value(_flat(student))), (d,)) - F.layer_norm(wanted, (d,))
        weight = (attention.detach() * queries.is_real[:, None, :, None]).sum(2)
        distances.append(((weight * apart.pow(2).mean(-1)).sum(-1) / weight.sum(-1).clamp(min=1e-6)).mean())
    prediction = icd.auxiliary_head(query)
    real, used = queries.is_real, ~queries.is_padding
    objectness = F.binary_cross_entropy_with_logits(prediction[..., 0][used], real[used].to(prediction.dtype))
    box, center = queries.boxes[real], queries.centers[real]
    low, high = box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2
    wanted = torch.cat([center - low, high - center], 1)
    distance = (prediction[..., 1:][real].sigmoid() - wanted).abs() / box[:, [2, 3, 2, 3]]
    return {
        "loss_icd": sum(distances) / len(distances),
        "loss_icd_aux_objectness": objectness,
        "loss_icd_aux_box": distance.sum(1).mean(),
    }


@pytest.mark.parametrize(("narrower", "adaptation"), [(-4, "none"), (8, "none"), (8, "select")])
@pytest.mark.parametrize("channels", [16, 12], ids=["same width", "input projection"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_losses_and_all_gradients_equal_the_definition(
    channels: int, num_layers: int, narrower: int, adaptation: str
) -> None:
    icd = _icd(channels, num_layers=num_layers, student=channels - narrower, adaptation=adaptation).double()
    queries = _queries()
    query = torch.randn(*queries.classes.shape, 16, dtype=torch.float64)
    queries.boxes, queries.centers = queries.boxes.double(), queries.centers.double()
    teacher = _maps(channels, 2, torch.float64)
    student = [m.requires_grad_() for m in _maps(channels - narrower, 3, torch.float64)]
    results = []
    for losses in (
        icd.losses(query, queries, student, teacher, _geometry(teacher)),
        _plain_losses(icd, query, queries, student, teacher),
    ):
        icd.zero_grad()
        for m in student:
            m.grad = None
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in icd.named_parameters() if p.grad is not None}
        results.append((losses, gradients | {f"student {i}": m.grad for i, m in enumerate(student)}))
    (ours, our_gradients), (plain, plain_gradients) = results
    for name, loss in plain.items():  # the auxiliary losses are computed in float32
        assert ours[name].item() == pytest.approx(loss.item(), rel=1e-6), name
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def _load_reference(icd: ICD, reference: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Copy the reference weights into the modules and return our parameters by reference name."""
    layer, encoder, head = icd.decoder.layers[0], icd.encoder.mlp, icd.auxiliary_head
    modules = {
        "attn.in_proj": [layer.query, layer.key, layer.value],
        "attn.out_proj": [layer.out],
        "pos_proj": [icd.decoder.position],
        "ffn1": [layer.ffn[0]],
        "ffn2": [layer.ffn[2]],
        "norm1": [layer.norm1],
        "norm2": [layer.norm2],
        "student_value": [icd.student_values[0]],
        **{f"encoder_mlp{i}": [encoder[2 * i]] for i in range(3)},
        **{f"head_mlp{i}": [head[2 * i]] for i in range(3)},
    }
    parameters = {
        f"{n}_{kind}": [getattr(m, kind) for m in ms] for n, ms in modules.items() for kind in ("weight", "bias")
    }
    with torch.no_grad():
        for name, parts in parameters.items():
            for part, values in zip(parts, reference[f"w.{name}"].chunk(len(parts)), strict=True):
                part.copy_(values)
    return parameters


@pytest.mark.parametrize("stored", [0, 2**27])
def test_the_authors_numbers(stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every step, loss and gradient of the authors' code on random inputs (fixtures/make_icd_reference.py).

    With and without a stored attention, as on a GPU and on a CPU.
    """
    monkeypatch.setattr(decoder_module, "STORED_ATTENTION", {"cpu": stored})
    reference = {name: torch.from_numpy(values) for name, values in np.load(REFERENCE).items()}
    dim, heads = reference["query"].shape[-1], reference["attention_logits"].shape[1]
    icd = _built([8, 16, 32, 64, 128], dim, dim, 80, dim, num_heads=heads, ffn_dim=4 * dim)
    assert icd.weight == 8
    parameters = _load_reference(icd, reference)
    teacher = [reference[f"teacher_p{level}"] for level in range(3, 8)]
    student = [reference[f"student_p{level}"].requires_grad_() for level in range(3, 8)]
    image_sizes = [tuple(size) for size in reference["image_sizes_hw"].tolist()]
    geometry = LevelGeometry.of(teacher, image_sizes, tuple(reference["padded_hw"].tolist()))
    left, top, right, bottom = reference["target_ltrb"].unbind(-1)
    boxes = torch.stack([(right - left) / 2, (bottom - top) / 2, left + right, top + bottom], -1)
    queries = InstanceQueries(
        boxes=boxes,  # around the jittered center, which is at 0
        centers=torch.zeros(*boxes.shape[:2], 2),
        classes=reference["descriptor"][..., :80].argmax(-1),
        is_real=reference["query_is_real"].bool(),
        is_padding=reference["query_is_padding"],
        image_sizes=reference["image_sizes_hw"],
        most_real=3,
    )

    def close(ours: Tensor, theirs: Tensor, rel: float = 1e-5) -> bool:
        return bool((ours - theirs).norm() <= rel * theirs.norm())

    assert (geometry.is_valid == ~reference["key_is_padding"]).all()
    query = icd.encoder.mlp(reference["descriptor"])
    assert close(query, reference["query"])
    keys = icd.decoder.keys(icd.decoder.layers[0], teacher, geometry)
    logits = icd.decoder.layers[0].logits(query, keys, geometry.is_valid)
    visible = torch.isfinite(reference["attention_logits"])
    assert (torch.isfinite(logits) == visible).all()
    assert close(logits[visible], reference["attention_logits"][visible])
    assert close(icd.decoder.values(icd.decoder.layers[0], teacher), reference["teacher_value"])
    waves = [sine_waves(positions[1, 0], dim // 4).flatten() for positions in (geometry.rows, geometry.columns)]
    assert all(map(close, waves, reference["position"][1, 0].chunk(2)))

    losses = icd.scaled(icd.losses(query, queries, student, teacher, geometry))
    for ours, theirs in (("", "distill"), ("_aux_objectness", "aux_obj"), ("_aux_box", "aux_box")):
        assert losses[f"loss_icd{ours}"].item() == pytest.approx(reference[f"loss_{theirs}"].item(), rel=1e-5)
    sum(losses.values()).backward()
    for level, ours in zip(range(3, 8), student, strict=True):
        assert close(ours.grad, reference[f"student_grad_p{level}"])
    for name, parts in parameters.items():
        if name == "pos_proj_bias":  # shifts all logits of a query equally: the gradient is 0 up to rounding
            assert parts[0].grad.norm() < 1e-6
        elif not name.startswith("student_value"):
            norm = torch.cat([p.grad.flatten() for p in parts]).norm().item()
            assert norm == pytest.approx(reference[f"gradnorm.{name}"].item(), rel=1e-4), name

    centers = queries.centers.clone()
    for image in (0, 1):  # the descriptors of the real queries, from the ground truth and the drawn jitter
        gt, (height, width) = reference[f"gt_boxes_xyxy_{image}"], image_sizes[image]
        extent = torch.tensor([width, height])
        count = len(gt)
        boxes[image, :count] = torch.cat([(gt[:, :2] + gt[:, 2:]) / 2 / extent, (gt[:, 2:] - gt[:, :2]) / extent], 1)
        centers[image, :count] = gt[:, :2] / extent + torch.stack([left, top], -1)[image, :count]
    queries.centers = centers
    real = queries.is_real
    torch.testing.assert_close(icd.encoder.describe(queries)[real], reference["descriptor"][real], rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------------- losses and gradients


def test_distill_loss_by_hand() -> None:
    """Check values with two dims: (1, -1) or (-1, 1) after the layer norm, so that their distance is 0 or 4."""
    student = torch.tensor([[3.0, 1.0], [0.0, 5.0]]).view(1, 1, 2, 2)
    teacher = torch.tensor([[-7.0, 9.0], [2.0, 4.0]]).view(1, 1, 2, 2)
    logits = torch.tensor([[0.0, math.log(3.0)], [9.0, -9.0]]).view(1, 1, 2, 2)
    only_first = torch.tensor([[True, False]])
    assert icd_distill_loss(student, teacher, logits, only_first).item() == pytest.approx(0.25 * 4, rel=1e-4)
    both = icd_distill_loss(student, teacher, logits, torch.tensor([[1.0, 1.0]]))
    assert both.item() == pytest.approx((0.25 + torch.tensor(18.0).sigmoid().item()) / 2 * 4, rel=1e-4)
    assert icd_distill_loss(student, teacher, logits, torch.tensor([[False, False]])).item() == 0


@pytest.mark.parametrize("chunk", [2 * 2 * 4, 2 * 2 * 5 * 4], ids=["two positions", "two images"])
def test_value_loss_gradient_is_the_numerical_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    attention = torch.rand(3, 2, 5, generator=generator, dtype=torch.float64)
    whole = attended_value_loss(student, teacher, attention)
    monkeypatch.setitem(losses_module.CHUNK_ELEMENTS, "cpu", chunk)
    assert attended_value_loss(student, teacher, attention).item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: 3 * attended_value_loss(s, teacher, attention), [student.requires_grad_()]
    )


def test_value_loss_in_place_is_the_same_and_runs_backward_again_where_the_graph_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 2, 5, 4, generator=generator) for _ in range(2))
    attention = torch.rand(2, 2, 5, generator=generator)
    results = []
    for overwrite in (False, True):
        leaf = student.clone().requires_grad_()
        loss = attended_value_loss(2 * leaf, teacher, attention, overwrite_student=overwrite)
        (3 * loss).backward(retain_graph=True)
        results.append((loss.detach(), leaf.grad.clone()))
    assert all((a == b).all() for a, b in zip(*results, strict=True))
    (3 * loss).backward()  # once more, as after a measurement of its gradient
    assert leaf.grad == pytest.approx(2 * results[1][1])
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_value_loss_gradient_does_not_underflow_in_float16() -> None:
    """Check nearly equal values at many positions, with a gradient scaler's factor."""
    torch.manual_seed(0)
    student = torch.randn(2, 8, 4096, 32)
    teacher, attention = student + 0.1 * torch.randn_like(student), torch.ones(2, 8, 4096)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        leaf = student.half().to(dtype).requires_grad_()
        (2**16 * attended_value_loss(leaf, teacher.half().to(dtype), attention)).backward()
        gradients.append(leaf.grad.float())
    exact, found = gradients
    assert (found - exact).norm() < 0.01 * exact.norm()


def test_projection_gradients_are_the_numerical_ones() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    maps = [random(2, 3, 2, 3), random(2, 3, 1, 2)]
    weight, bias = random(4, 3), random(4)
    terms = [random(2, 2, 4), random(2, 1, 4), random(2, 3, 4), random(2, 2, 4)]
    assert torch.autograd.gradcheck(lambda w, b, *m: project_levels(list(m), w, b), [weight, bias, *maps])
    assert torch.autograd.gradcheck(
        lambda w, b, m0, m1, r0, r1, c0, c1: project_levels([m0, m1], w, b, [r0, r1], [c0, c1]),
        [weight, bias, *maps, *terms],
    )
    channels_last = [m.detach().to(memory_format=torch.channels_last) for m in maps]
    torch.testing.assert_close(project_levels(channels_last, weight, bias), project_levels(maps, weight, bias))


def test_attention_in_pieces_is_that_of_all_queries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    icd, queries, teacher = _icd(), _queries(), _maps(16, 2)
    geometry, layer = _geometry(teacher), icd.decoder.layers[0]
    keys, query = icd.decoder.keys(layer, teacher, geometry), icd.encoder(queries)
    whole = layer.summed_attention(query, queries.is_real, keys, geometry.is_valid)
    torch.testing.assert_close(whole.sum(-1), queries.is_real.sum(1)[:, None].expand(2, 2).float())
    assert (whole[~geometry.is_valid[:, None].expand_as(whole)] == 0).all()
    monkeypatch.setattr(decoder_module, "LOGIT_ELEMENTS", {"cpu": 1})
    torch.testing.assert_close(layer.summed_attention(query, queries.is_real, keys, geometry.is_valid), whole)


@pytest.mark.parametrize("size", [(50, 96), (33, 70), (1, 1), (64, 96)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (1, 1), (3, 5)])
def test_padding_of_levels_is_the_nearest_pixels(size: tuple[int, int], shape: tuple[int, int]) -> None:
    mask = torch.zeros(1, 1, *PADDED)
    mask[..., : size[0], : size[1]] = 1
    expected = F.interpolate(mask, shape, mode="nearest").flatten().bool()
    geometry = LevelGeometry.of([torch.zeros(1, 2, *shape)], [size], PADDED)
    ours = torch.ones_like(expected) if geometry.is_valid is None else geometry.is_valid[0]
    assert (ours == expected).all()


@pytest.mark.parametrize("channels", [16, 12], ids=["same width", "input projection"])
def test_equal_features_start_with_no_distance(channels: int) -> None:
    torch.manual_seed(0)
    icd = _built(STRIDES, channels, channels, num_layers=2)
    queries, maps = _queries(), _maps(channels, 2)
    losses = icd.losses(icd.encoder(queries), queries, maps, maps, _geometry(maps))
    assert losses["loss_icd"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_icd_aux_objectness"].item() > 0.1


@pytest.mark.parametrize("channels", [16, 12], ids=["same width", "input projection"])
def test_equal_selected_channels_start_with_no_distance(channels: int) -> None:
    """Check every second channel, and that the others have no influence but on the attention."""
    torch.manual_seed(0)
    icd = _built(STRIDES, channels // 2, channels, num_layers=2, adaptation="select")
    queries, maps = _queries(), _maps(channels, 2)
    student = [m[:, ::2] for m in maps]
    losses = icd.losses(icd.encoder(queries), queries, student, maps, _geometry(maps))
    assert losses["loss_icd"].item() == pytest.approx(0, abs=1e-5)
    other = [m[:, 1::2] for m in maps]
    assert icd.losses(icd.encoder(queries), queries, other, maps, _geometry(maps))["loss_icd"].item() > 0.1


@pytest.mark.parametrize(
    ("channels", "inherits", "adaptation", "selected"),
    [
        ((6, 8), True, None, [0, 1, 2, 4, 5, 6]),
        ((6, 8), False, None, None),
        ((6, 8), True, "none", None),
        ((6, 8), False, "select", [0, 1, 2, 4, 5, 6]),
        ((8, 8), True, None, None),
        ((9, 8), True, None, None),
    ],
)
def test_channels_are_selected_if_the_student_inherits_them(
    channels: tuple[int, int], inherits: bool, adaptation: str | None, selected: list[int] | None
) -> None:
    pair = Pair(*(spec_of(dict.fromkeys(STRIDES, c)) for c in channels), max_iter=900, inherits_neck=inherits)
    icd = ICD(ICD.Config(adaptation=adaptation), pair)
    assert (icd.selection and icd.selection.channels.tolist()) == selected


def test_more_channels_than_can_be_selected() -> None:
    pair = Pair(*(spec_of(dict.fromkeys(STRIDES, c)) for c in (9, 8)), max_iter=900)
    with pytest.raises(
        UserError,
        match=r"ICD.ADAPTATION is 'select', but at stride 8 the student has 9 channels and the teacher only 8",
    ):
        ICD(ICD.Config(adaptation="select"), pair)


def test_distillation_trains_the_student_and_its_projection_alone() -> None:
    icd, queries = _icd(), _queries()
    teacher = [m.requires_grad_() for m in _maps(16, 2)]
    student = [m.requires_grad_() for m in _maps(20, 3)]
    losses = icd.losses(icd.encoder(queries), queries, student, teacher, _geometry(teacher))
    losses["loss_icd"].backward(retain_graph=True)
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in student)
    assert all(m.grad is None for m in teacher)
    assert {n.split(".")[0] for n, p in icd.named_parameters() if p.grad is not None} == {"student_values"}
    icd.zero_grad()
    for m in student:
        m.grad = None
    (losses["loss_icd_aux_objectness"] + losses["loss_icd_aux_box"]).backward()
    assert all(m.grad is None for m in student)
    trained = {n.split(".")[0] for n, p in icd.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"encoder", "decoder", "auxiliary_head"}


def test_auxiliary_losses_by_hand() -> None:
    """Check a 0.4 x 0.2 box with its center moved by (0.1, 0): distances 0.3, 0.1, 0.1, 0.1 and predictions of 0.5."""
    queries = InstanceQueries(
        boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.2], [0.3, 0.3, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]]),
        centers=torch.tensor([[[0.6, 0.5], [0.3, 0.3], [0.0, 0.0]]]),
        classes=torch.zeros(1, 3, dtype=torch.int64),
        is_real=torch.tensor([[True, False, False]]),
        is_padding=torch.tensor([[False, False, True]]),
        image_sizes=torch.tensor([[100.0, 100.0]]),
        most_real=1,
    )
    prediction = torch.zeros(1, 3, 5)
    prediction[0, :, 0] = torch.tensor([math.log(3.0), 0.0, 50.0])
    objectness, box = auxiliary_losses(prediction, queries)
    assert objectness.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert box.item() == pytest.approx(0.2 / 0.4 + 0.4 / 0.2 + 0.4 / 0.4 + 0.4 / 0.2)


def test_the_auxiliary_loss_of_a_box_without_area() -> None:
    """Check a real query of width 0, whose horizontal errors of 0.5 are relative to the smallest size."""
    (target,) = _targets([[30.0, 10.0, 30.0, 42.0]], sizes=[(64, 64)])
    queries = build_queries([target], [(64, 64)], _fakes(), fakes_per_instance=0, max_queries=1, jitter=0.0)
    prediction = torch.zeros(1, 1, 5, requires_grad=True)
    _, box = auxiliary_losses(prediction, queries)
    assert box.item() == pytest.approx(2 * 0.5 / SMALLEST_SIZE + 2 * 0.25 / 0.5, rel=1e-4)
    box.backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(
    "boxes",
    [
        ([], []),
        ([[3.0, 3.0, 4.0, 4.0]], []),
        ([[0.0, 0.0, 96.0, 64.0]], [[69.0, 51.0, 70.0, 52.0], [0.0, 0.0, 0.5, 0.5]]),
        ([[float(i % 60), float(i % 40), i % 60 + 30.0, i % 40 + 20.0] for i in range(400)], []),
    ],
    ids=["no instances", "one instance", "boxes at the border", "400 instances"],
)
def test_losses_and_gradients_are_finite(boxes: tuple, event_storage) -> None:
    icd = _icd()
    queries = build_queries(_targets(*boxes), IMAGE_SIZES, icd.fakes, fakes_per_instance=5, max_queries=300, jitter=0.3)
    student = [m.requires_grad_() for m in _maps(20, 3)]
    teacher = _maps(16, 2)
    losses = icd.losses(icd.encoder(queries), queries, student, teacher, _geometry(teacher))
    if not any(boxes):
        assert losses["loss_icd"].item() == losses["loss_icd_aux_box"].item() == 0
        assert losses["loss_icd_aux_objectness"].item() > 0
    sum(losses.values()).backward()
    for tensor in (*losses.values(), *(m.grad for m in student), *(p.grad for p in icd.parameters())):
        assert torch.isfinite(tensor).all()


def test_mixed_precision_is_close() -> None:
    icd, queries = _icd(), _queries()
    teacher, student = _maps(16, 2), [m.requires_grad_() for m in _maps(20, 3)]
    exact = icd.losses(icd.encoder(queries), queries, student, teacher, _geometry(teacher))
    with torch.autocast("cpu", torch.bfloat16):
        half = icd.losses(icd.encoder(queries), queries, student, teacher, _geometry(teacher))
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.03)
    sum(half.values()).backward()
    assert all(torch.isfinite(m.grad).all() and m.grad.dtype == torch.float32 for m in student)


# --------------------------------------------------------------------------------------------------- queries


@pytest.fixture
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_type_changes_nothing(default_float64: None) -> None:
    targets = [Instances(IMAGE_SIZES[0], gt_boxes=Boxes(torch.rand(2, 4)), gt_classes=torch.tensor([0, 1]))]
    queries = build_queries(targets, IMAGE_SIZES[:1], _fakes(), fakes_per_instance=2, max_queries=300, jitter=0.3)
    assert queries.boxes.dtype is queries.centers.dtype is queries.image_sizes.dtype is torch.float32


def test_queries_of_a_batch() -> None:
    torch.manual_seed(0)
    targets = _targets([[0.0, 16.0, 48.0, 48.0], [24.0, 0.0, 72.0, 64.0]], [])
    queries = build_queries(targets, IMAGE_SIZES, _fakes(), fakes_per_instance=1.5, max_queries=300, jitter=0)
    assert queries.is_real.tolist() == [[True, True, False, False, False], [False] * 5]
    assert queries.is_padding.tolist() == [[False] * 5, [False, True, True, True, True]]
    assert queries.boxes[0, :2].tolist() == [[0.25, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0]]
    assert queries.classes[0, :2].tolist() == [0, 1]
    assert queries.image_sizes.tolist() == [[64, 96], [52, 70]]
    torch.testing.assert_close(queries.centers, queries.boxes[..., :2])


def test_the_jitter_stays_within_its_part_of_the_box() -> None:
    torch.manual_seed(0)
    targets = _targets([[10.0, 10.0, 50.0, 20.0]] * 200)
    queries = build_queries(targets, IMAGE_SIZES[:1], _fakes(), fakes_per_instance=0, max_queries=300, jitter=0.3)
    moved = (queries.centers - queries.boxes[..., :2]) / queries.boxes[..., 2:]
    assert moved.abs().amax((0, 1)).min() > 0.28 and moved.abs().max() <= 0.3 + 1e-6
    assert moved.mean((0, 1)).abs().max() < 0.05


def test_no_image_has_more_than_max_queries() -> None:
    torch.manual_seed(0)
    many = [[float(i), 0.0, i + 10.0, 10.0] for i in range(80)]
    queries = build_queries(
        _targets(many, many[:9]), IMAGE_SIZES, _fakes(), fakes_per_instance=5, max_queries=50, jitter=0
    )
    assert queries.is_real.sum(1).tolist() == [50, 9]
    assert (~queries.is_padding).sum(1).tolist() == [50, 50]
    lefts = (queries.boxes[0, :, 0] * 96 - 5).round().long()
    assert lefts.unique().numel() == 50 and lefts.max() > 50  # a random 50 of the 80, not the first 50


def test_fakes_follow_the_priors_and_the_seed() -> None:
    frequencies = torch.tensor([1.0, 0.0, 3.0])
    means = torch.tensor([[0.1, 0.2], [0.9, 0.9], [0.4, 0.5]])
    fakes = FakeInstances(frequencies, means, means / 4)
    torch.manual_seed(5)
    boxes, classes = fakes.sample(20000)
    torch.manual_seed(5)
    assert all((a == b).all() for a, b in zip(fakes.sample(20000), (boxes, classes), strict=True))
    assert (torch.bincount(classes, minlength=3) / 20000).tolist() == pytest.approx([0.25, 0.0, 0.75], abs=0.01)
    for label in (0, 2):
        sizes = boxes[classes == label, 2:]
        torch.testing.assert_close(sizes.mean(0), means[label], rtol=0.01, atol=0)
        # Truncating a normal distribution at 2 sigma multiplies its standard deviation by 0.8796.
        torch.testing.assert_close(sizes.std(0), 0.8796 * means[label] / 4, rtol=0.03, atol=0)
        assert ((sizes - means[label]).abs() <= means[label] / 2 + 1e-6).all()
    assert boxes[:, :2].min() == pytest.approx(0.03) and boxes[:, :2].max() == pytest.approx(0.97)
    wild = FakeInstances(torch.ones(1), torch.full((1, 2), 0.35), torch.full((1, 2), 1.0)).sample(500)[0][:, 2:]
    assert wild.min() == pytest.approx(0.002) and wild.max() == pytest.approx(0.7)


def test_size_bins() -> None:
    pixels = torch.tensor([0.0, 1.0, 63.9, 64.0, 127.9, 128.0, 255.9, 256.0, 511.9, 512.0, 5000.0])
    assert size_bins(pixels).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_description_hides_the_exact_box() -> None:
    """Check that boxes with equal class, center and size bin have the same descriptor, whatever their exact size."""
    encoder = InstanceEncoder(NUM_CLASSES, 16)
    queries = _queries(jitter=0)
    described = encoder.describe(queries)
    assert described.shape == (*queries.classes.shape, NUM_CLASSES + 16 + 10)
    queries.boxes[0, :2] *= torch.tensor([1.0, 1.0, 1.1, 0.9])
    assert (encoder.describe(queries) == described).all()


# ---------------------------------------------------------------------------------------------------- priors


def test_priors_by_hand() -> None:
    classes = np.array([0] * 10 + [2] * 9)
    sizes = np.array([[0.1, 0.2], [0.3, 0.2]] * 5 + [[0.5, 0.6]] * 9)
    counts, mean, deviation = compute_priors(classes, sizes, 4)
    assert counts.tolist() == [10, 0, 9, 0]
    assert mean[0].tolist() == pytest.approx([0.2, 0.2]) and deviation[0].tolist() == pytest.approx(
        [0.1, 0.0], abs=1e-6
    )
    for few in (1, 2, 3):  # fewer than ten boxes: the statistics of all classes
        torch.testing.assert_close(mean[few], torch.from_numpy(sizes.mean(0)).float())
        torch.testing.assert_close(deviation[few], torch.from_numpy(sizes.std(0)).float())


@pytest.fixture
def annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Register a COCO file, and the same boxes as dicts without a file, with an empty cache; yield the file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boxes = [(10 * i % 60, 5 * i % 30, 10 + i, 40) for i in range(24)]
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}, {"id": 3, "file_name": "b.jpg", "width": 60, "height": 80}],
        "categories": [{"id": 90, "name": "last"}, {"id": 1, "name": "first"}, {"id": 18, "name": "middle"}],
        "annotations": [
            {"id": i + 1, "image_id": (7, 3)[i % 2], "category_id": (90, 18)[i % 2], "bbox": list(box), "iscrowd": int(i == 5)}
            for i, box in enumerate(boxes)
        ],
    }  # fmt: skip
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco))
    dicts = [
        {
            "width": image["width"],
            "height": image["height"],
            "annotations": [
                {**a, "category_id": {90: 2, 18: 1}[a["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
                for a in coco["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in coco["images"]
    ]
    DatasetCatalog.register("icd_with_file", lambda: pytest.fail("the annotation file is read by itself"))
    DatasetCatalog.register("icd_without_file", lambda: dicts)
    MetadataCatalog.get("icd_with_file").set(json_file=str(path))
    yield path
    for name in ("icd_with_file", "icd_without_file"):
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_priors_of_a_file_are_those_of_its_dictionaries(annotated: Path) -> None:
    of_file = read_priors(("icd_with_file",), 3)
    assert of_file[0].tolist() == [0, 11, 12]  # one annotation is a crowd; classes in order of category id
    for ours, theirs in zip(of_file, read_priors(("icd_without_file",), 3), strict=True):
        torch.testing.assert_close(ours, theirs)
    both = read_priors(("icd_with_file", "icd_without_file"), 3)
    assert both[0].tolist() == [0, 22, 24]
    torch.testing.assert_close(both[1], of_file[1])


def test_priors_of_images_without_sizes(annotated: Path) -> None:
    """Check that the sizes are read from the image files."""
    expected = read_priors(("icd_without_file",), 3)
    for number, entry in enumerate(DatasetCatalog.get("icd_without_file")):
        entry["file_name"] = annotated.parent / f"{number}.png"
        Image.new("RGB", (entry.pop("width"), entry.pop("height"))).save(entry["file_name"])
    for ours, theirs in zip(read_priors(("icd_without_file",), 3), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_priors_have_the_registered_order_of_the_classes(annotated: Path) -> None:
    """Check a set whose classes are matched by name with those of another set, also after the order has changed."""
    assert read_priors(("icd_with_file",), 3)[0].tolist() == [0, 11, 12]
    MetadataCatalog.get("icd_with_file").set(thing_dataset_id_to_contiguous_id={90: 0, 1: 1, 18: 2})
    assert read_priors(("icd_with_file",), 3)[0].tolist() == [12, 0, 11]


def test_priors_of_a_file_are_kept_until_it_changes(annotated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_priors(("icd_with_file",), 3)
    with monkeypatch.context() as patch:
        patch.setattr(priors_module, "_read_boxes", lambda *_: pytest.fail("read again"))
        assert all((a == b).all() for a, b in zip(first, read_priors(("icd_with_file",), 3), strict=True))
    os.utime(annotated, ns=(1, 1))
    coco = json.loads(annotated.read_text())
    coco["annotations"] = coco["annotations"][:3]
    annotated.write_text(json.dumps(coco))
    assert read_priors(("icd_with_file",), 3)[0].tolist() == [0, 1, 2]


def test_a_training_set_without_boxes_is_refused(annotated: Path) -> None:
    coco = json.loads(annotated.read_text())
    annotated.write_text(json.dumps({**coco, "annotations": []}))
    with pytest.raises(UserError, match="icd_with_file has no boxes"):
        read_priors(("icd_with_file",), 3)


# ------------------------------------------------------------------------------------------------ in the library


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_icd_in_a_training_step(kind: str, tiny_detector: Callable, make_inputs: Callable, event_storage) -> None:
    """Check that the student gets gradients only after DETACH_STUDENT_ITERS, and its value projection at once."""
    student, teacher = tiny_detector(kind), tiny_detector(kind, {"MODEL": {"FPN": {"OUT_CHANNELS": 12}}}, seed=1)
    strides = [8, 16, 32, 64, 128] if kind == "retinanet" else [4, 8, 16, 32, 64]
    icd = _built(strides, 8, 12, detach_student_iters=10)
    model = KDMetaArch(student=student, teacher=Teacher(teacher), distillers={"ICD": icd})
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for iteration, learns in ((9, False), (10, True)):
        event_storage.iter = iteration
        model.zero_grad(set_to_none=True)
        model(make_inputs())["loss_icd"].backward()
        assert all(p.grad is not None for p in icd.student_values.parameters())
        neck = student.backbone.fpn_output3.weight.grad
        assert (neck is not None) == learns
    assert all((value == before[name]).all() for name, value in teacher.state_dict().items())


def _spec(family: str = "one-stage", num_classes: int | None = 3, channels: tuple[int, ...] = (8, 8)) -> DetectorSpec:
    return spec_of(dict(zip(STRIDES, channels, strict=True)), family, num_classes=num_classes)


@pytest.fixture
def configured(annotated: Path, tiny_cfg: Callable) -> Callable[..., ICD]:
    """Return a function (student spec, teacher spec, iterations, keys) that builds ICD from a config."""

    def build(
        student: DetectorSpec | None = None, teacher: DetectorSpec | None = None, max_iter: int = 90000, **keys
    ) -> ICD:
        cfg = tiny_cfg("retinanet", {"MODEL": {"KD": {"ICD": keys}}, "DATASETS": {"TRAIN": ("icd_with_file",)}})
        cfg.SOLVER.MAX_ITER = max_iter
        return helpers.configured(ICD, cfg, student or _spec(), teacher or _spec())

    return build


def test_defaults_are_the_published_setting(configured: Callable) -> None:
    icd = configured()
    assert icd.weight == 8.0 and configured(_spec("two-stage")).weight == 3.0
    assert configured(WEIGHT=1.5).weight == 1.5
    assert icd.query_options == {"fakes_per_instance": 5, "max_queries": 300, "jitter": 0.3}
    assert icd.detach_student_until == 1000 and configured(START_ITER=50).detach_student_until == 1050
    assert configured(max_iter=900).detach_student_until == 10
    assert configured(max_iter=900, DETACH_STUDENT_ITERS=500).detach_student_until == 500
    assert configured(max_iter=270000).detach_student_until == 1000
    assert len(icd.decoder.layers) == 1 and icd.decoder.layers[0].num_heads == 8 and icd.decoder.dim == 256
    assert icd.decoder.layers[0].ffn[0].out_features == 1024
    assert icd.encoder.mlp[0].in_features == 3 + 256 + 10
    (group,) = icd.param_groups(None)
    assert group.optimizer == OptimizerSettings("icd", 1e-4, 1e-4, 10, 0.01)
    assert {id(p) for p in group.params} == {id(p) for p in icd.parameters()}


def test_the_number_of_iterations_is_needed_for_the_default() -> None:
    pair = Pair(_spec(), _spec())
    with pytest.raises(UserError, match=r"^ICD needs the number of training iterations, .*max_iter=90000"):
        ICD(ICD.Config(), pair)
    assert ICD(ICD.Config(start_iter=5, detach_student_iters=10), pair).detach_student_until == 15


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"DIM": 30}, r"ICD.DIM is 30; it must be a multiple of 4"),
        ({"DIM": 36}, r"ICD.DIM is 36; it must be a multiple of NUM_HEADS \(8\)"),
        ({"NUM_LAYERS": 0}, "ICD.NUM_LAYERS is 0"),
        ({"JITTER": -0.1}, "ICD.JITTER is -0.1"),
        ({"CLIP_NORM": 0.0}, "ICD.CLIP_NORM is 0.0"),
        ({"student": _spec(num_classes=None), "teacher": _spec(num_classes=None)}, "how many classes"),
        ({"teacher": _spec(channels=(8, 16))}, "different channels: {8: 8, 16: 16}"),
    ],
)
def test_what_cannot_work_is_refused(configured: Callable, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(**keys)
