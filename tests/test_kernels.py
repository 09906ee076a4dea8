"""Triton kernels and FP8 against their plain forms and written-out formulas, alone, in the model, the optimizer and a
run; what goes with them: settings, graphs compiled after the warm-up, shards opened ahead.

Kernels run compiled where there is a GPU, in bf16; elsewhere under Triton's interpreter, in fp32 and bf16."""
from __future__ import annotations

import functools
import json
import math
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, H100, documents, losses, make_data, parse, records, run_folder, settings, tiny, write_shard
from ranks import VOCAB, random_batch
from ranks import settings as model_settings

import train_gpt
from train_gpt import GPT, IGNORE, Loader, MuonAdamW, World

NO_CAP = (0.0, 0.0, 1.0)
CAPS = [(23.0, 5.0, 7.5), (30.0, 0.0, 7.5), NO_CAP]
E5M2_MAX = 57344.0
FAST_H100, A100 = H100._replace(fp8=True), H100._replace(name="NVIDIA A100-SXM4-80GB", fp8=False)


class Where(NamedTuple):
    """Where a kernel runs, its dtype, and how far results may be from each other: two roundings of values near 1."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def random(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * std).to(self.device, self.dtype).requires_grad_()

    def targets(self, count: int, rows: int, vocab: int) -> torch.Tensor:
        """(count, rows) int32, a tenth of them IGNORE, one row in all of them."""
        targets = torch.randint(vocab, (count, rows), dtype=torch.int32)
        targets[torch.rand(count, rows) < 0.1] = IGNORE
        targets[:, 3] = IGNORE
        targets[:, 4], targets[:, 5] = vocab - 1, 0
        return targets.to(self.device)


PLACES = {"cpu-fp32": Where("cpu", torch.float32, 2e-5), "cpu-bf16": Where("cpu", torch.bfloat16, 2e-2),
          "cuda-bf16": Where("cuda", torch.bfloat16, 2e-2)}


# --- Triton's interpreter

INTERPRETED: dict = {}  # the modules of a second Triton


def taken_triton() -> dict:
    """Triton's modules, taken out of sys.modules, but for the C library, which cannot be loaded twice."""
    names = [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]
    return {name: sys.modules.pop(name) for name in names}


