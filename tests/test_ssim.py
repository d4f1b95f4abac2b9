"""SSIM: the plain and the fused loss against kornia, slow independent implementations and hand-worked numbers."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from kd_d2.losses import fused_ssim, ms_ssim_loss, ssim_chunks, ssim_loss
from kd_d2.losses.gaussian import blur_matrix, gaussian_blur
from kd_d2.losses.ssim import MS_SSIM_SIGMAS

import kornia
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.unit

C1, C2 = 0.01**2, 0.03**2


def _maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher


def _relative_error(tensor: Tensor, reference: Tensor) -> float:
    return ((tensor.double() - reference).norm() / reference.norm()).item()


def _slow_components(
    student: np.ndarray, teacher: np.ndarray, window_size: int, sigma: float = 1.5, max_val: float = 1.0
) -> np.ndarray:
    """Compute l, c, s and the merged form of c * s at each cell of an (H, W) pair from the thesis: (4, H, W)."""
    half = window_size // 2
    offsets = np.arange(window_size) - half
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    window /= window.sum()
    s_padded, t_padded = (np.pad(x, half, mode="reflect") for x in (student, teacher))
    c1, c2 = C1 * max_val**2, C2 * max_val**2
    components = np.zeros((4, *student.shape))
    for y in range(student.shape[0]):
        for x in range(student.shape[1]):
            s = s_padded[y : y + window_size, x : x + window_size]
            t = t_padded[y : y + window_size, x : x + window_size]
            mean_s, mean_t = (window * s).sum(), (window * t).sum()
            var_s, var_t = (window * (s - mean_s) ** 2).sum(), (window * (t - mean_t) ** 2).sum()
            covariance = (window * (s - mean_s) * (t - mean_t)).sum()
            both = np.sqrt(var_s * var_t)
            components[:, y, x] = (
                (2 * mean_s * mean_t + c1) / (mean_s**2 + mean_t**2 + c1),
                (2 * both + c2) / (var_s + var_t + c2),
                (covariance + c2 / 2) / (both + c2 / 2),
                (2 * covariance + c2) / (var_s + var_t + c2),
            )
    return components


def _slow_ssim_loss(student: np.ndarray, teacher: np.ndarray, window_size: int, max_val: float = 1.0) -> float:
    """Compute the mean of (1 - SSIM) / 2 over one (H, W) pair."""
    luminance, _, _, contrast_structure = _slow_components(student, teacher, window_size, max_val=max_val)
    return float(((1 - luminance * contrast_structure) / 2).mean())


@pytest.mark.parametrize("window_size", [1, 3, 5, 11, 13])
def test_ssim_loss_equals_kornia_in_value_and_gradient(window_size: int) -> None:
    """Check the loss and both gradients, for a teacher that requires a gradient too."""
    ours = [x.requires_grad_() for x in _maps(2, 3, 9, 12)]
    theirs = [x.double().requires_grad_() for x in _maps(2, 3, 9, 12)]
    loss = ssim_loss(*ours, window_size=window_size)
    expected = kornia.losses.ssim_loss(*theirs, window_size=window_size, max_val=1.0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert _relative_error(mine.grad, reference.grad) < 1e-5


@pytest.mark.parametrize(("window_size", "max_val"), [(11, 1.0), (5, 1.0), (5, 4.0)])
def test_ssim_loss_equals_the_formula_cell_by_cell(window_size: int, max_val: float) -> None:
    """Check against an independent NumPy implementation with explicit windows, channel by channel."""
    student, teacher = (x * max_val for x in _maps(2, 2, 6, 7))
    expected = np.mean(
        [
            _slow_ssim_loss(student[b, c].double().numpy(), teacher[b, c].double().numpy(), window_size, max_val)
            for b in range(2)
            for c in range(2)
        ]
    )
    assert ssim_loss(student, teacher, window_size, max_val).item() == pytest.approx(expected, rel=1e-4)


def test_ssim_loss_gradient_is_the_slope_of_the_formula() -> None:
    """Check the gradient against finite differences of the slow implementation in float64."""
    student, teacher = _maps(1, 1, 5, 6)
    student.requires_grad_()
    ssim_loss(student, teacher, 5).backward()
    s, t = student.detach()[0, 0].double().numpy(), teacher[0, 0].double().numpy()
    step = 1e-5
    for y, x in [(0, 0), (2, 3), (4, 5), (1, 4)]:
        up, down = s.copy(), s.copy()
        up[y, x] += step
        down[y, x] -= step
        slope = (_slow_ssim_loss(up, t, 5) - _slow_ssim_loss(down, t, 5)) / (2 * step)
        assert student.grad[0, 0, y, x].item() == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_ssim_loss_of_constant_maps() -> None:
    """Check constant maps by hand: variances vanish, only the luminance term remains, and gradients are finite."""
    shape = (1, 2, 8, 8)
    zero, one = torch.zeros(shape, requires_grad=True), torch.ones(shape)
    loss = ssim_loss(zero, one)
    loss.backward()
    # l = C1 / (1 + C1), c = s = 1
    assert loss.item() == pytest.approx((1 - C1 / (1 + C1)) / 2, abs=1e-5)
    # d/da of -l/2 at a = 0, b = 1 is -1 / (1 + C1), spread over all cells
    assert zero.grad.sum().item() == pytest.approx(-1 / (1 + C1), rel=1e-3)
    half = torch.full(shape, 0.5, requires_grad=True)
    same = ssim_loss(half, half.detach().clone())
    same.backward()
    assert same.item() == pytest.approx(0.0, abs=1e-5)
    assert half.grad.abs().max().item() < 1e-3


def test_ssim_loss_ranges_from_equal_to_inverted() -> None:
    """Check that equal maps have no loss, and inverted stripes a higher one than noise, close to the maximum."""
    stripes = (torch.arange(12) % 2).float().expand(1, 1, 12, 12)
    noise = _maps(1, 1, 12, 12)[0]
    assert ssim_loss(stripes, stripes).item() == pytest.approx(0.0, abs=1e-5)
    inverted = ssim_loss(stripes, 1 - stripes).item()
    # in the center mu = 1/2 and var = 1/4 for both, covariance -1/4
    assert inverted == pytest.approx((1 + (0.5 - C2) / (0.5 + C2)) / 2, abs=5e-3)
    assert 0.3 < ssim_loss(stripes, noise).item() < inverted - 0.2


@pytest.mark.parametrize("window_size", [0, -1, 2, 10, 9])
def test_ssim_loss_refuses_windows_that_do_not_fit(window_size: int) -> None:
    """Check even, non-positive and too large windows: the largest for a side of 4 is 7."""
    student, teacher = _maps(1, 1, 4, 9)
    with pytest.raises(
        ValueError, match=rf"window_size is {window_size}; on a map of \(4, 9\) it must be odd and at most 7"
    ):
        ssim_loss(student, teacher, window_size)
    assert 0 < ssim_loss(student, teacher, 7) < 1


def test_ssim_loss_refuses_maps_of_different_shape() -> None:
    """Check that maps that would broadcast are refused, with both shapes in the error."""
    with pytest.raises(ValueError, match=r"student \(1, 2, 8, 8\) and teacher \(1, 1, 8, 8\)"):
        ssim_loss(torch.rand(1, 2, 8, 8), torch.rand(1, 1, 8, 8))


def test_ssim_loss_is_float32_under_autocast_and_on_bfloat16_maps() -> None:
    """Check nearly equal maps, whose loss bfloat16 would round to zero."""
    student = _maps(1, 2, 12, 12)[0]
    teacher = student + 0.01 * _maps(1, 2, 12, 12, seed=1)[0]
    expected = ssim_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ssim_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    rounded = [x.bfloat16() for x in (student, teacher)]
    loss = ssim_loss(*rounded)
    assert loss.dtype == torch.float32
    assert loss.item() == ssim_loss(*(x.float() for x in rounded)).item()


def _fused(student: Tensor, teacher: Tensor, window_size: int = 11, max_val: float = 1.0) -> Tensor:
    loss = ssim_loss(student, teacher, window_size, max_val)
    assert type(loss.grad_fn).__name__ == "FusedSSIMLossBackward"
    return loss


def _plain(student: Tensor, teacher: Tensor, window_size: int = 11, max_val: float = 1.0) -> Tensor:
    return ssim_loss(student, teacher, window_size, max_val, weight=torch.ones(1))


def _check_against_kornia(
    loss_of: Callable, student: Tensor, teacher: Tensor, window_size: int, max_val: float
) -> None:
    """Assert that the loss is kornia's in float64 to 1e-6, and the gradient to 1e-5 of its norm."""
    ours = student.clone().requires_grad_()
    loss = loss_of(ours, teacher, window_size, max_val)
    loss.backward()
    theirs = student.double().requires_grad_()
    expected = kornia.losses.ssim_loss(theirs, teacher.double(), window_size, max_val)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert _relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("loss_of", [_fused, _plain])
