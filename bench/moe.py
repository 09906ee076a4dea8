"""Dense against mixtures of experts at equal active FLOPs: loss at equal tokens and at equal time.

    python bench/moe.py --list                               # the plan; runs nothing
    python bench/moe.py --size cpu --data stdlib --jobs 2    # losses: dense and three kinds of train_moe.py, 3 seeds
    python bench/moe.py --size cpu --data stdlib --time      # step times, on an otherwise idle machine
    python bench/moe.py --size speedrun --out records/h200 -- --micro-tokens 98304

Flags after ` -- ` go to all runs. Writes --out: runs.jsonl, README.md and curves.png. The same command goes on where an
earlier one ended; calls with the same --size, --data and flags add up.

Losses: dense (--num-experts 0) to its end, and each kind with --fractions of its steps, each with a schedule of its
own. All have the same batches in the same order. Differences are paired by seed, with 95 % Student t intervals. Between
the fractions losses are interpolated over log tokens, never beyond them. Times: short runs in turn, one at a time. At
equal time means at 1 / (step-time ratio) of dense's tokens.
"""
import argparse
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path
from bench.common import Effect, effect, interval, markdown, mean_sd, paired, ratios  # noqa: E402

TRAINER = ROOT / "train_moe.py"
DENSE, KINDS = "dense", ("mixtral", "deepseek", "speed")
ALWAYS = "--target-loss 0 --save-every 0 --no-save-last".split()  # to the end, whatever the loss
TIMING = "--iterations 30 --log-every 1 --eval-every 0 --eval-tokens 1024"
CURVE = 6  # validations of a run with all of dense's steps
# What makes the batches and their order: the same in all models.
BATCHES = ("data", "seed", "shuffle", "long_docs", "iterations", "stage_ends", "batch_tokens", "seq_len",
           "max_doc_len", "mtp", "eval_tokens", "eval_seq_len")
SECONDS = {("cpu", "loss"): 75, ("cpu", "time"): 12}  # a job's, for --list, until one is measured

# --- Plan

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
    mixture_flags: str  # of the kinds alone

    def key(self, kind: str) -> str:
        length = TIMING if kind == "time" else self.iterations
        own = [self.mixture_flags] if self.mixture_flags else []
        return common.key_of(self.size, self.flags, self.fingerprint, length, *own)

class Job(NamedTuple):
    """One run to its end ("loss"), or one timing run ("time")."""

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
    flops = sum(n * t.flops_per_token(s, counts, stage) for stage, n in tokens.items())
    return Model(flags, counts["total"], counts["active"], flops / sum(tokens.values()))

