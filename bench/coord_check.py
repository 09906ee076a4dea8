"""Coordinate check: do the activations keep their size, and change alike in training, whatever the width?

    python bench/coord_check.py                                              # a small model with every technique
    python bench/coord_check.py --out records/coord -- --preset cpu --hidden-optimizer adamw
    python bench/coord_check.py --script train_moe.py -- --preset speed-cpu
    python bench/coord_check.py --report -- --preset gpu --width 1024 --base-width 256   # what --mup scales, and why

Flags after ` -- ` are the script's, and those it would choose itself if there are none. Models of several widths and
seeds train a few steps on one fixed batch, with --mup and, shown beside it but never judged, without; in fp32, at the
full learning rates. Two numbers tell how large an activation x is after t steps: mean |x_t|, and the change,
rms(x_t - x_0). Each is fitted as width^slope, per site, layer and step. What is right for every width has slope 0:
PASS, and exit code 0, if at the start and at the first, middle and last step no slope of --mup is beyond 0.15
(attention logits: 0.25). The change finds what the size hides: a wrong rate of a table that starts at its full size.

Seeds differ, most where few heads attend to few tokens. So where slopes are beyond their limit, but none by more than 3
standard errors, there are --max-seeds at once; then what is beyond fails. This second look is lenient; without it
correct models would fail, as there are some hundred slopes. --mup-embedding sqrt fails by design: the change of the
tables' rows falls.

No data set is needed: the text is this one, as bytes. The batch has fewer tokens than the smallest width has
dimensions: gradients then span few directions, updates line up with all of their inputs, and a rate that goes with the
wrong power of the width shows that power at small widths already. Routers need it most: the learned logits of
sigmoid_bias have slope -0.31 +- 0.09 with 48 tokens at widths 64 to 256, -0.15 with 24, none at 256 to 1024.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import re
import shlex
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path

# Without ` -- `: every technique, enough heads in the narrowest model, and rates at which tables and matrices change
# activations about equally, so that neither hides what is wrong with the other.
SMALL = """--preset cpu --device cpu --num-layers 4 --width 64 --head-dim 16 --value-embeds 1 --softcap 23,5,7.5
--paired --key-offset --xsa --skip single --backout --adam-lr 0.002""".split()
ROWS, VOCAB = 2, 256  # of the batch; bytes
GPT2_VOCAB = 50257
LIMIT, LIMITS = 0.15, {"attention logits": 0.25}  # of |slope|; query and key start to align, at any width
NOT_JUDGED = {"router logits": "initial weights of a readout that are not 0 give logits that fall with the root of the "
                               "width (TP-V, table 8); judged is what the learned part of the weights gives"}
RESOLVED = 3  # standard errors
ROUNDING = 1e-5  # a change of less than this share of the size is none
SIZE, CHANGE = "mean |x|", "change"
MUP, STANDARD = "--mup", "standard"

# --- Settings

def load_script(path: Path) -> ModuleType:
    """train_gpt.py or train_moe.py as a module. Raises ValueError if that file is no trainer that knows --mup."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--script {path}: there is no such file; use train_gpt.py or train_moe.py")
    loaded = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(path)]
    module = next((module for module in loaded if module.__name__ != "__main__"), None)
    if module is None:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, "trained_rules"):
        raise ValueError(f"--script {path}: it does not know --mup; use train_gpt.py or train_moe.py")
    return module

def settings_at_hand(script: ModuleType, flags: list[str]):
    """Settings of a command line, and the base width if it names one, else 0."""
    base_width = common.given(script, flags).get("base_width", 0)
    return script.parse_settings([*flags, "--mup"], world_size=1)[0], base_width

