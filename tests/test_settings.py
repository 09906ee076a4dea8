"""Settings: importing, --help, presets, errors, the stage table, schedules, and the numbers derived from them."""
import dataclasses
import json
import math
import re

import pytest
import torch
from helpers import CPU, H100, SCRIPT, parse, script, settings, tiny

import train_gpt
import train_grokking
from train_gpt import (
    PRESETS,
    Hyperparameters,
    RunSettings,
    Settings,
    Stage,
    UserError,
    bracket,
    build_parser,
    dashed,
    help_texts,
    parse_settings,
    stage_table,
)

FIELDS = dataclasses.fields(Settings)
V100 = H100._replace(name="Tesla V100-SXM2-16GB", memory_gib=15.8, bf16=False, why="compute capability 7.0 < 8.0")


def problems(*argv: str, world_size: int = 1) -> str:
    """What parse_settings complains about, on a CPU."""
    with pytest.raises(UserError) as caught:
        parse_settings(["--device", "cpu", *argv], world_size)
    return str(caught.value)


def given(*argv: str) -> dict:
    """The fields that a command line sets."""
    return vars(build_parser().parse_args(dashed(list(argv))))


# --- import and help

WATCH = """
import gc, json, os, signal, sys, threading
import numpy, torch, torch.distributed
done = []
def watch(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "subprocess.Popen", "socket.connect", "os.system"):
        done.append(f"{event} {args[:2]}")
before = torch.get_num_threads(), torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT)
sys.addaudithook(watch)
sys.dont_write_bytecode = True
import train_gpt
after = torch.get_num_threads(), torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT)
assert before == after
assert gc.isenabled()
print(json.dumps([done, threading.active_count(), torch.distributed.is_initialized(), torch.cuda.is_initialized(),
                  "wandb" in sys.modules]))
"""


