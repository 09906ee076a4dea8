"""A CUDA card that is not there: torch.compile, Triton and ptxas work for it, and all that it would do is watched.

A process starts itself again under a stub of the CUDA driver, so that CUDA tensors are accepted. Those are FakeTensors,
without memory or numbers; what lies on the CPU is real. Dynamo, AOTAutograd, Inductor, Triton and ptxas are the real
ones, for the card's architecture. Bytes and FLOPs come from the tensors of every kernel launched, library call and
collective; memory from the birth and death of every storage. bench/deviceless.py uses it.

What depends on numbers is stood in for, and counted: .item() is 1 or 0, nonzero() finds 1/world of all, unique() and
coalesce() merge nothing, copies to the CPU are zeros.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

# --- Cards

class Card(NamedTuple):
    """Facts of NVIDIA's data sheets; rates are dense, with sums in fp32."""
    name: str  # as torch.cuda tells it
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    memory: float  # GiB that a process finds
    bandwidth: float  # GB/s of its memory
    bf16: float  # TFLOP/s
    fp8: float  # TFLOP/s; 0: none
    fp32: float  # TFLOP/s, without tensor cores
    shared: int  # KiB of shared memory that a block may have
    link: float  # GB/s to other cards, each direction
    l2: int  # MiB

CARDS = {
    # H100 SXM5 data sheet and Hopper white paper: HBM3, NVLink 4 of 900 GB/s in both directions
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 79.2, 3350, 989, 1979, 67, 227, 450, 50),
    # H200 SXM data sheet: as H100, with 141 GB of HBM3e
    "h200": Card("NVIDIA H200", (9, 0), 132, 139.8, 4800, 989, 1979, 67, 227, 450, 50),
    # A100 SXM4 80 GB data sheet: HBM2e, NVLink 3 of 600 GB/s; no FP8
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 79.2, 2039, 312, 0, 19.5, 163, 300, 40),
    # HGX B200 data sheet, an eighth of it: 180 GB of HBM3e, NVLink 5 of 1,800 GB/s
    "b200": Card("NVIDIA B200", (10, 0), 148, 178.4, 8000, 2250, 4500, 80, 227, 900, 126),
    # Ada white paper, RTX 4090: GDDR6X, PCIe 4 x16 only
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 23.5, 1008, 165.2, 330.3, 82.6, 99, 32, 72),
    # Ada white paper, RTX 4080, 16 GB
    "4080": Card("NVIDIA GeForce RTX 4080", (8, 9), 76, 15.6, 716.8, 97.5, 194.9, 48.7, 99, 32, 64),
    # GA102 white paper, RTX 3090
    "3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 23.5, 936, 71, 0, 35.6, 99, 32, 6),
    # T4 data sheet: 65 TFLOP/s are fp16's; its bf16 is emulated
    "t4": Card("Tesla T4", (7, 5), 40, 14.6, 320, 65, 0, 8.1, 64, 16, 4),
}
# Assumed: the host's time of a launch, the shortest kernel, the least collective.
LAUNCH_US, KERNEL_US, SEND_US = 6.0, 2.0, 20.0

def roofline(card: Card, size: float, flops: float, itemsize: int = 2) -> dict[str, float]:
    """A kernel that moves `size` bytes and multiplies numbers of `itemsize`: what memory and arithmetic alone would
    take, and `us`, whichever is more, if it is not too short."""
    peak = card.fp32 if itemsize > 2 else card.fp8 if itemsize == 1 and card.fp8 else card.bf16
    memory, compute = size / card.bandwidth / 1e3, flops / peak / 1e6
    return dict(launches=1, bytes=size, flops=flops, memory_us=memory, compute_us=compute,
                us=max(KERNEL_US, memory, compute))

