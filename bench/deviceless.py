"""Before GPUs are rented: does a changed training script compile, fit and communicate as meant? No GPU is needed.

    python bench/deviceless.py --card h100 --out try -- --preset gpu           # train_gpt.py, one process
    python bench/deviceless.py --world 8 --out try -- --preset speedrun        # as rank 0 of 8
    python bench/deviceless.py --script PATH/train.py --steps 2 --out public   # any script of one file
    python bench/deviceless.py --compare try public                            # reports side by side

Needs a CUDA build of torch and a C compiler. Compilers are the real ones; tensors on the card are fake, without memory
or numbers. Times are a roofline, an ESTIMATE. docs/gpu.md says more.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path
from bench.cards import CARDS, INSIDE, Card, answer, let_in_fakes, pretend, restart  # noqa: E402

VOCAB = 50257
CONFIGS = {"first": 1, "all": None, "none": 0}  # how many of a kernel's become machine code
# Assumed: the host's time of a launch, the shortest kernel, the least collective.
LAUNCH_US, KERNEL_US, SEND_US = 6.0, 2.0, 20.0

# --- Bytes, FLOPs and the time that they need

def roofline(card: Card, size: float, flops: float, itemsize: int = 2) -> dict[str, float]:
    """A kernel that moves `size` bytes and multiplies numbers of `itemsize`. us: what memory or arithmetic alone would
    take, whichever is more, if it is not too short."""
    peak = {1: card.fp8 or card.bf16, 2: card.bf16}.get(itemsize, card.fp32)
    us = max(KERNEL_US, size / card.bandwidth / 1e3, flops / peak / 1e6)
    return dict(launches=1, bytes=size, flops=flops, us=us)

def nbytes(x) -> int:
    """Of a tensor's elements; of an expanded one its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())

def moved(name: str, inputs: list, outputs: list) -> float:
    """Bytes that an operation reads and writes: of gathers and scatters the rows, not the table."""
    rest = list(map(nbytes, inputs[1:]))
    if re.match("_*(index_(put|add|copy|fill)|scatter)", name):
        return 3.0 * max(rest, default=0)
    if re.fullmatch("embedding|index|index_select|gather", name):
        return 2.0 * sum(map(nbytes, outputs)) + sum(rest)
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

# --- Watching a run

PHASES = ("model", "forward", "backward", "optimizer", "evaluation")
FUNCTIONS = {"forward": "forward", "backward": "backward", "evaluate": "evaluation", "validate": "evaluation",
             "step": "optimizer", "optimizer_step": "optimizer", "step_optimizers": "optimizer"}

def new_step() -> SimpleNamespace:
    """Work by phase and kernel; time by phase, µs; collectives; waits of the host."""
    return SimpleNamespace(work=defaultdict(Counter), spent=Counter(), sent=[], waits=Counter())

def new_graph(name: str, kind: str = "", before: int = 0) -> SimpleNamespace:
    """A graph's row of the report, and what its last run did."""
    row = {"graph": name, "kind": kind, "phase": "", "steps before": before, "compile, s": 0.0}
    return SimpleNamespace(row=row | dict.fromkeys(("shared", "registers", "stack"), 0), work=Counter())

