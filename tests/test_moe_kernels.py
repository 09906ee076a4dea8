"""The fused experts of train_moe.py against a loop over the experts; their kernels compiled for GPUs that need not be
there.

Kernels run compiled where there is a GPU, in bf16; elsewhere under Triton's interpreter, in fp32 and bf16."""
from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import test_kernels
import test_kernels_build
import torch
from test_kernels import Where, assert_near
from test_kernels_build import SHARED_MEMORY, build, check, launched

import train_moe as tm

triton_interpreter, where, seed = test_kernels.interpreter, test_kernels.where, test_kernels.seed  # fixtures


class Routing(NamedTuple):
    """How many rows each expert has, choices of a token, model dim, hidden size."""

    counts: tuple[int, ...]
    choices: int
    dim: int
    hidden: int


ROUTINGS = {  # a tile has 128 rows, 128 or 256 columns and a depth of 32 or 64
    "uneven": Routing((97, 130, 153), 2, 40, 70),
    "empty": Routing((0, 150, 0, 0, 55, 0), 1, 33, 17),
    "one of many": Routing((0, 0, 300, 0), 3, 16, 24),
    "one": Routing((150,), 1, 70, 300),
    "one, each token twice": Routing((150,), 2, 8, 8),
    "whole tiles": Routing((128, 256, 0, 128), 2, 64, 32),
    "short": Routing((1, 0, 2, 1, 1, 0, 0, 3, 1, 1, 0, 2), 3, 300, 5),
    "more experts than rows": Routing((0,) * 40 + (1, 2) * 6 + (3, 0, 0) * 6 + (2, 2), 2, 5, 3),
}


@pytest.fixture
def interpreter(triton_interpreter, monkeypatch):
    """That of test_kernels.py, for train_moe's kernels, too."""
    monkeypatch.setattr(tm, "tl", None)
    tm.triton_kernel.cache_clear()
    yield
    tm.triton_kernel.cache_clear()