@pytest.mark.parametrize(
    ("shape", "window_size", "max_val", "offset"),
    [
        ((2, 3, 20, 31), 11, 1.0, 0.0),
        ((1, 2, 100, 53), 11, 1.0, 0.0),
        ((2, 5, 7, 10), 13, 1.0, 0.0),
        ((1, 4, 9, 3), 5, 1.0, 0.0),
        ((1, 3, 24, 24), 7, 255.0, 0.0),
        ((1, 2, 30, 30), 11, 1.0, 100.0),
        ((1, 2, 30, 30), 5, 1.0, -1000.0),
    ],
)
def test_fixed_teacher_equals_kornia(
    loss_of: Callable, shape: tuple[int, ...], window_size: int, max_val: float, offset: float
) -> None:
    """Check several shapes, windows and ranges, and offsets at which plain float32 would lose the variances."""
    student, noise = _maps(*shape)
    _check_against_kornia(
        loss_of, offset + max_val * student, offset + max_val * (0.7 * student + 0.3 * noise), window_size, max_val
    )


def test_ms_ssim_keeps_little_for_the_backward_pass() -> None:
    """Check that at most ten tensors of the student's size are kept for five sigmas, besides the inputs."""
    student, teacher = _maps(1, 2, 40, 40)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ms_ssim_loss(student.requires_grad_(), teacher, 33)
    own = sum(size for place, size in kept.items() if place not in inputs)
    assert own <= 10 * student.nbytes