class Watch:
    """What is known of a run. A step ends where the optimizer's work does. Host, device and link have a clock each, µs;
    the device runs kernels in order, none before its launch."""
    def __init__(self, card: Card, world: int, most: int | None = None):
        self.card, self.world, self.most, self.keys = card, world, most, 512.0
        self.host = self.device = self.link = self.mark = 0.0
        self.live, self.peaks = {}, dict.fromkeys(PHASES, 0)  # bytes of a storage, of a phase
        self.graphs, self.kernels, self.recompiled, self.problems = [], {}, [], Counter()
        self.graph = self.compiling = new_graph("eager")
        self.last, self.count, self.made = "model", 0, False
        self.step = self.done = new_step()

    @property
    def now(self) -> float:
        return max(self.host, self.device)

    def phase(self) -> str:
        """By the functions that are being called; before the first of them the model is made."""
        frames = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())]
        found = {FUNCTIONS.get(code.co_name) for code in frames if "/_dynamo/" not in code.co_filename}
        if self.graph.row["kind"] == "inference" and "optimizer" not in found:
            found.add("evaluation")
        first = [name for name in ("evaluation", "backward", "optimizer") if name in found]
        self.made = self.made or "forward" in found or bool(first)
        return first[0] if first else "forward" if self.made else "model"

    def enter(self) -> str:
        """The phase now; the time since the last call was the last one's. Ends a script after its last step."""
        self.step.spent[self.last] += self.now - self.mark
        self.mark, before, self.last = self.now, self.last, self.phase()
        if before == "optimizer" != self.last:
            self.count += 1
            self.done, self.step = self.step, new_step()
            if self.count == self.most:
                sys.exit()
        return self.last

    def launch(self, name: str, size: float, flops: float = 0.0, itemsize: int = 2, **more):
        phase, costs = self.enter(), roofline(self.card, size, flops, itemsize) | more
        self.step.work[phase, name[:60]].update(costs)
        self.graph.work.update(costs)
        self.host += LAUNCH_US
        self.device = self.now + costs["us"]

    def launched(self, name: str, given: dict, dot: bool):
        """A Triton kernel, with its arguments by name."""
        given = {k: getattr(x, "base", x) for k, x in given.items()}  # of a tensor descriptor
        tensors = {id(x): (k, x) for k, x in given.items() if isinstance(x, torch.Tensor)}.values()
        numels = [x for k, x in given.items() if k.endswith("numel") and isinstance(x, int)]
        most = math.prod(numels) if numels else math.inf  # elements that are loaded or stored
        size = sum(min(nbytes(x), most * x.element_size()) for _, x in tensors)
        size += sum(nbytes(x) for k, x in tensors if k.startswith("in_out"))
        matrices = [x for _, x in tensors if x.dim() >= 2]
        flops = product_flops(name, matrices) if dot else 0.0
        if "arg_LSE" in given:  # attention; buffers of q, k and v may have any shape, or be one
            backward = "arg_DQ" in given
            v = given["arg_DV" if backward else "out_ptr0"].size(-1)
            qk = given["arg_DQ"].size(-1) if backward else min(v, given["arg_K"].size(-1))
            products = 3 * qk + 2 * v if backward else qk + v
            flops = 2.0 * self.keys * given["arg_LSE"].numel() * products
        self.launch(name, size, flops, matrices[0].element_size() if matrices else 2, triton=1)

    def host_waits(self, why: str):
        """The host waits for the device; noted with the line of the script."""
        phase, stack = self.enter(), traceback.extract_stack()
        place = [f for f in stack if "/torch/" not in f.filename and Path(f.filename).parent != ROOT / "bench"][-1]
        self.step.waits[f"{why}, {phase}, {Path(place.filename).name}:{place.lineno}"] += 1
        self.host = self.now

    def see(self, tensors: list):
        """Counts the memory of new storages on the card, until they die."""
        for x in tensors:
            if x.device.type == "cuda" and (storage := x.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata], phase = storage.nbytes(), self.phase()
                weakref.finalize(storage, self.live.pop, storage._cdata)
                self.peaks[phase] = max(self.peaks[phase], sum(self.live.values()))

    def note(self, name: str, binaries: list):
        """Writes down what the first form of a kernel needs that a block has room for; without one it is a problem."""
        import triton
        reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        file, row, most = Path(os.environ[INSIDE]) / "kernel.cubin", self.compiling.row, self.card.shared << 10
        binary = next((x for x in binaries if x.metadata.shared <= most), binaries[0])
        if binary.metadata.shared > most:
            self.problems[f"{name}: {binary.metadata.shared:,} bytes of shared memory, and a block has {most:,}"] += 1
        file.write_bytes(binary.asm["cubin"])
        said = subprocess.run([reader, "-res-usage", file], capture_output=True, text=True).stdout
        used = {"shared": binary.metadata.shared} | usage_of(said)
        self.kernels[row["graph"], name] = {"kernel": name, "graph": row["graph"]} | used
        row.update({what: max(row[what], number) for what, number in used.items()})

def usage_of(text: str) -> dict[str, int]:
    """Of cuobjdump -res-usage: registers of a thread, bytes of its stack, where spilled registers go."""
    found = re.findall(r" (?:REG|STACK):(\d+)", text)
    return dict(zip(("registers", "stack"), map(int, found), strict=False))