def correct_interpreter(interpreter):
    """Two repairs to the interpreter of Triton 3.7.1, by torch. Its cast to float8e5 loses the carry into the exponent
    (1.9 becomes 1.0), rounds ties up and breaks subnormals, that to bf16 truncates; a product of bf16 multiplies the
    bits as integers."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def cast(data, source, wanted, *mode):
        narrow = {"fp8e5": (torch.float8_e5m2, torch.uint8), "bf16": (torch.bfloat16, torch.uint16)}.get(wanted.name)
        if source.name != "fp32" or narrow is None:
            return convert(data, source, wanted, *mode)
        return torch.from_numpy(np.array(data)).to(narrow[0]).view(narrow[1]).numpy()

    def product(self, a, b, *rest):
        def widen(x):
            if x.dtype.scalar.name != "bf16":
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
        return dot(self, widen(a), widen(b), *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = cast, product


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels run under a second copy of Triton: its own library is made for the interpreter or for GPUs when it is
    imported, and torch.compile may have imported it long ago."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(train_gpt, "tl", None)
    own, forget = taken_triton(), train_gpt.triton_kernel.cache_clear
    sys.modules.update(INTERPRETED)
    import triton.runtime.interpreter
    if not INTERPRETED:
        correct_interpreter(triton.runtime.interpreter)
    forget()
    yield
    forget()
    INTERPRETED.update(taken_triton())
    sys.modules.update(own)


def prepare(device: str, request):
    """Skips where kernels run elsewhere on this machine."""
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        pytest.importorskip("triton")
    elif torch.cuda.is_available():
        pytest.skip("the kernels run compiled on the GPU")
    else:
        request.getfixturevalue("interpreter")


@pytest.fixture(params=PLACES)
def where(request) -> Where:
    prepare(PLACES[request.param].device, request)
    return PLACES[request.param]


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    prepare(request.param, request)
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- comparisons


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float):
    """Every entry, to a share of itself and of the largest one."""
    assert found.shape == expected.shape and expected.abs().max() > 0
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), atol=limit, rtol=tolerance)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of all entries together."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# --- gram


@pytest.mark.parametrize("shape", [(2, 150, 70), (3, 37, 301), (1, 1, 5), (1, 128, 64)], ids=str)
def test_gram_equals_the_plain_product_and_is_exactly_symmetric(where, shape):
    x = where.random(*shape).detach()
    for given in (x, x.mT, where.random(shape[0], shape[2], 2 * shape[1]).detach()[:, :, ::2].mT):  # strides of x, too
        found = train_gpt.fused_gram(given, None, 1.0, 0.0, 0.0)
        assert_near(found, given @ given.mT, where.tolerance)
        assert torch.equal(found, found.mT) and found.dtype == where.dtype


@pytest.mark.parametrize("alpha, beta, diagonal", [(1.0, 1.0, 0.0), (0.5, -2.0, 7.0), (-2.8, 0.0, -7.0)])
def test_gram_adds_a_share_of_a_matrix_and_of_the_identity(where, alpha, beta, diagonal):
    x = where.random(2, 150, 40).detach()
    add = where.random(2, 150, 150).detach()
    add = add + add.mT
    found = train_gpt.fused_gram(x, add, alpha, beta, diagonal)
    expected = alpha * x.double() @ x.double().mT + beta * add.double() + diagonal * torch.eye(150, device=x.device)
    assert_near(found, expected.float(), where.tolerance)
    assert torch.equal(found, found.mT)


def test_quintic_with_the_kernel_is_the_written_out_polynomial(where, monkeypatch):
    """The linear term is a multiple of the identity in the kernel: no copy of x for baddbmm."""
    x = where.random(2, 150, 210, std=0.05).detach()
    s = x.double() @ x.double().mT
    expected = 2.5 * x.double() - 1.5 * s @ x.double() + 0.5 * s @ s @ x.double()
    assert_near(train_gpt.quintic(x, 2.5, -1.5, 0.5, kernel=False), expected.float(), where.tolerance)
    monkeypatch.setattr(torch, "baddbmm", None)
    assert_near(train_gpt.quintic(x, 2.5, -1.5, 0.5, kernel=True), expected.float(), where.tolerance)


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("shape", [(2, 150, 40), (2, 40, 150), (1, 64, 96)], ids=str)
def test_orthogonalize_gives_the_same_with_the_kernel(where, method, shape):
    x = where.random(*shape).detach().float()
    found, expected = (train_gpt.orthogonalize(x, method, where.dtype, kernel) for kernel in (True, False))
    assert found.shape == x.shape and found.dtype == where.dtype
    if where.dtype == torch.float32:
        assert_near(found, expected, 1e-3)
    assert error(found, expected) < (1e-4 if where.dtype == torch.float32 else 5e-2)
    sizes = torch.linalg.svdvals(found.float())
    assert 0.5 < sizes.min() and sizes.max() < 1.3


# --- MLP


def mlp_results(x, up, down, grad, kernel: bool, fp8: bool = False) -> list[torch.Tensor]:
    """Output and the gradients of input and both weights."""
    y = train_gpt.mlp_relu2(x, up, down, kernel, fp8)
    return [y.detach(), *torch.autograd.grad(y, (x, up, down), grad)]


@pytest.mark.parametrize("rows, hidden, dim", [(200, 304, 48), (1, 24, 8), (130, 264, 72), (1100, 304, 8)])
def test_fused_mlp_equals_the_plain_one_forward_and_backward(where, rows, hidden, dim):
    x, up, down = where.random(rows, dim), where.random(hidden, dim, std=dim**-0.5), where.random(hidden, dim, std=0.1)
    grad = where.random(rows, dim).detach()
    found, expected = (mlp_results(x, up, down, grad, kernel) for kernel in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, where.tolerance)


def test_fused_mlp_of_rows_whose_hidden_units_are_all_off(where):
    x, up, down = where.random(70, 16), where.random(40, 16), where.random(40, 16)
    with torch.no_grad():
        up[:, 0], x[5:30] = 3.0, 0.0
        x[5:30, 0] = -10.0
    y, x_grad, *_ = mlp_results(x, up, down, where.random(70, 16).detach(), kernel=True)
    for result in (y, x_grad):
        assert (result[5:30] == 0).all() and result.isfinite().all() and (result[30:] != 0).any(1).all()


def test_fp8_linear_rounds_forward_and_has_exact_gradients():
    x, weight = torch.randn(80, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    y, grad = train_gpt.fp8_linear(x, weight), torch.randn(80, 96)
    assert 0.005 < error(y.detach(), (x @ weight.T).detach()) < 0.05  # 3 bits of mantissa
    gradients = torch.autograd.grad(y, (x, weight), grad)
    assert torch.equal(gradients[0], grad @ weight) and torch.equal(gradients[1], grad.T @ x)
    assert torch.equal(train_gpt.fp8_linear(1024 * x, weight), 1024 * y)  # scaled to its largest entry
    assert torch.equal(train_gpt.fp8_linear(0 * x, weight), torch.zeros(80, 96))


def test_mlp_in_fp8_is_near_the_exact_one():
    where = PLACES["cpu-fp32"]
    leaves = where.random(80, 64), where.random(96, 64, std=0.1), where.random(96, 64, std=0.1)
    grad = torch.randn(80, 64)
    exact = mlp_results(*leaves, grad, kernel=False)
    for kernel in (False, True):  # there is no fused kernel in FP8: none is called
        for a, b in zip(mlp_results(*leaves, grad, kernel, fp8=True), exact, strict=True):
            assert 1e-3 < error(a, b) < 0.06


# --- head: losses and gradients of the logits


def written_out(logits: torch.Tensor, targets: torch.Tensor, cap) -> torch.Tensor:
    """Summed cross-entropies, (K,), by their formula in fp64."""
    (a, b, c), z = cap, logits.double()
    z = a / (1 + torch.exp(-(z + b) / c)) if a else z / c
    lse = z.exp().sum(1).log()
    return torch.stack([sum(lse[n] - z[n, t] for n, t in enumerate(row) if t != IGNORE) for row in targets.tolist()])


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("count, rows, vocab, biased", [
    (1, 75, 300, False), (3, 75, 300, True), (2, 9, 4500, False), (2, 9, 4500, True)])
def test_fused_head_equals_the_plain_one_forward_and_backward(where, cap, count, rows, vocab, biased):
    x, weight, targets = where.random(rows, 40), where.random(vocab, 40, std=0.3), where.targets(count, rows, vocab)
    bias, results = None, []
    if biased:
        bias = torch.full((vocab,), 1.5, device=where.device)
        bias[targets.flatten().clamp_min(0).long()] = 0.0
    for kernel in (True, False):
        found, clipped = train_gpt.head_losses(x, weight, targets, cap, kernel, fp8=False, bias_V=bias)
        incoming = torch.tensor([1.0, 0.0, -0.25][:count], device=where.device)
        assert found.dtype == torch.float32 and found.shape == (count,) and clipped == 0
        results.append([found.detach(), *torch.autograd.grad(found, (x, weight), incoming)])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, where.tolerance)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("rows, vocab", [(75, 300), (9, 4500)])
def test_losses_and_logit_gradients_equal_the_written_out_formula(where, cap, kernel, rows, vocab, monkeypatch):
    """From logits so large that their exponentials overflow fp32; the plain form takes them in chunks of 32 rows."""
    monkeypatch.setattr(train_gpt, "LOSS_CHUNK", 32)
    logits, targets = where.random(rows, vocab, std=30.0), where.targets(3, rows, vocab)
    incoming, unit = (torch.tensor(v, device=where.device) for v in ([1.0, 0.0, -0.25], 2.0))
    expected = written_out(logits, targets, cap)
    (expected_grad,) = torch.autograd.grad(expected, logits, incoming.double())
    with torch.no_grad():
        losses_KN, lse_N = train_gpt.loss_rows(logits, targets, None, list(cap), kernel)
        each = incoming[:, None].expand(-1, rows)  # token's loss has a gradient of its own
        gradient, transposed = train_gpt.logit_gradient(logits, targets, None, lse_N, each, unit, list(cap),
                                                        where.dtype, kernel)
    torch.testing.assert_close(losses_KN.sum(1).double(), expected.detach(), rtol=1e-5, atol=1e-4)
    assert (losses_KN[targets == IGNORE] == 0).all()
    assert gradient.dtype == where.dtype and torch.equal(transposed, gradient.T)
    assert_near(2 * gradient, expected_grad, 1e-4 if where.dtype == torch.float32 else 8e-3)
    assert (gradient[3] == 0).all()  # the row that no target counts


def test_logits_and_their_gradient_have_the_dtype_of_the_activations(where):
    x, weight, targets = where.random(32, 16).detach(), where.random(48, 16).detach(), where.targets(2, 32, 48)
    found, logits, lse = train_gpt.fused_head(x, weight, x, weight, targets, None, list(CAPS[0]), True)
    assert (found.dtype, logits.dtype, lse.dtype) == (torch.float32, where.dtype, torch.float32)
    assert torch.equal(logits, F.linear(x, weight))
    for dtype in (where.dtype, torch.float8_e5m2):
        parts = train_gpt.logit_gradient(logits, targets, None, lse, torch.ones_like(found), lse.new_ones(()),
                                         list(CAPS[0]), dtype, True)
        assert [part.dtype for part in parts] == [dtype] * 2


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_fp8_logit_gradients_of_the_kernel_are_those_of_the_plain_form(where, cap):
    """To the bit, but for values so near to the middle of two that the exponential's last bit decides."""
    logits, targets = where.random(75, 300, std=10.0).detach(), where.targets(3, 75, 300)
    incoming, unit = (torch.tensor(v, device=where.device) for v in ([[1.0], [-0.5], [0.25]], 2.0**-14))
    incoming = incoming.expand(-1, 75)
    _, lse = train_gpt.loss_rows(logits, targets, None, list(cap), False)
    (found, found_t), (expected, expected_t) = (
        train_gpt.logit_gradient(logits, targets, None, lse, incoming, unit, list(cap), torch.float8_e5m2, kernel)
        for kernel in (True, False))
    assert torch.equal(found.float().T, found_t.float()) and torch.equal(expected.float().T, expected_t.float())
    assert found_t.is_contiguous() and expected_t.is_contiguous()
    a, b = found.float(), expected.float()
    assert (a != b).float().mean() < 1e-3 and b.unique().numel() > 100
    assert ((a - b).abs() <= 0.25 * b.abs() + 2.0**-16).all()  # one step of two bits of mantissa; of subnormals