def test_a_blur_first_made_in_inference_trains_afterwards() -> None:
    """Check that matrices cached in inference mode can be saved for a backward pass."""
    student, teacher = _maps(1, 1, 19, 23)
    with torch.inference_mode():
        _plain(student, teacher, 9)
    _plain(student.requires_grad_(), teacher, 9).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("loss_of", "side"), [(ssim_loss, 21), (ms_ssim_loss, 22)])
def test_maps_of_a_size_first_seen_without_values(loss_of: Callable, side: int) -> None:
    """Check that fake tensors, or another default device, neither leave a blur without values nor meet one with them."""
    student, teacher = _maps(1, 1, side, side)
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(loss_of(*torch.rand(2, 1, 1, side, side), 7), FakeTensor)
        with torch.device("meta"):
            loss = loss_of(student, teacher, 7)
        torch.testing.assert_close(loss, loss_of(student.double(), teacher.double(), 7).float())


def test_the_plain_loss_compiles_to_one_graph() -> None:
    """Check that neither the cache of matrices nor the settings for float32 products break the graph."""
    student, teacher = _maps(2, 3, 14, 17)
    expected = _plain(student, teacher, 7)
    compiled = torch.compile(_plain, backend="aot_eager", fullgraph=True)
    loss = compiled(student.requires_grad_(), teacher, 7)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert student.grad.abs().sum() > 0