def reason_of(message: str) -> str:
    """Of Dynamo's log on a recompilation: the function and the first guard that failed, in a line."""
    found = re.search(r"Recompiling function (\S+).*?- \d+/\d+: (.*?)(\n|$)", message, re.DOTALL)
    return (f"{found[1]}: {found[2]}" if found else message.strip().splitlines()[-1])[:300]

HANDLE = ("begins in", "kind", "awaited in")

class Handle:
    """A collective under way, a ring's, after earlier ones; keeps its tensors until it is waited for."""
    def __init__(self, watch: Watch, kind: str, size: float, tensors: list):
        self.watch, self.tensors, phase = watch, tensors, watch.enter()
        sent = size * (watch.world - 1) / watch.world * (2 if kind == "all_reduce" else 1)
        start = max(watch.link, watch.now)
        self.end = watch.link = start + SEND_US + sent / watch.card.link / 1e3
        self.row = {"begins in": phase, "kind": kind, "awaited in": "", "bytes": size, "us": 0.0}
        watch.step.sent.append(self.row)

    def wait(self, *_):
        watch, phase = self.watch, self.watch.enter()
        self.row["us"] += max(0.0, self.end - watch.now)
        watch.device = max(watch.device, self.end)
        self.row["awaited in"], self.tensors = self.row["awaited in"] or phase, []

    def get_future(self) -> Handle:
        return self

# --- What runs, and what it tells