def test_importing_does_nothing(tmp_path):
    """Nothing is printed, written, started or connected; the random state and the signal handlers stay."""
    done = script("-c", WATCH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], 1, False, False, False]  # the line is the only output
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_a_run_on_a_cpu_starts_without_the_compiler(tmp_path):
    """Loading it takes half of the start: the model whose shapes the memory check counts has no values, so no
    operation that torch has in Python only."""
    code = "import sys, train_gpt; code = train_gpt.main(sys.argv[1:]); print('torch._dynamo' in sys.modules, code)"
    done = script("-c", code, *tiny(tmp_path, iterations=1, eval_every=0), cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_help_works_without_data_and_writes_nothing(tmp_path):
    done = script(SCRIPT, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout and "--muon-lr" in done.stdout and not list(tmp_path.iterdir())


def test_every_field_has_a_comment_of_words():
    texts = help_texts()
    assert list(texts) == [field.name for field in FIELDS]
    for name, text in texts.items():
        assert len(re.findall(r"[a-z]{2,}", re.sub(r"\[[^\]]+\]$", "", text))) >= 2, f"{name}: {text!r} says nothing"


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_help_lists_each_field_with_comment_and_default(field):
    shown = "".join(build_parser().format_help().split())  # lines are wrapped, at hyphens too
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    assert f"--{field.name.replace('_', '-')}" in shown
    assert "".join(f"{help_texts()[field.name]} (default: {default})".split()) in shown


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_both_spellings_set_the_field(field):
    kinds = {"int": "3", "float": "0.25", "str": "word", "ints": "3,4", "floats": "0.5,1"}
    expected = {"int": 3, "float": 0.25, "str": "word", "ints": (3, 4), "floats": (0.5, 1.0)}
    for name in (field.name, field.name.replace("_", "-")):
        if field.type == "bool":
            assert given(f"--{name}") == {field.name: True} and given(f"--no-{name}") == {field.name: False}
        else:
            value, read = kinds[field.type], {field.name: expected[field.type]}
            assert given(f"--{name}", value) == read == given(f"--{name}={value}")


@pytest.mark.parametrize("value", ["a_b", "logs_of/a_run", "--no_word", "-x_y"])
def test_underscores_of_values_stay(value):
    assert given(f"--experiment_name={value}", "--log_dir", "log_s") == {"experiment_name": value, "log_dir": "log_s"}


@pytest.mark.parametrize("flag", ["--no_compile", "--no_save_last", "--no_attn_gate"])
def test_switches_are_turned_off_with_underscores_too(flag):
    assert list(given(flag).values()) == [False]


def test_resume_without_a_value_is_latest():
    assert given("--resume", "--seed", "1") == {"resume": "latest", "seed": 1}
    assert given("--resume", "logs/x/1") == {"resume": "logs/x/1"}


# --- comments of the fields

RANGE = re.compile(r">=?0|0\.\.1|\w+(\|\w+)+")
WITH = re.compile(r"with (\w+)(?: ([\w|]+))?")
FREE_TEXT = {"experiment_name", "allow_change", "log_dir", "resume", "data", "attention", "kernels"}


def defaults_of(name: str) -> tuple:
    value = getattr(Settings, name)
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_bracket_holds_a_range_then_stages_and_conditions(field):
    """Numbers and choices have a range; whatever else a bracket says is understood by the program, in all parts."""
    first, *rest = bracket(field.name) or [""]
    if field.type == "bool":
        rest = [first, *rest] if first else []
    elif field.name not in FREE_TEXT:
        assert RANGE.fullmatch(first), f"{field.name}: {first!r} is no range"
    for part in rest:
        condition = WITH.fullmatch(part)
        assert part == "per stage" or condition, f"{field.name}: {part!r}"
        if condition:
            other, *values = (word for word in condition.groups() if word)
            assert isinstance(getattr(Settings, other), bool | int | float) or set(values[0].split("|")) <= set(
                bracket(other)[0].split("|"))
    assert ("per stage" in rest) == (field.type in ("ints", "floats") and field.name not in ("stage_ends", "softcap"))


def test_a_value_outside_the_range_is_refused_for_every_field_that_has_one():
    """And one of the wrong kind where words are listed; the defaults are all inside."""
    outside = {">0": 0, ">=0": -1, "0..1": 1.5}
    ranged = [field.name for field in FIELDS if field.type != "bool" and field.name not in FREE_TEXT]
    assert not train_gpt.field_errors(Settings()) and bracket("preset") == ["|".join(["auto", *PRESETS])]
    for name in ranged:
        spec = bracket(name)[0]
        wrong = outside.get(spec, "nothing of it")
        value = (*defaults_of(name), wrong) if isinstance(getattr(Settings, name), tuple) else wrong
        (told,) = train_gpt.field_errors(dataclasses.replace(Settings(), **{name: value}))
        assert told == f"--{name} {value}: must be {spec.replace('|', ' or ').replace('..', ' to ')}"


def test_what_is_computed_and_how_it_runs_have_no_setting_in_common():
    kinds = [{field.name for field in dataclasses.fields(kind)} for kind in (Hyperparameters, RunSettings)]
    assert not kinds[0] & kinds[1] and kinds[0] | kinds[1] == {field.name for field in FIELDS}


# --- what a resumed run must have in common with its checkpoint


def other_value(name: str):
    """A value that differs from the default, whether allowed or not."""
    value = getattr(Settings, name)
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else (*value, 1) if isinstance(value, tuple) else value + 1


def resumed(name: str, fingerprint: str = "same", allow: str = ""):
    """What the check says where this setting of the checkpoint's run differs; its files are JSON."""
    then = dataclasses.replace(Settings(), **{name: other_value(name)}) if name else Settings()
    meta = {"settings": dataclasses.asdict(then), "data": {"fingerprint": fingerprint}}
    return train_gpt.changed_settings(Settings(allow_change=allow), "same", SCRIPT, json.loads(json.dumps(meta)))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Hyperparameters)])
def test_a_resumed_run_must_have_the_same_hyperparameters(name):
    with pytest.raises(UserError) as refused:
        resumed(name)
    head, line = str(refused.value).splitlines()
    assert str(SCRIPT) in head and "start without --resume" in head
    then, now = (json.loads(json.dumps(value)) for value in (other_value(name), getattr(Settings, name)))
    assert line.strip() == f"{name}: {then} in the checkpoint, {now} now"


@pytest.mark.parametrize("name", ["", *(field.name for field in dataclasses.fields(RunSettings))])
def test_a_resumed_run_may_run_otherwise(name):
    assert resumed(name) == {}


def test_changes_that_are_allowed_are_told():
    then, now = other_value("muon_lr"), Settings().muon_lr
    assert resumed("muon_lr", allow="iterations,muon-lr") == {"muon_lr": [then, now]}
    assert resumed("", "other", allow="data_fingerprint") == {"data_fingerprint": ["other", "same"]}
    with pytest.raises(UserError, match="or add --allow-change muon_lr:"):
        resumed("muon_lr", allow="adam_lr")