def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all models. Raises ValueError for wrong ones, FileNotFoundError without the data."""
    import train_moe as t  # not above: --help needs no torch

    shared = (*ALWAYS, *(["--data", args.data] if args.data else []), *args.flags)
    own = f" {args.mixture_flags}".rstrip()
    flags = {DENSE: f"--preset {args.size} --num-experts 0"}
    flags |= {kind: f"--preset {kind}-{args.size}{own}" for kind in KINDS if kind in args.only}
    settings = {who: common.parsed(t, [*line.split(), *shared], f"{who}, ") for who, line in flags.items()}
    dense = settings[DENSE]
    for who, s in settings.items():
        assert all(getattr(s, name) == getattr(dense, name) for name in BATCHES), f"{who} has other batches"
    corpus = t.open_corpus(dense.data)
    vocab_size = corpus.meta["vocab_size"]
    models = {who: make_model(t, flags[who], s, vocab_size) for who, s in settings.items()}
    return Sweep(args.size, shared, corpus.fingerprint(), dense.iterations, models, own)

def make_jobs(sweep: Sweep, args: argparse.Namespace) -> list[Job]:
    """All jobs, seed by seed or round by round, so that what is interrupted has complete ones. Every other round of
    timing runs goes backwards: what a machine loses by getting warm then falls on all alike."""
    kind = "time" if args.time else "loss"

    def job(who: str, seed: int, change: str) -> Job:
        return Job(kind, who, seed, sweep.key(kind), change, sweep.flags, sweep.fingerprint)

    flags, jobs = {who: model.flags for who, model in sweep.models.items()}, []
    if args.time:
        timed = list(flags.items())
        return [job(who, number, f"{line} {TIMING}")
                for number in range(args.pairs) for who, line in (timed[::-1] if number % 2 else timed)]
    for seed in range(args.seeds):
        for who, line in flags.items():
            for fraction in [1.0] if who == DENSE else args.fractions:
                steps = max(1, round(fraction * sweep.iterations))
                every = -(-steps // CURVE) if fraction == 1 else 0
                jobs.append(job(who, seed, f"{line} --iterations {steps} --eval-every {every}"))
    return jobs

# --- Runs

def measure(job: Job, children: set) -> dict:
    """Losses or the step time of a run of train_moe.py, and where it ran."""
    events, config = common.train(TRAINER, job.flags(), job.seed, children)
    where = common.about(config, job.fingerprint)
    if job.kind == "time":
        return where | {"ms": common.step_ms(events, config)}
    curve = [(event["tokens"], event["val_loss"]) for event in events
             if {"val_loss", "tokens"} <= event.keys() and "event" not in event]
    return where | {"val_loss": events[-1]["val_loss"], "tokens": curve[-1][0], "curve": curve}

def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    return common.record(job, TRAINER, lambda: measure(job, children))

def outcome(run: dict) -> str:
    """A line about a finished run."""
    who = f"{run['who']}, {'round' if run['kind'] == 'time' else 'seed'} {run['seed']}"
    if run["problem"]:
        return f"{who} ({run['change']}): FAILED: {run['problem']}"
    if "ms" in run:
        return f"{who}: {run['ms']:.1f} ms per step"
    return f"{who}: val loss {run['val_loss']:.4f} after {run['tokens']:,} tokens, {run['wall_s']:.0f} s"

# --- Results

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

def dense_tokens(runs: list[dict]) -> int:
    return next((run["tokens"] for run in runs if (run["kind"], run["who"]) == ("loss", DENSE)), 0)

def final_losses(runs: list[dict]) -> dict[str, dict[float, dict[int, float]]]:
    """who -> share of dense's tokens -> seed -> final loss; empty without dense's."""
    whole, found = dense_tokens(runs), {}
    for run in runs if whole else []:
        if run["kind"] == "loss":
            shares = found.setdefault(run["who"], {})
            shares.setdefault(run["tokens"] / whole, {})[run["seed"]] = run["val_loss"]
    return found

def step_times(runs: list[dict]) -> dict[str, dict[int, float]]:
    """who -> round -> ms per step."""
    found = {}
    for run in runs:
        if run["kind"] == "time":
            found.setdefault(run["who"], {})[run["seed"]] = run["ms"]
    return found

def summarize_kind(who: str, own: dict, dense: dict[int, float], times: dict) -> Result:
    """Means are compared over the same seeds: a share that has fewer than others is left out until it has as many."""
    ratio = effect(ratios(times.get(who, {}), times.get(DENSE, {})))
    most = max((len(seeds) for seeds in own.values()), default=0)
    full = {share: seeds for share, seeds in own.items() if len(seeds) == most}
    common_seeds = sorted(set(dense).intersection(*full.values())) if full else []
    found, deltas = None, []
    if common_seeds:
        means = {share: mean(seeds[seed] for seed in common_seeds) for share, seeds in full.items()}
        found = reach(means, mean(dense[seed] for seed in common_seeds))
    for seed in common_seeds if ratio else []:
        loss = loss_at({share: seeds[seed] for share, seeds in full.items()}, 1 / ratio.mean)
        deltas += [] if loss is None else [loss - dense[seed]]
    return Result(who, own, effect(paired(own.get(1.0, {}), dense)), found, ratio, effect(deltas))

def summarize(runs: list[dict]) -> list[Result]:
    """Results of all kinds that these finished runs of one sweep tell about."""
    losses, times = final_losses(runs), step_times(runs)
    dense = losses.get(DENSE, {}).get(1.0, {})
    return [summarize_kind(kind, losses.get(kind, {}), dense, times)
            for kind in KINDS if losses.get(kind) or times.get(kind)]

# --- Report

def verdict(e: Effect) -> str:
    return f"{e.side('it loses to dense', 'it beats dense', 'it cannot be told from dense')}: loss {interval(e)}"

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
    elif r.losses and r.ratio:
        said.append(f"At equal time, {1 / r.ratio.mean:.3f} of dense's tokens, its loss is not measured: --fractions.")
    return f"**{r.who}**: {' '.join(said)}"

def model_table(sweep: Sweep) -> str:
    dense = sweep.models[DENSE]
    rows = [[who, f"`{m.flags}`", f"{m.total:,}", f"{m.active:,}", f"{m.flops / 1e6:.2f}",
             f"{m.flops / dense.flops:.4f}"] for who, m in sweep.models.items()]
    return markdown(["model", "flags", "parameters", "active", "active MFLOPs/token", "/ dense"], rows)

def two_cells(e: Effect | None, form: str, empty: str = "") -> list[str]:
    """Mean and interval."""
    return [f"{e.mean:{form}}", f"{e.low:{form}} to {e.high:{form}}"] if e else [empty, ""]

def loss_table(runs: list[dict]) -> str:
    losses, tokens, rows = final_losses(runs), dense_tokens(runs), []
    dense = losses.get(DENSE, {}).get(1.0, {})
    for who in (DENSE, *KINDS):
        for share, seeds in sorted(losses.get(who, {}).items(), reverse=True):
            e = effect(paired(seeds, dense)) if who != DENSE else None
            rows.append([who, f"{share:.3f}", f"{round(share * tokens):,}", mean_sd(seeds.values()), len(seeds),
                         *two_cells(e, "+.4f")])
    head = ["model", "share of dense's tokens", "tokens", "final val loss ± sd", "n", "minus dense", "95 % interval"]
    return markdown(head, rows)

def summary_table(results: list[Result], times: dict[str, dict[int, float]]) -> str:
    ms = {who: f"{median(rounds.values()):.1f}" for who, rounds in times.items()}
    rows = [[DENSE, ms.get(DENSE, "-"), *["-"] * 7]]
    for r in results:
        seconds = "not measured"
        if r.reach and r.ratio:
            product = Reach(r.reach.ratio * r.ratio.mean, r.reach.relation)
            seconds = "not reached" if r.reach.relation == ">" else str(product)
        ratio = [*two_cells(r.ratio, ".3f", "not measured"), r.ratio.n if r.ratio else ""]
        rows.append([r.who, ms.get(r.who, "-"), r.reach or "not measured", *ratio, seconds,
                     *two_cells(r.equal_time, "+.4f", "not measured")])
    head = ["kind", "ms/step, median", "tokens to dense's final loss / dense's", "step time / dense's", "95 % interval",
            "rounds", "time to that loss / dense's", "loss at equal time minus dense's", "95 % interval"]
    return markdown(head, rows)

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

![validation losses](curves.png)

"""
TIME_TEXT = """## Time

One run at a time, in turn, {rounds} rounds. Ratios are taken in each round; time to dense's final loss is the product
of the ratios of tokens and of step times. At equal time: with 1 / (step-time ratio) of dense's tokens.

{summary}

"""

