"""Dense against mixtures of experts at equal active FLOPs: loss at equal tokens and at equal time, and where time goes.

    python bench/moe.py --list                               # the plan; runs nothing
    python bench/moe.py --size cpu --data stdlib --jobs 2    # losses: dense and three kinds of train_moe.py, 3 seeds
    python bench/moe.py --size cpu --data stdlib --time      # step times, on an otherwise idle machine
    python bench/moe.py --size cpu --data stdlib --shares    # parts of a mixture layer, likewise
    python bench/moe.py --size speedrun --out records/h200 -- --micro-tokens 98304

Flags after ` -- ` go to all runs. Writes --out: runs.jsonl (a line for each finished run, at once), README.md and
curves.png. The same command goes on where an earlier one ended; calls with the same --size, --data and flags add up.

Losses: dense (--num-experts 0) to its end, and each kind with --fractions of its steps, each with a schedule of its
own: a run that is cut short has not been cooled down. All have the same batches in the same order. Differences are
paired by seed, with 95 % Student t intervals. Between the fractions losses are interpolated over log tokens, never
beyond them.
Times: short runs in turn, one at a time; the losses may be computed side by side on a busy machine. At equal time means
at 1 / (step-time ratio) of dense's tokens. Needs Linux or macOS.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import (  # noqa: E402
    Effect,
    append_run,
    command_line,
    effect,
    exit_code,
    missing,
    read_runs,
    run_all,
    step_ms,
    train,
)

TRAINER = ROOT / "train_moe.py"
DENSE, KINDS = "dense", ("mixtral", "deepseek", "speed")
ALWAYS = "--target-loss 0 --save-every 0 --no-save-last"  # to the end, whatever the loss
TIMING = "--iterations 30 --log-every 1 --eval-every 0 --eval-tokens 1024"
CURVE = 6  # validations of a run with all of dense's steps
# What makes the batches and their order: the same in all models.
BATCHES = ("data", "seed", "shuffle", "long_docs", "iterations", "stage_ends", "batch_tokens", "seq_len", "max_doc_len",
           "mtp", "eval_tokens", "eval_seq_len")
SECONDS = {("cpu", "loss"): 75, ("cpu", "time"): 12, ("cpu", "share"): 15}  # a job's, for --list, until one is measured


# ----------------------------------------------------------------------------------------------------------------------
# Plan


class Model(NamedTuple):
    """Dense, or a kind of mixture."""

    flags: str  # of train_moe.py, that tell it from the others
    total: int  # parameters
    active: int  # parameters that a token meets
    flops: float  # per token, forward and backward, mean over the run


class Sweep(NamedTuple):
    """What all runs of a call have in common; `key` tells their records from those of other flags and data."""

    size: str
    flags: tuple[str, ...]
    fingerprint: str  # of the data
    iterations: int  # of dense
    models: dict[str, Model]
    variants: dict[str, str]  # timed as well: name -> flags
    mixture_flags: str  # of the kinds alone

    def key(self, kind: str) -> str:
        parts = [self.size, self.flags, self.fingerprint, TIMING if kind == "time" else self.iterations]
        parts += [self.mixture_flags] if self.mixture_flags else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


class Job(NamedTuple):
    """One run to its end ("loss"), one timing run ("time"), or the parts of a layer ("share")."""

    kind: str
    who: str
    seed: int  # for "time" the number of the round
    key: str
    change: str  # flags of train_moe.py beside the common ones
    common: tuple[str, ...]
    fingerprint: str

    def flags(self) -> list[str]:
        return [*self.common, *self.change.split()]


def make_model(t, flags: str, s, vocab_size: int) -> Model:
    """Parameters and FLOPs; built without memory."""
    import torch

    with torch.device("meta"):
        counts = t.parameter_counts(t.GPT(s, vocab_size))
    tokens = {stage: (stage.end - stage.start) * stage.batch_tokens for stage in t.stage_table(s)}
    flops = sum(n * t.flops_per_token(s, counts, stage) for stage, n in tokens.items()) / sum(tokens.values())
    return Model(flags, counts["total"], counts["active"], flops)


def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all models. Raises ValueError for flags that train_moe.py refuses, FileNotFoundError where
    the data set is missing."""
    import train_moe as t  # not above: --help needs no torch

    def parse(flags: str):
        try:
            return t.parse_settings([*flags.split(), *common], 1)[0]
        except ValueError as error:
            raise ValueError(f"train_moe.py {flags}: {error}") from error

    common = (*ALWAYS.split(), *(["--data", args.data] if args.data else []), *args.flags)
    own = f" {args.mixture_flags}".rstrip()
    flags = {DENSE: f"--preset {args.size} --num-experts 0"}
    flags |= {kind: f"--preset {kind}-{args.size}{own}" for kind in KINDS}
    settings = {who: parse(line) for who, line in flags.items() if who in (DENSE, *args.only)}
    dense, variants = settings[DENSE], {}
    for who, s in settings.items():
        assert all(getattr(s, name) == getattr(dense, name) for name in BATCHES), f"{who} has other batches"
        others = ("grouped" if s.moe_impl == "triton" else "triton", "loop") if s.device == "cuda" else ()
        for impl in others if who != DENSE else ():
            with contextlib.suppress(ValueError):  # not on this machine
                parse(line := f"{flags[who]} --moe-impl {impl}")
                variants[f"{who} by {impl}"] = line
    corpus = t.open_corpus(dense.data)
    models = {who: make_model(t, flags[who], s, corpus.meta["vocab_size"]) for who, s in settings.items()}
    return Sweep(args.size, common, corpus.fingerprint(), dense.iterations, models, variants, own)