# --- head in FP8


class Head(NamedTuple):
    """Inputs, RMS-normed, and weights that FP8 products can have: multiples of 16."""

    x: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor

    def results(self, cap, kernel: bool, fp8: bool, incoming=(1.0, 0.5, 0.25)) -> tuple[list[torch.Tensor], int]:
        """Losses, gradients of x and weight; number of clipped values."""
        found, clipped = train_gpt.head_losses(self.x, self.weight, self.targets, cap, kernel, fp8)
        gradients = torch.autograd.grad(found, (self.x, self.weight), found.new_tensor(incoming))
        return [found.detach(), *gradients], int(clipped)


def random_head(where: Where, dim: int = 64, rows: int = 64, vocab: int = 304, std: float = 0.2) -> Head:
    x = train_gpt.norm(where.random(rows, dim)).detach().requires_grad_()
    return Head(x, where.random(vocab, dim, std=std), where.targets(3, rows, vocab))


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-bf16"])
def test_fp8_head_is_near_the_exact_one_and_unbiased(name, cap):
    head = random_head(PLACES[name])
    (exact, none), (found, clipped) = head.results(cap, False, fp8=False), head.results(cap, False, fp8=True)
    assert none == clipped == 0
    assert 0 < error(found[0], exact[0]) < 0.01
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert a.dtype == b.dtype and 0.01 < error(a, b) < 0.08 and cosine(a, b) > 0.99
        assert error(a.norm(), b.norm()) < 0.02


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_fp8_head_with_the_kernels_is_the_one_without(where, cap):
    head = random_head(where)
    (found, _), (expected, _) = (head.results(cap, kernel, fp8=True) for kernel in (True, False))
    assert error(found[0], expected[0]) < 1e-5
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.parametrize("kernel", [True, False])
def test_fp8_gradients_scale_with_the_incoming_gradient(where, kernel):
    """A power of two leaves no trace but itself: no gradient is too small for FP8."""
    head, size = random_head(where), 2.0**-19
    (one, _), (small, _) = (head.results(CAPS[0], kernel, True, [g * f for g in (1.0, -0.5, 0.0)]) for f in (1.0, size))
    assert all(torch.equal(a * size, b) and a.abs().max() > 0 for a, b in zip(one[1:], small[1:], strict=True))
    (nothing, _) = head.results(CAPS[0], kernel, True, (0.0, 0.0, 0.0))
    assert all((gradient == 0).all() for gradient in nothing[1:])