def test_a_resumed_run_must_have_the_same_data():
    with pytest.raises(UserError, match="data_fingerprint: other in the checkpoint, same now"):
        resumed("", fingerprint="other")


def test_checkpoints_of_before_a_setting_was_there_or_left_are_told_by_name():
    """A new hyperparameter is missing in them; one that left, or a new run setting, is not asked for."""
    settings_then = dataclasses.asdict(Settings()) | {"hellaswag_every": 3}
    del settings_then["xsa"], settings_then["keep"]
    with pytest.raises(UserError) as refused:
        train_gpt.changed_settings(Settings(), "same", SCRIPT, json.loads(json.dumps(
            {"settings": settings_then, "data": {"fingerprint": "same"}})))
    assert [line.strip() for line in str(refused.value).splitlines()[1:]] == ["xsa: None in the checkpoint, True now"]


# --- flags that are wrong


@pytest.mark.parametrize("argv, words", [
    (["--muon-lrr", "1"], ["--muon-lrr", "did you mean --muon-lr?"]),
    (["--batchtokens", "1"], ["--batchtokens", "did you mean --batch"]),
    (["--zzzzzzzz"], ["--zzzzzzzz", "--help lists all flags"]),
    (["--iter", "5"], ["--iter"]),  # no abbreviations: a new flag must not change what an old command means
    (["--iterations", "many"], ["--iterations", "many"]),
    (["--iterations", "1.5"], ["--iterations", "1.5"]),
    (["--muon-lr=--"], ["-- as its value"]),
    (["--iterations", "1.55e1"], ["--iterations", "1.55e1"]),
    (["--iterations", "1e400"], ["--iterations", "1e400"]),
    (["--iterations", "nan"], ["--iterations", "nan"]),
    (["--muon-lr", "fast"], ["--muon-lr", "fast"]),
    (["--batch-tokens", "8,x"], ["--batch-tokens", "8,x"]),
])
def test_unknown_flag_or_wrong_type_is_one_sentence_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main(argv)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words)
    assert "lambda" not in printed.err, "names a piece of the program instead of what was expected"


@pytest.mark.parametrize("argv, said", [
    (["--iterations", "0"], "--iterations 0: must be >0"),
    (["--seed", "-1"], "--seed -1: must be >=0"),
    (["--cooldown", "1.5"], "--cooldown 1.5: must be 0 to 1"),
    (["--muon-lr", "nan"], "--muon_lr nan: must be >=0"),
    (["--schedule", "cosine"], "--schedule cosine: must be linear or wsd"),
    (["--preset", "huge"], "--preset huge: must be auto or cpu or gpu or speedrun or medium"),
    (["--data", ""], "--data: is empty"),
    (["--resume", ""], "--resume: is empty"),
    (["--allow-change", "muon-lr"], "--allow_change: has no effect without --resume"),
    (["--resume", "--allow-change", "muon-lr,speed"], "--allow_change: speed: no such setting"),
    (["--width", "2147483648"], "--width 2.14748e+09: must be below 2147483648"),
    (["--iterations", "1e30"], "--iterations 1e+30: must be below 2147483648"),
    (["--threads", "1000000000000"], "--threads 1e+12: must be below 4096"),
    (["--batch-tokens", str(10**18)], "--batch_tokens 1e+18: must be below 2147483648"),
    (["--num-layers", "100000"], "--num_layers 100000: must be below 2048"),
    (["--width", "9999984", "--head-dim", "48"], "a lower --num_layers, --width"),
    (["--ngram-rows", "2147483646"], "a lower --num_layers, --width"),
    (["--preset", ""], "--preset : must be auto or cpu or gpu or speedrun or medium"),
    (["--device", "tpu"], "--device tpu: must be auto or cpu or cuda"),
    (["--window", "64,0"], "--window (64, 0): must be >0"),
    (["--experiment-name", "a/b"], "--experiment_name 'a/b': use letters"),
    (["--experiment-name", ".."], "--experiment_name '..': use letters"),
    (["--width", "102"], "--width 102 must be a multiple of --head_dim 48"),
    (["--width", "72", "--head-dim", "6"], "that one of 4"),
    (["--width", "8", "--head-dim", "8"], "not below 12"),
    (["--value-embeds", "3"], "--value_embeds 3: each table serves two of 3 layers"),
    (["--attention", "LSXL"], "--attention LSXL: a letter L, S, P or - for each of 3 layers"),
    (["--attention", "LS"], "--attention LS: a letter"),
    (["--muon-momentum", "1"], "must be below 1"),
    (["--warmup-steps", "360"], "--warmup_steps 360 must be less than --iterations 360"),
    (["--window", "64,128"], "--window has 2 values, --stage_ends 1"),
    (["--stage-ends", "0.5,0.9"], "must rise and end with 1.0"),
    (["--stage-ends", "0.5,0.5,1"], "must rise and end with 1.0"),
    (["--batch-tokens", "8000"], "--batch_tokens 8000 must be a multiple of --seq_len 256"),
    (["--micro-tokens", "255"], "--micro_tokens 255 is less than one row of --seq_len 256 tokens"),
    (["--backend", "flex"], "--backend flex trains only compiled and on CUDA"),
    (["--softcap", "0"], "--softcap (0.0,): three numbers a,b,c, a and c above 0; 0,0,1 is no cap"),
    (["--softcap", "30,0,0"], "--softcap (30.0, 0.0, 0.0): three numbers a,b,c"),
    (["--softcap", "0,5,7.5"], "--softcap (0.0, 5.0, 7.5): three numbers a,b,c"),  # neither a cap nor none
    (["--seq-len", "250", "--batch-tokens", "5000", "--fp8-mlp"], "--seq_len 250: FP8 needs a multiple of 16"),
    (["--width", "200", "--head-dim", "40", "--fp8-head", "on"], "--width 200: FP8 needs a multiple of 16"),
])
def test_a_setting_that_cannot_work_is_named_with_what_is_allowed(argv, said):
    told = problems(*argv)
    assert said in told and told.startswith("1 setting(s) cannot work:")