def stood_in(watch: Watch, name: str, args: tuple, options: dict):
    """What an operation gives that depends on numbers, or brings them to the CPU. None for another one."""
    x = args[0] if args else None
    if name == "_local_scalar_dense":
        watch.host_waits("a number is read")
        return False if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 0
    if name == "nonzero":
        watch.host_waits("nonzero")
        return x.new_empty(-(-x.numel() // watch.world), x.dim(), dtype=torch.int64)
    if name not in ("_to_copy", "copy_"):
        return None
    if str(options.get("device") or x.device) == "cpu":
        watch.host_waits("a copy to the CPU")
        return x if name == "copy_" else torch.zeros(x.shape, dtype=options.get("dtype") or x.dtype)
    waits = not (options.get("non_blocking") or args[2:])
    if waits and any(y.device.type == "cpu" for y in args[:2]):
        watch.host_waits("a copy from the CPU")
    return None

@functools.cache
def starts_kernel(func) -> bool:
    """Whether an operation does: it makes no view, and no empty tensor."""
    returned = [r.alias_info for r in func._schema.returns]
    views = all(alias is not None and not alias.is_write for alias in returned)
    quiet = r"(new_)?empty|detach|_?unsafe_view|_reshape|lift|resize_"
    return not views and not re.match(quiet, func._overloadpacket.__name__)

def make_mode(watch: Watch):
    """A mode in which what is on the card is fake, and watched, and the rest real."""
    from torch._library.custom_ops import OPDEFS
    from torch.utils._pytree import tree_leaves, tree_map_only
    from torch.utils.flop_counter import flop_registry

    def tensors(tree) -> list:
        return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

    def fake(x):  # without its numbers, which would be sent to the card
        return x if isinstance(x, FakeTensor) else mode.from_tensor(x)

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
            if found is None:
                args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
                found = self.count(func, name, kinds, args, kwargs, given)
            watch.see(tensors(found))
            return found

        def count(self, func, name, kinds, args, kwargs, given):
            """Runs an operation on fakes, the script's own by its body; counts those that start kernels."""
            has_kernel, own = torch._C._dispatch_has_kernel_for_dispatch_key, OPDEFS.get(func._schema.name)
            body = own._init_fn if own else func.decompose
            if not func.namespace.startswith("prim") and (own or has_kernel(func.name(), "CompositeImplicitAutograd")):
                with self:  # it consists of others
                    return body(*args, **kwargs)
            self.nested += 1
            try:
                out = kwargs["out"] if "out" in kwargs else super().__torch_dispatch__(func, kinds, args, kwargs)
            finally:
                self.nested -= 1
            results = tensors(out)
            if results and not self.nested and starts_kernel(func):
                formula = flop_registry.get(func._overloadpacket)
                flops = formula(*args, **kwargs, out_val=out) if formula else 0
                if name == "_grouped_mm":  # experts, which torch has no formula for
                    flops = 2.0 * args[0].numel() * args[1].size(-1)
                low = min((x.element_size() for x in given if x.dim() >= 2), default=2)
                watch.launch(name, moved(name, given, results), flops, low)
            return out
    mode = Mode(allow_non_fake_inputs=True)
    return mode

def watch_triton(watch: Watch):
    """Kernels that a script launches itself: compiled with the arguments of the launch, and counted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction
    driver, (major, minor) = SimpleNamespace(utils=SimpleNamespace()), watch.card.capability
    answer(driver.utils, get_device_properties={})
    answer(driver, get_current_target=GPUTarget("cuda", 10 * major + minor, 32), get_current_device=0,
           get_current_stream=0, set_current_device=None, get_active_torch_device=torch.device("cuda", 0),
           get_device_interface=torch.cuda, is_active=True)
    triton.runtime.driver.set_active(driver)
    real, known = JITFunction.run, set()

    def run(kernel, *args, grid, warmup, **options):
        binary, name = real(kernel, *args, grid=grid, warmup=True, **options), kernel.__name__
        if not warmup:
            if binary.hash not in known:
                watch.note(f"{name} {binary.hash[:6]}", [binary])
            known.add(binary.hash)
            watch.launched(name, dict(zip(kernel.arg_names, args, strict=False)), "tt.dot" in binary.asm["ttir"])
        return binary
    JITFunction.run = run
    answer(Autotuner, _bench=[0.0] * 3)  # the first configuration

def watch_tuners(watch: Watch, most: int | None):
    """Kernels of Inductor: of each the first `most` configurations become machine code, none is timed."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    answer(triton_helpers, set_driver_to_gpu=None, set_driver_to_cpu=None)

    def name_of(tuner) -> str:
        return tuner.inductor_meta.get("kernel_name", tuner.fn.__name__)

    def precompile(tuner, *_, **__):
        made = [tuner._precompile_config(config).kernel for config in tuner.configs[:most]]
        if made:
            watch.note(name_of(tuner), made)

    def run(tuner, *args, stream=None, **options):
        dot = "tem_fused" not in name_of(tuner) and "tl.dot(" in getattr(tuner.fn, "src", "")
        watch.launched(name_of(tuner), dict(zip(tuner.fn.arg_names, args, strict=False)), dot)
    triton_heuristics.CachingAutotuner.precompile = precompile
    triton_heuristics.CachingAutotuner.run = run

def watch_inductor(watch: Watch, mode):
    """Graphs: what they are compiled to, and what they do when they run, on fake buffers."""
    import torch._inductor.compile_fx as compile_fx
    guards, original = torch._C._dynamo.guards, compile_fx._compile_fx_inner
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset)
    torch._inductor.config.shape_padding = False  # would time products
    torch._inductor.config.joint_graph_constant_folding = False  # would compute them

    def run(graph, call, inputs):
        before, watch.graph, graph.work = watch.graph, graph, Counter()
        graph.row["phase"] = graph.row["phase"] or watch.enter()
        with mode, contextlib.ExitStack() as stack:
            stack.callback(setattr, watch, "graph", before)
            return call(inputs)

    def inner(module, example_inputs, **options):
        kinds = {"is_backward": "backward", "is_inference": "inference"}
        kind = next((kind for flag, kind in kinds.items() if options.get(flag)), "forward")
        places = [frame.f_locals for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "_compile"]
        codes = [place["code"].co_name for place in places if "code" in place]  # none in backward
        graph = new_graph(" ".join([str(len(watch.graphs)), *codes[:1]]), kind, watch.count)
        watch.graphs.append(graph)
        before, watch.compiling, began = watch.compiling, graph, time.perf_counter()
        compiled = original(module, example_inputs, **options)
        watch.compiling, graph.row["compile, s"] = before, round(time.perf_counter() - began, 1)
        compiled.current_callable = functools.partial(run, graph, compiled.current_callable)
        print(f"  graph {graph.row}", flush=True)
        return compiled
    compile_fx._compile_fx_inner = inner

def watch_recompilations(watch: Watch):
    torch._logging.set_logs(recompiles=True)
    handler = logging.Handler()
    handler.emit = lambda record: watch.recompiled.append(
        {"steps before": watch.count, "reason": reason_of(record.getMessage())})
    logger = logging.getLogger("torch._dynamo.guards.__recompiles")
    logger.handlers, logger.propagate = [handler], False

def watch_collectives(watch: Watch):
    """torch.distributed as rank 0 finds it; what is sent is written down, counts on the CPU come back."""
    dist = torch.distributed

    def collective(name: str, *args, async_op=False, **options):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if "all_to_all" in name and tensors[0].device.type == "cpu":
            tensors[0].copy_(tensors[1])
        kind = re.sub("_(into_tensor|tensor|single)$", "", name)
        handle = Handle(watch, kind, max(map(nbytes, tensors)), tensors)
        return handle if async_op else handle.wait()
    for name in """all_reduce reduce broadcast all_gather_into_tensor reduce_scatter_tensor
                   all_to_all_single""".split():
        setattr(dist, name, torch._dynamo.disable(functools.partial(collective, name)))
    nothing = "init_process_group destroy_process_group barrier broadcast_object_list new_group"
    answer(dist, get_rank=0, get_world_size=watch.world, is_initialized=watch.world > 1, get_backend="nccl",
           **dict.fromkeys(nothing.split()))

# --- Scripts

def stand_in(s, world, stage, steps: int) -> MagicMock:
    """For the Run of a script of this project: zeros as tokens, no data, no logs; some steps of a stage."""
    length, size = s.eval_seq_len, world.size
    rows = stage.micro_rows(s, size)
    shape = stage.batch_tokens // (stage.seq_len * rows * size), 3, rows, stage.seq_len
    stream = SimpleNamespace(
        seq_len=length, num_tokens=s.micro_tokens * size,
        num_rows=max(1, s.micro_tokens // length) * size,
        rows=lambda first, rows: torch.zeros(3, rows, length, dtype=torch.int32).numpy())
    run = MagicMock(s=s, world=world, stages=[stage], vocab_size=VOCAB, stream=stream, left=steps, over=False,
                    at=stage.start, following=stage.start + 1)

    def next_batch(step: int):
        run.left -= 1
        return torch.zeros(shape, dtype=torch.int32, device=s.device)
    run.next_batch = next_batch
    run.start.return_value, run.log_due.return_value = stage.start, False
    run.fits.side_effect = lambda attempt: attempt() or True
    run.validation_due.side_effect = lambda step: not run.left
    return run

def run_ours(path: Path, watch: Watch, args: argparse.Namespace):
    """`train` of a script of this project. Raises ValueError where it has no such stage."""
    module = importlib.import_module(path.stem)
    s, _, notes = module.parse_settings(args.flags, args.world)
    print("\n".join(notes), flush=True)
    build, stages = module.GPT.__init__, module.stage_table(s)
    if args.stage > len(stages):
        raise ValueError(f"--stage {args.stage}: must be 1 to {len(stages)}, or 0 for the largest")
    largest = max(stages, key=lambda t: (t.batch_tokens, t.start))
    stage = stages[args.stage - 1] if args.stage else largest
    module.stage_table = lambda _: [stage]
    # what a query sees in the mean of all layers, as the script counts FLOPs
    bare, nothing = dataclasses.replace(s, pointer=0, qk_dim=0), defaultdict(int)
    flops = module.flops_per_token(bare, nothing, stage._replace(candidates=0))
    layers = [layer for layer in module.layer_table(s) if layer.attention != "-"]
    watch.keys = flops / (12.0 * s.width * len(layers))

    def on_card(model, *values, **options):
        with torch.device("cuda"):
            build(model, *values, **options)
        for part in model.modules():
            part._buffers = {name: x.cuda() for name, x in part._buffers.items()}
        model.to = lambda *_: model  # all is there
    module.GPT.__init__ = on_card
    module.train(stand_in(s, module.World(0, 0, args.world), stage, args.steps))

def study(args: argparse.Namespace, path: Path, command: str):
    """The run, in the process that has the stub; ends it."""
    watch, errors = Watch(CARDS[args.card], args.world), []
    pretend(watch.card)
    let_in_fakes(watch.host_waits)
    for prepare in (watch_triton, watch_recompilations, watch_collectives):
        prepare(watch)
    watch_tuners(watch, CONFIGS[args.configs])
    watch_inductor(watch, mode := make_mode(watch))
    ours = re.search(r"^def stage_table", path.read_text(encoding="utf-8"), re.MULTILINE)
    sys.argv, sys.path[0] = [str(path), *args.flags], str(path.parent)
    try:
        with mode, contextlib.suppress(SystemExit):
            if ours:
                run_ours(path, watch, args)
            else:
                watch.most = args.steps
                runpy.run_path(str(path), run_name="__main__")
            watch.enter()  # ends the step
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - becomes the report's
        traceback.print_exc()
        errors.append(f"in {watch.last}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    about = dict(script=path.name, flags=shlex.join(args.flags), world=args.world, command=command,
                 torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    found = result(watch, about, errors)
    args.out.mkdir(parents=True, exist_ok=True)
    common.write_json(args.out / "report.json", found, indent=1)
    (args.out / "report.md").write_text(report(found), encoding="utf-8")
    print(f"\n{report(found)}\nwritten to {args.out}", flush=True)
    shutil.rmtree(os.environ[INSIDE], ignore_errors=True)
    os._exit(int(bool(errors)))  # threads of the script may be waiting

# --- Report

def numbers(work: Counter) -> dict:
    return {"launches": work["launches"], "of Triton": work["triton"], "GB": round(work["bytes"] / 1e9, 3),
            "GFLOP": round(work["flops"] / 1e9, 1), "ms (estimate)": round(work["us"] / 1e3, 3)}

def by_phase(step: SimpleNamespace) -> dict[str, Counter]:
    """A training step's work."""
    parts = {name: [work for (phase, _), work in step.work.items() if phase == name] for name in PHASES[1:4]}
    return {name: sum(works, Counter()) for name, works in parts.items()}

def sent_row(what: tuple, sent: list[dict]) -> dict:
    size, us = (sum(row[name] for row in sent) for name in ("bytes", "us"))
    return dict(zip(HANDLE, what, strict=True)) | {
        "number": len(sent), "MB": round(size / 1e6, 2), "ms waited (estimate)": round(us / 1e3, 3)}

def tables_of(watch: Watch) -> dict[str, list[dict]]:
    """Rows by title."""
    step = watch.done
    busiest = sorted(step.work.items(), key=lambda item: -item[1]["us"])[:25]
    groups = itertools.groupby(step.sent, key=lambda row: tuple(row[name] for name in HANDLE))
    return {
        "Memory": [{"peak in": name, "GiB": round(peak / 2**30, 2),
                    "of the card's": f"{peak / 2**30 / watch.card.memory:.0%}"} for name, peak in watch.peaks.items()],
        "Roofline of a step": [
            {"": f"{name}, estimate", **numbers(work),
             "ms with launches, collectives": round(step.spent[name] / 1e3, 3)}
            for name, work in by_phase(step).items()],
        "Where a step's time goes": [
            {"phase": phase, "kernel": name, **numbers(work)} for (phase, name), work in busiest],
        "Collectives of a step": [
            sent_row(what, list(rows)) for what, rows in groups if what[0] != "evaluation"],
        "Graphs": [graph.row | numbers(graph.work) for graph in watch.graphs],
        "Kernels with a stack, and the script's own": [
            row for row in watch.kernels.values() if row.get("stack") or row["graph"] == "eager"],
        "Recompilations": watch.recompiled,
        "The host waits, in a step": [{"why": why, "times": n} for why, n in step.waits.items()],
        "Problems": [{"what": text, "times": n} for text, n in watch.problems.items()]}

def result(watch: Watch, about: dict, errors: list[str]) -> dict:
    """What report.json holds: facts, a summary, tables."""
    card, step, work = watch.card, watch.done, sum(by_phase(watch.done).values(), Counter())
    sent = sum(row["bytes"] for row in step.sent if row["begins in"] != "evaluation")
    peak, ms = max(watch.peaks.values()) / 2**30, round(sum(step.spent[name] for name in PHASES[1:4]) / 1e3, 2)
    summary = {
        "script": about["script"], "card": card.name, "steps": watch.count, "graphs": len(watch.graphs),
        "of them in the last step": sum(graph.row["steps before"] == watch.count - 1 for graph in watch.graphs),
        "peak GiB": round(peak, 2), "MB sent": round(sent / 1e6), **numbers(work), "ms of a step (estimate)": ms}
    said = (f"Rank 0 of {about['world']}, torch {about['torch']}, {about['date']}; no GPU was used.\n\n"
            f"Compiles: {'**no**' if errors else 'yes'}. Fits: {'yes' if peak < card.memory else '**no**'}, "
            f"{peak:.2f} of {card.memory} GiB. Estimates with {card.bandwidth:g} GB/s, {card.bf16:g} TFLOP/s in bf16, "
            f"{card.fp8:g} in FP8, {card.link:g} GB/s between cards, {LAUNCH_US:g} µs of the host for a launch, "
            f"a kernel at least {KERNEL_US:g} µs; a query sees {watch.keys:.1f} keys.")
    return about | {"said": said, "errors": errors, "summary": summary, "tables": tables_of(watch)}

def table(rows: list[dict]) -> str:
    return common.markdown(list(rows[0]), [list(row.values()) for row in rows]) if rows else "none"

def report(r: dict) -> str:
    """The text, in Markdown."""
    parts = [f"# {r['script']} {r['flags']}", r["said"], table([r["summary"]]), *r["errors"]]
    parts += [f"## {title}\n\n{table(rows)}" for title, rows in r["tables"].items()]
    return "\n\n".join(parts) + "\n"

def compared(folders: list[Path]) -> str:
    """The summaries of reports, side by side."""
    texts = [(folder / "report.json").read_text(encoding="utf-8") for folder in folders]
    return table([{"report": folder.name} | json.loads(text)["summary"]
                  for folder, text in zip(folders, texts, strict=True)])

# --- Command line

def check(args: argparse.Namespace) -> Path:
    """The script. Raises ValueError, FileNotFoundError or RuntimeError with one sentence."""
    if args.card not in CARDS:
        raise ValueError(f"--card {args.card}: must be one of {', '.join(CARDS)}")
    if min(args.steps, args.world, args.stage + 1) < 1:
        raise ValueError(f"--steps {args.steps} and --world {args.world} must be at least 1, --stage 0")
    if not args.script.is_file():
        raise FileNotFoundError(f"--script {args.script}: no such file; expected train_gpt.py or a path")
    if torch.version.cuda is None:
        raise RuntimeError(
            f"torch {torch.__version__} is a build for CPUs; its CUDA build is needed, no GPU: python -m venv "
            "cuda && cuda/bin/pip install torch numpy, then cuda/bin/python bench/deviceless.py")
    if not shutil.which("cc"):
        raise RuntimeError("no C compiler named cc: apt-get install gcc")
    return args.script.resolve()

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "the script")
    add = parser.add_argument
    add("--script", type=Path, default=ROOT / "train_gpt.py", metavar="PATH", help="default: train_gpt.py")
    add("--card", default="h100", help=f"{', '.join(CARDS)} (default: %(default)s)")
    add("--world", type=int, default=1, metavar="N", help="processes; this is the first (default: 1)")
    add("--stage", type=int, default=0, metavar="N", help="from 1 on; 0: the largest (default)")
    add("--steps", type=int, default=2, metavar="N", help="steps to make (default: 2)")
    add("--configs", default="first", choices=CONFIGS, help="of a kernel, that become machine code (default: first)")
    add("--out", type=Path, default=Path("deviceless"), metavar="FOLDER", help="default: %(default)s")
    add("--cache", type=Path, metavar="FOLDER", help="keeps machine code between runs")
    add("--compare", type=Path, nargs="+", metavar="FOLDER", help="print reports side by side")
    return parser.parse_args(argv)

def work(args: argparse.Namespace, command: str) -> int:
    if args.compare:
        print(compared(args.compare))
        return 0
    script = check(args)
    if INSIDE in os.environ:
        study(args, script, command)
    restart(CARDS[args.card], args.world, args.cache, [__file__, *shlex.split(command)[2:]])

main = functools.partial(common.command_line, "deviceless", parse_args, work, resumes=False)

if __name__ == "__main__":
    common.start(main)