class Timeline:
    """Host, device and link, a clock each, µs. The device runs kernels in order, none before its launch."""
    def __init__(self, card: Card, world: int = 1):
        self.card, self.world = card, world
        self.host = self.device = self.link = 0.0

    @property
    def now(self) -> float:
        return max(self.host, self.device)

    def launch(self, us: float):
        self.host += LAUNCH_US
        self.device = self.now + us

    def send(self, kind: str, size: float) -> float:
        """When a collective on `size` bytes of the whole, by a ring, is over. It waits for earlier ones."""
        sent = size * (self.world - 1) / self.world * (2 if kind == "all_reduce" else 1)
        self.link = max(self.link, self.now) + SEND_US + sent / self.card.link / 1e3
        return self.link

    def wait(self, end: float) -> float:
        """The device waits for a collective; returns for how long."""
        exposed = max(0.0, end - self.now)
        self.device = max(self.device, end)
        return exposed

    def sync(self):
        """The host waits for the device."""
        self.host = self.now

# --- What programs print

def usage_of(text: str) -> dict[str, int]:
    """Of cuobjdump -res-usage: registers of a thread, bytes of its stack, where spilled registers go."""
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}

def calls_of(code: str) -> dict[str, int]:
    """Launches of kernels, calls of libraries and operators in the `call` of Inductor's code."""
    body = code[max(code.rfind("def call("), 0):]
    calls = re.findall(r"extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+", body)
    return {"kernels": len(re.findall(r"\.run\(", body)), "calls": len(calls)}

def reason_of(message: str) -> str:
    """Of Dynamo's log on a recompilation: the function and the first guard that failed, in a line."""
    place = re.search(r"Recompiling function (\S+)", message)
    guard = re.search(r"- \d+/\d+: (.*)", message)
    said = guard[1] if guard else message.strip().splitlines()[-1]
    return (f"{place[1]}: {said}" if place else said)[:300]

# --- Bytes and FLOPs

GATHERS = {"embedding", "index", "index_select", "gather"}
SCATTERS = {"index_put", "index_add", "index_copy", "index_fill", "scatter", "scatter_add"}