@pytest.mark.parametrize("argv, said", [
    (["--iterations", "0", "--seed", "-1", "--skip", "x"], ["--iterations 0", "--seed -1", "--skip x"]),
    (["--width", "102", "--value-embeds", "3", "--warmup-steps", "999", "--batch-tokens", "8000"],
     ["--width 102", "--value_embeds 3", "--warmup_steps 999", "--batch_tokens 8000"]),
    (["--window", "1,2", "--seq-len", "1,2"], ["--window has 2", "--seq_len has 2"]),
    (["--backend", "flex", "--value-embeds", "3"], ["--backend flex", "--value_embeds 3"]),  # machine and model
    (["--keep", "-1", "--kernels", "gramm"], ["--keep -1", "--kernels gramm: gramm is none", "--kernels gramm needs"]),
])
def test_all_problems_are_told_at_once(argv, said):
    told = problems(*argv)
    assert told.startswith(f"{len(said)} setting(s)") and all(part in told for part in said)


@pytest.mark.parametrize("world_size, ok", [(1, True), (2, True), (3, False), (4, True), (5, False), (8, False)])
def test_rows_must_divide_among_the_processes(world_size, ok):
    argv = ["--batch-tokens", "1024", "--seq-len", "256"]  # 4 rows
    if ok:
        parse_settings(["--device", "cpu", *argv], world_size)
    else:
        told = problems(*argv, world_size=world_size)
        assert f"{world_size} processes cannot share the 4 rows" in told and "use 1, 2, 4 processes" in told


def test_each_stage_is_checked():
    told = problems("--stage-ends", "0.5,1", "--seq-len", "256,100", "--batch-tokens", "8192")
    assert "--batch_tokens 8192 must be a multiple of --seq_len 100" in told


def test_compiling_on_a_cpu_wants_a_compiler(monkeypatch):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda command: None)
    assert "--compile on a CPU needs a C++ compiler" in problems("--compile")
    parse_settings(["--device", "cpu", "--no-compile"], 1)


@pytest.mark.parametrize("argv", [["--backend", "flex"], []], ids=["asked for", "chosen"])
def test_flex_wants_rows_of_whole_blocks(argv, monkeypatch):
    """Also where `auto` chooses it: else the run ends in a traceback out of the block mask."""
    rows = ["--preset", "gpu", "--seq-len", "1000", "--batch-tokens", "8000"]
    with pytest.raises(UserError, match="multiples of 128"):
        parse(*rows, *argv, hardware=H100, monkeypatch=monkeypatch)