@pytest.mark.parametrize("kernel", [True, False])
def test_clipped_values_are_counted_and_finite(kernel, device):
    """On a CPU torch's cast would clip by itself, on a GPU it makes NaN."""
    head = random_head(PLACES[f"{device}-bf16"], std=0.1)
    with torch.no_grad():
        head.weight[7, :4] = torch.tensor([1.75, -1.75, 1.7578125, -5.0])  # two are beyond; bf16 is exact here
        head.weight[0, 0], head.x[0, 0] = math.inf, 1e4
    found, clipped = head.results(CAPS[0], kernel, fp8=True)
    assert clipped == 4 and all(result.isfinite().all() for result in found)
    assert train_gpt.head_losses(head.x, head.weight, head.targets, NO_CAP, False, fp8=False)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 48, 64, 768, 1024, 4096])
def test_normed_inputs_never_clip_whatever_their_direction(width, dtype):
    scale = train_gpt.head_scales(width)[0]
    assert math.log2(scale).is_integer() and 448 * scale <= 2.1 * math.sqrt(width)  # wastes at most one exponent
    steps = torch.arange(width)
    rows = torch.cat([torch.eye(width)[:3], 1e6 * torch.eye(width)[-3:], torch.randn(50, width),
                      torch.randn(50, width) ** 9, 2.0 ** -steps[None].float()])
    x = train_gpt.norm(rows.to(dtype)).requires_grad_()
    assert x.abs().max() > 0.99 * math.sqrt(width)
    weight, targets = torch.zeros(16, width, dtype=dtype), torch.zeros(1, len(rows), dtype=torch.int32)
    assert train_gpt.head_losses(x, weight, targets, NO_CAP, False, fp8=True)[1] == 0


@pytest.mark.parametrize("incoming", [(1.0,), (0.7, -0.3, 0.0), (1.0, 0.5, 0.25)], ids=str)
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_fp8_gradients_never_clip(cap, incoming, monkeypatch):
    """In its units a gradient is at most the largest e5m2 number, and the worst case reaches it: all targets agree on
    a token that has no probability and whose logit is where the cap is steepest."""
    found, original = [], train_gpt.logit_gradient

    def spy(logits, targets, bias, lse, grad, unit, cap, dtype, kernel):
        assert dtype == torch.float8_e5m2
        found.append(original(logits, targets, bias, lse, grad, unit, cap, torch.float64, kernel)[0].abs().max().item())
        return original(logits, targets, bias, lse, grad, unit, cap, dtype, kernel)

    monkeypatch.setattr(train_gpt, "logit_gradient", spy)
    incoming = torch.tensor(incoming)
    xq, wq = torch.ones(32, 16).to(torch.float8_e4m3fn), torch.ones(64, 16).to(torch.float8_e4m3fn)
    for size in (0.1, 3.0, 30.0, None):
        logits = torch.full((32, 64), 200.0) if size is None else torch.randn(32, 64) * size
        targets = torch.randint(64, (len(incoming), 32), dtype=torch.int32)
        if size is None:
            targets[:], logits[:, 0] = 0, -cap[1] if cap[0] else -200.0
            targets[incoming < 0] = 1
        lse = train_gpt.loss_rows(logits, targets, None, list(cap), False)[1]
        each = incoming[:, None].expand(-1, 32)
        gradients = train_gpt.fused_head_backward(
            each, xq.T.contiguous(), wq.T.contiguous(), targets, None, logits, lse, list(cap), False, torch.float32)
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(found) <= E5M2_MAX * (1 + 1e-6)
    if (incoming > 0).all():
        assert found[-1] > 0.99 * E5M2_MAX