def make_jobs(sweep: Sweep, args: argparse.Namespace) -> list[Job]:
    """All jobs, seed by seed or round by round, so that what is interrupted has complete ones. Every other round of
    timing runs goes backwards: what a machine loses by getting warm then falls on all alike."""
    def job(kind: str, who: str, seed: int, change: str) -> Job:
        return Job(kind, who, seed, sweep.key(kind), change, sweep.flags, sweep.fingerprint)

    flags = {who: model.flags for who, model in sweep.models.items()}
    if args.shares:
        return [job("share", who, 0, line) for who, line in flags.items() if who != DENSE]
    if args.time:
        timed = list((flags | sweep.variants).items())
        return [job("time", who, number, f"{line} {TIMING}")
                for number in range(args.pairs) for who, line in (timed[::-1] if number % 2 else timed)]
    return [job("loss", who, seed, f"{line} --iterations {steps} --eval-every {-(-steps // CURVE) if whole else 0}")
            for seed in range(args.seeds) for who, line in flags.items()
            for fraction in ([1.0] if who == DENSE else args.fractions)
            for steps, whole in [(max(1, round(fraction * sweep.iterations)), fraction == 1)]]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def execute(job: Job, children: set) -> dict:
    """The record of a job: what was run and where, its numbers, or the problem that kept it from having any."""
    began, run = time.perf_counter(), job._asdict() | {"problem": "", "date": date.today().isoformat()}
    run |= {"trainer": hashlib.sha256(TRAINER.read_bytes()).hexdigest()[:12]}
    try:
        run |= measure_parts(job) if job.kind == "share" else measure_run(job, children)
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # from the trainer, or in what it wrote
        run["problem"] = str(error) or repr(error)
    return run | {"wall_s": round(time.perf_counter() - began, 2)}


def measure_run(job: Job, children: set) -> dict:
    """Losses or the step time of a run of train_moe.py, and where it ran."""
    events, config = train(job.flags(), job.seed, children, TRAINER)
    if config["data"]["fingerprint"] != job.fingerprint:
        raise RuntimeError(f"the data have changed: fingerprint {config['data']['fingerprint']}, at the start of this "
                           f"call {job.fingerprint}")
    numbers = {"ms": step_ms(events, config)}
    if job.kind == "loss":
        curve = [(event["tokens"], event["val_loss"]) for event in events if "val_loss" in event and "tokens" in event]
        numbers = {"val_loss": events[-1]["val_loss"], "tokens": curve[-1][0], "curve": curve}
    return numbers | about(config["torch"], config["hardware"]["name"], config["git"]["commit"],
                           config["git"]["dirty"], config["data"])


def about(torch_version: str, hardware: str, commit: str | None, dirty: bool | None, data: dict) -> dict:
    return {"torch": torch_version, "hardware": f"{hardware}, {os.cpu_count()} CPU cores",
            "commit": (commit or "unknown")[:10] + (" with changes" if dirty else ""),
            "data": f"{data['name']}, fingerprint {data['fingerprint']}"}


def outcome(run: dict) -> str:
    """A line about a finished run."""
    done = "parts measured" if "parts" in run else f"{run['ms']:.1f} ms per step" if "ms" in run else (
        f"val loss {run.get('val_loss', 0):.4f} after {run.get('tokens', 0):,} tokens, {run['wall_s']:.0f} s")
    number = f"{run['who']}, {'round' if run['kind'] == 'time' else 'seed'} {run['seed']}"
    return f"{number} ({run['change']}): FAILED: {run['problem']}" if run["problem"] else f"{number}: {done}"


# --- parts of a layer. Each is timed by itself, forward and backward, compiled if the settings say so.


def measure_parts(job: Job) -> dict:
    """ms of a mixture layer and its parts, of the dense MLP and of their updates, at the shape of a micro-step."""
    import torch

    import train_moe as t
    from bench.gpu import elapsed_ms

    s, hardware, _ = t.parse_settings(job.flags(), 1)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    torch.manual_seed(job.seed)
    calls, stage = part_calls(t, s), t.stage_table(s)[-1]
    times = {name: [] for name in calls}
    for number in range(2 + (20 if s.device == "cuda" else 8)):  # the first two compile and warm up
        for name, call in calls.items():
            ms = elapsed_ms(call, s.device)
            times[name] += [ms] if number >= 2 else []
    micro_tokens = stage.micro_rows(s, 1) * stage.seq_len
    git = t.command_output("git", "rev-parse", "HEAD"), t.command_output("git", "status", "--porcelain", "-uno")
    return {"parts": {name: median(some) for name, some in times.items()}, "micro_tokens": micro_tokens,
            "micro_steps": stage.batch_tokens // micro_tokens, "impl": s.moe_impl,
            **about(torch.__version__, hardware.name, git[0], bool(git[1]),
                    {"name": Path(s.data).name, "fingerprint": job.fingerprint})}


