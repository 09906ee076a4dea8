"""Before GPUs are rented: does a changed training script compile, fit and communicate as meant? No GPU is needed.

    python bench/deviceless.py --card h100 --out try -- --preset gpu           # train_gpt.py, one process
    python bench/deviceless.py --world 8 --out try -- --preset speedrun        # as rank 0 of 8
    python bench/deviceless.py --script PATH/train.py --steps 2 --out public   # any script of one file
    python bench/deviceless.py --compare try public                            # reports side by side
    python bench/deviceless.py --facts                                         # what it knows of the cards

Needs a CUDA build of torch (Linux, any machine: `pip install torch numpy`, 5.5 GB) and a C compiler; --compare, --facts
and --help do without. A script of this project runs its own `train`, with a stand-in for its SERVICE; another one runs
as it is until it has made --steps steps. How a card is made up, and what is stood in for: bench/fakecuda.py. Times are
a roofline, an ESTIMATE: docs/gpu.md says how far off it is.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common, fakecuda  # noqa: E402 - after the path
from bench.fakecuda import CARDS, PHASES, Enough, Watch  # noqa: E402

# --- Scripts

def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module

class Silent:
    """Answers every call with None; is false."""
    def __getattr__(self, name: str) -> Silent:
        return Silent()

    def __call__(self, *_, **__):
        return None

    def __bool__(self) -> bool:
        return False

class StandIn(Silent):
    """For the Run of a script of this project: zeros as tokens, no data, no logs, --steps steps."""
    def __init__(self, s, world, stages, args: argparse.Namespace):
        self.s, self.world, self.vocab_size, self.stages = s, world, args.vocab, stages
        self.left, self.over, self.position, self.status = args.steps, False, {}, ""
        self.at = stages[-1].start if stages else 0
        self.corpus = SimpleNamespace(meta={"vocab_size": args.vocab})
        length = getattr(s, "eval_seq_len", s.seq_len)
        count = max(1, s.micro_tokens // length) * world.size
        self.stream = SimpleNamespace(
            seq_len=length, num_rows=count, num_tokens=count * length,
            rows=lambda first, rows: torch.zeros(3, rows, length, dtype=torch.int32).numpy())

    def fits(self, attempt) -> bool:
        attempt()
        return True

    def start(self, *_) -> int:
        return self.at

    @property
    def following(self) -> int:
        return self.at + 1

    def next_batch(self, *_):
        s, size = self.s, self.world.size
        self.left -= 1
        self.over = not self.left
        if not self.stages:  # train_baseline.py: the rows of a process, and the place in the data
            shape = 3, s.batch_tokens // s.seq_len // size, s.seq_len
            return torch.zeros(shape, dtype=torch.int32, device="cuda"), {}
        t = self.stages[-1]
        rows = t.micro_rows(s, size)
        shape = t.batch_tokens // (t.seq_len * rows * size), 3, rows, t.seq_len
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    def validation_due(self, *_) -> bool:
        return self.over

    def look(self):
        return contextlib.nullcontext()

def chosen(stages: list, which: str) -> list:
    """Of a script's stages those to compile; the last one is run. Raises ValueError for another word."""
    most = max(t.batch_tokens for t in stages)
    largest = [t for t in stages if t.batch_tokens == most][-1:]
    kinds = {"largest": largest, "last": stages[-1:], "first": stages[:1], "all": stages}
    kinds |= {str(i): [t] for i, t in enumerate(stages, 1)}
    if which not in kinds:
        raise ValueError(f"--stages {which}: must be one of {', '.join(kinds)}")
    return kinds[which]

def visible_keys(module, s, stage) -> float:
    """Keys that a query sees, the mean of all layers, as the script counts FLOPs; without that half a row."""
    if stage is None:
        return s.seq_len / 2
    bare = dataclasses.replace(s, pointer=0)
    total = module.flops_per_token(bare, collections.defaultdict(int), stage._replace(candidates=0))
    return total / (12.0 * s.width * sum(layer.attention != "-" for layer in module.layer_table(s)))