def test_compiled_matrices_are_computed_on_the_device_of_the_maps() -> None:
    """Check that no step copies them, with the meta device in place of a GPU, and their values."""
    devices = set()

    def look(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        devices.update(value.device.type for value in values if isinstance(value, Tensor))
        return graph.forward

    compiled = torch.compile(blur_matrix, backend=look, fullgraph=True)
    compiled(21, 11, 1.5, torch.float32, torch.device("meta"))
    assert devices == {"meta"}
    settings = (9, 7, 1.5, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(compiled(*settings), blur_matrix(*settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which the kernels are built")
def test_fake_tensors_of_a_gpu_do_not_decide_whether_kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the kernels are not tried with fake tensors, whose failure would be remembered."""
    monkeypatch.setattr(fused_ssim, "_triton_kernels", lambda device: pytest.fail("tried"))
    with FakeTensorMode():
        assert ssim_loss(*torch.rand(2, 1, 1, 21, 21, device="cuda"), 7).device.type == "cuda"


@pytest.mark.parametrize("loss_of", [ssim_loss, ms_ssim_loss])
def test_no_maps(loss_of: Callable) -> None:
    with pytest.raises(ValueError, match=r"maps of shape \(0, 2, 9, 9\) have no similarity"):
        loss_of(*torch.zeros(2, 0, 2, 9, 9), 3)


@pytest.mark.parametrize("loss_of", [_fused, _plain])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_at_different_offsets(loss_of: Callable, memory_format: torch.memory_format) -> None:
    """Check that neither a channel far from zero nor the other channels lose precision."""
    student, noise = _maps(2, 4, 30, 41)
    offset = torch.tensor([0.0, 1000.0, -100.0, 0.5])[:, None, None]
    maps = (x.contiguous(memory_format=memory_format) for x in (offset + student, offset + 0.7 * student + 0.3 * noise))
    _check_against_kornia(loss_of, *maps, 11, 1.0)


def test_dark_cells_beside_bright_ones() -> None:
    """Check maps that are near zero except in a corner, which no single offset suits; float32 kornia is off by 5e-2."""
    student, teacher = (x**8 * 1e-3 for x in _maps(1, 4, 30, 40))
    for maps in (student, teacher):
        maps[..., :12, :12] += 1
    exact = student.double().requires_grad_()
    expected = kornia.losses.ssim_loss(exact, teacher.double(), 11)
    expected.backward()
    loss = _fused(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert _relative_error(student.grad, exact.grad) < 1e-4


@pytest.mark.parametrize("value", [0.0, 0.01, 1.0])
def test_equal_constant_maps_cost_what_kornias_denominator_adds(value: float) -> None:
    """Check black maps, which have a loss of 1e-12 / (1e-4 * 9e-4) / 2, and brighter ones."""
    maps = torch.full((1, 2, 9, 9), value)
    expected = kornia.losses.ssim_loss(maps.double(), maps.double(), 11).item()
    assert expected == pytest.approx(1e-12 / ((2 * value**2 + C1) * C2) / 2, rel=1e-3)
    for loss_of in (_fused, _plain):
        assert loss_of(maps.clone().requires_grad_(), maps).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("chunk", "block"), [(1, 1000), (250, 8), (1000, 5), (2**17, 32)])
def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    """Check maps one by one, in groups that do not divide the channels, and with matrices split at any size."""
    monkeypatch.setitem(ssim_chunks.CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(ssim_chunks.BLOCK_SIDE, "cpu", block)
    _check_against_kornia(_fused, *_maps(2, 7, 12, 17), 11, 1.0)


def test_any_memory_layout() -> None:
    """Check channels-last and sliced maps; the gradient keeps the student's layout."""
    student, teacher = _maps(2, 4, 12, 15)
    expected = student.clone().requires_grad_()
    _fused(expected, teacher).backward()
    last = student.to(memory_format=torch.channels_last).requires_grad_()
    _fused(last, teacher.to(memory_format=torch.channels_last)).backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.grad, expected.grad)
    cut = torch.zeros(2, 4, 20, 20)
    cut[:, :, 3:15, 2:17] = student
    cut.requires_grad_()
    _fused(cut[:, :, 3:15, 2:17], teacher).backward()
    torch.testing.assert_close(cut.grad[:, :, 3:15, 2:17], expected.grad)
    assert cut.grad.sum() == pytest.approx(expected.grad.sum().item(), abs=1e-6)


def test_fused_gradients_numerically() -> None:
    """Check first and second derivatives in float64; the second ones use the plain operations."""
    student, teacher = _maps(1, 2, 5, 6, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: _fused(s, teacher, 5), student)
    assert torch.autograd.gradgradcheck(lambda s: _fused(s, teacher, 5), student)


def test_fused_gradient_may_be_asked_for_again() -> None:
    """Check that a second backward pass over a retained graph adds the gradient times the upstream gradient."""
    student, teacher = _maps(1, 2, 9, 9)
    student.requires_grad_()
    loss = _fused(student, teacher)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 4 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_without_gradient_only_the_loss_is_made() -> None:
    """Check that the loss is the same for inputs without gradients and under `no_grad`."""
    student, teacher = _maps(1, 2, 9, 9)
    expected = _fused(student.clone().requires_grad_(), teacher).item()
    assert ssim_loss(student, teacher).item() == expected
    with torch.no_grad():
        assert ssim_loss(student.requires_grad_(), teacher).item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_vanish(dtype: torch.dtype) -> None:
    """Check maps so large that the gradient of a mean underflows in float16, with a gradient scaler's factor."""
    student, teacher = (x.to(dtype) for x in _maps(1, 16, 120, 120))
    exact = student.double().requires_grad_()
    (2.0**16 * kornia.losses.ssim_loss(exact, teacher.double(), 11)).backward()
    student.requires_grad_()
    (2.0**16 * _fused(student, teacher)).backward()
    assert student.grad.dtype == dtype
    assert _relative_error(student.grad, exact.grad) < torch.finfo(dtype).eps


EXTREMES = {
    "zeros": (torch.zeros(1, 2, 8, 9), torch.zeros(1, 2, 8, 9)),
    "constant": (torch.full((1, 2, 8, 9), 0.3), torch.full((1, 2, 8, 9), 0.9)),
    "identical": (_maps(1, 2, 8, 9)[0],) * 2,
    "half constant": (torch.ones(1, 2, 8, 9).tril(), torch.zeros(1, 2, 8, 9)),
    "huge": tuple(1e6 * x for x in _maps(1, 2, 8, 9)),
    "huge constant": (torch.full((1, 2, 8, 9), 1e6), torch.full((1, 2, 8, 9), -1e6)),
    "of opposite sign": (_maps(1, 2, 8, 9)[0], -_maps(1, 2, 8, 9)[1]),
}
LOSSES: dict[str, Callable] = {
    "ssim": ssim_loss,
    "plain": _plain,
    "ms_ssim": lambda s, t: ms_ssim_loss(s, t, 15),
    **{
        str(exponents): lambda s, t, exponents=exponents: ssim_loss(s, t, exponents=exponents)
        for exponents in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0.5, 0.5, 0.5), (2, 3, 0.3)]
    },
}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("maps", EXTREMES.values(), ids=EXTREMES.keys())
def test_losses_and_gradients_are_finite(maps: tuple[Tensor, Tensor], loss_of: Callable) -> None:
    """Check maps without variance, without difference, or with very large values."""
    student = maps[0].clone().requires_grad_()
    loss = loss_of(student, maps[1])
    loss.backward()
    assert -1e-5 <= loss.item() <= 2 + 1e-5
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    "exponents", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 0, 1), (2, 0.5, 1), (0, 0, 0.5), (0, 0, 0)]
)
def test_components_cell_by_cell(exponents: tuple[float, float, float]) -> None:
    """Check the component choices of table 2 of the thesis and other exponents; a negative s keeps its sign."""
    student, teacher = (x - 0.2 for x in _maps(1, 1, 7, 8, dtype=torch.float64))
    luminance, contrast, structure, _ = _slow_components(student[0, 0].numpy(), teacher[0, 0].numpy(), 5)
    assert (structure < 0).any()
    product = np.ones_like(luminance)
    for component, exponent in zip((luminance, contrast, structure), exponents, strict=True):
        if exponent:
            product = product * np.sign(component) * np.abs(component) ** exponent
    loss = ssim_loss(student, teacher, 5, exponents=exponents)
    assert loss.item() == pytest.approx(((1 - product) / 2).mean(), rel=1e-9)