def forward_backward(t, s, function: Callable, inputs: tuple, leaves: list) -> Callable[[], object]:
    """A call of the function, then of the gradients of all its differentiable outputs by the leaves."""
    import torch

    def outputs() -> list:
        return [out for out in function(*inputs) if out is not None and out.requires_grad]

    function = t.compiled(function, s)
    weights = [torch.randn_like(out) for out in outputs()]
    return lambda: torch.autograd.grad(outputs(), leaves, weights)


def part_calls(t, s) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name, on random normed tokens and with routers as at the start of training."""
    import torch

    def draw(*shape: int, dtype=s.torch_dtype):
        return torch.randn(shape, device=s.device).to(dtype).requires_grad_()

    def both(function: Callable, *inputs, leaves: tuple = ()):
        return forward_backward(t, s, function, inputs, [x for x in inputs if x is not None and x.requires_grad]
                                + list(leaves))

    stage = t.stage_table(s)[-1]
    x = t.norm(draw(stage.micro_rows(s, 1), stage.seq_len, s.width)).detach().requires_grad_()
    layer = t.Mixture(s)
    with torch.no_grad():
        layer.experts_down.copy_(t.uniform(*layer.experts_down.shape))  # zeros would leave their products idle
    layer, mlp, noisy = layer.to(s.device, s.torch_dtype), t.MLP(s, s.mlp_ratio * s.width), s.router == "noisy_topk"
    mlp = mlp.to(s.device, s.torch_dtype)
    weight = draw(s.experts * (2 if noisy else 1), s.width, dtype=torch.float32)
    weight = (weight.detach() * (0 if noisy else t.ROUTER_STD)).requires_grad_()
    bias = torch.zeros(s.experts, device=s.device)
    noise = torch.randn(*x.shape[:2], s.experts, device=s.device) if noisy else None
    experts, gates = (y.detach() for y in layer.router(x, weight, bias, noise)[:2])
    up, down = layer.experts_up, layer.experts_down

    calls = {"layer": both(lambda x, w: layer(x, (w, bias, noise)), x, weight, leaves=tuple(layer.parameters())),
             "dense MLP": both(lambda x: (mlp(x),), x, leaves=tuple(mlp.parameters())),
             "router": both(lambda x, w: layer.router(x, w, bias, noise), x, weight)}
    if s.moe_impl == "triton":
        calls["experts"] = both(lambda x, *w: (t.expert_mlp(x, *w, experts, s.moe_impl),),
                                x.detach().flatten(0, 1).requires_grad_(), up, down)
    else:
        calls |= sorted_calls(t, s, both, layer, x.detach().flatten(0, 1).requires_grad_(), experts, gates)
    if noisy:
        balance = t.Balance(SimpleNamespace(router_bias=bias[None].clone()), s, t.World())
        calls["noise"] = lambda: balance.noise(0, *x.shape[:2])
    if layer.shared is not None:
        calls["shared experts"] = both(lambda x: (layer.shared(x),), x, leaves=tuple(layer.shared.parameters()))
    own = [up, down, *(layer.shared.parameters() if layer.shared is not None else [])]
    return calls | {"update": update_call(t, s, own), "dense update": update_call(t, s, list(mlp.parameters()))}


def sorted_calls(t, s, both: Callable, layer, x_ND, experts_NK, gates_NK) -> dict[str, Callable[[], object]]:
    """The parts of expert_mlp and the weighted sum behind it."""
    def sort():  # as in expert_mlp; a test compares what both call
        return t.arrange(experts_NK, s.experts, s.moe_impl)

    def permute(x, gates):
        y = t.Collect.apply(t.Spread.apply(x, g.order_R, g.inverse_R, s.choices), g.order_R, g.inverse_R)
        return ((y.unflatten(0, (-1, s.choices)) * gates[..., None]).sum(1).type_as(x),)

    def multiply(x, up, down):
        return (t.expert_product(t.expert_product(x, up, g, s.moe_impl).relu().square(), down, g, s.moe_impl),)

    g = sort()
    x_RD = t.Spread.apply(x_ND.detach(), g.order_R, g.inverse_R, s.choices).requires_grad_()
    return {"sorting": t.compiled(sort, s), "permutation": both(permute, x_ND, gates_NK.requires_grad_()),
            "products": both(multiply, x_RD, layer.experts_up, layer.experts_down)}


def update_call(t, s, parameters: list) -> Callable[[], object]:
    """Muon's update of these matrices, those of one shape at once, as a Bank does it. A rate of 0 keeps them."""
    import torch

    shapes, function, banks = {}, t.compiled(t.muon_update, s), []
    for p in parameters:
        shapes.setdefault(p.shape[-2:], []).append(p.numel() // p.shape[-2:].numel())
    for shape, counts in shapes.items():
        master, grad = (torch.randn(sum(counts), *shape, device=s.device) for _ in range(2))
        tall = shape[0] >= shape[1]
        variance = torch.ones_like(master[..., :1] if tall else master[:, :1]) if s.muon_beta2 else None
        banks.append((master, grad, torch.zeros_like(master), variance, master.new_zeros(len(master), 1, 1)))
    decay, mu, share = (torch.tensor(value, device=s.device) for value in (0.0, s.muon_momentum, 1 - s.muon_beta2))

    def call():
        for bank in banks:
            function(*bank, decay, mu, share, s.orthogonalizer, s.torch_dtype, s.cautious, "gram" in s.kernels)

    return call


# ----------------------------------------------------------------------------------------------------------------------
# Results


class Reach(NamedTuple):
    """Share of dense's tokens with which a kind has dense's final loss."""

    ratio: float
    relation: str  # =: interpolated; <: at the least share measured it is below already; >: at no share is it reached

    def __str__(self) -> str:
        words = {"=": "{:.3f} ×", "<": "below {:.3f} ×", ">": "not reached at {:.3f} ×"}
        return words[self.relation].format(self.ratio)


def reach(losses: dict[float, float], target: float) -> Reach:
    """Where a curve of final losses over shares of dense's tokens first is at the target, linear in log tokens."""
    shares = sorted(losses)
    if losses[shares[0]] <= target:
        return Reach(shares[0], "<" if losses[shares[0]] < target else "=")
    for low, high in zip(shares, shares[1:], strict=False):
        if losses[high] <= target:
            part = (losses[low] - target) / (losses[low] - losses[high])
            return Reach(low * (high / low)**part, "=")
    return Reach(shares[-1], ">")


def loss_at(losses: dict[float, float], share: float) -> float | None:
    """Final loss with a share of dense's tokens, linear in log tokens between those measured; None outside."""
    shares = sorted(losses)
    if not shares or not shares[0] - 1e-9 <= share <= shares[-1] + 1e-9:
        return None
    return float(np.interp(math.log(share), np.log(shares), [losses[x] for x in shares]))


class Result(NamedTuple):
    """What came out for a kind; None where it is not measured. Differences are kind - dense: negative is better."""

    who: str
    losses: dict[float, dict[int, float]]  # share of dense's tokens -> seed -> final loss
    equal_tokens: Effect | None
    reach: Reach | None
    ratio: Effect | None  # of step times, over rounds
    equal_time: Effect | None
    by: dict[str, Effect | None]  # other backends -> their step time / that of the one chosen: its gain in tokens/s


def final_losses(runs: list[dict]) -> dict[str, dict[float, dict[int, float]]]:
    """who -> share of dense's tokens -> seed -> final loss."""
    dense = [run["tokens"] for run in runs if (run["kind"], run["who"]) == ("loss", DENSE)]
    found = {}
    for run in runs if dense else []:
        if run["kind"] == "loss":
            found.setdefault(run["who"], {}).setdefault(run["tokens"] / dense[0], {})[run["seed"]] = run["val_loss"]
    return found


def step_times(runs: list[dict]) -> dict[str, dict[int, float]]:
    """who -> round -> ms per step."""
    found = {}
    for run in runs:
        if run["kind"] == "time":
            found.setdefault(run["who"], {})[run["seed"]] = run["ms"]
    return found


def paired(one: dict[int, float], other: dict[int, float], combine: Callable[[float, float], float]) -> Effect | None:
    """Statistics over the seeds, or rounds, that both have."""
    return effect([combine(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())])


def summarize(runs: list[dict]) -> list[Result]:
    """Results of all kinds that these finished runs of one sweep tell about."""
    losses, times = final_losses(runs), step_times(runs)
    dense, results = losses.get(DENSE, {}).get(1.0, {}), []
    for who in (kind for kind in KINDS if losses.get(kind) or times.get(kind)):
        own, ms = losses.get(who, {}), times.get(who, {})
        ratio = paired(ms, times.get(DENSE, {}), lambda a, b: a / b)
        # means are compared over the same seeds, and an unfinished share is left out until it has as many
        most = max((len(seeds) for seeds in own.values()), default=0)
        full = {share: seeds for share, seeds in own.items() if len(seeds) == most}
        common = sorted(set(dense).intersection(*full.values())) if full else []
        means = {share: mean(seeds[seed] for seed in common) for share, seeds in full.items()} if common else {}
        deltas = []
        for seed in common if ratio else []:
            loss = loss_at({share: seeds[seed] for share, seeds in full.items()}, 1 / ratio.mean)
            deltas += [] if loss is None else [loss - dense[seed]]
        by = {name.removeprefix(f"{who} by "): paired(other, ms, lambda a, b: a / b)
              for name, other in times.items() if name.startswith(f"{who} by ")}
        results.append(Result(who, own, paired(own.get(1.0, {}), dense, lambda a, b: a - b),
                              reach(means, mean(dense[seed] for seed in common)) if means else None, ratio,
                              effect(deltas), by))
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Report


def interval(e: Effect, form: str = "+.4f", unit: str = "") -> str:
    return f"{e.mean:{form}}{unit} (95 % interval {e.low:{form}} to {e.high:{form}}, n = {e.n})"


def verdict(e: Effect) -> str:
    how = "it loses to dense" if e.low > 0 else "it beats dense" if e.high < 0 else "it cannot be told from dense"
    return f"{how}: loss {interval(e)}"


def equal_time_gap(r: Result) -> str:
    """Why there is no loss at equal time."""
    if r.ratio is None:
        return "not measured: step times are missing (--time)"
    if not r.losses:
        return "not measured: losses are missing"
    share, measured = 1 / r.ratio.mean, sorted(r.losses)
    if measured[0] <= share <= measured[-1]:
        return "not measured: fewer than 2 seeds"
    outside = math.floor(100 * share) / 100 if share < measured[0] else math.ceil(100 * share) / 100
    wanted = ",".join(f"{x:.4g}" for x in [*measured[::-1], outside])
    return (f"not measured: {share:.3f} of dense's tokens lies outside the fractions measured, {measured[0]:.3g} to "
            f"{measured[-1]:.3g}; add --fractions {wanted}")


def findings(r: Result) -> str:
    """Sentences on a kind."""
    said = [f"At equal tokens {verdict(r.equal_tokens)}."] if r.equal_tokens else []
    if r.reach and r.reach.relation == ">":
        said.append(f"Dense's final loss is {r.reach} its tokens.")
    elif r.reach:
        above = "above " if r.reach.relation == "<" else ""
        said.append(f"Dense's final loss takes {r.reach} its tokens: {above}{1 / r.reach.ratio:.3f} is the step-time "
                    "ratio that breaks even.")
    if r.ratio:
        said.append(f"A step takes {interval(r.ratio, '.3f', ' × that of dense')}.")
    if r.equal_time:
        said.append(f"At equal time, {1 / r.ratio.mean:.3f} of dense's tokens (interpolated between the fractions "
                    f"measured), {verdict(r.equal_time)}.")
    elif r.losses:
        said.append(f"At equal time it is {equal_time_gap(r)}.")
    said += [f"Tokens/s are {interval(e, '.3f', f' × those by {impl}')}." for impl, e in r.by.items() if e]
    return f"**{r.who}**: {' '.join(said)}"


def judge(what: str, met: bool | None, measured: str) -> str:
    word = "Not measured" if met is None else "Met" if met else "Missed"
    return f"{word}: {what}{'; ' if measured else ''}{measured}."


def judge_effect(what: str, who: str, e: Effect | None, limit: float, form: str, least: bool = False) -> str:
    """By the mean; it is said where the interval leaves it open."""
    if e is None:
        return judge(what, None, "")
    doubt = ", which does not settle it" if e.low < limit < e.high else ""
    return judge(what, e.mean >= limit if least else e.mean <= limit, f"{who}: {interval(e, form)}{doubt}")


def best_by_tokens(results: list[Result], limit: float) -> Result | None:
    """Of the kinds that meet the aim for tokens the one with the cheapest step, else the one with the fewest tokens."""
    known = [r for r in results if r.reach]
    meeting = [r for r in known if r.reach.relation != ">" and r.reach.ratio <= limit]
    if meeting:
        return min(meeting, key=lambda r: r.ratio.mean if r.ratio else math.inf)
    return min(known, key=lambda r: (r.reach.relation == ">", r.reach.ratio,
                                     r.equal_tokens.mean if r.equal_tokens else math.inf), default=None)


def cpu_aims(results: list[Result]) -> list[str]:
    best = best_by_tokens(results, 0.8)
    tokens, step = ("the best kind has dense's final loss with at most 0.8 × its tokens",
                    "its step takes at most 1.25 × dense's time")
    if best is None:
        return [judge(tokens, None, ""), judge(step, None, "")]
    if best.reach.relation == "<" and best.reach.ratio > 0.8:
        first = judge(tokens, None, f"{best.who}: {best.reach}, add --fractions 1,0.8")
    else:
        first = judge(tokens, best.reach.relation != ">" and best.reach.ratio <= 0.8, f"{best.who}: {best.reach}")
    return [first, judge_effect(step, best.who, best.ratio, 1.25, ".3f")]


def speedrun_aims(results: list[Result]) -> list[str]:
    said, rows = [], {r.who: r for r in results}
    for who, limit in (("speed", 1.12), ("mixtral", 1.3)):
        ratio = rows[who].ratio if who in rows else None
        said.append(judge_effect(f"a step of {who} takes at most {limit} × dense's time", who, ratio, limit, ".3f"))
    for r in results:
        said.append(judge_effect(f"{r.who} has at least 2 × the tokens/s of a loop over experts", r.who,
                                 r.by.get("loop"), 2, ".3f", least=True))
    best = min((r for r in results if r.equal_time), key=lambda r: r.equal_time.mean, default=None)
    return [*said, judge_effect("the best kind's loss at equal time is no worse than dense's", best and best.who,
                                best and best.equal_time, 0, "+.4f")]


AIMS: dict[str, Callable[[list[Result]], list[str]]] = {"cpu": cpu_aims, "speedrun": speedrun_aims}


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def model_table(sweep: Sweep) -> str:
    dense = sweep.models[DENSE]
    return markdown(["model", "flags", "parameters", "active", "active MFLOPs/token", "/ dense"], [
        [who, f"`{m.flags}`", f"{m.total:,}", f"{m.active:,}", f"{m.flops / 1e6:.2f}", f"{m.flops / dense.flops:.4f}"]
        for who, m in sweep.models.items()])


def loss_table(runs: list[dict]) -> str:
    losses, rows = final_losses(runs), []
    dense = losses.get(DENSE, {}).get(1.0, {})
    tokens = next((run["tokens"] for run in runs if (run["kind"], run["who"]) == ("loss", DENSE)), 0)
    for who in (DENSE, *KINDS):
        for share, seeds in sorted(losses.get(who, {}).items(), reverse=True):
            spread = f" ± {stdev(seeds.values()):.4f}" if len(seeds) > 1 else ""
            e = paired(seeds, dense, lambda a, b: a - b) if who != DENSE else None
            difference = [f"{e.mean:+.4f}", f"{e.low:+.4f} to {e.high:+.4f}"] if e else ["", ""]
            rows.append([who, f"{share:.3f}", f"{round(share * tokens):,}", f"{mean(seeds.values()):.4f}{spread}",
                         len(seeds), *difference])
    return markdown(["model", "share of dense's tokens", "tokens", "final val loss ± sd", "n", "minus dense",
                     "95 % interval"], rows)


def summary_table(results: list[Result]) -> str:
    rows = []
    for r in results:
        equal = [f"{r.equal_time.mean:+.4f}", f"{r.equal_time.low:+.4f} to {r.equal_time.high:+.4f}"] if (
            r.equal_time) else ["not measured", ""]
        ratio = [f"{r.ratio.mean:.3f}", f"{r.ratio.low:.3f} to {r.ratio.high:.3f}", r.ratio.n] if r.ratio else [
            "not measured", "", ""]
        seconds = "not measured"
        if r.reach and r.ratio:
            seconds = str(Reach(r.reach.ratio * r.ratio.mean, r.reach.relation)) if r.reach.relation != ">" else (
                "not reached")
        rows.append([r.who, r.reach or "not measured", *ratio, seconds, *equal])
    return markdown(["kind", "tokens to dense's final loss / dense's", "step time / dense's", "95 % interval", "rounds",
                     "time to dense's final loss / dense's", "loss at equal time minus dense's", "95 % interval"], rows)


def time_table(runs: list[dict]) -> str:
    rows = [[who, f"{median(ms.values()):.1f}", f"{min(ms.values()):.1f}", f"{max(ms.values()):.1f}", len(ms)]
            for who, ms in step_times(runs).items()]
    return markdown(["model", "ms per step, median", "min", "max", "rounds"], rows)


PARTS = ("noise", "router", "sorting", "permutation", "products", "experts", "shared experts")


def share_table(runs: list[dict]) -> str:
    """ms of the parts of a layer and their share of the parts' sum; the updates beside them, once a step."""
    rows = []
    for run in (run for run in runs if run["kind"] == "share"):
        p, total = run["parts"], sum(run["parts"].get(name, 0) for name in PARTS)
        cells = [f"{p[name]:.3g} ({100 * p[name] / total:.0f} %)" if name in p else "-" for name in PARTS]
        rows.append([run["who"], *cells, f"{total:.3g}", f"{p['layer']:.3g}", f"{p['dense MLP']:.3g}",
                     f"{p['layer'] / p['dense MLP']:.2f}", f"{p['update']:.3g}", f"{p['dense update']:.3g}"])
    return markdown(["kind", *PARTS, "sum", "whole layer", "dense MLP", "layer / MLP", "update", "MLP's update"], rows)


README = """# Dense against mixtures of experts at equal active FLOPs: `{size}`, {date}

{sentences}

## Models

{models}

{body}## How

- Commands: `{command}`
- Flags of all runs: `{flags}`; of the kinds: `{mixture}`; dense has {iterations:,} steps
- Data: {data}; every model has the same batches in the same order
- Machine: {hardware}; torch {torch}; commit {commit}; train_moe.py {trainer}
{problems}"""
LOSS_TEXT = """## Losses

Cross-entropy alone, nats per token, on the validation split. A share below 1 is a run with a schedule of its own, not a
cut. Differences are paired by seed: negative means the mixture is better.

{table}

"""
TIME_TEXT = """## Time

One run at a time, in turn, {rounds} rounds. Ratios are taken in each round; time to dense's final loss is the product
of the ratios of tokens and of step times. At equal time: with 1 / (step-time ratio) of dense's tokens.

{summary}

{table}

"""
SHARE_TEXT = """## Where the time of a mixture layer goes

ms of forward and backward of one layer for {shape}, on random tokens with
routers as at the start of training. Each part is measured by itself; in brackets its share of the parts' sum. The noise
of noisy routers is drawn outside the whole layer; `experts` is sorting, permutation and products in one. Updates are
Muon's of a layer's experts, shared ones included, and of the MLP: once in a step of {steps} micro-step(s).

{table}

"""


def readme(sweep: Sweep, results: list[Result], runs: list[dict], problems: list[str]) -> str:
    """README.md: what came out, the tables, and how it came about."""
    said = {field: ("`; `" if field == "command" else "; ").join(dict.fromkeys(run[field] for run in runs))
            for field in ("date", "command", "data", "hardware", "torch", "commit", "trainer")}
    kinds = {run["kind"] for run in runs}
    sentences = [*(f"- Aim. {line}" for line in (AIMS[sweep.size](results) if sweep.size in AIMS else [])),
                 *(f"- {findings(r)}" for r in results)]
    body = LOSS_TEXT.format(table=loss_table(runs)) if "loss" in kinds else ""
    if "loss" in kinds:
        body += "![validation losses](curves.png)\n\n"
    if "time" in kinds:
        rounds = max(len(ms) for ms in step_times(runs).values())
        body += TIME_TEXT.format(rounds=rounds, summary=summary_table(results), table=time_table(runs))
    if shares := [run for run in runs if run["kind"] == "share"]:
        shape = f"{shares[0]['micro_tokens']:,} tokens, experts by `{shares[0]['impl']}`"
        body += SHARE_TEXT.format(shape=shape, steps=shares[0]["micro_steps"], table=share_table(runs))
    if len({run["trainer"] for run in runs}) > 1:
        problems = [*problems, "train_moe.py has changed between these runs; use another --out for the new one"]
    return README.format(size=sweep.size, sentences="\n".join(sentences), models=model_table(sweep), body=body,
                         flags=shlex.join(sweep.flags), mixture=sweep.mixture_flags.strip() or "-",
                         iterations=sweep.iterations,
                         problems="".join(f"- Problem: {problem}\n" for problem in problems), **said)


COLORS = {DENSE: "black", "mixtral": "tab:blue", "deepseek": "tab:orange", "speed": "tab:green"}


def mean_curve(runs: list[dict], who: str, tokens: int) -> tuple[list[int], list[float], list[float]]:
    """Tokens, mean and standard deviation over seeds of the validations of the runs with that many tokens."""
    points = {}
    for run in runs:
        if (run["kind"], run["who"]) == ("loss", who) and run["tokens"] == tokens:
            for at, loss in run["curve"]:
                points.setdefault(at, []).append(loss)
    return (sorted(points), [mean(points[at]) for at in sorted(points)],
            [stdev(points[at]) if len(points[at]) > 1 else 0.0 for at in sorted(points)])


def plot(sweep: Sweep, runs: list[dict], path: Path) -> None:
    """Validation loss against tokens and against time, mean and standard deviation over seeds; hollow: final losses of
    runs with schedules of their own."""
    from matplotlib.figure import Figure

    losses, times = final_losses(runs), step_times(runs)
    tokens = next(run["tokens"] for run in runs if (run["kind"], run["who"]) == ("loss", DENSE))
    seconds = {who: median(ms.values()) * sweep.iterations / 1000 / tokens for who, ms in times.items()}  # per token
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    high, finals = [], []
    for who in (DENSE, *KINDS):
        at, center, spread = mean_curve(runs, who, tokens)
        shares = sorted(share for share in losses.get(who, {}) if share != 1)
        ends = [list(losses[who][share].values()) for share in shares]
        finals += [min(values) for values in ends] + center[-1:]
        high += [loss for x, loss in zip(at, center, strict=True) if x >= 0.45 * tokens][:1]
        for axes, scale in ((left, 1e-6), (right, seconds.get(who))):
            if scale is None or not (at or shares):
                continue
            x = np.array(at) * scale
            axes.plot(x, center, color=COLORS[who], marker=".", label=who)
            axes.fill_between(x, np.subtract(center, spread), np.add(center, spread), color=COLORS[who], alpha=0.2)
            axes.errorbar([share * tokens * scale for share in shares], [mean(values) for values in ends],
                          yerr=[stdev(values) if len(values) > 1 else 0.0 for values in ends], fmt="o", mfc="white",
                          capsize=3, color=COLORS[who])
    for axes in (left, right):
        axes.axhline(mean(losses[DENSE][1.0].values()), color="black", linewidth=0.8, linestyle=":")
    room = 0.05 * (max(high) - min(finals))
    left.set_ylim(min(finals) - 2 * room, max(high) + room)
    left.set_ylabel("validation loss, nats per token")
    left.set_xlabel("training tokens, millions")
    right.set_xlabel("training time, s, by the step times measured in turn")
    if not times:
        right.text(0.5, 0.5, "step times are not measured (--time)", ha="center", transform=right.transAxes)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(title="hollow: final losses of runs of other lengths")
    figure.suptitle(f"{sweep.size}: mean and standard deviation over seeds")
    figure.savefig(path, dpi=130)


def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and curves.png from the records of these flags and data; there may be others in the file."""
    found = read_runs(out / "runs.jsonl", Job._fields[:5]).values()
    runs = [run for run in found if run["key"] == sweep.key(run["kind"])]
    done = [run for run in runs if not run["problem"]]
    problems = [outcome(run) for run in runs if run["problem"]]
    if not done:
        return
    text = readme(sweep, summarize(done), done, problems)
    (out / "README.md").write_text(text, encoding="utf-8")
    if any((run["kind"], run["who"]) == ("loss", DENSE) for run in done):
        plot(sweep, done, out / "curves.png")
    print(f"\n{text}\nwritten to {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_plan(sweep: Sweep, jobs: list[Job], runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long by the median of finished runs (none yet: by a guess, where there is one)."""
    todo = missing(jobs, runs)
    print(model_table(sweep), end="\n\n")
    for name in dict.fromkeys((job.who, job.change) for job in jobs):
        mine, left = ([job for job in some if (job.who, job.change) == name] for some in (jobs, todo))
        print(f"{name[0]:20} {len(mine) - len(left)} of {len(mine)} done  {name[1]}")
    seconds = [run["wall_s"] for key, run in runs.items() if not run["problem"] and key[0] == jobs[0].kind]
    each = median(seconds) if seconds else SECONDS.get((args.size, jobs[0].kind))
    how = "time unknown: no run has ended yet" if each is None else (
        f"about {len(todo) * each / args.jobs / 60:.0f} min: {each:.0f} s each "
        f"({'measured' if seconds else 'a guess'}), {args.jobs} at a time")
    print(f"{len(todo)} of {len(jobs)} to run, {how}")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot give a result."""
    for name in args.only:
        if name not in KINDS:
            raise ValueError(f"--only {name}: no such kind; there are {', '.join(KINDS)}")
    least = 1 if args.quick else 3
    if args.seeds < least:
        raise ValueError(f"--seeds must be at least {least}, got {args.seeds}; fewer than 3 need --quick")
    if args.pairs < 2:
        raise ValueError(f"--pairs must be at least 2, got {args.pairs}: one ratio has no interval")
    if bad := [x for x in args.fractions if not 0 < x <= 4]:
        raise ValueError(f"--fractions {bad[0]:g}: must be above 0 and at most 4")
    args.fractions = sorted({1.0, *args.fractions}, reverse=True)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if args.time and args.shares:
        raise ValueError("--time and --shares are two calls: give one of them")
    if (args.time or args.shares) and args.jobs > 1:
        raise ValueError(f"--{'time' if args.time else 'shares'} needs --jobs 1: runs beside each other would change "
                         "each other's times")


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] [-- flags of train_moe.py]")
    parser.add_argument("--size", choices=("cpu", "gpu", "speedrun", "medium"), default="cpu",
                        help="preset of the dense model, and of each kind's (default: cpu)")
    parser.add_argument("--data", default="", help="data set: a folder under data/, or a path (default: the preset's)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(KINDS), metavar="KIND,..",
                        help=f"these kinds only, of {', '.join(KINDS)}")
    parser.add_argument("--mixture-flags", default="", metavar="FLAGS",
                        help='flags of the kinds alone, such as --mixture-flags="--router-lr 0.002"')
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default: 3)")
    parser.add_argument("--fractions", type=numbers, default=[1.0, 0.8], metavar="X,..",
                        help="of dense's steps that the kinds are trained for; 1 is always among them (default: 1,0.8)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--time", action="store_true", help="measure step times instead of losses")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of --time (default: 5)")
    parser.add_argument("--shares", action="store_true", help="time the parts of a mixture layer instead")
    parser.add_argument("--quick", action="store_true", help="allow fewer than 3 seeds, to try it out")
    parser.add_argument("--list", action="store_true", help="print the plan and its time, and run nothing")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder of the results; name it to go on another day (default: records/DATE_moe_SIZE)")
    parser.add_argument("flags", nargs="*", help="after --: flags of train_moe.py for all runs")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / "records" / f"{date.today()}_moe_{args.size}"
    return args


def run_jobs(jobs: list[Job], args: argparse.Namespace, command: str, path: Path) -> int:
    """Runs and records the jobs; returns how many failed. Parts are timed in this thread: an interruption ends it."""
    if not args.shares:
        return run_all(jobs, args.jobs, command, path, execute, outcome)
    failed = 0
    for job in jobs:
        run = execute(job, set())
        append_run(path, run | {"command": command})
        failed += bool(run["problem"])
        print(outcome(run), flush=True)
    return failed


def compare(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    jobs, runs = make_jobs(sweep, args), read_runs(file, Job._fields[:5])
    if args.list:
        show_plan(sweep, jobs, runs, args)
        return 0
    if (args.time or args.shares) and os.getloadavg()[0] > 0.5:
        print(f"warning: the load average is {os.getloadavg()[0]:.1f}; times need an idle machine", file=sys.stderr)
    if args.jobs > 1:  # each with its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    try:
        failed = run_jobs(missing(jobs, runs), args, command, file)
    finally:
        write_report(sweep, args.out)
    return exit_code(failed)


def main(argv: list[str] | None = None) -> int:
    return command_line("bench/moe.py", parse_args, compare, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the runs under way too
    sys.exit(main())