def run_ours(module, watch: Watch, args: argparse.Namespace):
    """`train` of a script of this project."""
    s, _, notes = module.parse_settings(args.flags, args.world)
    print("\n".join(notes), flush=True)
    world, stages, build = module.World(args.rank, 0, args.world), [], module.GPT.__init__
    if hasattr(module, "stage_table"):
        stages = chosen(module.stage_table(s), args.stages)
        module.stage_table = lambda _: stages
    watch.keys = args.keys or visible_keys(module, s, stages[-1] if stages else None)
    run = StandIn(s, world, stages, args)
    if not stages:
        module.training_rows, module.next_batch = run.look, run.next_batch

    def on_card(model, *values, **options):
        with torch.device("cuda"):
            build(model, *values, **options)
        for part in model.modules():
            part._buffers = {name: x.cuda() for name, x in part._buffers.items()}
        model.to = lambda *_: model  # all is there
    module.GPT.__init__ = on_card
    module.train(run)

def run_other(path: Path, watch: Watch, args: argparse.Namespace):
    """A script as it is, as if torchrun had started it."""
    watch.most, watch.keys = args.steps, args.keys or watch.keys
    sys.argv, sys.path[0] = [str(path), *args.flags], str(path.parent)
    with contextlib.suppress(Enough, SystemExit):
        runpy.run_path(str(path), run_name="__main__")

# --- Report

def totals(work: dict, place: int) -> dict[str, Counter]:
    """Work by phase (0), graph (1) or kernel (2)."""
    found = collections.defaultdict(Counter)
    for key, one in work.items():
        found[key[place]].update(one)
    return found

def result(watch: Watch, about: dict, errors: list[str]) -> dict:
    """What report.json holds."""
    step = watch.done
    phases = {name: one | {"ms": step.spent[name] / 1e3} for name, one in totals(step.work, 0).items()}
    graphs = [{**graph, **graph["work"]} for graph in watch.graphs]
    for graph in graphs:
        rows = [row for row in watch.kernels.values() if row["graph"] == graph["label"]]
        graph |= {what: max((row.get(what, 0) for row in rows), default=0) for what in ("shared", "registers", "stack")}
        del graph["work"]
    busiest = sorted(totals(step.work, 2).items(), key=lambda item: -item[1]["us"])[:25]
    late = sum(graph["after"] == watch.count - 1 for graph in watch.graphs) if watch.count else None
    return {
        "about": about, "steps": watch.count, "compiled_in_last_step": late, "memory": watch.peaks,
        "phases": {name: phases[name] for name in PHASES[1:4] if name in phases}, "graphs": graphs,
        "collectives": [row for row in step.sent if row["phase"] != "evaluation"], "busiest": dict(busiest),
        "kernels": [row for row in watch.kernels.values() if row.get("stack") or row["graph"] == "own"],
        "recompilations": watch.recompiled, "waits": step.waits, "stand_ins": watch.stand_ins,
        "problems": [f"{text} ({n} times)" for text, n in watch.problems.items()], "errors": errors}

def step_ms(r: dict) -> float:
    return sum(phase["ms"] for phase in r["phases"].values())

def verdict(r: dict) -> list[str]:
    """The answers, a sentence each."""
    card, most = CARDS[r["about"]["card"]], max(r["memory"].values(), default=0) / 2**30
    exposed = sum(row["exposed_us"] for row in r["collectives"]) / 1e3
    return [
        f"Compiles: {'**no**' if r['errors'] else 'yes'}, {len(r['graphs'])} graphs, "
        f"{len(r['problems'])} problem(s).",
        f"Fits: {'yes' if most < card.memory else '**no**'}, {most:.2f} of {card.memory} GiB.",
        f"Graphs compiled in the last of {r['steps']} steps: {r['compiled_in_last_step']}.",
        f"Estimate of a step: {step_ms(r):.2f} ms, of which {exposed:.2f} ms wait for collectives."]

def memory_rows(r: dict) -> list[list]:
    size = CARDS[r["about"]["card"]].memory * 2**30
    peaks = {name: r["memory"][name] for name in PHASES if name in r["memory"]}
    return [[name, f"{peak / 2**30:.2f}", f"{peak / size:.0%}"] for name, peak in peaks.items()]

def roofline_rows(r: dict) -> list[list]:
    rows = []
    for name, one in r["phases"].items():
        times = one["memory_us"] / 1e3, one["compute_us"] / 1e3, one["us"] / 1e3, one["ms"]
        rows.append([f"{name}, estimate", one["launches"], f"{one['bytes'] / 1e9:.2f}",
                     f"{one['flops'] / 1e12:.3f}", *(f"{ms:.2f}" for ms in times)])
    return [*rows, ["step, estimate", *[""] * 6, f"{step_ms(r):.2f}"]]

