"""The cards, and how a machine without one pretends to have one: a stub of the CUDA driver, bench/deviceless.c, and
answers of torch.cuda. For bench/deviceless.py."""
import os
import shlex
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensor

# Facts of NVIDIA's data sheets and white papers. name: as torch.cuda tells it; processors: streaming multiprocessors;
# memory: GiB that a process finds; bandwidth: GB/s; bf16 (of the T4 fp16), fp8, fp32: dense TFLOP/s, fp32 without
# tensor cores; shared: KiB that a block may have; link: GB/s to other cards, each direction; l2: MiB
Card = namedtuple("Card", """name capability processors memory bandwidth
                              bf16 fp8 fp32 shared link l2""")
CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 79.2, 3350, 989, 1979, 67, 227, 450, 50),
    "h200": Card("NVIDIA H200", (9, 0), 132, 139.8, 4800, 989, 1979, 67, 227, 450, 50),
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 79.2, 2039, 312, 0, 19.5, 163, 300, 40),
    "b200": Card("NVIDIA B200", (10, 0), 148, 178.4, 8000, 2250, 4500, 80, 227, 900, 126),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 23.5, 1008, 165.2, 330.3, 82.6, 99, 32, 72),
    "4080": Card("NVIDIA GeForce RTX 4080", (8, 9), 76, 15.6, 716.8, 97.5, 194.9, 48.7, 99, 32, 64),
    "3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 23.5, 936, 71, 0, 35.6, 99, 32, 6),
    "t4": Card("Tesla T4", (7, 5), 40, 14.6, 320, 65, 0, 8.1, 64, 16, 4),
}
OFF = """TORCHINDUCTOR_FX_GRAPH_CACHE TORCHINDUCTOR_AUTOGRAD_CACHE TORCH_COMPILE_DYNAMO_PGO
TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER TORCHINDUCTOR_USE_STATIC_TRITON_LAUNCHER"""
INSIDE = "NANOSPEEDRUN_DEVICELESS"  # the stub's folder, where it is loaded

def restart(card: Card, world: int, cache: Path | None, command: list[str]):
    """A program of Python, in this process, under the stub."""
    scratch, (major, minor) = tempfile.mkdtemp(prefix="deviceless-"), card.capability
    library, source = f"{scratch}/libcuda.so.1", Path(__file__).with_name("deviceless.c")
    facts = f"-DBYTES={int(card.memory * 2**30)}ull -DMAJOR={major} -DMINOR={minor}"
    compiler = f"cc -w -shared -fPIC -Wl,-soname,libcuda.so.1 {facts} -o {library} {source}"
    subprocess.run(shlex.split(compiler), check=True)
    env = os.environ | dict.fromkeys(OFF.split(), "0") | {
        INSIDE: scratch, "LD_PRELOAD": library,
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world),
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": str(cache or f"{scratch}/triton")}
    os.execve(sys.executable, [sys.executable, *command], env)

def answer(place, **values):
    """Functions of a module that give fixed values."""
    for name, value in values.items():
        setattr(place, name, lambda *_, value=value, **__: value)

def pretend(card: Card):
    """torch.cuda as on the card; what would talk to a driver does nothing."""
    from torch._dynamo.device_interface import CudaInterface
    (major, minor), size = card.capability, int(card.memory * 2**30)
    threads = {(8, 9): 1536, (8, 6): 1536, (7, 5): 1024}.get(card.capability, 2048)
    properties = SimpleNamespace(
        name=card.name, major=major, minor=minor, uuid="stub", warp_size=32,
        multi_processor_count=card.processors, regs_per_multiprocessor=65536,
        max_threads_per_block=1024, max_threads_per_multi_processor=threads,
        shared_memory_per_block=49152, shared_memory_per_block_optin=card.shared << 10,
        shared_memory_per_multiprocessor=(card.shared + 1) << 10,
        total_memory=size, L2_cache_size=card.l2 << 20)
    zero = """_lazy_init synchronize manual_seed manual_seed_all set_rng_state set_rng_state_all
    empty_cache set_device reset_peak_memory_stats max_memory_allocated max_memory_reserved
    memory_allocated memory_reserved current_device"""
    answer(torch.cuda, **dict.fromkeys(zero.split(), 0), get_rng_state_all=[],
           get_rng_state=torch.zeros(16, dtype=torch.uint8),
           is_available=True, is_initialized=True, is_current_stream_capturing=False,
           is_bf16_supported=major >= 8, device_count=1, mem_get_info=(size, size),
           get_device_properties=properties, get_device_name=card.name,
           get_device_capability=card.capability)
    answer(CudaInterface, current_device=0, device_count=1, synchronize=None,
           get_device_properties=properties, is_bf16_supported=major >= 8)
    answer(CudaInterface.Worker, get_device_properties=properties)
    answer(torch._subclasses.fake_tensor, init_gpu_context=None)
    torch.autograd.set_multithreading_enabled(False)  # backward in the calling thread

def let_in_fakes(waits: Callable):
    """What a script asks of tensors, it may ask of fake ones, too; waits(why) where that copies."""
    real, take, convert = torch.tensor, FakeTensor.__getitem__, torch.nn.Module._apply

    def tensor(data, *, device=None, requires_grad=False, **options):
        there = torch.empty(0).device if device is None else torch.device(device)
        # on the card it would be there before a mode sees it
        made = real(data, device="cpu", **options)
        if there.type == "cuda":
            waits("a copy from the CPU")
            made = torch.empty(made.shape, dtype=made.dtype, device=there)
        return made.requires_grad_() if requires_grad else made

    def item(x, index):
        return take(x, real(index, device="cpu") if isinstance(index, list) else index)

    def apply(module, *args, **options):
        hung = {name: dict(vars(x)) for name, x in module._parameters.items()
                if type(x) is torch.nn.Parameter}
        convert(module, *args, **options)
        # a parameter is another one on the card, and keeps what hung on it
        for name, values in hung.items():
            vars(module._parameters[name]).update(values)
        return module
    torch.tensor, FakeTensor.__getitem__, torch.nn.Module._apply = tensor, item, apply
    FakeTensor.__format__ = lambda x, form: format(x.item(), form)
    FakeTensor.data_ptr = lambda x: 0