def test_contrast_times_structure_is_kornias_second_factor() -> None:
    """Check c * s, separate and merged, against kornia's SSIM map divided by the luminance term."""
    student, teacher = _maps(1, 2, 9, 11, dtype=torch.float64)
    merged = np.stack([_slow_components(student[0, c].numpy(), teacher[0, c].numpy(), 11) for c in range(2)])
    kornias = kornia.metrics.ssim(student, teacher, 11).numpy()[0] / merged[:, 0]
    np.testing.assert_allclose(merged[:, 3], kornias, rtol=1e-6)
    np.testing.assert_allclose(merged[:, 1] * merged[:, 2], kornias, rtol=1e-6)
    assert ssim_loss(student, teacher, exponents=(0, 1, 1)).item() == pytest.approx((1 - kornias.mean()) / 2)


@pytest.mark.parametrize("exponents", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 0.5)])
def test_component_gradients_numerically(exponents: tuple[float, float, float]) -> None:
    """Check the gradients of student and teacher in float64."""
    maps = [x.requires_grad_() for x in _maps(1, 1, 5, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda s, t: ssim_loss(s, t, 5, exponents=exponents), maps)


def test_weight_of_positions() -> None:
    """Check that a weight multiplies the loss at its position: the left half counts twice, the right half is 0."""
    student, teacher = _maps(1, 2, 6, 8, dtype=torch.float64)
    weight = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    weight[..., :4] = 2
    losses = [
        (1 - np.prod(_slow_components(student[0, c].numpy(), teacher[0, c].numpy(), 5)[[0, 3]], 0)) / 2
        for c in range(2)
    ]
    expected = np.mean([x[:, :4].mean() for x in losses])
    assert ssim_loss(student, teacher, 5, weight=weight).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("window_size", [33, 7])
def test_ms_ssim_cell_by_cell(window_size: int) -> None:
    """Check l of sigma 8 times c * s of sigmas 0.5, 1, 2, 4 and 8, with one window size and no downsampling."""
    student, teacher = _maps(1, 2, 17, 18, dtype=torch.float64)
    losses = []
    for channel in range(2):
        maps = student[0, channel].numpy(), teacher[0, channel].numpy()
        scales = [_slow_components(*maps, window_size, sigma) for sigma in (0.5, 1, 2, 4, 8)]
        losses.append(1 - scales[-1][0] * np.prod([scale[3] for scale in scales], axis=0))
    expected = np.mean(losses)
    assert ms_ssim_loss(student, teacher, window_size).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma", MS_SSIM_SIGMAS)
def test_ms_ssim_multiplies_by_no_denormal_numbers(sigma: float) -> None:
    """Check the outer weights of narrow windows: with denormal ones a CPU is several times slower."""
    matrix = blur_matrix(64, 33, sigma, torch.float32, torch.device("cpu"))
    assert matrix[matrix != 0].min() > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(matrix.sum(1), torch.ones(64))


def test_ms_ssim_gradient_numerically() -> None:
    """Check the gradient in float64, and that invalid windows are refused as for SSIM."""
    student, teacher = _maps(1, 1, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: ms_ssim_loss(s, teacher, 9), student.requires_grad_())
    with pytest.raises(ValueError, match=r"window_size is 33; on a map of \(5, 6\) it must be odd and at most 9"):
        ms_ssim_loss(student, teacher)


def _fail_without_a_compiler(*args: object) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


@pytest.mark.parametrize(("kernels", "reason"), [
    (SimpleNamespace(loss_and_gradient=_fail_without_a_compiler), "Failed to find C compiler."),
    (None, "import of kd_d2.losses.ssim_triton halted; None in sys.modules"),
])  # fmt: skip
def test_triton_that_cannot_start_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: object, reason: str
) -> None:
    """Check one warning and the fallback to chunks, as on a machine with a GPU and no compiler, or with a broken Triton."""
    monkeypatch.setitem(sys.modules, "kd_d2.losses.ssim_triton", kernels)
    if kernels is None:
        monkeypatch.delattr("kd_d2.losses.ssim_triton", raising=False)
    else:
        monkeypatch.setattr("kd_d2.losses.ssim_triton", kernels, raising=False)
    monkeypatch.setattr(fused_ssim, "HAS_TRITON", True)
    fused_ssim._triton_kernels.cache_clear()
    assert [fused_ssim._triton_kernels(torch.device("cpu")) for _ in range(2)] == [None, None]
    fused_ssim._triton_kernels.cache_clear()
    assert [r.message for r in caplog.records] == [
        f"The Triton kernels of SSIM failed on cpu ({reason}); falling back to the slower PyTorch implementation."
    ]


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of float32 products to numbers with some of the 23 bits of the mantissa, as GPUs do."""

    def __init__(self, bits: int):
        super().__init__()
        self.dropped = 23 - bits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.mm.out):
            args = [self._round(x) if x.dtype is torch.float32 else x for x in args]
        return function(*args, **(kwargs or {}))

    def _round(self, x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 2 ** (self.dropped - 1)) & -(2**self.dropped)).view(torch.float32)


@pytest.fixture
def float32_products() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(
    "loss_of",
    [_fused, lambda s, t: ssim_loss(s, t, exponents=(0, 1, 1)), ms_ssim_loss],
    ids=["fused", "exponents", "multi-scale"],
)
def test_products_of_low_precision_do_not_matter(loss_of: Callable, precision: str) -> None:
    """Check smooth maps, whose variances products in TF32 or bfloat16 lose, with the backward pass under autocast."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 4, 5, 5, generator=generator)
    teacher = 1 + torch.nn.functional.interpolate(coarse, size=(40, 40), mode="bicubic")
    student = teacher + 0.01 * torch.randn(teacher.shape, generator=generator)
    exact = student.double().requires_grad_()
    expected = loss_of(exact, teacher.double())
    expected.backward()
    torch.set_float32_matmul_precision(precision)
    student.requires_grad_()
    with RoundedProducts(10 if torch.backends.mkldnn.matmul.fp32_precision == "tf32" else 7):
        loss = loss_of(student, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert _relative_error(student.grad, exact.grad) < 1e-3
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("loss_of", [_fused, lambda s, t: ssim_loss(s, t, exponents=(0.5, 1, 2)), ms_ssim_loss])
def test_backward_pass_under_autocast(loss_of: Callable) -> None:
    """Check first and, for create_graph, second derivatives against those without autocast."""
    student, teacher = _maps(1, 2, 20, 24)

    def gradients(autocast: bool) -> list[Tensor]:
        leaf = student.clone().requires_grad_()
        loss = loss_of(leaf, teacher)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return [first, *torch.autograd.grad((first * teacher).sum(), leaf)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert _relative_error(found, expected) < 1e-5


def test_blur_derivatives_numerically() -> None:
    maps = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gaussian_blur(x, 5, 1.5), maps)
    assert torch.autograd.gradgradcheck(lambda x: gaussian_blur(x, 5, 1.5), maps)


def test_function_transforms() -> None:
    """Check torch.func's gradient of one pair, and of each pair of a batch, against autograd's."""
    student, teacher = torch.randn(2, 3, 2, 4, 7, 7).requires_grad_()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return ssim_loss(s, t, 5, exponents=(0, 1, 1))

    expected = torch.stack([torch.autograd.grad(loss(s, t), s)[0] for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(torch.func.grad(loss)(student[0], teacher[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(student, teacher), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Check loss and gradient on a GPU against kornia's."""
    student, teacher = (x.to("cuda", dtype) for x in _maps(2, 5, 40, 53, dtype=torch.float64))
    exact = student.double().clone().requires_grad_()
    expected = kornia.losses.ssim_loss(exact, teacher.double(), 11)
    expected.backward()
    student.requires_grad_()
    loss = _fused(student, teacher)
    (loss * 2**12).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert _relative_error(student.grad / 2**12, exact.grad) < (1e-5 if dtype != torch.float16 else 2e-3)


@pytest.mark.parametrize("window_size", [8, 9])
def test_windows_too_large_for_a_blur(window_size: int) -> None:
    with pytest.raises(ValueError, match=rf"window_size is {window_size}; for 4 cells it must be odd and at most 7"):
        gaussian_blur(torch.ones(4, 9), window_size, 1.5)