# --- rows of tables


def test_rows_of_a_table_have_the_gradient_of_an_embedding_to_the_bit(device):
    """On a GPU torch's own form, outside of a graph, is the sorted one."""
    table, index = torch.randn(50, 24, device=device, requires_grad=True), torch.randint(40, (3, 70), device=device)
    grad = torch.randn(3, 70, 24, device=device)
    for given in (index, index.int()):
        rows, expected = train_gpt.TableRows.apply(table, given), F.embedding(given, table)
        assert torch.equal(rows, expected)
        found, wanted = (torch.autograd.grad(x, table, grad)[0] for x in (rows, expected))
        assert torch.equal(found, wanted) and (found[40:] == 0).all() and found[:40].abs().min() > 0


def test_look_up_takes_the_repeatable_gradient_on_a_gpu_alone(device):
    table = torch.randn(5, 4, device=device, requires_grad=True)
    rows = train_gpt.look_up(table, torch.zeros(2, dtype=torch.int32, device=device))
    taken = "TableRows" in type(rows.grad_fn).__name__
    assert taken == (device == "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unit", ["model", "block"])
def test_two_runs_on_a_gpu_give_the_same_bits(unit):
    """Compiled, with few tokens that each come often: atomics would add them up in any order."""
    s = model_settings(device="cuda", dtype="bf16", compile=True, compile_unit=unit, kernels="gram+mlp+loss", width=128,
                       head_dim=64, candidates=(0,))
    results = []
    for _ in range(4):
        model = GPT(s, VOCAB).to("cuda")
        optimizer = MuonAdamW(model, s, World())
        train_gpt.compile_model(model, s)
        for _ in range(2):
            inputs, targets, docs = random_batch(0, rows=256).cuda()
            window = torch.tensor(8, dtype=torch.int32, device="cuda")
            optimizer.last_micro_step = True
            (model(inputs, targets[None], docs, window)[0] / 8192).backward()
            optimizer.step(1.0, 0.9)
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for other in results[1:]:
        assert not [name for name, p in results[0].items() if not torch.equal(p, other[name])]


# --- registered operators


def test_kernels_run_exactly_where_they_are_asked_for(device, monkeypatch):
    """Results alone would not tell."""
    asked, original, where = [], train_gpt.triton_kernel, PLACES[f"{device}-bf16"]
    monkeypatch.setattr(train_gpt, "triton_kernel", lambda f: asked.append(f.__name__) or original(f))
    square, head = where.random(1, 16, 16), random_head(where, rows=16)
    leaves = where.random(16, 16), where.random(32, 16), where.random(32, 16)
    for kernel in (True, False):
        train_gpt.quintic(square.detach(), 2.0, -1.5, 0.5, kernel)
        mlp_results(*leaves, torch.ones_like(leaves[0]), kernel)
        for fp8 in (False, True):
            head.results(NO_CAP, kernel, fp8)
        mlp, loss = ["product_relu2_kernel"] * 2, ["loss_kernel", "loss_gradient_kernel"] * 2
        assert asked == (["gram_kernel", "gram_kernel", *mlp, *loss] if kernel else [])
        asked.clear()


def operator_samples(where: Where) -> list[tuple]:
    """(operator, arguments) with gradients wanted where the operator has them."""
    x, up, down = where.random(32, 16), where.random(48, 16), where.random(48, 16)
    post, grad = where.random(32, 48).detach().square(), where.random(32, 16).detach()
    targets, incoming = where.targets(2, 32, 48), torch.rand(2, 32, device=where.device)
    plain = [t.detach() for t in (x, up)]
    logits = where.random(32, 48).detach()
    quantized = [train_gpt.to_fp8(t, 1.0) for t in plain]
    wide, one = where.random(2, 40, 24).detach(), torch.ones((), device=where.device)
    samples = [
        (train_gpt.fused_mlp, (x, up, down)), (train_gpt.fused_mlp_backward, (grad, *plain, down.detach(), post)),
        (train_gpt.quantized_linear, (x, up, *quantized, one, one)),
        (train_gpt.fused_gram, (wide, None, 1.0, 0.0, 0.0)),
        (train_gpt.fused_gram, (wide.mT, where.random(2, 24, 24).detach(), 0.5, -1.0, 2.0)),
        (train_gpt.table_gradient, (where.random(2, 32, 16).detach(), targets % 7, 9)),
    ]
    for pair in (plain, quantized):
        for kernel, bias in ((False, None), (True, None), (True, torch.rand(48, device=where.device))):
            rest = list(CAPS[0] if kernel else NO_CAP), kernel
            turned = pair if pair is plain else [t.T.contiguous() for t in pair]
            lse = train_gpt.loss_rows(logits, targets, None, *rest)[1]
            samples += [(train_gpt.fused_head, (x, up, *pair, targets, bias, *rest)),
                        (train_gpt.fused_head_backward,
                         (incoming, *turned, targets, bias, logits, lse, *rest, where.dtype))]
    return samples