# --- presets and automatic choices


@pytest.mark.parametrize("preset, hardware, world_size", [
    ("cpu", CPU, 1), ("cpu", CPU, 2), ("cpu", CPU, 4), ("t4", V100, 1), ("one", H100, 1),
    *[(name, H100, n) for name in ("gpu", "speedrun", "medium") for n in (1, 2, 4, 8) if (name, n) != ("medium", 1)],
])
def test_presets_are_coherent(preset, hardware, world_size, monkeypatch):
    s = parse("--preset", preset, hardware=hardware, world_size=world_size, monkeypatch=monkeypatch)
    assert (s.preset, s.device) == (preset, hardware.device) and s.dtype == ("bf16" if hardware.bf16 else "fp32")
    assert s.warmup_steps + s.momentum_warmup + s.momentum_cooldown <= s.iterations
    assert 0 < s.window_start <= s.window[-1] <= s.seq_len[-1]
    assert all(size % s.window_step == 0 for size in (s.window_start, *s.window))
    assert s.eval_tokens >= s.eval_seq_len == s.seq_len[-1]
    for stage in stage_table(s):
        rows = stage.micro_rows(s, world_size)
        assert rows * stage.seq_len <= s.micro_tokens and stage.batch_tokens % (rows * stage.seq_len * world_size) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_override_presets_and_nothing_else_changes(preset, monkeypatch):
    machine = dict(hardware=H100, world_size=8, monkeypatch=monkeypatch)
    plain = parse("--preset", preset, **machine)
    other = parse("--preset", preset, "--muon_lr", "0.123", "--iterations", "2000", **machine)
    assert other == dataclasses.replace(plain, muon_lr=0.123, iterations=2000) != plain
    for name, value in PRESETS[preset].items():
        assert getattr(plain, name) == value


@pytest.mark.parametrize("hardware, world_size, fineweb, preset, why", [
    (CPU, 1, True, "cpu", "no CUDA device"),
    (V100, 1, True, "t4", "1 process(es) on Tesla V100-SXM2-16GB of 16 GiB, without bf16"),
    (H100, 8, True, "speedrun", "8 process(es) on NVIDIA H100 80GB HBM3 of 80 GiB, and fineweb10B is there"),
    (H100, 8, False, "gpu", "speedrun wants 8 with 25 GiB free, and data/fineweb10B"),
    (H100, 4, True, "gpu", "4 process(es)"),
])
def test_auto_chooses_by_machine_and_data(hardware, world_size, fineweb, preset, why, monkeypatch, tmp_path):
    if fineweb:
        (tmp_path / "fineweb10B").mkdir()
    monkeypatch.setattr(train_gpt, "data_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device: hardware)
    s, _, notes = parse_settings([], world_size)
    assert s.preset == preset and notes[0].startswith(f"preset {preset}: ") and why in notes[0]
    assert s.data == ("stdlib" if preset == "cpu" or not fineweb else "fineweb10B")
    assert any(note.startswith(f"dtype {s.dtype}: ") and hardware.why in note for note in notes)
    assert "auto" not in dataclasses.asdict(s).values(), "an automatic choice was left open"


def test_auto_is_resolved_by_process_count_and_compilation(monkeypatch):
    def parsed(*argv, n=1):
        return parse("--preset", "gpu", *argv, hardware=H100, world_size=n, monkeypatch=monkeypatch)
    assert (parsed().backend, parsed().compile_unit, parsed(n=2).compile_unit) == ("flex", "model", "block")
    assert parsed("--no-compile").backend == "sdpa" and parsed("--compile-unit", "model", n=2).compile_unit == "model"
    assert parsed("--device", "cpu", "--seq-len", "256", "--ngram-rows", "0").backend == "sdpa"
    assert parsed("--dtype", "fp32").dtype == "fp32"


def test_auto_attention_is_long_first_at_a_third_and_last():
    assert train_gpt.auto_attention(12, paired=False) == "LSSSLSS-SSSL"
    assert train_gpt.auto_attention(12, paired=True) == "LSPSLPS-PSSL"
    assert train_gpt.auto_attention(4, paired=False) == "LLSL" and train_gpt.auto_attention(1, paired=True) == "L"


def test_the_choices_and_the_derived_numbers_are_printed(tmp_path, capsys):
    """Preset left to `auto`: on a CPU without a CUDA device it says so."""
    assert train_gpt.main(tiny(tmp_path, iterations=1)) == 0
    out = capsys.readouterr().out
    for line in ("preset cpu: no CUDA device", "backend sdpa: the fastest here", "attention LL: for 2 layers"):
        assert f"{line}\n" in out
    assert "dtype fp32:" not in out and "device cpu:" not in out, "asked for: nothing was chosen"


@pytest.mark.parametrize("load, warned", [(0.0, False), (1000.0, True)])
def test_a_machine_that_others_use_is_told(load, warned, tmp_path, monkeypatch, capsys):
    """On a CPU; a GPU's steps do not wait for the cores."""
    monkeypatch.setattr(train_gpt.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert train_gpt.main(tiny(tmp_path, iterations=1)) == 0
    words = f"WARNING: load {load:.1f} on {train_gpt.os.cpu_count()} cores:"
    assert (words in capsys.readouterr().out) == warned
    assert any(words in note for note in train_grokking.parse_settings([])[1]) == warned
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device="auto": H100)
    assert not any("WARNING" in note for note in train_gpt.parse_settings([], 1)[2])


@pytest.mark.parametrize("argv, hardware", [
    ([], CPU), ([], H100), (["--mup", "--width", "384"], CPU), (["--dtype", "fp32", "--backend", "sdpa"], H100),
], ids=str)
def test_there_is_one_note_for_each_automatic_choice(argv, hardware, monkeypatch):
    """`name value: reason` for what the command line and the preset leave open, with the value that is taken."""
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device: hardware)
    s, _, (first, *notes) = parse_settings(argv, 1)
    assert re.fullmatch(rf"preset {s.preset}: .+", first)
    open_ones = {**dataclasses.asdict(Settings()), **PRESETS[s.preset], **given(*argv)}
    told = [re.fullmatch(r"(\w+) (\S+): (.+)", note).groups() for note in notes]
    names = [name for name, _, _ in told]
    assert len(set(names)) == len(names) and all(str(getattr(s, name)) == value for name, value, _ in told)
    chosen = {name for name, value in open_ones.items() if value == "auto" and name != "preset"} | {"eval_seq_len"}
    chosen |= set() if open_ones["micro_tokens"] else {"micro_tokens"}
    assert set(names) == chosen | ({"base_width", "base_head_dim"} if s.mup else set())