def graph_rows(r: dict) -> list[list]:
    names = "label kind phase kernels calls seconds shared registers stack".split()
    return [[*(g.get(name, "") for name in names), f"{g.get('bytes', 0) / 1e9:.2f}",
             f"{g.get('flops', 0) / 1e9:.1f}", f"{g.get('us', 0) / 1e3:.3f}"] for g in r["graphs"]]

def collective_rows(r: dict) -> list[list]:
    """In their order; neighbours of one kind are one line."""
    lines = []
    for row in r["collectives"]:
        what = [row["phase"], row["kind"], row["waited"]]
        if not lines or lines[-1][0] != what:
            lines.append((what, Counter()))
        lines[-1][1].update(number=1, size=row["bytes"], us=row["exposed_us"])
    return [[*what, n["number"], f"{n['size'] / 1e6:.2f}", f"{n['us'] / 1e3:.3f}"] for what, n in lines]

def brief(name: str) -> str:
    """A kernel's name as a table can show it."""
    return name if len(name) <= 60 else f"{name[:28]}..{name[-30:]}"

def section(title: str, head: str, rows: list[list]) -> str:
    return f"## {title}\n\n" + (common.markdown(head.split("|"), rows) if rows else "none")

def report(r: dict) -> str:
    """The text, in Markdown."""
    about, card = r["about"], CARDS[r["about"]["card"]]
    busiest = [[brief(name), one["launches"], f"{one['bytes'] / 1e9:.2f}", f"{one['flops'] / 1e9:.1f}",
                f"{one['us'] / 1e3:.3f}"] for name, one in [*r["busiest"].items()][:12]]
    own = [[brief(row["kernel"]), row["shared"], row.get("registers"), row.get("stack")] for row in r["kernels"]]
    assumed = (f"Estimate: {card.bandwidth:g} GB/s, {card.bf16:g} TFLOP/s in bf16, {card.fp8:g} in FP8, "
               f"{card.link:g} GB/s between cards, {fakecuda.LAUNCH_US:g} µs of the host for a launch, a "
               f"kernel at least {fakecuda.KERNEL_US:g} µs; a query sees {about['keys']:g} keys.")
    return "\n\n".join([
        f"# {about['script']} {about['flags']}\n\n{card.name}, rank {about['rank']} of {about['world']}, "
        f"torch {about['torch']}, {about['date']}; no GPU was used.",
        "\n".join(f"- {line}" for line in verdict(r)),
        section("Memory", "peak in|GiB|of the card's", memory_rows(r)),
        section("Roofline of a step", "|launches|GB|TFLOP|memory alone, ms|arithmetic alone, ms|kernels, ms"
                "|with launches and collectives, ms", roofline_rows(r)), assumed,
        section("Where a step's time goes", "kernel|launches|GB|GFLOP|ms (estimate)", busiest),
        section("Collectives of a step", "begins in|kind|awaited in|number|MB|ms waited (estimate)",
                collective_rows(r)),
        section("Graphs", "graph|kind|phase|kernels|calls|compile, s|shared, bytes|registers|stack, bytes|GB|GFLOP"
                "|ms (estimate)", graph_rows(r)),
        section("Kernels of the script's own, and those with a stack", "kernel|shared|registers|stack", own),
        section("Recompilations", "steps before|reason", r["recompilations"]),
        section("The host waits, in a step", "why|times", [*r["waits"].items()]),
        section("Stood in for", "operation|times", [*r["stand_ins"].items()]),
        section("Problems", "what", [[text] for text in [*r["problems"], *r["errors"]]])]) + "\n"

def compared(folders: list[Path]) -> str:
    """Reports side by side."""
    found = [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in folders]

    def line(r: dict) -> list:
        work = Counter()
        for one in r["phases"].values():
            work.update(one)
        sent = sum(row["bytes"] for row in r["collectives"])
        return [r["about"]["script"], r["about"]["card"], len(r["graphs"]), work["launches"],
                f"{work['bytes'] / 1e9:.1f}", f"{work['flops'] / 1e12:.2f}", f"{sent / 1e6:.0f}",
                f"{max(r['memory'].values()) / 2**30:.2f}", f"{step_ms(r):.2f}"]
    head = "report|script|card|graphs|launches|GB|TFLOP|MB sent|peak GiB|ms of a step (estimate)"
    return common.markdown(head.split("|"), [[f.name, *line(r)] for f, r in zip(folders, found, strict=True)])