def test_operators_are_registered_as_torch_wants_them(device):
    for function, arguments in operator_samples(PLACES[f"{device}-bf16"]):
        fp8 = any(isinstance(a, torch.Tensor) and a.dtype.itemsize == 1 for a in arguments)
        tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        tests = tests[:2] if fp8 else (*tests, "test_schema")  # these multiply the arguments, which torch cannot in FP8
        torch.library.opcheck(function, arguments, test_utils=tests)


# --- model and optimizer


def build(device: str, **changes) -> tuple[GPT, MuonAdamW]:
    """A tiny model with noise on all weights, and its optimizer."""
    s = model_settings(device=device, dtype="bf16" if device == "cuda" else "fp32", **changes)
    model, generator = GPT(s, VOCAB), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model = model.to(device)
    return model, MuonAdamW(model, s, World())


def model_losses(model: GPT, device: str) -> torch.Tensor:
    """Summed losses of the next and two further tokens, (3,)."""
    inputs, targets, docs = random_batch(0, rows=4).to(device)
    window = torch.tensor(8, dtype=torch.int32, device=device)
    return model(inputs, train_gpt.future_targets(targets, docs, 2), docs, window)


def loss_and_gradients(model: GPT, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = model_losses(model, device)
    weights = found.new_tensor([1.0, 0.5, 0.25]) / 64
    return found.detach(), dict(zip(names, torch.autograd.grad(found @ weights, parameters), strict=True))


@pytest.mark.parametrize("traced", [False, True])
def test_the_model_with_kernels_is_the_model_without(device, traced, monkeypatch):
    """aot_eager: the graph that torch.compile sees, without the wait for its code."""
    compiler = functools.partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(train_gpt, "compiled", lambda f, s: compiler(f))
    tolerance = 1e-5 if device == "cpu" else 3e-2
    for fp8 in ("on",) if traced else ("off", "on"):
        model = build(device, kernels="gram+mlp+loss", fp8_head=fp8)[0]
        if traced:
            train_gpt.compile_model(model, model_settings(compile_unit="model"))
        found, gradients = loss_and_gradients(model, device)
        expected, expected_gradients = loss_and_gradients(build(device, kernels="none", fp8_head=fp8)[0], device)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        least = 0.05 * max(gradient.norm() for gradient in expected_gradients.values())  # smaller ones are noisier
        for name, gradient in gradients.items():
            wanted = expected_gradients[name]
            # in FP8 a last bit of the logits can decide to which of two neighbours a value is rounded
            limit = max(tolerance, 0.02 * (fp8 == "on")) * torch.maximum(wanted.norm(), least)
            few = device == "cuda" and wanted.numel() < 100  # sums over all tokens, of rounded terms that cancel
            assert (gradient - wanted).norm() < (2 if few else 1) * limit, name


def test_the_model_with_an_fp8_head_is_near_the_exact_one(device):
    (exact, exact_gradients), (found, gradients) = (
        loss_and_gradients(build(device, kernels="none", fp8_head=fp8)[0], device) for fp8 in ("off", "on"))
    assert 1e-6 < error(found, exact) < 0.01
    everything = [torch.cat([g.flatten() for g in parts.values()]) for parts in (gradients, exact_gradients)]
    assert 0.005 < error(*everything) < 0.08 and cosine(*everything) > 0.99


@pytest.mark.parametrize("kernels", ["none", "loss"])
def test_evaluation_is_exact_whatever_training_does(device, kernels):
    exact, fp8 = (build(device, kernels=kernels, fp8_head=choice)[0] for choice in ("off", "on"))
    with torch.no_grad():
        assert torch.equal(model_losses(exact, device), model_losses(fp8, device))
    assert not torch.equal(model_losses(exact, device), model_losses(fp8, device))


def test_an_evaluated_mlp_is_exact_whatever_training_does():
    exact, fp8 = (build("cpu", fp8_mlp=choice)[0] for choice in (False, True))
    with torch.no_grad():
        assert torch.equal(model_losses(exact, "cpu"), model_losses(fp8, "cpu"))
    assert not torch.equal(model_losses(exact, "cpu"), model_losses(fp8, "cpu"))


def test_optimizer_steps_with_the_kernel_are_those_without(device):
    weights = []
    for kernels in ("gram", "none"):
        model, optimizer = build(device, kernels=kernels)
        for _ in range(2):
            optimizer.last_micro_step = True
            (model_losses(model, device)[0] / 64).backward()
            optimizer.step(1.0, 0.9)
        weights.append({name: w.clone() for name, w in optimizer.state_dict()["state"]["master"].items()})
    start = build(device)[1].state_dict()["state"]["master"]
    for name, found in weights[0].items():
        moved = (weights[1][name] - start[name]).norm()
        assert moved > 0 and (found - weights[1][name]).norm() < (1e-3 if device == "cpu" else 0.25) * moved, name


@pytest.mark.parametrize("kernels, wanted", [("gram", True), ("gram+loss", True), ("mlp+loss", False), ("none", False)])
def test_the_optimizer_takes_the_kernel_only_if_it_is_named(kernels, wanted, monkeypatch):
    asked, original = set(), train_gpt.quintic
    monkeypatch.setattr(train_gpt, "quintic", lambda *a: asked.add(a[-1]) or original(*a[:-1], False))
    optimizer = build("cpu", kernels=kernels)[1]
    optimizer.last_micro_step = True
    sum(p.square().sum() for bank in optimizer.banks for p in bank.params.values()).backward()
    optimizer.step(1.0, 0.9)
    assert asked == {wanted}


def test_a_run_with_kernels_and_fp8_learns_as_the_plain_one(device, tmp_path):
    found, plain = tmp_path / "kernels", tmp_path / "plain"
    data = make_data(tmp_path / "data")
    common = dict(data=data, iterations=4, eval_every=2, eval_tokens=64, batch_tokens=64, adam_lr=0.02,
                  mtp=1, device=device, dtype="fp32" if device == "cpu" else "bf16", backend="sdpa")
    for base, kernels, fp8 in ((found, "gram+mlp+loss", "on"), (plain, "none", "off")):
        assert train_gpt.main(tiny(base, **common, kernels=kernels, fp8_head=fp8)) == 0
        used = json.loads((run_folder(base) / "config.json").read_text())["settings"]
        assert (used["kernels"], used["fp8_head"], used["fp8_mlp"]) == (kernels, fp8, False)
    for kind, values in losses(run_folder(found)).items():
        expected = losses(run_folder(plain))[kind]
        assert values != expected and values == pytest.approx(expected, rel=0.01)
        assert values[4] < values[2]
    steps = [record for record in records(run_folder(found)) if "train_loss" in record]
    assert len(steps) == 4 and all(record["fp8_clipped"] == 0 for record in steps)


# --- settings


def test_auto_takes_what_the_gpu_can_do(monkeypatch):
    pytest.importorskip("triton")
    for hardware, kernels, fp8 in ((FAST_H100, "gram+mlp+loss", "on"), (A100, "gram+mlp+loss", "off"),
                                   (CPU, "none", "off")):
        s = parse(hardware=hardware, monkeypatch=monkeypatch)
        assert (s.kernels, s.fp8_head, s.fp8_mlp) == (kernels, fp8, False)
    off = parse("--kernels", "none", "--fp8-head", "off", hardware=FAST_H100, monkeypatch=monkeypatch)
    assert (off.kernels, off.fp8_head) == ("none", "off")
    fp32 = parse("--dtype", "fp32", hardware=FAST_H100, monkeypatch=monkeypatch)
    assert (fp32.kernels, fp32.fp8_head) == ("none", "off")


def test_auto_takes_no_kernels_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None)
    assert parse(hardware=FAST_H100, monkeypatch=monkeypatch).kernels == "none"


