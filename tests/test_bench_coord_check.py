"""bench/coord_check.py: --mup passes, the standard parametrization fails, and each known mistake is found and named.

The mutants are this process's copy of train_gpt.py with one function replaced; the bench knows nothing of them.
"""
import gc
import importlib.util
import re
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
import train_moe

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_coord_check", ROOT / "bench" / "coord_check.py")
cc = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cc)

WIDTHS, HEAD_DIM = [64, 128, 256], 16
SMALL = [*cc.SMALL, "--num-layers", "2"]
ONE_LAYER = [*cc.SMALL, "--num-layers", "1", "--value-embeds", "0"]
MIXTURE = ["--hidden-optimizer", "adamw", "--num-experts", "4", "--num-shared", "1"]
STANDARD: dict[tuple, dict] = {}  # what was measured without --mup, by flags: no mutant changes it
LOGITS = {"logits", "capped logits"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Runs the program; exit code, what it printed, what it reported."""
    original, write, kept = cc.measure, cc.write_report, []

    def measure(script, s, *rest):
        if s.mup:
            return original(script, s, *rest)
        key = (script.__name__, s.hidden_optimizer, s.num_layers, getattr(s, "router", None))
        if key not in STANDARD:
            STANDARD[key] = original(script, s, *rest)
        return STANDARD[key]

    def run(*flags: str, script: str = "train_gpt.py", small=ONE_LAYER, picture: bool = False):
        monkeypatch.setattr(cc, "measure", measure)
        if not picture:  # it takes as long as a small training
            monkeypatch.setattr(cc, "plot", lambda *_: None)
        monkeypatch.setattr(cc, "write_report", lambda found, out: kept.append(found) or write(found, out))
        code = cc.main(["--script", str(ROOT / script), "--widths", ",".join(map(str, WIDTHS)), "--out", str(tmp_path),
                        "--", *small, "--threads", "1", *flags])
        return code, capsys.readouterr().out, kept[-1]
    return run


def beyond(found: cc.Check, which: str = cc.MUP) -> dict[tuple, float]:
    """Worst slope of each (site, statistic) that is beyond its limit at a judged step."""
    worst: dict[tuple, float] = {}
    for line in found.lines(which):
        key = line.site.name, line.statistic
        assert line.step in (0, 1, 3, 6)
        if line.site.name != "router logits" and abs(line.fit.slope) > line.limit:
            worst[key] = max(worst.get(key, 0.0), line.fit.slope, key=abs)
    return worst


def failing(found: cc.Check) -> list[str]:
    """The failing sites, the worst first."""
    return [str(line.site) for line in cc.failing(found.lines(cc.MUP))]


# --- the verdict on what is right


def test_muon_passes_and_without_mup_the_logits_grow(check, tmp_path):
    code, out, report = check(small=SMALL, picture=True)
    assert (code, failing(report), beyond(report)) == (0, [], {})
    assert out.splitlines()[-1].startswith("PASS: ") and max(map(len, out.splitlines()[2:])) <= 120
    standard = beyond(report, cc.STANDARD)
    assert standard["logits", cc.SIZE] == pytest.approx(1, abs=0.1)
    assert standard["logits", cc.CHANGE] == pytest.approx(1, abs=0.1)
    assert (tmp_path / "coord_check.png").stat().st_size > 50_000
    assert "PASS" in (tmp_path / "coord_check.md").read_text()


def test_adamw_passes_and_without_mup_more_grows_than_the_logits(check):
    code, _, report = check("--hidden-optimizer", "adamw", small=SMALL)
    assert (code, beyond(report)) == (0, {})
    standard = beyond(report, cc.STANDARD)
    assert {"attention output", "MLP output", "logits"} <= {site for site, _ in standard}
    assert standard["MLP output", cc.CHANGE] > 0.4


@pytest.mark.parametrize("router", ["noisy_topk", "softmax_topk"])
def test_mixtures_pass(check, router):
    code, out, report = check(*MIXTURE, "--router", router, script="train_moe.py")
    assert code == 0, out
    seen = {line.site.name for line in report.lines(cc.MUP)}
    assert {"learned router logits", "expert hidden", "mixture output", "MLP hidden"} <= seen


def test_no_model_outlives_its_training():
    """Optimizers hold the weights and moments of a model, and a check trains dozens of models."""
    def optimizers() -> int:
        gc.collect()
        return sum(isinstance(thing, train_gpt.Bank) for thing in gc.get_objects())

    before, s = optimizers(), cc.settings_at_hand(train_gpt, ONE_LAYER)[0]
    cc.measure(train_gpt, cc.dataclasses.replace(s, base_width=64), [64, 128], [0], 1)
    assert optimizers() <= before


def test_at_the_base_width_both_are_one_model():
    s = cc.dataclasses.replace(cc.settings_at_hand(train_gpt, ONE_LAYER)[0], base_width=64)
    mup, standard = (cc.measure(train_gpt, cc.dataclasses.replace(s, mup=mup), [64], [0], 3) for mup in (True, False))
    assert len(mup) > 50 and mup == standard


# --- mutants


def scaled(monkeypatch, pattern, script=train_gpt, power=-1.0):
    """Multiplies the learning rate of the parameters with that pattern by growth^power."""
    original = script.trained_rules

    def trained_rules(s, names):
        rules = original(s, names)
        return {name: rule._replace(lr=rule.lr * s.growth**power) if re.fullmatch(pattern, rule.pattern) else rule
                for name, rule in rules.items()}
    monkeypatch.setattr(script, "trained_rules", trained_rules)


def after_init(monkeypatch, script, change):
    """Models of the script are changed after they were built."""
    original = script.GPT.__init__

    def init(model, s, vocab_size):
        original(model, s, vocab_size)
        change(model, s)
    monkeypatch.setattr(script.GPT, "__init__", init)


def test_initial_weights_divided_twice(check, monkeypatch):
    original = train_gpt.uniform_matrix  # which divides by the root of the width, the base's being 64
    monkeypatch.setattr(train_gpt, "uniform_matrix", lambda *shape: original(*shape) * (64 / shape[-1]) ** 0.5)
    code, out, report = check()
    assert code == 1 and out.splitlines()[-1].startswith("FAIL: worst of --mup is ")
    assert beyond(report)["MLP hidden", cc.SIZE] == pytest.approx(-1, abs=0.15)  # squared
    assert beyond(report)["value", cc.SIZE] == pytest.approx(-0.5, abs=0.1)


def test_muon_rate_divided_by_the_width(check, monkeypatch):
    scaled(monkeypatch, r"blocks.*")
    code, _, report = check()
    assert code == 1
    for site in ("attention output", "MLP output"):
        assert -1.5 < beyond(report)[site, cc.SIZE] < -0.7


def test_head_rate_scaled_on_top_of_its_multiplier(check, monkeypatch):
    scaled(monkeypatch, "lm_head")
    code, _, report = check()
    assert code == 1 and failing(report)[0] in LOGITS
    assert beyond(report)["logits", cc.CHANGE] == pytest.approx(-1, abs=0.1)


def test_head_without_its_factor(check, monkeypatch):
    after_init(monkeypatch, train_gpt, lambda model, s: setattr(model, "cap", s.softcap))
    code, _, report = check()
    assert code == 1 and failing(report)[0] in LOGITS
    assert beyond(report)["logits", cc.CHANGE] == pytest.approx(1, abs=0.1)


def test_embedding_rate_is_seen_in_the_change_alone(check, monkeypatch):
    scaled(monkeypatch, r"\(embed.*")
    code, _, report = check()
    assert code == 1 and "embedding" in failing(report)
    assert beyond(report)["embedding", cc.CHANGE] == pytest.approx(-1, abs=0.1)
    assert ("embedding", cc.SIZE) not in beyond(report)


def split_by_head(monkeypatch, factor):
    """Muon takes the q, k and v matrices of each head apart; `factor` of (rows, columns) is on their rate, and the
    decay is what it was."""
    original = train_gpt.muon_update

    def muon_update(master, grad, momentum, variance, lr, decay, *rest):
        if master.size(-1) != master.size(-2):
            return original(master, grad, momentum, variance, lr, decay, *rest)
        for i in range(len(master)):  # q, k, v and output matrix of a layer, and again
            heads, f = ((-1, HEAD_DIM), factor(HEAD_DIM, master.size(-1))) if i % 4 < 3 else ((1, master.size(1)), 1)
            parts = [None if x is None else x[i].view(*heads, x.size(-1)) for x in (master, grad, momentum, variance)]
            original(*parts, lr[i] * f, decay / f, *rest)
    monkeypatch.setattr(train_gpt, "muon_update", muon_update)


def test_a_split_by_head_with_a_clamped_shape_factor(check, monkeypatch):
    split_by_head(monkeypatch, lambda rows, columns: max(1, rows / columns) ** 0.5)
    code, _, report = check()
    assert code == 1
    for site in ("query before norm", "key before norm", "value"):
        assert beyond(report)[site, cc.CHANGE] > 0.25


def test_a_split_by_head_with_the_factor_relative_to_the_base_passes(check, monkeypatch):
    split_by_head(monkeypatch, lambda rows, columns: (WIDTHS[0] / columns) ** 0.5)
    code, out, _ = check()
    assert code == 0, out


def test_router_without_its_multiplier(check, monkeypatch):
    after_init(monkeypatch, train_moe, lambda model, s: setattr(model, "router_scale", 1.0))
    code, _, report = check(*MIXTURE, "--router", "softmax_topk", script="train_moe.py")
    assert code == 1
    assert beyond(report)["learned router logits", cc.CHANGE] > 0.7


# --- what is recorded


def one_pass(width: int = 128):
    """A model with random weights, what is recorded of a forward pass, and the batch."""
    s, _ = cc.settings_at_hand(train_gpt, SMALL)
    s = cc.resized(train_gpt, cc.dataclasses.replace(s, base_width=64), 24, width=width)
    torch.manual_seed(1)
    model = train_gpt.GPT(s, cc.VOCAB)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    inputs, targets, docs = cc.text_batch(24, "cpu")
    with torch.no_grad(), cc.recorded(train_gpt, model, s) as found:
        model(inputs, targets[None], docs, torch.tensor(24, dtype=torch.int32))
    return s, model, found, inputs, docs


def test_what_is_recorded_is_what_the_model_computes():
    s, model, found, inputs, docs = one_pass()
    x = model.trunk(inputs, docs, torch.tensor(24, dtype=torch.int32))
    z = F.linear(train_gpt.norm(x), model.lm_head) / 2  # m = 128 / 64
    a, b, c = s.softcap
    expected = {cc.Site("logits"): z, cc.Site("capped logits"): a * torch.sigmoid((z + b) / c),
                cc.Site("residual stream", 1): x, cc.Site("head input"): train_gpt.norm(x),
                cc.Site("value embedding", 0): model.value_embeds[0](inputs)}
    for site, tensor in expected.items():
        assert torch.allclose(found[site], tensor.detach().flatten(), atol=1e-5), site


def test_attention_logits_give_the_attention_of_the_model(monkeypatch):
    seen, original = [], train_gpt.attend

    def attend(q, k, v, mask, *rest):
        seen.append((v.transpose(1, 2), mask, y := original(q, k, v, mask, *rest)))
        return y
    monkeypatch.setattr(train_gpt, "attend", attend)
    *_, found, _, _ = one_pass()
    for layer, (v, mask, y) in enumerate(seen):
        visible = mask.expand(*v.shape[:3], v.size(2))
        logits = torch.full(visible.shape, -torch.inf)
        logits[visible] = found[cc.Site("attention logits", layer)]
        assert torch.allclose((logits.softmax(-1) @ v).transpose(1, 2), y, atol=1e-5)
    assert len(seen) == 2 and seen[0][0].size(1) == 128 // HEAD_DIM


def test_nothing_is_left_of_the_recording():
    before = {name: getattr(train_gpt, name) for name in ("attend", "head_losses", "cap_logits")}
    _, model, _, _, _ = one_pass()
    assert all(getattr(train_gpt, name) is function for name, function in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- fits and verdict


@pytest.mark.parametrize("exponent", [-0.7, 0.0, 0.31])
def test_fit_is_that_of_polyfit(exponent):
    widths, noise = [64, 128, 256, 512], np.random.default_rng(0).normal(size=(4, 3))
    sizes = 3 * np.array(widths)[:, None]**exponent * np.exp2(0.1 * noise)
    found = cc.fit(widths, sizes)
    (slope, _), covariance = np.polyfit(np.repeat(np.log2(widths), 3), np.log2(sizes).ravel(), 1, cov=True)
    assert found.slope == pytest.approx(slope) and found.error == pytest.approx(covariance[0, 0]**0.5)
    assert abs(found.slope - exponent) < 3 * found.error < 0.2
    assert cc.fit(widths, sizes / np.exp2(0.1 * noise)).slope == pytest.approx(exponent)


def test_zeros_are_skipped_everywhere_or_a_fault():
    sizes = np.ones((3, 2))
    assert cc.fit(WIDTHS, 0 * sizes) is None
    sizes[1, 1] = 0
    assert cc.fit(WIDTHS, sizes).problem == "0 at width 128, not at all widths"
    sizes[2, 0] = np.inf
    sizes[1, 1] = np.nan
    assert cc.fit(WIDTHS, sizes).problem == "not finite at width 128"
    key = cc.Site("value", 1), cc.SIZE, 3
    line, = cc.failing(cc.fit_all({key: sizes}, WIDTHS, 6))
    assert line.clear and str(line.site) == "value, layer 1"


def grown(exponent: float, seeds: int, spread: float) -> np.ndarray:
    noise = np.where(np.arange(seeds) % 2, spread, -spread)
    return np.array(WIDTHS)[:, None]**exponent * np.exp2(noise)


@pytest.mark.parametrize("first, more, most, looks, passes", [
    ((0.1, 0.0), None, 8, [range(2)], True),  # within the limit
    ((0.5, 0.1), None, 8, [range(2)], False),  # clearly beyond it
    ((0.2, 1.0), None, 2, [range(2)], False),  # not clearly, but no more are allowed
    ((0.2, 1.0), (0.0, 1.0), 8, [range(2), range(2, 8)], True),  # not clearly: all that are allowed pass ..
    ((0.2, 1.0), (0.2, 1.0), 8, [range(2), range(2, 8)], False),  # .. or do not
])
def test_seeds_are_added_where_the_verdict_needs_them(monkeypatch, first, more, most, looks, passes):
    key, seen = (cc.Site("value", 0), cc.CHANGE, 3), []

    def measure(script, s, widths, numbers, steps, say):
        seen.append(numbers)
        exponent, spread = first if 0 in numbers else more
        return {key: grown(exponent, len(numbers), spread)}
    monkeypatch.setattr(cc, "measure", measure)
    sizes = cc.judge(None, None, WIDTHS, 2, most, 6, lambda line: None)
    assert seen == looks and sizes[key].shape == (3, looks[-1].stop)
    assert (not cc.failing(cc.fit_all(sizes, WIDTHS, 6))) == passes


def test_limits_are_by_site():
    lines = cc.fit_all({(cc.Site(name, 0), cc.SIZE, 6): grown(0.2, 2, 0.01) for name in ("attention logits", "value")},
                       WIDTHS, 6)
    assert [str(line.site) for line in cc.failing(lines)] == ["value, layer 0"]


def test_the_picture_has_each_kind_of_site_over_its_narrowest_model_with_slope_and_limit():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def sizes(slope):
        return {(cc.Site(name, 0), statistic, 6): 5 * grown(slope * (statistic == cc.CHANGE), 2, 0.01)
                for name in ("attention logits", "value") for statistic in (cc.SIZE, cc.CHANGE)}
    found = cc.Check("s", [], "", WIDTHS, 6, {cc.MUP: sizes(0.1), cc.STANDARD: sizes(-1.0)})
    axes = Figure().subplots()
    handles = cc.draw_site(axes, found, "attention logits")
    drawn = {name: [*line.get_ydata()] for name, line in handles.items() if name != "flat enough to pass"}
    assert drawn == {f"{which}, {statistic}": pytest.approx([2.0**(i * slope) for i in range(3)])
                     for which, grows in ((cc.MUP, 0.1), (cc.STANDARD, -1)) for statistic, slope in
                     ((cc.SIZE, 0), (cc.CHANGE, grows))}
    band = handles["flat enough to pass"].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx([4**-0.25, 4**0.25])
    assert {text.get_text() for text in axes.texts} == {"+0.10", "-1.00"}
    (low, high), title = axes.get_ylim(), axes.get_title("left")
    assert title == "attention logits" and low < 0.25 and high > 2 and axes.get_yscale() == axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128", "256"]


def test_failing_sites_are_told_once_and_the_worst_first():
    slopes = {cc.Site("value", 0): 0.3, cc.Site("value", 1): 0.6, cc.Site("logits"): 0.5, cc.Site("embedding"): 0}
    sizes = {(site, cc.SIZE, step): grown(slope + step / 100, 2, 0.001)
             for site, slope in slopes.items() for step in (0, 6)}
    found = [(str(line.site), line.step) for line in cc.failing(cc.fit_all(sizes, WIDTHS, 6))]
    assert found == [("value, layer 1", 6), ("logits", 6), ("value, layer 0", 6)]


# --- settings and command line


def test_default_widths():
    s, _ = cc.settings_at_hand(train_gpt, [])
    replace = cc.dataclasses.replace
    assert cc.default_widths(replace(s, head_dim=16)) == [64, 128, 256, 512]
    assert cc.default_widths(replace(s, head_dim=48)) == [192, 384, 768]
    assert cc.default_widths(replace(s, head_dim=128)) == [256, 512, 1024]


def test_the_program_by_itself():
    run = helpers.script(ROOT / "bench" / "coord_check.py", "--", "--preset", "cpu", "--device", "cpu", "--head-dim",
                         "16", "--width", "64", "--num-layers", "1", "--value-embeds", "0", "--mlp-ratio", "1",
                         "--hidden_optimizer", "adamw", "--adam-lr", "0.002", "--threads", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    head, about, *_, last = run.stdout.splitlines()
    assert "--preset cpu" in head and "--hidden_optimizer adamw" in head
    assert "widths 64, 128, 256, 512, base width 64, hidden matrices by adamw" in about and last.startswith("PASS: ")
    assert "--mup     width   512  seed 1  loss " in run.stderr


def report_rows(capsys, *flags: str) -> tuple[str, dict[str, list[str]]]:
    """The first line of the table of --report, and its rows: parameter -> cells."""
    assert cc.main(["--report", "--", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    about, head, *rows = lines[next(i for i, line in enumerate(lines) if line.startswith("muP from")):]
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", head)]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in rows]
    return about, {row[0]: row[1:] for row in cells}


def test_report_says_what_is_scaled_and_why(capsys, tmp_path):
    data = helpers.make_data(tmp_path / "bytes", vocab_size=256, eot=None)
    wide = ["--preset", "cpu", "--device", "cpu", "--width", "384", "--base-width", "96", "--ngram-rows", "50",
            "--data", str(data)]
    about, rows = report_rows(capsys, *wide)
    assert about == "muP from width 96 to 384, m = 4; attention scale 0.1963 at head_dim 48"
    assert rows["lm_head"][:5] == ["output", "256 x 384*", "384", "-", "adamw"]
    assert rows["lm_head"][5:9] == ["1", "0.25", "-", "0.25"]
    assert rows["blocks.*.mlp.up"][:3] == ["hidden", "1536* x 384*", "384"]
    assert float(rows["blocks.*.mlp.up"][3]) == pytest.approx(0.5 * 384**-0.5, rel=0.03)
    assert rows["blocks.*.mlp.up"][4:9] == ["muon", "1", "1", "1", "-"]
    assert rows["ngrams.table"][:2] == ["table", "50 x 384*"] and rows["scalars"][0] == "fixed"
    assert rows["gates"][1] == "3 x 2 x 8* x 12" and rows["gates"][-1] == "TP-V: input, constant"
    _, rows = report_rows(capsys, *wide, "--hidden-optimizer", "adamw", "--mup-embedding", "sqrt")
    assert rows["blocks.*.attn.qkvo"][4:] == ["adamw", "0.25", "1", "4", "0.25", "TP-V: rate / m"]
    assert rows["embed.weight"][5] == "0.5" and rows["embed.weight"][-1] == "2506.15025: / sqrt(m)"


@pytest.mark.parametrize("widths", ["64,wide,256", "64,128,", "64,128,-256"])
def test_widths_are_numbers(capsys, widths):
    assert cc.main(["--widths", widths]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --widths ")
    assert error.endswith(": must be whole numbers above 0, such as 64,128,256\n")


def test_without_any_change_there_is_no_verdict(capsys, tmp_path):
    code = cc.main(["--widths", "32,64,128", "--steps", "3", "--out", str(tmp_path / "out"), "--", *ONE_LAYER,
                    "--threads", "1", "--muon-lr", "0", "--adam-lr", "0"])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and not (tmp_path / "out").exists()
    assert err.splitlines()[-1].startswith("error: no activation changes in training")


@pytest.mark.parametrize("argv, told", [
    (["--seeds", "1"], "--seeds 1: "),
    (["--seeds", "4", "--max-seeds", "3"], "--max-seeds 3 is less than --seeds 4"),
    (["--steps", "2"], "--steps 2: "),
    (["--widths", "64,128,128"], "--widths 64,128: three different ones"),
    (["--widths", "64,128,250"], "250 is no multiple of the head_dim, 16"),
    (["--widths", "64,80,256"], "width 80 cannot work: --attention LLPL: P layers pair heads"),
    (["--script", "nowhere.py"], "nowhere.py: there is no such file"),
    (["--script", str(ROOT / "generate.py")], "it does not know --mup"),
    (["--", "--preset", "cpu", "--device", "cpu", "--width", "100"], "--width 100 must be a multiple of --head_dim"),
])
def test_what_cannot_work_is_said_in_a_sentence(capsys, argv, told):
    assert cc.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error


def test_unknown_flags_of_the_script(capsys):
    with pytest.raises(SystemExit) as stop:
        cc.main(["--", "--wdith", "64"])
    assert stop.value.code == 2 and "--width" in capsys.readouterr().err
