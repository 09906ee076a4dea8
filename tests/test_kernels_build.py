"""The Triton kernels compiled to machine code of GPUs that need not be there: tensor cores, memory, registers."""
import re
import subprocess
from pathlib import Path

import pytest
import torch

import train_gpt as tg

triton = pytest.importorskip("triton", reason="needs Triton")

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a block may have: A100, RTX 4090, H100
CAP = dict(a="fp32", b="fp32", c="fp32")
LOSS = dict(logits="*bf16", targets="*i32", bias="*fp32", lses="*fp32", rows="i32", vocab="i32", **CAP)


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tg.triton_kernel.cache_clear()
    yield
    tg.triton_kernel.cache_clear()


def launched(monkeypatch, capability: int, call) -> dict:
    """Constants and options with which `call` launches its kernel on a GPU of that capability."""
    seen = {}

    class Kernel:
        def __init__(self, function):
            seen["function"] = function

        def __getitem__(self, grid):
            return lambda *values, **options: seen.update(options)
    monkeypatch.setattr(tg, "small_shared_memory", lambda device: SHARED_MEMORY[capability] < 160 << 10)
    monkeypatch.setattr(tg, "triton_kernel", Kernel)
    call()
    monkeypatch.undo()
    return seen


def build(capability: int, function, types: dict[str, str], constants: dict, **options):
    """Machine code of a kernel whose sizes and addresses are multiples of 16, and its registers' overflow in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = tg.triton_kernel(function)
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items()
               if kind.startswith("*") or kind == "i32"}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(code, folder: Path) -> int:
    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def check(code, capability: int, folder: Path, products: bool):
    assert code.metadata.shared <= SHARED_MEMORY[capability]
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert (instruction in code.asm["ptx"]) == products
    if products:
        assert "cp.async" in code.asm["ptx"], "loads of the next tiles run beside the products of this one"
    if capability != 80:  # A100: the wide tile of the MLP spills 40 bytes
        assert stack_bytes(code, folder) == 0


@pytest.mark.parametrize("capability", [90])  # earlier ones multiply by cuBLAS
@pytest.mark.parametrize("backward", [False, True])
def test_mlp_kernel(capability, backward, monkeypatch, tmp_path):
    x, post = (torch.zeros(128, size, dtype=torch.bfloat16) for size in (64, 256))
    call = lambda: tg.product_relu2(x, x.new_zeros(256, 64), post if backward else None)  # noqa: E731
    options = launched(monkeypatch, capability, call)
    rows, cols, depth = (options[name] for name in ("ROWS", "COLS", "DEPTH"))
    tiles = dict(a=(rows, depth), b=(cols, depth), post=(rows, cols // 2), out=(rows, cols // 2))
    types = {name: f"tensordesc<bf16[{down}, {right}]>" for name, (down, right) in tiles.items()}
    types |= dict(rows="i32", cols="i32", depth="i32")
    constants = {name: options[name] for name in ("BACKWARD", "ROWS", "COLS", "DEPTH", "GROUP", "PROGRAMS")}
    code = build(capability, options["function"], types, constants, num_warps=options["num_warps"],
                 num_stages=options["num_stages"])
    check(code, capability, tmp_path, products=True)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_gram_kernel(capability, monkeypatch, tmp_path):
    x = torch.zeros(1, 128, 64)
    options = launched(monkeypatch, capability, lambda: tg.fused_gram._init_fn(x, None, 1.0, 0.0, 0.0))
    types = dict(x="*bf16", add="*bf16", out="*bf16", size="i32", depth="i32", stride_batch="i32", stride_row="i32",
                 alpha="fp32", beta="fp32", diagonal="fp32")
    constants = dict(stride_depth=1, ADD=True, TILE=options["TILE"], DEPTH=options["DEPTH"])
    code = build(capability, options["function"], types, constants, num_warps=options["num_warps"],
                 num_stages=options["num_stages"])
    check(code, capability, tmp_path, products=True)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_loss_kernel(capability, tmp_path):
    constants = dict(CAPPED=True, BIASED=True, TARGETS=3, BLOCK=2048)
    code = build(capability, tg.loss_kernel, LOSS | dict(losses="*fp32"), constants, num_warps=4)
    check(code, capability, tmp_path, products=False)


FP8, BF16 = "*fp8e5", "*bf16"


@pytest.mark.parametrize("capability,out", [(80, BF16), (89, BF16), (89, FP8), (90, BF16), (90, FP8)])
def test_loss_gradient_kernel(capability, out, tmp_path):
    types = LOSS | dict(grads="*fp32", unit="*fp32", out=out, out_t=out)
    constants = dict(CAPPED=True, BIASED=True, TARGETS=3, TRANSPOSED=out == FP8, ROWS=64, COLS=64)
    code = build(capability, tg.loss_gradient_kernel, types, constants, num_warps=4)
    check(code, capability, tmp_path, products=False)
    wide = re.findall(r"st\.global\.v4", code.asm["ptx"])
    assert len(wide) == len(re.findall(r"st\.global", code.asm["ptx"])), "16 bytes a store, of the transpose too"