def default_widths(s) -> list[int]:
    """Doubling from the smallest that has four heads (large ones: a pair) and is 64 or more, up to 512; three at least.
    With fewer heads the attention's output is not yet what it is at large widths (records/LOG.md, 2026-11-20)."""
    unit = s.head_dim * (4 if s.head_dim <= 64 else 2)
    widths = [-(-64 // unit) * unit]
    while len(widths) < 3 or 2 * widths[-1] <= 512:
        widths.append(2 * widths[-1])
    return widths

def resized(script: ModuleType, s, length: int, **changes):
    """The settings in fp32 and plain torch, for rows of `length` tokens. Raises ValueError where they do not fit."""
    fixed = dict(
        dtype="fp32", compile=False, kernels="none", fp8_head="off", fp8_mlp=False, backend="sdpa",
        stage_ends=(1.0,), stage_lr=(1.0,), mtp=(0,), seq_len=(length,), max_doc_len=(length,),
        batch_tokens=(ROWS * length,), micro_tokens=ROWS * length, eval_seq_len=length,
        window=(length,), window_start=0, window_step=length // 4)
    fixed |= {"moe_impl": "loop"} if hasattr(s, "moe_impl") else {}
    s = dataclasses.replace(s, **fixed, **changes)
    if ROWS * (length + 1) > len(__doc__):
        raise ValueError(f"width {s.width}: the text is too short for rows of {length} tokens; use smaller --widths")
    if problems := script.hyperparameter_errors(s, {}, script.detect_hardware(s.device), 1):
        raise ValueError(f"width {s.width} cannot work: {'; '.join(problems)}")
    return s

def text_batch(length: int, device: str) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and document numbers, (ROWS, length) each: passages of this file's docstring."""
    text = torch.tensor(list(__doc__.encode()), dtype=torch.int32)
    starts = torch.linspace(0, len(text) - length - 1, ROWS + 2)[1:-1].long()
    tokens = torch.stack([text[i:i + length + 1] for i in starts]).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:])

# --- What --mup scales: a model at the base width beside one that is much wider

class Axes(NamedTuple):
    """Shape of a parameter, and which of its axes grow with the width."""
    shape: tuple[int, ...]
    wide: tuple[bool, ...]

    def __str__(self) -> str:
        return " x ".join(f"{size}{'*' if wide else ''}" for size, wide in zip(self.shape, self.wide, strict=True))

def model_shapes(script: ModuleType, s, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, of a model without weights."""
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return {name: tuple(p.shape) for name, p in script.GPT(s, vocab_size).named_parameters()}

def parameter_axes(script: ModuleType, s, vocab_size: int) -> dict[str, Axes]:
    """An axis grows if models of the base width and 64 times that (some sizes are rounded) differ in it."""
    far = dataclasses.replace(s.base, width=64 * s.base.width)
    now, base, wide = (model_shapes(script, x, vocab_size) for x in (s, s.base, far))
    return {name: Axes(shape, tuple(a != b for a, b in zip(base[name], wide[name], strict=True)))
            for name, shape in now.items()}

def reason(rule, s) -> str:
    """Where a rule's factors come from: Tensor Programs V (TP-V, arXiv 2203.03466) or the numbered paper."""
    if rule.role in ("input", "table"):
        sqrt = rule.role == "table" and s.mup_embedding == "sqrt"
        return "2506.15025: / sqrt(m)" if sqrt else "TP-V: input, constant"
    hidden = "2310.17813: Muon, sqrt(fan_out / fan_in)" if rule.kind == "muon" else "TP-V: rate / m"
    return {"hidden": hidden, "output": "TP-V: logits / m"}.get(rule.role, "does not grow with the width")

def initial_std(p: torch.Tensor) -> str:
    """Standard deviation of the weights that are drawn; of a constant there is none."""
    drawn = p.detach()[p.detach() != 0]
    return f"{drawn.std():.2g}" if drawn.numel() > 1 and drawn.min() < drawn.max() else "-"

def factors(rule, base, wide) -> list[str]:
    """Of learning rate, product, decay and epsilon, relative to the base width's; - of what is not there."""
    product = base.fans[1] / wide.fans[1] if rule.role == "output" else 1.0
    pairs = [(rule.lr, base.lr), (product, 1.0), (rule.weight_decay, base.weight_decay),
             (rule.eps, base.eps if rule.kind == "adamw" else 0.0)]
    return [f"{a / b:.4g}" if b else "-" for a, b in pairs]

def report(script: ModuleType, s, vocab_size: int) -> str:
    """The table of --report: what is scaled and why, parameters of equal rows together."""
    model = dict(script.GPT(s, vocab_size).named_parameters())
    names, axes, rows = list(model), parameter_axes(script, s, vocab_size), {}
    rules = script.trained_rules(s, names)
    wide, base = (script.match_rules(script.parameter_table(x), names) for x in (s, s.base))
    for name, rule in rules.items():
        key = re.sub(r"\.\d+\.", ".*.", name), rule.role, str(axes[name])
        if key not in rows:
            fan_in = str(wide[name].fans[1]) if rule.role in ("hidden", "output") else "-"
            std = "-" if rule.role == "fixed" else initial_std(model[name])
            rows[key] = [*key, fan_in, std, rule.kind, *factors(rule, base[name], wide[name]), reason(rule, s)]
    head = ["parameter", "role", "shape (* grows)", "fan-in", "init std", "optimizer", "lr x", "multiplier", "decay x",
            "eps x", "reason"]
    return (f"muP from width {s.base.width} to {s.width}, m = {s.growth:g}; attention scale {s.softmax_scale:.4g} "
            f"at head_dim {s.head_dim}\n{common.aligned([head, *rows.values()])}")

def print_report(script: ModuleType, s) -> int:
    """The table, with the vocabulary of the run's data if they are there."""
    there = script.data_folder(s.data).is_dir()
    if not there:
        print(f"{script.data_folder(s.data)} is not there: with GPT-2's vocabulary")
    print(report(script, s, script.open_corpus(s.data).meta["vocab_size"] if there else GPT2_VOCAB))
    return 0

# --- Measurement

class Site(NamedTuple):
    """Where an activation is looked at."""
    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}, layer {self.layer}"

@contextlib.contextmanager
def recorded(script: ModuleType, model, s):
    """Activations of the last forward pass inside, by Site, each as a flat tensor. Hooks see what modules take and
    give; products inside are made again; functions that look at their arguments stand in for the script's."""
    found: dict[Site, torch.Tensor] = {}
    handles, originals, layer = [], {}, [None]

    def keep(name: str, x: torch.Tensor, i: int | None = None):
        found[Site(name, i)] = x.detach().flatten().float()

    def hook(module, look):
        handles.append(module.register_forward_hook(look))

    def replace(name: str, make):
        originals[name] = getattr(script, name)
        setattr(script, name, make(originals[name]))

    for i, table in enumerate(model.value_embeds):
        hook(table, lambda _, args, out, i=i: keep("value embedding", out, i))
    if model.ngrams is not None:
        hook(model.ngrams, lambda _, args, out: keep("n-gram embedding", out))
    handles.append(model.blocks[0].register_forward_pre_hook(lambda _, args: keep("embedding", args[1])))
    for i, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(lambda _, args, i=i: layer.__setitem__(0, i)))
        look_at_block(block, i, hook, keep)
    replace("attend", lambda original: looking_attend(original, lambda x: keep("attention logits", x, layer[0])))
    replace("head_losses", lambda original: looking_head(original, keep))
    replace("cap_logits", lambda original: looking_cap(original, s.softcap, keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, original in originals.items():
            setattr(script, name, original)

def look_at_block(block, i: int, hook, keep):
    """Hooks on the modules of layer i. A mixture's shared experts are an MLP."""
    start = []  # the router's weights at each pass, times their multiplier

    def attention(module, args, out):
        qkv = F.linear(args[0], module.qkvo[:3].flatten(0, 1)).chunk(3, dim=-1)
        for name, x in zip(("query before norm", "key before norm", "value"), qkv, strict=True):
            keep(name, x, i)
        keep("attention output", out, i)

    def mlp(module, args, out):
        keep("MLP hidden", F.linear(args[0], module.up).relu().square(), i)
        keep("MLP output", out, i)

    def mixture(module, args, out):
        x, router = args[0].flatten(0, 1), args[1][0][:len(module.experts_up)].detach()
        start.append(router)
        keep("router logits", F.linear(x, router), i)
        keep("learned router logits", F.linear(x, router - start[0]), i)
        keep("expert hidden", (x @ module.experts_up).relu().square(), i)  # of all tokens, whoever has chosen it
        keep("mixture output", out[0], i)

    if block.attn is not None:
        hook(block.attn, attention)
    if hasattr(block.mlp, "experts_up"):
        hook(block.mlp, mixture)
    for module in filter(lambda module: module is not None, (block.mlp, getattr(block.mlp, "shared", None))):
        if hasattr(module, "up"):
            hook(module, mlp)
    hook(block, lambda _, args, out: keep("residual stream", out[0] if isinstance(out, tuple) else out, i))

def looking_attend(original, keep):
    def attend(q, k, v, mask, scale, *rest):
        logits = scale * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        keep(logits[mask.expand_as(logits)])
        return original(q, k, v, mask, scale, *rest)
    return attend

def looking_head(original, keep):
    return lambda x, *rest: keep("head input", x) or original(x, *rest)

def looking_cap(original, cap, keep):
    """The model's cap has the head's multiplier in it: what it is to the settings' makes of z what that would take."""
    def cap_logits(z, own):
        keep("logits", z * (cap[2] / own[2]))
        capped = original(z, own)
        if cap[0]:
            keep("capped logits", capped)
        return capped
    return cap_logits

Sizes = dict[tuple[Site, str, int], np.ndarray]  # by site, SIZE or CHANGE, and step

def train(script: ModuleType, s, steps: int) -> tuple[dict[tuple[Site, str, int], float], list[float]]:
    """What is seen in a model's first steps, with keys as of Sizes, and the losses before, between and after them."""
    model, length = script.GPT(s, VOCAB), s.seq_len[0]
    optimizer = script.MuonAdamW(model, s, script.World())
    model.to(s.device)
    batch, window = text_batch(length, s.device), torch.tensor(length, dtype=torch.int32, device=s.device)
    first, sizes, losses = {}, {}, []
    with recorded(script, model, s) as found:
        for step in range(steps + 1):
            loss = common.micro_step(script, model, optimizer, batch, window, [1 / (ROWS * length)])
            losses.append(loss.item() / (ROWS * length))
            first = first or dict(found)
            for site, x in found.items():
                sizes[site, SIZE, step] = x.abs().mean().item()
                if step:
                    sizes[site, CHANGE, step] = change(x, first[site])
            if step < steps:
                optimizer.step(1.0, script.momentum_at(s, step))
    for p in model.parameters():
        p._post_accumulate_grad_hooks.clear()  # they hold the optimizer, in a cycle that no collector sees
    return sizes, losses

def change(x: torch.Tensor, first: torch.Tensor) -> float:
    """rms(x - first); 0 where only the rounding differs."""
    difference = (x - first).square().mean().sqrt().item()
    return 0.0 if difference < ROUNDING * first.square().mean().sqrt().item() else difference

def measure(script: ModuleType, s, widths: list[int], seeds: Iterable[int], steps: int, say=lambda line: None) -> Sizes:
    """Statistics, (widths, seeds), of each site and step, of models with the settings s but for width and seed."""
    length = max(8, 3 * min(widths) // 64 * 4)  # two rows of it: 3/8 of the smallest width
    models = [resized(script, s, length, width=width, seed=s.seed + seed) for width in widths for seed in seeds]
    traces = []
    for model in models:
        start = time.perf_counter()
        sizes, losses = train(script, model, steps)
        traces.append(sizes)
        say(f"{MUP if s.mup else STANDARD:8}  width {model.width:5}  seed {model.seed}  loss {losses[0]:.3f} -> "
            f"{losses[-1]:.3f}  {time.perf_counter() - start:.1f} s")
    return {key: np.array([sizes[key] for sizes in traces]).reshape(len(widths), -1) for key in traces[0]}

# --- Verdict

class Fit(NamedTuple):
    """size = c * width^slope, by least squares on logarithms."""
    slope: float  # nan: there is none
    error: float  # standard error
    problem: str = ""  # why there is none

def fit(widths: list[int], sizes_WS: np.ndarray) -> Fit | None:
    """A statistic's slope over all widths and seeds; None where it is exactly 0 in all models."""
    if not sizes_WS.any():
        return None
    for width, sizes in zip(widths, sizes_WS, strict=True):
        if not np.isfinite(sizes).all():
            return Fit(np.nan, np.nan, f"not finite at width {width}")
        if not sizes.all():
            return Fit(np.nan, np.nan, f"0 at width {width}, not at all widths")
    x, y = np.repeat(np.log2(widths), sizes_WS.shape[1]), np.log2(sizes_WS).ravel()
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * y).sum() / spread
    rest = y - y.mean() - slope * (x - x.mean())
    return Fit(float(slope), float(((rest**2).sum() / (len(x) - 2) / spread) ** 0.5))

class Line(NamedTuple):
    """One fit and where it belongs."""
    site: Site
    statistic: str  # SIZE or CHANGE
    step: int
    fit: Fit

    @property
    def limit(self) -> float:
        return LIMITS.get(self.site.name, LIMIT)

    @property
    def judged(self) -> bool:
        return self.site.name not in NOT_JUDGED or bool(self.fit.problem)

    @property
    def share(self) -> float:
        """Of the limit that the slope takes; infinite where there is no slope."""
        return float(np.nan_to_num(abs(self.fit.slope) / self.limit, nan=np.inf))

    @property
    def clear(self) -> bool:
        """Beyond the limit by more than chance explains."""
        return bool(self.fit.problem) or abs(self.fit.slope) - RESOLVED * self.fit.error > self.limit

    def __str__(self) -> str:
        return self.fit.problem or f"slope {self.fit.slope:+.2f} ± {self.fit.error:.2f}"

def judged_steps(steps: int) -> set[int]:
    """Start, first, middle and last step: others say nearly the same, and may be beyond their limit by chance."""
    return {0, 1, (steps + 1) // 2, steps}

def fit_all(sizes: Sizes, widths: list[int], steps: int) -> list[Line]:
    """Lines of the judged steps; statistics that are exactly 0 have none."""
    fits = {key: fit(widths, values) for key, values in sizes.items() if key[2] in judged_steps(steps)}
    return [Line(*key, found) for key, found in fits.items() if found]

def worst(lines: list[Line]) -> Line | None:
    return max(lines, key=lambda line: line.share, default=None)

def failing(lines: list[Line]) -> list[Line]:
    """The worst line of each site and layer that has one beyond its limit, the worst first."""
    beyond = sorted((line for line in lines if line.judged and line.share > 1), key=lambda line: -line.share)
    return [line for line in beyond if line is worst([other for other in beyond if other.site == line.site])]

def judge(script: ModuleType, s, widths: list[int], seeds: int, max_seeds: int, steps: int, say) -> Sizes:
    """Measures as many seeds as the verdict needs. Raises ValueError if nothing changes in training."""
    sizes = measure(script, s, widths, range(seeds), steps, say)
    lines = fit_all(sizes, widths, steps)
    if not any(line.statistic == CHANGE for line in lines):
        raise ValueError("no activation changes in training: all learning rates are 0, there is nothing to check")
    beyond = failing(lines)
    if not beyond or any(line.clear for line in beyond) or max_seeds <= seeds:
        return sizes
    say(f"{beyond[0].statistic} at {beyond[0].site}: {beyond[0]}, not clearly beyond {beyond[0].limit}; "
        f"{max_seeds - seeds} more seeds")
    added = measure(script, s, widths, range(seeds, max_seeds), steps, say)
    return {key: np.concatenate((values, added[key]), axis=1) for key, values in sizes.items()}

# --- Result

class Check(NamedTuple):
    """What was run and what came out of it."""
    script: str
    flags: list[str]
    about: str  # the models, in a line
    widths: list[int]
    steps: int
    sizes: dict[str, Sizes]  # by parametrization

    def lines(self, which: str) -> list[Line]:
        return fit_all(self.sizes[which], self.widths, self.steps)

    def seeds(self, which: str) -> int:
        return next(iter(self.sizes[which].values())).shape[1]

    @property
    def names(self) -> list[str]:
        """Kinds of sites, in the order in which they were seen."""
        return [*dict.fromkeys(site.name for site, *_ in self.sizes[MUP])]

    @property
    def verdict(self) -> str:
        """PASS or FAIL, and the slope that takes most of its limit."""
        lines = self.lines(MUP)
        line, bad = worst([line for line in lines if line.judged]), failing(lines)
        doubt = "" if not bad or any(line.clear for line in bad) else (
            f"; no slope is clearly beyond its limit, --max-seeds {4 * self.seeds(MUP)} would tell")
        return (f"{'FAIL' if bad else 'PASS'}: worst of --mup is {line.statistic} at {line.site}, step {line.step}: "
                f"{line} (limit {line.limit}){doubt}")

def cell(line: Line | None) -> str:
    """Slope and place of a line, for the table."""
    if line is None:
        return "always 0"
    layer = "" if line.site.layer is None else f"L{line.site.layer} "
    slope = "none" if line.fit.problem else f"{line.fit.slope:+.2f} ± {line.fit.error:.2f}"
    return f"{slope:12} {layer}t{line.step}"

def table(check: Check) -> list[list[str]]:
    """Cells, heads first: a row for each kind of site, with the worst of its layers and steps."""
    pairs = [(which, statistic) for which in (MUP, STANDARD) for statistic in (SIZE, CHANGE)]
    lines = {which: check.lines(which) for which in (MUP, STANDARD)}
    rows = [["site", "limit", *(f"{which} {statistic}" for which, statistic in pairs), ""]]
    for name in check.names:
        own = [[line for line in lines[which] if line.site.name == name and line.statistic == statistic]
               for which, statistic in pairs]
        told = "FAIL" if failing(own[0] + own[1]) else "not judged" if name in NOT_JUDGED else "ok"
        limit = "" if name in NOT_JUDGED else f"{LIMITS.get(name, LIMIT):.2f}"
        rows.append([name, limit, *(cell(worst(group)) for group in own), told])
    return rows

def summary(check: Check) -> tuple[list[str], list[str]]:
    """What was run, and the failing sites, in lines."""
    head = [f"{check.script} {shlex.join(check.flags)}".rstrip(), check.about,
            "Slopes over the width, worst of all layers (L) and of steps "
            f"{', '.join(map(str, sorted(judged_steps(check.steps))))} (t); change is rms(x_t - x_0).",
            *(f"Not judged, {name}: {why}." for name, why in NOT_JUDGED.items() if name in check.names)]
    return head, [f"  {line.site}: {line.statistic} at step {line.step}, {line}, limit {line.limit}"
                  for line in failing(check.lines(MUP))]

def draw_site(axes, check: Check, name: str) -> dict:
    """Draws a kind of site's worst layer and step by width, and writes the slope; label -> handle, for the legend."""
    ratios = np.array(check.widths) / check.widths[0]
    bounds = ratios ** LIMITS.get(name, LIMIT)
    handles = {"flat enough to pass": axes.fill_between(ratios, 1 / bounds, bounds, color="0.88")}
    for which, colour, x in ((STANDARD, "#d55e00", 0.36), (MUP, "#0072b2", 0.04)):
        fits = [line for line in check.lines(which) if line.site.name == name and not line.fit.problem]
        for statistic, style in ((SIZE, "o:"), (CHANGE, "o-")):
            if line := worst([line for line in fits if line.statistic == statistic]):
                means = np.log2(check.sizes[which][line[:3]]).mean(1)
                plotted = axes.plot(ratios, np.exp2(means - means[0]), style, color=colour, markersize=3.5)
                handles[f"{which}, {statistic}"] = plotted[0]
        axes.text(x, 0.87, cell(worst(fits)).split()[0], color=colour, weight="bold", size=9, transform=axes.transAxes)
    axes.loglog([], base=2)
    low, high = np.clip(axes.dataLim.intervaly, [0, 2], [0.5, np.inf])
    axes.set(ylim=(low / 1.1, high * (high / low) ** 0.3), xticks=ratios, xticklabels=check.widths)
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.set_title(name, loc="left", fontsize=10)
    return handles

def plot(check: Check, path: Path) -> None:
    """A panel for each kind of site: size and change, with --mup and without, over those of the narrowest model."""
    rows, handles = -(-len(check.names) // 5), {}
    figure, grid = common.panels(11, 1.2 + 1.8 * rows, rows, 5, squeeze=False)
    for axes, name in zip_longest(grid.flat, check.names):
        handles |= draw_site(axes, check, name) if name else axes.remove() or {}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Activations by width, over those of the narrowest model: under muP blue is flat (slope 0)\n"
                    "Numbers: slope of size or change, whichever is worse, at the worst layer and step", fontsize=11)
    figure.savefig(path, dpi=110)

def write_report(check: Check, out: Path) -> None:
    """coord_check.md and .png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    head, bad = summary(check)
    first, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table(check)]
    text = ["# Coordinate check", *head, common.markdown(first, rows), *(["Failing:", *bad] if bad else []),
            check.verdict, "![mean size and change of each site by width](coord_check.png)"]
    (out / "coord_check.md").write_text("\n\n".join(text) + "\n")
    plot(check, out / "coord_check.png")

# --- Command line

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "the script")
    add = parser.add_argument
    add("--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE",
        help="train_gpt.py or train_moe.py (default: train_gpt.py)")
    add("--report", action="store_true", help="print what --mup scales at these settings and why; train nothing")
    add("--widths", metavar="N,N,..", help="at least three multiples of the head_dim "
        "(default: from the smallest, 64 or more, that has four heads, doubled up to 512)")
    add("--seeds", type=int, default=2, help="models of each width, at first (default: 2)")
    add("--max-seeds", "--max_seeds", type=int, metavar="N",
        help="models of each width, where the verdict needs them (default: 16, or --seeds)")
    add("--steps", type=int, default=6, help="optimizer steps (default: 6)")
    add("--out", type=Path, metavar="DIR", help="folder for coord_check.md and .png (default: print the table only)")
    args = parser.parse_args(argv)
    args.max_seeds = max(16, args.seeds) if args.max_seeds is None else args.max_seeds
    args.flags = args.flags if "--" in argv else SMALL
    return args

def check_args(args: argparse.Namespace, s, widths: list[int]) -> None:
    """Raises ValueError with what is wrong."""
    if args.seeds < 2:
        raise ValueError(f"--seeds {args.seeds}: a slope needs 2 or more to tell its error")
    if args.max_seeds < args.seeds:
        raise ValueError(f"--max-seeds {args.max_seeds} is less than --seeds {args.seeds}")
    if args.steps < 3:
        raise ValueError(f"--steps {args.steps}: outputs that start at zero pass gradients on from the second step on; "
                         "use 3 or more")
    if len(widths) < 3:
        raise ValueError(f"--widths {','.join(map(str, widths))}: three different ones or more are needed for a slope")
    if wrong := [width for width in widths if width <= 0 or width % s.head_dim]:
        raise ValueError(f"--widths: {wrong[0]} is no multiple of the head_dim, {s.head_dim}")

def coord_check(args: argparse.Namespace, _command: str) -> int:
    """Runs the check, prints and writes its report; the exit code: 0 PASS, 1 FAIL."""
    script = load_script(args.script)
    s, base_width = settings_at_hand(script, args.flags)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    if args.report:
        return print_report(script, s)
    widths = common.whole_numbers(args.widths, "--widths") if args.widths else default_widths(s)
    check_args(args, s, widths)
    s = dataclasses.replace(s, base_width=base_width or widths[0])

    say = partial(print, file=sys.stderr, flush=True)
    standard = measure(script, dataclasses.replace(s, mup=False), widths, range(args.seeds), args.steps, say)
    sizes = {MUP: judge(script, s, widths, args.seeds, args.max_seeds, args.steps, say), STANDARD: standard}
    about = (f"{s.num_layers} layers ({s.attention}), head_dim {s.head_dim}, widths {', '.join(map(str, widths))}, "
             f"base width {s.base_width}, hidden matrices by {s.hidden_optimizer}, {args.steps} steps, seeds: ")
    check = Check(args.script.name, args.flags, about, widths, args.steps, sizes)
    check = check._replace(about=f"{about}{check.seeds(MUP)} ({STANDARD}: {check.seeds(STANDARD)})")
    if args.out:
        write_report(check, args.out)
    head, bad = summary(check)
    failing = ["failing:", *bad] if bad else []
    print("\n".join([*head, "", common.aligned(table(check)), "", *failing, check.verdict]))
    return 1 if bad else 0

main = partial(common.command_line, "coord_check", parse_args, coord_check, resumes=False)

if __name__ == "__main__":
    common.start(main)