# --- Command line

def check(args: argparse.Namespace) -> Path:
    """The script. Raises ValueError, FileNotFoundError or RuntimeError with one sentence."""
    if args.card not in CARDS:
        raise ValueError(f"--card {args.card}: must be one of {', '.join(CARDS)}")
    if args.steps < 1 or not 0 <= args.rank < args.world:
        raise ValueError(f"--steps {args.steps} must be at least 1, --rank {args.rank} from 0 to --world - 1")
    script = next((path for path in (Path(args.script), ROOT / args.script) if path.is_file()), None)
    if not script:
        raise FileNotFoundError(f"--script {args.script}: no such file; expected train_gpt.py or a path")
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is a build for CPUs; its CUDA build is needed, no GPU: python "
                           "-m venv cuda && cuda/bin/pip install torch numpy, then cuda/bin/python bench/deviceless.py")
    if not shutil.which("cc"):
        raise RuntimeError("no C compiler named cc: apt-get install gcc")
    return script.resolve()

def study(args: argparse.Namespace, path: Path, command: str) -> int:
    """The run, in the process that has the stub; its exit code."""
    watch, errors = Watch(CARDS[args.card], args.world), []
    mode = fakecuda.install(watch, args.configs, args.rank)
    ours = re.search(r"^def train\(run", path.read_text(encoding="utf-8"), re.MULTILINE)
    try:
        with mode:
            run_ours(load(path), watch, args) if ours else run_other(path, watch, args)
        if watch.last == "optimizer":
            watch.complete()
    except Exception as error:  # noqa: BLE001 - becomes the report's
        traceback.print_exc()
        errors.append(f"in {watch.last}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    about = vars(args) | dict(script=path.name, flags=shlex.join(args.flags), keys=round(watch.keys, 1),
                              command=command, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
    found = json.loads(json.dumps(result(watch, about, errors), default=str))
    args.out.mkdir(parents=True, exist_ok=True)
    common.write_json(args.out / "report.json", found, indent=1)
    (args.out / "report.md").write_text(report(found), encoding="utf-8")
    print(f"\n{report(found)}\nwritten to {args.out}", flush=True)
    os._exit(int(bool(errors)))  # threads of the script may be waiting

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "the script")
    add = parser.add_argument
    add("--script", default="train_gpt.py", metavar="PATH", help="default: %(default)s")
    add("--card", default="h100", help=f"{', '.join(CARDS)} (default: %(default)s)")
    add("--world", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--rank", type=int, default=0, metavar="R", help="which of them this is (default: 0)")
    add("--stages", default="largest", help="largest, first, last, all or a number (default: %(default)s)")
    add("--steps", type=int, default=2, metavar="N", help="steps to make (default: 2)")
    add("--configs", default="first", choices=("first", "all", "none"),
        help="configurations of a kernel that become machine code (default: %(default)s)")
    add("--keys", type=float, default=0.0, metavar="N", help="that a query sees, for FLOPs of attention")
    add("--vocab", type=int, default=50257, metavar="N", help="default: %(default)s")
    add("--out", type=Path, default=Path("deviceless"), metavar="FOLDER", help="default: %(default)s")
    add("--cache", type=Path, metavar="FOLDER", help="keeps machine code between runs")
    add("--facts", action="store_true", help="print what is known of the cards")
    add("--compare", type=Path, nargs="+", metavar="FOLDER", help="print reports side by side")
    return parser.parse_args(argv)

def work(args: argparse.Namespace, command: str) -> int:
    if args.facts or args.compare:
        rows = [[key, *card] for key, card in CARDS.items()]
        print(compared(args.compare) if args.compare else common.markdown(["--card", *fakecuda.Card._fields], rows))
        return 0
    script = check(args)
    if fakecuda.INSIDE in os.environ:
        return study(args, script, command)
    return fakecuda.restart(args, [str(Path(__file__).resolve()), *shlex.split(command)[2:]])

main = functools.partial(common.command_line, "deviceless", parse_args, work, resumes=False)

if __name__ == "__main__":
    common.start(main)