@pytest.mark.parametrize("hardware, argv, words", [
    (FAST_H100, ["--kernels", "gram+nonsense"], ["--kernels gram+nonsense", "nonsense is none of gram, mlp, loss"]),
    (FAST_H100, ["--kernels", "mlp-loss"], ["mlp-loss is none of"]),
    (CPU, ["--kernels", "gram"], ["--kernels gram", "needs Triton, CUDA", "use none"]),
    (FAST_H100, ["--kernels", "gram", "--dtype", "fp32"], ["--kernels gram", "--dtype bf16", "use none"]),
    (A100, ["--fp8-head", "on"], ["--fp8_head", "A100", "8.9"]), (A100, ["--fp8-mlp"], ["--fp8_mlp", "A100", "8.9"]),
    (FAST_H100, ["--softcap", "23,5"], ["--softcap (23.0, 5.0)", "three numbers a,b,c"]),
    (FAST_H100, ["--softcap", "23,5,0"], ["--softcap (23.0, 5.0, 0.0)", "three numbers a,b,c"]),
    (FAST_H100, ["--fp8-head", "maybe"], ["--fp8_head maybe", "auto or on or off"]),
], ids=str)
def test_settings_that_cannot_work_are_told_in_one_sentence(hardware, argv, words, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device="auto": hardware)
    assert train_gpt.main(argv) == 2
    first, *told = capsys.readouterr().err.splitlines()
    assert first == "error: 1 setting(s) cannot work:" and len(told) == 1
    assert all(word in told[0] for word in words)