def test_automatic_numbers_stay_numbers(monkeypatch):
    """config.json and the checkpoints hold them."""
    for argv in ([], ["--mup"]):
        s = parse("--preset", "cpu", *argv, monkeypatch=monkeypatch)
        wrong = {f.name: getattr(s, f.name) for f in FIELDS if f.type == "int" and type(getattr(s, f.name)) is not int}
        assert not wrong


# --- stages and schedules

THREE = dict(iterations=100, stage_ends=(0.25, 0.5, 1.0), batch_tokens=(64, 128, 256), seq_len=32, window=(32, 48, 64),
             window_start=16, window_step=8, stage_lr=(1.0, 1.5, 0.5), max_doc_len=(32, 16, 0), mtp=(2, 1, 0))


def test_stage_table_broadcasts_single_values():
    assert stage_table(settings(**THREE)) == [
        Stage(0, 25, 16, 64, 32, 32, 32, 2, 0, 1.0),
        Stage(25, 50, 32, 128, 32, 16, 48, 1, 0, 1.5),
        Stage(50, 100, 48, 256, 32, 0, 64, 0, 0, 0.5),
    ]


def test_stage_at_covers_every_step_and_those_past_the_end():
    stages = stage_table(settings(**THREE))
    found = [stages.index(train_gpt.stage_at(stages, step)) for step in range(102)]
    assert found == [0] * 25 + [1] * 25 + [2] * 52


def test_window_start_zero_is_the_window_of_the_first_stage():
    s = settings(window_start=0, window=48)
    assert {train_gpt.window_at(s, stage_table(s), step) for step in range(s.iterations + 1)} == {48}


@pytest.mark.parametrize("seq_len, batch, micro, world_size, rows", [
    (32, 256, 256, 1, 8), (32, 256, 128, 1, 4), (32, 256, 100, 1, 2), (32, 256, 32, 1, 1), (32, 256, 128, 2, 4),
    (32, 256, 128, 8, 1), (32, 192, 128, 1, 3), (32, 224, 200, 1, 1),  # 7 rows: 1 or 7
])
def test_micro_rows_fit_and_divide_the_share(seq_len, batch, micro, world_size, rows):
    s = settings(seq_len=seq_len, batch_tokens=batch, micro_tokens=micro)
    assert stage_table(s)[0].micro_rows(s, world_size) == rows