def readme(sweep: Sweep, results: list[Result], runs: list[dict], problems: list[str]) -> str:
    """README.md: what came out, the tables, and how it came about."""
    times, body = step_times(runs), ""
    if any(run["kind"] == "loss" for run in runs):
        body += LOSS_TEXT.format(table=loss_table(runs))
    if times:
        body += TIME_TEXT.format(rounds=max(map(len, times.values())), summary=summary_table(results, times))
    return README.format(
        size=sweep.size, sentences="\n".join(f"- {findings(r)}" for r in results), models=model_table(sweep),
        body=body, flags=shlex.join(sweep.flags), mixture=sweep.mixture_flags.strip() or "-",
        iterations=sweep.iterations, problems=common.problem_lines(problems, runs, "train_moe.py"),
        **common.facts(runs))

COLORS = {DENSE: "black", "mixtral": "tab:blue", "deepseek": "tab:orange", "speed": "tab:green"}

def mean_curve(runs: list[dict], who: str, tokens: int) -> dict[int, float]:
    """Tokens -> mean over seeds of the validations of the runs with that many tokens."""
    points = {}
    for run in runs:
        if (run["kind"], run["who"]) == ("loss", who) and run["tokens"] == tokens:
            for at, loss in run["curve"]:
                points.setdefault(at, []).append(loss)
    return {at: mean(points[at]) for at in sorted(points)}