def nbytes(x) -> int:
    """Of a tensor's elements; of an expanded one its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())

def moved(name: str, inputs: list, outputs: list) -> float:
    """Bytes that an operation reads and writes: of gathers and scatters the rows, not the table."""
    bare = re.sub(r"^_+|_impl|_+$", "", name)
    if bare in GATHERS:
        return 2.0 * sum(map(nbytes, outputs)) + sum(map(nbytes, inputs[1:]))
    if bare in SCATTERS:
        return 3.0 * max(map(nbytes, inputs[1:]), default=0)
    return float(sum(map(nbytes, {id(x): x for x in [*inputs, *outputs]}.values())))

def product_flops(name: str, matrices: list) -> float:
    """Of a Triton kernel that multiplies its first matrix with the next one of its depth. x @ x.T counts half."""
    if not matrices:
        return 0.0
    first, depth = matrices[0], matrices[0].size(-1)
    if re.search("gram|XXT|XTX|plus_cAA", name):
        return float(first.numel() * min(first.shape[-2:]))
    alike = [x for x in matrices[1:] if x.size(-1) == depth and x.dtype == first.dtype]
    return 2.0 * first.numel() * alike[0].size(-2) if alike else 0.0

def attention_flops(q, v, keys: float, backward: bool) -> float:
    """Of queries (B, H, T, K) that see so many keys: 2 products forward, 5 backward."""
    width = 3 * q.size(-1) + 2 * v.size(-1) if backward else q.size(-1) + v.size(-1)
    return 2.0 * keys * q.numel() / q.size(-1) * width

# --- Watching a run

PHASES = ("model", "forward", "backward", "optimizer", "evaluation")
FUNCTIONS = {"evaluate": "evaluation", "validate": "evaluation"} | {
    name: name for name in ("forward", "backward")} | dict.fromkeys(
    ("step", "optimizer_step", "step_optimizer", "step_optimizers"), "optimizer")

class Enough(BaseException):
    """All steps that were asked for are made."""

class Watch:
    """What is known of a run. A step ends where the optimizer's work does."""
    def __init__(self, card: Card, world: int, most: int | None = None):
        self.card, self.most, self.keys = card, most, 512.0
        self.time, self.live, self.known, self.peaks = Timeline(card, world), 0, set(), {}
        self.graphs, self.kernels, self.recompiled = [], {}, []
        self.problems, self.stand_ins = Counter(), Counter()
        self.graph, self.compiling, self.last, self.count, self.made = None, None, "model", 0, False
        self.step = self.done = self.new_step()

    def new_step(self) -> SimpleNamespace:
        """Work by phase, graph and kernel; time by phase, µs; collectives; waits of the host."""
        return SimpleNamespace(
            work=collections.defaultdict(Counter), spent=Counter(), sent=[], waits=Counter())

    def phase(self) -> str:
        """By the functions that are being called; before the first of them the model is made."""
        found, frame = set(), sys._getframe(1)
        while frame:
            found.add(FUNCTIONS.get(frame.f_code.co_name))
            frame = frame.f_back
        if self.graph and self.graph["kind"] == "inference" and "optimizer" not in found:
            found.add("evaluation")
        first = [name for name in ("evaluation", "backward", "optimizer") if name in found]
        self.made = self.made or "forward" in found or bool(first)
        return first[0] if first else "forward" if self.made else "model"

    def enter(self) -> str:
        phase = self.phase()
        if self.last == "optimizer" != phase:
            self.complete()
        self.last = phase
        return phase

    def complete(self):
        self.count, self.last = self.count + 1, ""
        self.done, self.step = self.step, self.new_step()
        if self.count == self.most:
            raise Enough

    @contextlib.contextmanager
    def spending(self, phase: str):
        """What is done within is the phase's, of host and device whichever is ahead."""
        before = self.time.now
        yield
        self.step.spent[phase] += self.time.now - before

    def launch(self, name: str, size: float, flops: float = 0.0, itemsize: int = 2):
        phase, costs = self.enter(), roofline(self.card, size, flops, itemsize)
        where = self.graph["label"] if self.graph else "eager"
        self.step.work[phase, where, name].update(costs)
        if self.graph:
            self.graph["work"].update(costs)
        with self.spending(phase):
            self.time.launch(costs["us"])

    def launched(self, name: str, given: dict, dot: bool):
        """A Triton kernel, with its arguments by name."""
        given = {k: getattr(x, "base", x) for k, x in given.items()}  # of a tensor descriptor
        tensors = {id(x): (k, x) for k, x in given.items() if isinstance(x, torch.Tensor)}.values()
        numels = [x for k, x in given.items() if k.endswith("numel") and isinstance(x, int)]
        most = math.prod(numels) if numels else math.inf  # elements that are loaded or stored
        size = sum(min(nbytes(x), most * x.element_size()) * (1 + k.startswith("in_out")) for k, x in tensors)
        matrices = [x for _, x in tensors if x.dim() >= 2]
        flops = product_flops(name, matrices) if dot else 0.0
        if "flex_attention" in name and "arg_V" in given:  # arg_Q is missing where it shares its buffer with keys
            v = given["arg_V"]
            backward = "arg_DO" in given or "flex_attention_backward" in name
            flops = attention_flops(given.get("arg_Q", v), v, self.keys, backward)
        self.launch(name, size, flops, matrices[0].element_size() if matrices else 2)

    def host_waits(self, why: str):
        phase = self.enter()
        self.step.waits[f"{why}, {phase}"] += 1
        with self.spending(phase):
            self.time.sync()

    def see(self, out):
        """Counts the memory of new storages on the card, until they die."""
        if isinstance(out, (tuple, list)):
            for x in out:
                self.see(x)
        elif isinstance(out, torch.Tensor) and out.device.type == "cuda":
            storage = out.untyped_storage()
            key, size, phase = storage._cdata, storage.nbytes(), self.phase()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self.gone, key, size)
            self.peaks[phase] = max(self.peaks.get(phase, 0), self.live)

    def gone(self, key: int, size: int):
        self.known.discard(key)
        self.live -= size

    def note(self, name: str, binary) -> bool:
        """What a compiled kernel needs; False if its shared memory is more than a block may have."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run([disassembler(), "-res-usage", file.name], capture_output=True, text=True)
        graph = self.compiling["label"] if self.compiling else "own"
        need, most = binary.metadata.shared, self.card.shared << 10
        self.kernels[graph, name] = dict(
            kernel=name, graph=graph, shared=need, dot="tt.dot" in binary.asm["ttir"], **usage_of(usage.stdout))
        if need > most:
            self.problems[f"{name}: {need:,} bytes of shared memory, and a block has {most:,}"] += 1
        return need <= most

class Handle:
    """A collective under way; keeps its tensors until it is waited for."""
    def __init__(self, watch: Watch, kind: str, size: float, tensors: list):
        self.watch, self.tensors, phase = watch, tensors, watch.enter()
        self.end = watch.time.send(kind, size) if size else 0.0
        self.row = dict(kind=kind, bytes=size, phase=phase, waited="", exposed_us=0.0)
        watch.step.sent.append(self.row)

    def wait(self, *_):
        phase = self.watch.enter()
        with self.watch.spending(phase):
            self.row["exposed_us"] += self.watch.time.wait(self.end)
        self.row["waited"], self.tensors = self.row["waited"] or phase, []

    def get_future(self) -> Handle:
        return self

@functools.cache
def disassembler() -> Path:
    import triton
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# --- The card that is not there

SETS = """cudaGetDeviceCount(int *x)=1 cudaGetDevice(int *x)=0 cudaDriverGetVersion(int *x)=13000
cudaRuntimeGetVersion(int *x)=13000 cudaStreamIsCapturing(void *s, int *x)=0 cudaStreamGetPriority(void *s, int *x)=0
cudaDeviceGetStreamPriorityRange(int *x, int *y)=*y=0 cudaDeviceCanAccessPeer(int *x, int a, int b)=0
cudaMemGetInfo(size_t *x, size_t *y)=*y=BYTES cudaEventCreateWithFlags(void **x, unsigned f)=(void*)1
cudaStreamCreateWithPriority(void **x, unsigned f, int p)=(void*)1 cudaEventElapsedTime(float *x, void *a, void *b)=1
cuDevicePrimaryCtxGetState(int d, unsigned *x, int *y)=*y=0 cuGetErrorString(int e, const char **x)="stub" """
NOTHING = """cudaSetDevice cudaGetLastError cudaPeekAtLastError cudaDeviceSynchronize cudaStreamSynchronize
cudaStreamQuery cudaEventDestroy cudaEventQuery cudaEventRecord cudaEventRecordWithFlags cudaEventSynchronize
cudaStreamWaitEvent cudaThreadExchangeStreamCaptureMode"""
OFF = """TORCHINDUCTOR_FX_GRAPH_CACHE TORCHINDUCTOR_AUTOGRAD_CACHE TORCH_COMPILE_DYNAMO_PGO
TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER TORCHINDUCTOR_USE_STATIC_TRITON_LAUNCHER"""
INSIDE = "NANOSPEEDRUN_DEVICELESS"  # set in the process that has the stub

PROPERTIES = """int cudaGetDeviceProperties(char *x, int d) { memset(x, 0, 800);
*(size_t*)(x+288) = BYTES; *(int*)(x+308) = 32; *(int*)(x+360) = MAJOR; *(int*)(x+364) = MINOR; return 0; }
int cudaGetDeviceProperties_v2(char *x, int d) { return cudaGetDeviceProperties(x, d); }"""  # places of CUDA 12, 13

def stub_source(size: int, capability: tuple[int, int]) -> str:
    """C of what libtorch asks CUDA's runtime and driver: one device; nothing can be launched."""
    known = dict(BYTES=f"{size}ull", MAJOR=capability[0], MINOR=capability[1])
    sets = re.findall(r"(\w+)\(([^)]*)\)=(\S+)", SETS)
    lines = [f"int {name}({args}) {{ *x = {value}; return 0; }}" for name, args, value in sets]
    lines += [f"int {name}() {{ return 0; }}" for name in NOTHING.split()]
    lines = [f"#define {name} {value}" for name, value in known.items()] + [*lines, PROPERTIES]
    return "\n".join(["#include <string.h>", *lines, ""])