def test_learning_rate_warms_up_holds_and_falls_to_the_floor():
    s = settings(iterations=100, warmup_steps=10, cooldown=0.5, lr_floor=0.1)
    scale = {step: train_gpt.lr_scale(s, stage_table(s), step) for step in range(100)}
    assert scale[0] == pytest.approx(0.1) and scale[4] == pytest.approx(0.5)
    assert all(scale[step] == 1 for step in range(9, 51))
    assert scale[75] == pytest.approx(0.1 + 0.9 * 0.5) and scale[99] == pytest.approx(0.1 + 0.9 * 0.02)
    assert all(scale[step] > scale[step + 1] for step in range(50, 99))


def test_wsd_falls_by_one_minus_square_root():
    s = settings(iterations=100, cooldown=0.2, lr_floor=0.0, schedule="wsd", warmup_steps=4)
    scale = [train_gpt.lr_scale(s, stage_table(s), step) for step in range(100)]
    assert scale[0] == 0.25 and scale[3:81] == [1.0] * 78
    assert scale[85] == pytest.approx(1 - math.sqrt(0.25)) and scale[95] == pytest.approx(1 - math.sqrt(0.75))


def test_learning_rate_without_warm_up_and_cool_down_is_the_factor_of_the_stage():
    s = settings(**{**THREE, "cooldown": 0.0})
    assert [train_gpt.lr_scale(s, stage_table(s), step) for step in (0, 24, 25, 50, 99)] == [1.0, 1.0, 1.5, 0.5, 0.5]


def test_momentum_rises_holds_and_falls():
    s = settings(iterations=100, momentum_start=0.85, muon_momentum=0.95, momentum_warmup=20, momentum_cooldown=10)
    known = {0: 0.85, 10: 0.90, 20: 0.95, 50: 0.95, 90: 0.95, 95: 0.90, 99: 0.86, 100: 0.85}
    assert {step: train_gpt.momentum_at(s, step) for step in known} == pytest.approx(known)
    flat = settings(momentum_warmup=0, momentum_cooldown=0, muon_momentum=0.9)
    assert train_gpt.momentum_at(flat, 1) == pytest.approx(0.9)


@pytest.mark.parametrize("changes", [
    THREE, dict(iterations=97, window=50, window_start=7, window_step=12), dict(window=1, window_start=1),
])
def test_window_grows_in_multiples_of_window_step(changes):
    s = settings(**changes)
    windows = [train_gpt.window_at(s, stage_table(s), step) for step in range(s.iterations + 1)]
    assert windows == sorted(windows) and all(size % s.window_step == 0 for size in windows)
    assert windows[-1] == math.ceil(s.window[-1] / s.window_step) * s.window_step


def test_window_at_known_points():
    s = settings(**THREE)
    known = {0: 16, 1: 24, 12: 24, 13: 32, 25: 32, 26: 40, 50: 48, 75: 56, 100: 64}
    assert {step: train_gpt.window_at(s, stage_table(s), step) for step in known} == known


# --- derived numbers