def plot(runs: list[dict], path: Path) -> None:
    """Mean validation loss against tokens; hollow: final losses of all runs, each with a schedule of its own."""
    losses, tokens, shown = final_losses(runs), dense_tokens(runs), []
    figure, axes = common.panels(8, 5)
    for who, shares in losses.items():
        curve, color = mean_curve(runs, who, tokens), COLORS[who]
        ends = [(share * tokens, loss) for share, seeds in shares.items() for loss in seeds.values()]
        shown += [loss for _, loss in ends] + [loss for at, loss in curve.items() if at >= 0.45 * tokens]
        axes.plot([at / 1e6 for at in curve], [*curve.values()], color=color, marker=".", label=who)
        axes.plot([at / 1e6 for at, _ in ends], [loss for _, loss in ends], "o", mfc="white", color=color)
    room = 0.05 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.axhline(mean(losses[DENSE][1.0].values()), color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(title="line: mean of seeds; hollow: final losses")
    figure.savefig(path, dpi=130)

def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and curves.png from the records of these flags and data; there may be others in the file."""
    found = common.read_runs(out / "runs.jsonl", Job).values()
    runs = [run for run in found if run["kind"] in ("loss", "time") and run["key"] == sweep.key(run["kind"])]
    done = [run for run in runs if not run["problem"]]
    if not done:
        return
    problems = [outcome(run) for run in runs if run["problem"]]
    if final_losses(done):
        plot(done, out / "curves.png")
    common.write_readme(out, readme(sweep, summarize(done), done, problems))

# --- Command line

def show_plan(sweep: Sweep, jobs: list[Job], runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long."""
    todo, kind = common.missing(jobs, runs), jobs[0].kind
    print(model_table(sweep), end="\n\n")
    common.show_plan(jobs, todo, lambda job: f"{job.who:8} {job.change}")
    seconds = [run["wall_s"] for run in runs.values() if run["kind"] == kind and not run["problem"]]
    time = common.effort(len(todo), seconds, SECONDS.get((args.size, kind)), args.jobs)
    print(f"{len(todo)} of {len(jobs)} to run, {time}")

def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.only = common.words(args.only, KINDS, "--only")
    common.check_counts(args, pairs=2)  # one ratio has no interval
    fractions = {word: common.number(word) for word in args.fractions.split(",")}
    if bad := [word for word, x in fractions.items() if not 0 < x <= 4]:
        raise ValueError(f"--fractions {bad[0]}: must be above 0 and at most 4")
    args.fractions = sorted({1.0, *fractions.values()}, reverse=True)
    if args.time and args.jobs > 1:
        raise ValueError("--time needs --jobs 1: runs beside each other would change each other's times")
    args.out = args.out or common.default_out(f"moe_{args.size}")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_moe.py")
    add = parser.add_argument
    add("--size", choices=("cpu", "gpu", "speedrun", "medium"), default="cpu",
        help="preset of the dense model, and of each kind's (default: cpu)")
    add("--data", default="", help="a folder under data/, or a path (default: the preset's)")
    add("--only", default=",".join(KINDS), metavar="KIND,..", help="these kinds only (default: %(default)s)")
    add("--mixture-flags", default="", metavar="FLAGS",
        help='flags of the kinds alone, such as --mixture-flags="--router-lr 0.002"')
    add("--fractions", default="1,0.8", metavar="X,..",
        help="of dense's steps that the kinds are trained for; 1 is always among them (default: 1,0.8)")
    add("--time", action="store_true", help="measure step times instead of losses")
    add("--pairs", type=int, default=5, help="rounds of --time (default: 5)")
    common.add_sweep_options(parser, "moe_SIZE")
    return parser.parse_args(argv)

def compare(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    jobs, runs = make_jobs(sweep, args), common.read_runs(file, Job)
    if args.list:
        show_plan(sweep, jobs, runs, args)
        return 0
    if args.time:
        common.warn_if_busy()
    common.share_cores(args.jobs)
    todo = common.missing(jobs, runs)
    return common.finish(lambda: common.run_all(todo, args.jobs, command, file, execute, outcome),
                         lambda: write_report(sweep, args.out))

main = partial(common.command_line, "moe", parse_args, compare)

if __name__ == "__main__":
    common.start(main)