class Case(NamedTuple):
    """Inputs; `chosen` (R,): the expert of each (token, choice), from which order and ends follow."""

    x: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    chosen: torch.Tensor
    choices: int
    grad: torch.Tensor

    def fused(self, function=None) -> list[torch.Tensor]:
        """Output and the gradients of input and both weights."""
        order = self.chosen.argsort(stable=True)
        ends = self.chosen.bincount(minlength=len(self.up)).cumsum(0).int()
        y = (function or tm.fused_experts)(self.x, self.up, self.down, order, ends, self.choices)[0]
        return [y.detach(), *torch.autograd.grad(y, (self.x, self.up, self.down), self.grad)]

    def loop(self) -> list[torch.Tensor]:
        """The same in fp32 by plain operations on one expert's rows after the other."""
        leaves = [t.detach().float().requires_grad_() for t in (self.x, self.up, self.down)]
        x, up, down = leaves
        y = x.new_zeros(len(self.chosen), x.size(1))
        for expert in range(len(up)):
            rows = (self.chosen == expert).nonzero().squeeze(1)
            y = y.index_copy(0, rows, (x[rows // self.choices] @ up[expert]).relu().square() @ down[expert])
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.float())]


def make_case(where: Where, counts, choices: int, dim: int, hidden: int) -> Case:
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    up = where.random(len(counts), dim, hidden, std=dim**-0.5)
    return Case(where.random(len(chosen) // choices, dim), up, where.random(len(counts), hidden, dim, std=0.1),
                chosen.to(where.device), choices, where.random(len(chosen), dim).detach())


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_fused_experts_equal_a_loop_over_experts_forward_and_backward(where, routing):
    case = make_case(where, *routing)
    for found, expected in zip(case.fused(), case.loop(), strict=True):
        assert_near(found, expected, where.tolerance)
        assert found.dtype == where.dtype


def test_every_token_to_every_expert_is_one_wide_mlp(where):
    case = make_case(where, (60,) * 4, 4, 24, 20)
    case = case._replace(chosen=torch.arange(4).repeat(60).to(where.device),
                         grad=case.grad[0].expand(240, -1))  # as a sum over the choices has it: not contiguous
    y, x_grad, up_grad, down_grad = case.fused()
    leaves = [t.detach().float().requires_grad_() for t in (case.x, case.up.transpose(0, 1), case.down)]
    wide = (leaves[0] @ leaves[1].flatten(1)).relu().square() @ leaves[2].flatten(0, 1)
    expected = torch.autograd.grad(wide, leaves, case.grad[:60].float())
    assert_near(y.float().unflatten(0, (-1, 4)).sum(1), wide.detach(), where.tolerance)
    for a, b in zip((x_grad, up_grad.transpose(0, 1), down_grad), expected, strict=True):
        assert_near(a, b, where.tolerance)


def test_experts_without_rows_have_a_gradient_of_exactly_zero(where):
    counts = torch.tensor(ROUTINGS["empty"].counts)
    for gradient in make_case(where, *ROUTINGS["empty"]).fused()[2:]:
        assert torch.equal(gradient.cpu().flatten(1).ne(0).any(1), counts > 0)


def test_tokens_whose_hidden_units_are_all_off(where):
    case = make_case(where, (40, 60), 2, 16, 24)
    with torch.no_grad():
        case.up[:, 0], case.x[5:30] = 0.1, 0.0
        case.x[5:30, 0] = -10.0
    y, x_grad, *_ = case.fused()
    for result in (y.unflatten(0, (-1, 2)).flatten(1), x_grad):
        assert (result[5:30] == 0).all() and result.isfinite().all() and (result[30:] != 0).any(1).all()


def test_a_value_that_is_not_a_number_stays_with_its_expert(where):
    """The rows of its neighbours share blocks of DEPTH rows with it."""
    case = make_case(where, (20, 5, 30), 1, 16, 24)
    hit = case.chosen == 1
    with torch.no_grad():
        case.x[hit], case.grad[hit] = math.nan, math.nan
    y, x_grad, up_grad, down_grad = case.fused()
    for result, bad in ((y, hit), (x_grad, hit), (up_grad, [False, True, False]), (down_grad, [False, True, False])):
        assert result.isfinite().flatten(1).all(1).tolist() == [not b for b in bad]


def test_results_are_the_same_to_the_bit_whatever_the_memory_held_before(where):
    """New memory is filled with NaN the second time: every entry is written, none is read before."""
    case = make_case(where, *ROUTINGS["uneven"])
    first = case.fused()
    torch.use_deterministic_algorithms(True)
    try:
        second = case.fused()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_fused_experts_are_one_node_of_a_compiled_graph(where):
    case = make_case(where, *ROUTINGS["empty"])
    compiled = torch.compile(lambda *inputs: tm.fused_experts(*inputs), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, case.fused(compiled), case.fused()))


# --- machine code


@pytest.fixture
def compiled_kernels(monkeypatch):
    """The tools of test_kernels_build.py, at work on train_moe."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(test_kernels_build, "tg", tm)
    tm.triton_kernel.cache_clear()
    yield
    tm.triton_kernel.cache_clear()


def build_launched(capability: int, call):
    """Machine code of the kernel that `call` launches, for bf16."""
    options = launched(pytest.MonkeyPatch(), capability, call)
    function = options.pop("function")
    kinds = dict(index="*i64", ends="*i32") | dict.fromkeys(("a", "b", "post", "out"), "*bf16")
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types = {name: kinds.get(name, "i32") for name in names if name not in options}
    return build(capability, function, types, options, **settings)


def check_experts(code, capability: int, folder):
    """Rows of a gather are loaded and stored 16 bytes at a time; what has 8 is the index."""
    check(code, capability, folder, products=True)
    stores = re.findall(r"st\.global\S*", code.asm["ptx"])
    assert stores and all(".v4" in store for store in stores)
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global .*, 0x(\w+), ", code.asm["ptx"])
    assert set(sizes) <= {"10", "8"} and sizes.count("8") < sizes.count("10") / 2


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scatter", [False, True])
def test_expert_product_kernel(capability, backward, scatter, compiled_kernels, tmp_path):
    x, weight = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(8, 64, 64, dtype=torch.bfloat16)
    index, ends = torch.zeros(128, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    code = build_launched(capability, lambda: tm.fused_product(x, weight, index, ends, x, backward, scatter))
    check_experts(code, capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("gather_a", [False, True])
def test_expert_weight_kernel(capability, gather_a, compiled_kernels, tmp_path):
    x, index = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.int64)
    ends = torch.zeros(8, dtype=torch.int32)
    code = build_launched(capability, lambda: tm.fused_weight_gradient(x, x, index, ends, gather_a))
    check_experts(code, capability, tmp_path)