@pytest.mark.parametrize("size, small", [(101376, True), (166912, False), (232448, False)])  # RTX 4090, A100, H100
def test_flex_takes_small_tiles_only_on_gpus_with_little_shared_memory(size, small, monkeypatch):
    class Properties:
        shared_memory_per_block_optin = size

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(train_gpt, "small_shared_memory", train_gpt.small_shared_memory.__wrapped__)  # no cache
    assert train_gpt.flex_options("cpu") is None
    options = train_gpt.flex_options("cuda")
    assert (options is not None) == small
    assert not small or (max(options.values()) <= 64 and {"BLOCK_M", "BLOCK_N"} <= options.keys())


# --- compilation


@pytest.fixture
def two_stages(tmp_path, monkeypatch) -> list[str]:
    """A compiled run whose stages differ in everything that is a shape. aot_eager makes the same graphs as the default
    backend, without a minute of g++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: name)
    torch._dynamo.reset()
    return tiny(tmp_path, compile=True, iterations=4, stage_ends=(0.5, 1.0), mtp=(1, 0), seq_len=(16, 32),
                max_doc_len=(16, 32), batch_tokens=(64, 128), window=(16, 32), eval_tokens=64, eval_every=2,
                enable_profiling=True, profile_start=1, profile_steps=1, save_last=False)


def test_nothing_is_compiled_after_the_warm_up(two_stages, capsys):
    assert train_gpt.main(two_stages) == 0
    out = capsys.readouterr().out
    assert "graphs compiled after the warm-up: 0\n" in out and ", 0 graphs compiled" not in out


def test_a_shape_that_the_warm_up_forgot_is_told(two_stages, monkeypatch):
    warm_up = train_gpt.warm_up

    def forgetful(run, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(run, "stages", run.stages[1:])
            warm_up(run, *arguments)

    monkeypatch.setattr(train_gpt, "warm_up", forgetful)
    with pytest.raises(AssertionError, match="compiled after the warm-up"):
        train_gpt.main(two_stages)


# --- shards ahead of time


class Opened:
    """A spy on open_shard: which shards were opened, in order, and an event for each."""

    def __init__(self, monkeypatch):
        self.numbers, self.events, original = [], [threading.Event() for _ in range(10)], train_gpt.open_shard

        def spy(path, *arguments):
            number = int(path.stem[-6:])
            self.numbers.append(number)
            self.events[number].set()
            return original(path, *arguments)

        monkeypatch.setattr(train_gpt, "open_shard", spy)


def shards(tmp_path, count: int = 3) -> train_gpt.Corpus:
    """Of about 9 rows of 32 tokens each: more than the loader prepares ahead."""
    return train_gpt.open_corpus(str(make_data(tmp_path / "data", train=[documents(320, i) for i in range(count)])))


def test_the_next_shard_is_opened_before_a_batch_needs_it(tmp_path, monkeypatch):
    corpus, opened = shards(tmp_path), Opened(monkeypatch)
    loader = Loader(settings(batch_tokens=32, iterations=60), corpus, World())
    try:
        assert opened.events[1].wait(timeout=60)  # nobody has asked for a batch
        step = 0
        while loader.next(step)[1]["shard"] == 0:
            step += 1
        assert step > 5  # more than is prepared ahead: that was long before it
    finally:
        loader.close()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_shard_is_opened_once_for_each_use(count, tmp_path, monkeypatch):
    """In turn, one ahead, also where the next use is of the same shard in a new epoch."""
    corpus, opened = shards(tmp_path, count), Opened(monkeypatch)
    loader, used = Loader(settings(batch_tokens=32, iterations=70), corpus, World()), []
    try:
        for step in range(70):
            position = loader.next(step)[1]
            if used[-1:] != [(position["epoch"], position["shard"])]:
                used.append((position["epoch"], position["shard"]))
    finally:
        loader.close()  # waits for what is being opened
    assert len(used) > 2 * count and used == [divmod(i, count) for i in range(len(used))]
    assert opened.numbers == [i % count for i in range(len(used) + 1)]


def test_a_damaged_shard_is_told_when_it_is_reached_and_not_before(tmp_path, monkeypatch):
    corpus = shards(tmp_path)

    def firsts(damaged: bool) -> list[list[int]]:
        """First tokens of the batches until the loader raises or reaches shard 1."""
        opened, found = Opened(monkeypatch), []
        loader = Loader(settings(batch_tokens=32, iterations=20), corpus, World())
        try:
            assert opened.events[1].wait(timeout=60)
            for step in range(20):
                try:
                    tokens, position = loader.next(step)
                except train_gpt.UserError as problem:
                    assert damaged and corpus.train[1].name in str(problem) and "token id 999" in str(problem)
                    return found
                if position["shard"] == 1:
                    break
                found.append(tokens[0, 0, 0].tolist())
        finally:
            loader.close()
        assert not damaged, "the damage was not told"
        return found

    good = firsts(damaged=False)
    tokens = documents(320, 1)
    tokens[200] = 999
    write_shard(corpus.train[1], tokens)
    assert firsts(damaged=True) == good and len(good) > 5