def restart(args: argparse.Namespace, program: list[str]) -> int:
    """Starts a program of Python under the stub; its exit code."""
    with tempfile.TemporaryDirectory(prefix="deviceless-") as scratch:
        source, library = Path(scratch, "stub.c"), Path(scratch, "libcuda.so.1")
        card = CARDS[args.card]
        source.write_text(stub_source(int(card.memory * 2**30), card.capability))
        subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", library, source], check=True)
        paths = [scratch, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        given = {
            INSIDE: "1", "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": ":".join(paths),
            "RANK": str(args.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(args.world),
            "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_UNIQUE_KERNEL_NAMES": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            "TRITON_CACHE_DIR": str(args.cache or f"{scratch}/triton")}
        env = os.environ | dict.fromkeys(OFF.split(), "0") | given
        return subprocess.call([sys.executable, *program], env=env)

def answer(place, **values):
    """Functions of a module that give fixed values."""
    for name, value in values.items():
        setattr(place, name, lambda *_, value=value, **__: value)

def pretend(card: Card):
    """torch.cuda as on the card; what would talk to a driver does nothing."""
    import torch._subclasses.fake_tensor as fake
    from torch._dynamo.device_interface import CudaInterface
    size, (major, minor) = int(card.memory * 2**30), card.capability
    threads = {(8, 9): 1536, (8, 6): 1536, (7, 5): 1024}.get(card.capability, 2048)
    properties = SimpleNamespace(
        name=card.name, major=major, minor=minor, total_memory=size, warp_size=32, uuid="stub",
        multi_processor_count=card.processors, regs_per_multiprocessor=65536, max_threads_per_block=1024,
        max_threads_per_multi_processor=threads, shared_memory_per_block=49152, gcnArchName="",
        shared_memory_per_block_optin=card.shared << 10, is_integrated=0, is_multi_gpu_board=0,
        shared_memory_per_multiprocessor=(card.shared + 1) << 10, L2_cache_size=card.l2 << 20)
    told = dict(
        is_available=True, device_count=1, current_device=0, get_device_properties=properties, is_initialized=True,
        get_device_capability=card.capability, get_device_name=card.name, mem_get_info=(size, size),
        is_bf16_supported=major >= 8, is_current_stream_capturing=False, get_rng_state_all=[],
        max_memory_allocated=0, max_memory_reserved=0, memory_allocated=0, memory_reserved=0,
        get_rng_state=torch.zeros(16, dtype=torch.uint8))
    quiet = """_lazy_init synchronize manual_seed manual_seed_all set_rng_state set_rng_state_all empty_cache
    set_device reset_peak_memory_stats"""
    answer(torch.cuda, **told, **dict.fromkeys(quiet.split()))
    for name in ("current_device", "device_count", "get_device_properties", "synchronize", "is_bf16_supported"):
        setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: properties)
    answer(fake, init_gpu_context=None)
    fake.FakeTensor.data_ptr = lambda x: 0
    torch.autograd.set_multithreading_enabled(False)  # backward in the calling thread

def replace_tensor():
    """torch.tensor and lists as indices would allocate on the card before a mode sees it."""
    from torch._subclasses import FakeTensor
    real, take = torch.tensor, torch.Tensor.__getitem__

    def tensor(data, *, dtype=None, device=None, requires_grad=False, **options):
        there = torch.empty(0).device if device is None else torch.device(device)
        made = real(data, dtype=dtype, device="cpu", **options)
        if there.type == "cuda":
            made = torch.empty(made.shape, dtype=made.dtype, device=there)
        return made.requires_grad_() if requires_grad else made

    def item(x, index):
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, list) for part in parts):
            index = tuple(real(i, device="cpu") if isinstance(i, list) else i for i in parts)
        return take(x, index)
    torch.tensor, FakeTensor.__getitem__ = tensor, item
    FakeTensor.__format__ = lambda x, form: format(x.item(), form)