def visible_keys(s: Settings) -> float:
    """Average number of keys a query sees, summed over the layers, counted in the masks that the model really uses at
    the last step, for a row of whole documents of max_doc_len."""
    stage, model = stage_table(s)[-1], train_gpt.GPT(s, 50)
    docs = (torch.arange(stage.seq_len) // (stage.max_doc_len or stage.seq_len))[None]
    window = torch.tensor(train_gpt.window_at(s, [stage], stage.end))
    masks = model.masks(docs, window)
    return sum(masks[layer].sum().item() / stage.seq_len for layer in s.attention if layer != "-")


@pytest.mark.parametrize("changes", [
    dict(window=64, window_start=64),  # the whole causal row
    dict(window=16, window_start=16),
    dict(window=32, attention="LS-L", num_layers=4),
    dict(window=64, max_doc_len=16),
    dict(window=1000, attention="SS"),
    dict(window=24, attention="LS", window_step=8),  # half a window is rounded up, as in the medium preset
    dict(window=20, attention="LL", window_step=8),  # so is a window
], ids=str)
def test_flops_count_the_pairs_that_attention_computes(changes):
    s = settings(**{"seq_len": 64, "eval_seq_len": 64, "max_doc_len": 0, "batch_tokens": 64, **changes})
    counts = {"matmul": 1000}
    attention = train_gpt.flops_per_token(s, counts, stage_table(s)[-1]) - 6 * 1000
    assert attention == pytest.approx(3 * 2 * 2 * s.width * visible_keys(s))  # q.k and p.v, 2 each; backward twice that


def test_parameter_counts_by_hand():
    s = settings(num_layers=4, width=32, head_dim=16, value_embeds=2, attention="LS-L", mlp_ratio=4)
    counts = train_gpt.parameter_counts(train_gpt.GPT(s, 130))  # a vocabulary of 130 is padded to 256
    hidden = 3 * 4 * 32 * 32 + 4 * 2 * 128 * 32
    small = (12 + 1) + 4 * 2 * 2 * 12 + 4 * 6  # smear, gates, scalars
    assert counts == {"embedding": 3 * 256 * 32, "hidden": hidden, "head": 256 * 32, "small": small,
                      "total": 4 * 256 * 32 + hidden + small, "active": 4 * 256 * 32 + hidden + small,
                      "matmul": hidden + 256 * 32}


def test_flops_of_the_speedrun_by_hand():
    """11 layers with attention (3 of them long, 3 with paired heads, which see twice as many keys; queries and keys of
    the 8 short ones of half the size) and 12 MLPs of width 768; the pointer; documents of at most 896 tokens, long
    windows of 384. In the head 10,240 candidates; in the last stages the whole padded head."""
    s = Settings(**{**PRESETS["speedrun"], "attention": "LSPSLPS-PSSL"})
    counts = {"matmul": 10**8 + 50304 * 768, "head": 50304 * 768}
    long, short = 384 - 384 * 383 / (2 * 896), 256 - 256 * 255 / (2 * 896)
    expected = 6 * (10**8 + 10240 * 768) + 12 * 768 * (3 * long + 0.75 * (5 + 2 * 3) * short) + 6 * 128 * 896 / 2
    assert train_gpt.flops_per_token(s, counts, stage_table(s)[0]) == pytest.approx(expected)
    whole = train_gpt.flops_per_token(s, counts, stage_table(s)[4])
    fewer = train_gpt.flops_per_token(s, counts, stage_table(s)[4]._replace(candidates=10240))
    assert whole - fewer == pytest.approx(6 * 768 * (50304 - 10240))


def test_the_speedrun_has_the_tokens_of_record_92():
    s = Settings(**PRESETS["speedrun"])
    stages = stage_table(s)
    assert [stage.end for stage in stages] == [320, 681, 965, 1107, 1174, 1194]
    assert sum((t.end - t.start) * t.batch_tokens for t in stages) == 328_663_040
    rates = [train_gpt.lr_scale(s, stages, step) for step in range(1194)]
    assert rates[1174:] == pytest.approx([1.73 * s.lr_floor] * 20) and rates[1106] > rates[1173] * 1.1


@pytest.mark.parametrize("gpu, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA B200", 2250e12), ("NVIDIA L4", 121e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12),
])
def test_mfu_is_achieved_over_peak(gpu, peak):
    assert train_gpt.model_flops_utilization(1e6, 1e9, gpu, 8) == pytest.approx(1e15 / (8 * peak))


@pytest.mark.parametrize("gpu", ["AMD EPYC 9654", "Intel Xeon H1000", "Tesla T4", ""])
def test_mfu_is_unknown_where_the_peak_is(gpu):
    assert train_gpt.model_flops_utilization(1e6, 1e9, gpu, 1) is None


def test_bits_per_byte():
    meta = {"splits": {"val": {"tokens": 500, "bytes": 2000}}}
    assert train_gpt.bits_per_byte(math.log(2), meta) == pytest.approx(0.25)  # one bit a token, four bytes a token
    bytes_only = {"splits": {"val": {"tokens": 7, "bytes": 7}}}
    assert train_gpt.bits_per_byte(2 * math.log(256), bytes_only) == pytest.approx(16)
    for split in ({"tokens": 500, "bytes": None}, {"bytes": 100}, {}, None):
        assert train_gpt.bits_per_byte(1.0, {"splits": {"val": split}}) is None
    assert train_gpt.bits_per_byte(1.0, train_gpt.GPT2_META) is None