def stood_in(watch: Watch, name: str, args: tuple, options: dict):
    """What an operation gives that depends on numbers, or brings them to the CPU. None for another one."""
    x = args[0] if args else None
    if name == "_local_scalar_dense":
        watch.host_waits("a number is read")
        return False if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 0
    if name == "_to_copy" and str(options.get("device")) == "cpu":
        watch.host_waits("a copy to the CPU")
        return torch.zeros(x.shape, dtype=options.get("dtype") or x.dtype)
    if name == "copy_" and x.device.type == "cpu":
        watch.host_waits("a copy to the CPU")
        return x
    if name == "nonzero":
        watch.host_waits("nonzero")
        return x.new_empty(-(-x.numel() // watch.time.world), x.dim(), dtype=torch.int64)
    if name in ("_unique2", "unique_consecutive"):
        watch.host_waits("unique")
        places = torch.empty_like(x, dtype=torch.int64)
        return x.clone().flatten(), places, places.flatten().clone()
    return None

@functools.cache
def starts_kernel(func) -> bool:
    """Whether an operation of aten does: it makes no view, and no empty tensor."""
    returned = [r.alias_info for r in func._schema.returns]
    views = all(alias is not None and not alias.is_write for alias in returned)
    quiet = r"(new_)?empty|detach|_?unsafe_view|_reshape|lift|resize_"
    return not views and not re.match(quiet, func._overloadpacket.__name__)

def shapes_of(tensors: list) -> list:
    return [(*x.shape, *x.stride(), x.dtype) for x in tensors]

def make_mode(watch: Watch):
    """A mode in which what is on the card is fake, and watched, and the rest real."""
    from torch._library.custom_ops import OPDEFS
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map_only
    from torch.utils.flop_counter import flop_registry

    def tensors(tree) -> list:
        return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

    class Mode(FakeTensorMode):
        nested = 0  # operations within one, which count as one

        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
            given = tensors((args, kwargs))
            named = str(kwargs.get("device") or "").startswith("cuda")
            if not named and not any(isinstance(x, FakeTensor) for x in given):
                kwargs.pop("pin_memory", None)
                return given[0] if "pin_memory" in name else func(*args, **kwargs)
            with self:
                found = stood_in(watch, name, args, kwargs)
            if found is not None:
                watch.stand_ins[name] += 1
                watch.see(found)
                return found
            args, kwargs = tree_map_only(torch.Tensor, self.faked, (args, kwargs))
            return self.count(func, name, kinds, args, kwargs, given)

        def faked(self, x):
            """Without its numbers, which would be sent to the card."""
            return x if isinstance(x, FakeTensor) else self.from_tensor(x)

        def count(self, func, name, kinds, args, kwargs, given):
            """Runs an operation on fakes, the project's own by its body; counts those that start kernels."""
            self.nested += 1
            try:
                out = super().__torch_dispatch__(func, kinds, args, kwargs)
            finally:
                self.nested -= 1
            own = None if func.namespace.startswith("prim") else OPDEFS.get(func._schema.name)
            if own is not None:
                said = shapes_of(tensors(out))
                with self:
                    out = own._init_fn(*args, **kwargs)
                if said != shapes_of(tensors(out)):
                    watch.problems[f"{name}: its fake says {said}, it gives {shapes_of(tensors(out))}"] += 1
            elif not self.nested and starts_kernel(func) and (results := tensors(out)):
                formula = flop_registry.get(func._overloadpacket)
                flops = formula(*args, **kwargs, out_val=out) if formula else 0
                low = min((x.element_size() for x in given if x.dim() >= 2), default=2)
                watch.launch(name, moved(name, given, results), flops, low)
            watch.see(out)
            return out
    return Mode(allow_non_fake_inputs=True)

# --- Triton and Inductor

def watch_triton(watch: Watch):
    """Kernels that a script launches itself: compiled with the arguments of the launch, and counted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction
    major, minor = watch.card.capability
    driver = SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda device: {}))
    answer(driver, get_current_target=GPUTarget("cuda", 10 * major + minor, 32), get_current_device=0,
           get_current_stream=0, set_current_device=None, get_active_torch_device=torch.device("cuda", 0),
           get_device_interface=torch.cuda, is_active=True)
    triton.runtime.driver.set_active(driver)
    real, known = JITFunction.run, set()

    def run(kernel, *args, grid, warmup, **options):
        binary = real(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            name = kernel.__name__
            if binary.hash not in known and not watch.note(f"{name} {binary.hash[:6]}", binary):
                raise RuntimeError(f"OutOfResources: {list(watch.problems)[-1]}")
            known.add(binary.hash)
            watch.launched(name, dict(zip(kernel.arg_names, args, strict=False)), "tt.dot" in binary.asm["ttir"])
        return binary
    JITFunction.run = run
    answer(Autotuner, _bench=[0.0] * 3)  # the first configuration

def watch_tuners(watch: Watch, configs: str):
    """Kernels of Inductor: configurations become machine code, none is timed."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    tuner_type = triton_heuristics.CachingAutotuner
    compile_all = tuner_type._precompile_worker
    answer(triton_helpers, set_driver_to_gpu=None, set_driver_to_cpu=None)
    answer(tuner_type, _dynamic_scale_rblock=None)

    def precompile(tuner):
        if configs == "first" and not tuner.compile_results:
            tuner.configs = tuner.configs[:1]
        if configs != "none":
            compile_all(tuner)

    def make_launchers(tuner):
        """Those that fit; otherwise the last one without pipelining, as Inductor tries it."""
        if configs == "none" or tuner.launchers:
            return
        name, last = tuner.inductor_meta.get("kernel_name", "triton"), tuner.compile_results[-1].config
        found = [r for r in tuner.compile_results if watch.note(name, r.kernel)]
        if not found and last.num_stages > 1:
            last.num_stages = 1
            again = tuner._precompile_config(last)
            found = [again] if watch.note(f"{name}, 1 stage", again.kernel) else []
        if not found:
            raise RuntimeError(f"No valid triton configs. OutOfResources: {list(watch.problems)[-1]}")
        tuner.compile_results = found
        tuner.launchers = [SimpleNamespace(config=r.config, store_cubin=False) for r in found]

    def run(tuner, *args, stream=None, **options):
        name = tuner.inductor_meta.get("kernel_name", tuner.fn.__name__)
        dot = "tem_fused" not in name and "tl.dot(" in getattr(tuner.fn, "src", "")
        watch.launched(name, dict(zip(tuner.fn.arg_names, args, strict=False)), dot)
    tuner_type._precompile_worker, tuner_type._make_launchers, tuner_type.run = precompile, make_launchers, run

def prepare_inductor():
    """Its buffers are fake, it computes constants on the CPU, and times no products."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder
    guards, deduce = torch._C._dynamo.guards, Folder._deduce_value

    def on_cpu(folder, node):
        if node.target is torch.ops.prims.device_put.default:
            return folder.env[node.args[0]]
        before = node.kwargs
        if "device" in before:
            node.kwargs = {**before, "device": torch.device("cpu")}
        try:
            return deduce(folder, node)
        finally:
            node.kwargs = before
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset)
    Folder._deduce_value, torch._inductor.config.shape_padding = on_cpu, False
    answer(Folder, _add_peephole_patterns=None)

def watch_inductor(watch: Watch, mode):
    """Graphs: what they are compiled to, and what they do when they run."""
    import torch._inductor.compile_fx as compile_fx
    original = compile_fx._compile_fx_inner

    def run(graph, call, inputs):
        with contextlib.ExitStack() as stack:
            if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
                stack.enter_context(mode)
            stack.callback(setattr, watch, "graph", watch.graph)
            watch.graph, graph["work"] = graph, Counter()
            graph["phase"] = graph["phase"] or watch.enter()
            return call(inputs)

    def inner(module, example_inputs, **options):
        kind = "inference" if options.get("is_inference") else "forward"
        kind = "backward" if options.get("is_backward") else kind
        graph = dict(label=f"{len(watch.graphs)} {frame_name()}", kind=kind, phase="", work=Counter(),
                     nodes=len(module.graph.nodes), after=watch.count)
        watch.graphs.append(graph)
        before, watch.compiling, began = watch.compiling, graph, time.perf_counter()
        try:
            compiled = original(module, example_inputs, **options)
        finally:
            watch.compiling, graph["seconds"] = before, round(time.perf_counter() - began, 1)
        graph |= calls_of(getattr(compiled, "source_code", None) or "")
        compiled.current_callable = functools.partial(run, graph, compiled.current_callable)
        print(f"  graph {graph['label']}, {kind}: {graph['kernels']} kernels, {graph['seconds']} s", flush=True)
        return compiled
    compile_fx._compile_fx_inner = inner

def frame_name() -> str:
    """The function that Dynamo compiles now; ? in a backward pass that is compiled late."""
    frame = sys._getframe(1)
    while frame and not (frame.f_code.co_name == "_compile" and "code" in frame.f_locals):
        frame = frame.f_back
    return frame.f_locals["code"].co_name if frame else "?"

def watch_recompilations(watch: Watch):
    class Handler(logging.Handler):
        def emit(self, record):
            watch.recompiled.append((watch.count, reason_of(record.getMessage())))
    torch._logging.set_logs(recompiles=True)
    for name in ("torch._dynamo.guards.__recompiles", "torch._dynamo.__recompiles"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Handler()], False

# --- Other processes

COLLECTIVES = """all_reduce reduce broadcast all_gather_into_tensor reduce_scatter_tensor all_to_all_single"""

def watch_collectives(watch: Watch, rank: int):
    """torch.distributed as this rank finds it; what is sent is written down, tensors on the CPU are copied."""
    dist, world = torch.distributed, watch.time.world

    def collective(name: str, *args, async_op=False, **options):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        whole, on_card = max(tensors, key=nbytes), tensors[0].device.type == "cuda"
        if not on_card and "all_to_all" in name:
            tensors[0].copy_(tensors[1])
        kind = re.sub("_(into_tensor|tensor|single)$", "", name)
        handle = Handle(watch, kind, nbytes(whole) * on_card, tensors)
        return handle if async_op else handle.wait()
    for name in COLLECTIVES.split():
        setattr(dist, name, torch._dynamo.disable(functools.partial(collective, name)))
    nothing = "init_process_group destroy_process_group barrier broadcast_object_list new_group"
    answer(dist, get_rank=rank, get_world_size=world, is_initialized=world > 1, get_backend="nccl",
           **dict.fromkeys(nothing.split()))
    torch.nn.parallel.DistributedDataParallel = unseen

def unseen(module, *_, **__):
    """Stands in for DistributedDataParallel: its collectives are not seen."""
    module.no_sync = contextlib.nullcontext
    return module

class SparseRows:
    """Stands in for a sparse tensor of rows; coalesced, as many are left: at worst all differ."""
    def __init__(self, indices, values, *_, **__):
        self.indices, self.values = lambda: indices, lambda: values

    def __add__(self, other):
        indices = torch.cat((self.indices(), other.indices()), dim=1)
        return SparseRows(indices, torch.cat((self.values(), other.values())))

    def coalesce(self) -> SparseRows:
        order = self.indices()[0].argsort()
        return SparseRows(self.indices()[:, order], self.values()[order])

def install(watch: Watch, configs: str, rank: int):
    """The card, under the stub; a mode in which a script runs on it."""
    pretend(watch.card)
    replace_tensor()
    watch_triton(watch)
    watch_tuners(watch, configs)
    prepare_inductor()
    mode = make_mode(watch)
    watch_inductor(watch, mode)
    watch_recompilations(watch)
    watch_collectives(watch, rank)
    torch.sparse_coo_tensor = SparseRows
    return mode
