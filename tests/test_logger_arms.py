"""Which logs belong to a record: arms, cells, copies, code versions; verdicts over them; the board's choice."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_logger_commands import BAR, CODE, QUICK, command, error, log_text, make_ours, numbers

import logger
from runlogs import arms, judging, leaderboard

ALPHA = 0.01


def machine(count=8, name="NVIDIA H100 80GB HBM3", date=None, torch="2.9.0"):
    """What a log says of its machine: nvidia-smi's table with `count` GPUs."""
    rows = "".join(f"|   {i}  {name}          On  |   00000000:0{i}:00.0 Off |          0 |\n" for i in range(count))
    return f"Running Python 3.11.1\nRunning PyTorch {torch} compiled for CUDA 12.6\n{date or ''}\n{rows}"


def day(minute, hour=7):
    return f"Mon Aug 31 {hour:02}:{minute:02}:00 2026"


def write(path, *args, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(log_text(*args, **options))
    return path


def group(folder, losses, seconds=10.0, name="run", **options):
    """A log for each loss, milliseconds apart, in a folder that may be there."""
    for i, loss in enumerate(losses):
        write(folder / f"{name}_{i}.txt", loss, seconds + i / 1000, **options)
    return folder


def console(path, *runs):
    """A capture of a terminal: step lines alone, of several (loss, seconds)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(log_text(*run).rpartition(BAR)[2] for run in runs))
    return path


def evidence(*names):
    return arms.evidence_of([str(name) for name in names])


def counts(found):
    return {arm.name: [len(cell.samples) for cell in arm.cells] for arm in found.arms}


GOOD, BAD = [3.2750, 3.2760, 3.2770, 3.2780, 3.2764], [3.2805, 3.2799, 3.2812, 3.2796, 3.2808]


# -- arms


@pytest.mark.parametrize("inside,arm", [
    ("a.txt", "record"), ("this_pr/a.txt", "record"), ("this_record/a.txt", "record"), ("record/a.txt", "record"),
    ("logs/a.txt", "record"), ("runs/2026/a.txt", "record"), ("pr299/a.txt", "record"),
    ("prefix-1375-8x/a.txt", "record"),
    ("baseline/a.txt", "baseline"), ("BASELINE_retime/a.txt", "baseline"), ("12-19-Baseline/a.txt", "baseline"),
    ("xsa-baseline-s1385/a.txt", "baseline"), ("baseline2/a.txt", "baseline"), ("master-s1480/a.txt", "baseline"),
    ("deep/logs/baseline_pr299/x/a.txt", "baseline"), ("logs/baseline3-1.txt", "baseline"),
    ("single_gpu_baseline.txt", "baseline"), ("dev_baseline/a.txt", "baseline"),
    ("dev_1194/a.txt", "dev_1194"), ("smoke/a.txt", "smoke"), ("smoke_2/x/a.txt", "smoke_2"),
    ("provenance-old/a.txt", "provenance-old"), ("hparam_lr/a.txt", "hparam_lr"), ("logs/Sweep/a.txt", "logs/Sweep"),
    ("ablations/a.txt", "ablations"), ("extra/a.txt", "extra"), ("prior/a.txt", "prior"),
    ("device/a.txt", "record"), ("baselined/a.txt", "baseline"), ("remastered/a.txt", "record"),
    ("priority/a.txt", "record"), ("extraction/a.txt", "record"),
])
def test_the_name_of_a_folder_says_the_arm(tmp_path, inside, arm):
    assert arms.arm_name(tmp_path / inside, tmp_path) == arm


def test_the_name_that_is_given_does_not_say_the_arm(tmp_path):
    """stats FOLDER/baseline is about the baseline; FOLDER/* and FOLDER/a FOLDER/baseline have both arms."""
    record = tmp_path / "baseline" / "record"
    group(record / "this_pr", GOOD)
    group(record / "baseline", BAD, 12.0)
    assert counts(evidence(record)) == {"record": [5], "baseline": [5]}
    assert counts(evidence(record / "baseline")) == counts(evidence(record / "baseline" / "run_0.txt", *(
        record / "baseline").glob("run_[1-4]*"))) == {"record": [5]}
    assert counts(evidence(str(record / "*"))) == counts(evidence(record / "this_pr", record / "baseline")) == {
        "record": [5], "baseline": [5]}


def test_an_only_arm_is_the_record(tmp_path):
    group(tmp_path / "baseline", GOOD)
    found = evidence(tmp_path)
    assert counts(found) == {"record": [5]} and found.notes == ["all runs are of baseline: taken as the record"]


def test_side_folders_are_never_pooled(tmp_path, capsys):
    group(tmp_path, BAD)
    for name in ("dev_1194", "smoke", "provenance", "hparam_lr"):
        group(tmp_path / name, GOOD, 20.0 + len(name))
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28, code=1)
    assert found["n"] == 5 and found["mean_val_loss"] == pytest.approx(sum(BAD) / 5)
    assert {name: arm["n"] for name, arm in found["other_arms"].items()} == dict.fromkeys(
        ("dev_1194", "smoke", "provenance", "hparam_lr"), 5)
    assert found["baseline"] is found["difference"] is None


def test_record_and_baseline_come_first(tmp_path):
    for i, name in enumerate(("ablation", "baseline", "this_pr", "smoke")):
        group(tmp_path / name, GOOD[:2], 10.0 + i)
    assert [arm.name for arm in evidence(tmp_path).arms] == ["record", "baseline", "ablation", "smoke"]


# -- code versions


SAME = {
    "comments": CODE.replace("  # of training", "  # how long # it runs").replace("import os", "# more\nimport os"),
    "docstrings": CODE.replace('"""Rate at a step."""', "r'''Another\ntext, on two lines.'''").replace(
        '"""Settings."""', ""),
    "blank lines": CODE.replace("\n\n\n", "\n\n   \n\n\n").replace("import os\n", "import os\n\n"),
    "indentation": CODE.replace("    ", "  "),
    "blanks": CODE.replace("RATE, BLOCK = 0.05, 64", "RATE,BLOCK  =  0.05,64").replace("\n", "\r\n"),
    "line breaks in brackets": CODE.replace("dict(width=192,", "dict(\n  width=192,  # wide\n"),
    "continued lines": CODE.replace("RATE, BLOCK =", "RATE, BLOCK \\\n  ="),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_what_does_not_run_is_no_version(text):
    assert text != CODE and arms.code_of({"a.py": text}) == arms.code_of({"a.py": CODE})


OTHER = {
    "a number": CODE.replace("0.05", "0.06"), "a string": CODE.replace('"cpu"', '"cpu2"'),
    "depth": CODE.replace("        return 1.0\n", "        return 1.0\n    x = 1\n").replace(
        "    return 0.1", "return 0.1"),
    "a nested block": CODE.replace("    helper()\n", "helper()\n"),
    "a hash in a string": CODE.replace('"gpu"', '"gpu#1"'),
    "an operator": CODE.replace("self.steps *", "self.steps **"),
    "a string that is used": CODE + 'x = """text"""\n', "a line less": CODE.replace("    helper()\n", "    pass\n"),
}


@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER)
def test_what_runs_is_a_version(text):
    assert arms.code_of({"a.py": text}) != arms.code_of({"a.py": CODE})


@pytest.mark.parametrize("line", [
    "SEED = {}", "    seed: int = {}", "torch.manual_seed({} + rank)", "f(lr=1, seed={}, x=2)", "run_id = '{}'",
    "args = dict(run_name=f'{}-b', lr=3)", "runid='{}'",
])
def test_seeds_and_names_are_no_version(line):
    one, two = (arms.code_of({"a.py": line.format(n)}) for n in (1, 22))
    assert one == two
    assert arms.code_of({"a.py": line.format(1) + "\nlr = 1"}) != arms.code_of({"a.py": line.format(1) + "\nlr = 2"})


def test_values_beside_a_seed_count():
    assert arms.code_of({"a": "f(seed=1, lr=1)"}) != arms.code_of({"a": "f(seed=1, lr=2)"})
    assert arms.code_of({"a": "f(g(seed=1), 1)"}) != arms.code_of({"a": "f(g(seed=1), 2)"})


@pytest.mark.parametrize("line", [
    "seed = 1; lr = {}", "if seed: lr = {}", "steps = 5 if seed else {}", "lr = seed * {}", "num_seed_tokens = {}",
    "lr = 1 if run_id == 'a' else {}", "while seed: lr = {}", "lr = seed and {}",
])
def test_no_other_value_is_taken_for_a_seed(line):
    assert arms.code_of({"a.py": line.format(1)}) != arms.code_of({"a.py": line.format(2)})


def test_files_and_other_languages_are_part_of_the_version():
    rust = "fn main() { // a\n let x = 1; /* b\n c */ }\n"
    assert arms.code_of({"a.rs": rust}) == arms.code_of({"a.rs": "fn main() {\n let x = 1; }"})
    assert arms.code_of({"a.rs": rust}) != arms.code_of({"a.rs": rust.replace("1", "2")})
    assert arms.code_of({"a.cu": "#define A 1"}) != arms.code_of({"a.cu": "#define A 2"})
    assert arms.code_of({"a.py": "x", "b.py": "y"}) != arms.code_of({"a.py": "x\ny"})
    assert arms.code_of({"a.py": "x // y"}) != arms.code_of({"a.py": "x // z"})


def test_a_source_of_remarks_alone_is_told_apart_by_its_text(tmp_path):
    group(tmp_path / "a", GOOD, code="# stand-in for the record\n")
    group(tmp_path / "b", BAD, 11.0, code="# stand-in for the other\n")
    assert arms.code_of({"a.py": "# stand-in\n"}) is None and counts(evidence(tmp_path)) == {"record": [5, 5]}


@QUICK
@given(st.text(alphabet="\"'\\#/* \n\tab1([{}])rf,=seed", max_size=60))
def test_any_text_has_a_version(text):
    for name in ("a.py", "a.rs"):
        assert len(arms.code_of({name: "x = 1\n" + text})) == 12


def test_what_follows_an_open_bracket_counts():
    """The source was cut, or is of a newer Python."""
    assert arms.code_of({"a.py": "f(\nx = 1"}) != arms.code_of({"a.py": "f(\nx = 2"})
    assert arms.code_of({"a.py": "f(\nx = 1"}) == arms.code_of({"a.py": "f(\nx = 1\n\n"}) is not None


PIECES = ['"""', "'''", '"""\\', "/*", "(", "'", '"\\', "a ", "\n" + 9 * " " + "a", "seed", "\\\n"]


@pytest.mark.parametrize("piece", PIECES)
def test_the_time_of_a_version_is_linear(piece):
    start = time.process_time()
    for name in ("a.py", "a.rs"):
        arms.code_of({name: piece * (300_000 // len(piece))})
    assert time.process_time() - start < 5


def test_settings_of_our_runs_are_part_of_the_version(tmp_path):
    for i in range(2):
        make_ours(tmp_path / "runs" / f"a{i}", [4.0, 3.0 + i / 100], seed=i)
    make_ours(tmp_path / "runs" / "b", [4.0, 3.1], width=64)
    assert counts(evidence(tmp_path)) == {"record": [2, 1]}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change", ["data", "git", "resume"])
def test_data_commit_and_changes_on_resume_are_part_of_the_version(tmp_path, capsys, change):
    for i in range(3):
        run = make_ours(tmp_path / f"r{i}", [4.0, 3.0 + i / 100], seed=i)
        edit(run / "config.json", data={"fingerprint": "b" if i and change == "data" else "a"},
             git={"commit": "0" * 40 if i and change == "git" else "1" * 40})
        if change == "git":  # without a source the commit stands for it
            (run / "log.txt").unlink()
    if change == "resume":
        event = {"event": "resume", "step": 1, "config": {}, "changed": {"muon_lr": [0.1, 0.9]}}
        first, rest = (tmp_path / "r0/metrics.jsonl").read_text().split("\n", 1)
        (tmp_path / "r0/metrics.jsonl").write_text(f"{first}\n{json.dumps(event)}\n{rest}")
    assert counts(evidence(tmp_path)) == {"record": [2, 1]}
    said = any("no log holds a source" in text for text in numbers(capsys, "stats", tmp_path)["warnings"])
    assert said == (change == "git")
    (tmp_path / "README.md").write_text("# Runs\n")
    checks = numbers(capsys, "verify", tmp_path, code=1)["checks"]
    words = {"data": "data", "git": "commit", "resume": "changes on resume"}[change]
    assert [(c["verdict"], f"other {words}" in c["detail"]) for c in checks if c["kind"] == "code"] == [
        ("contradicted", True)]


# -- cells


def test_cells_are_of_one_version_machine_count_and_last_step(tmp_path):
    group(tmp_path / "a", GOOD, machine=machine())
    group(tmp_path / "b", GOOD[:4], 80.0, machine=machine(1))
    group(tmp_path / "c", GOOD[:3], 9.0, machine=machine(name="NVIDIA H200"))
    group(tmp_path / "d", GOOD[:2], 7.0, machine=machine(), count=8)
    group(tmp_path / "e", GOOD[:1], 8.0, machine=machine(), code=CODE + "x = 1\n")
    arm = evidence(tmp_path).arm("record")
    assert [len(cell.samples) for cell in arm.cells] == [5, 4, 3, 2, 1]
    assert [(cell.hardware, cell.processes, cell.steps) for cell in arm.cells][1:4] == [
        ("NVIDIA H100 80GB HBM3", 1, 4), ("NVIDIA H200", 8, 4), ("NVIDIA H100 80GB HBM3", 8, 8)]
    assert all(words in arm.mixture for words in (
        "2 code versions: 14 of ", "2 kinds of hardware: 12 of NVIDIA H100 80GB HBM3, 3 of NVIDIA H200",
        "2 numbers of processes: 11 of 8, 4 of 1", "2 final steps: 13 of 4, 2 of 8"))
    code = arm.cells[0].code
    assert arm.cells[1].label == f"{code}, NVIDIA H100 80GB HBM3, 1 process, step 4"


def test_one_cell_is_no_mixture(tmp_path):
    arm = evidence(group(tmp_path, GOOD, machine=machine())).arm("record")
    assert (arm.mixture, arm.cells[0].label, arm.cells[0].processes) == ("", "all", 8)


def test_a_log_that_does_not_say_what_ran_is_not_known_to_be_the_same(tmp_path, capsys):
    """A console capture has neither source nor hardware."""
    group(tmp_path, GOOD, machine=machine())
    console(tmp_path / "z.txt", (3.2755, 10.5))
    arm = evidence(tmp_path).arm("record")
    assert [len(cell.samples) for cell in arm.cells] == [5, 1] and arm.cells[1].code is None
    assert "2 code versions: 5 of " in arm.mixture and "1 of unknown" in arm.mixture
    assert numbers(capsys, "stats", tmp_path, "--target", 3.28, code=1)["passed"] is None
    assert numbers(capsys, "stats", tmp_path, "--target", 3.28, "--cell", arm.cells[0].label)["passed"]


def test_one_fact_that_is_missing_is_enough(tmp_path):
    group(tmp_path, GOOD, machine=machine())
    group(tmp_path / "b", GOOD[:4], 10.1, machine="Running PyTorch 2.9.0\n")
    assert evidence(tmp_path).arm("record").mixture == (
        "the runs are of 2 kinds of hardware: 5 of NVIDIA H100 80GB HBM3, 4 of unknown; "
        "2 numbers of processes: 5 of 8, 4 of unknown")


def test_logs_that_say_nothing_are_one_cell_if_their_steps_take_as_long(tmp_path, capsys):
    console(tmp_path / "a.txt", (3.2755, 10.5), (3.2756, 10.6))
    console(tmp_path / "b.txt", (3.2757, 10.7))
    assert counts(evidence(tmp_path)) == {"record": [3]} and not evidence(tmp_path).arm("record").mixture
    assert numbers(capsys, "stats", tmp_path)["warnings"] == [
        "no log holds a source: that the runs are of one version is not shown"]
    console(tmp_path / "c.txt", (3.2758, 16.0))
    arm = evidence(tmp_path).arm("record")
    assert [len(cell.samples) for cell in arm.cells] == [4]
    assert arm.mixture == "the runs do not name their machine, and a step takes 2,625.00 to 4,000.00 ms"
    for cell in ((), ("--cell", "all")):
        assert numbers(capsys, "stats", tmp_path, "--target", 3.28, *cell, code=1)["passed"] is None
    group(tmp_path / "named", [3.27, 3.271], 10.0, machine=machine())
    write(tmp_path / "named" / "slow.txt", 3.272, 20.0, machine=machine())
    assert not evidence(tmp_path / "named").arm("record").mixture  # one machine, by name: slow as it may be


@pytest.mark.parametrize("count,slow,parts", [(8, 30.0, [5, 1]), (8, 29.0, [6]), (8, 90.1, [5, 1])])
def test_a_much_slower_run_had_fewer_processes(tmp_path, capsys, count, slow, parts):
    """nvidia-smi lists the GPUs of the machine, used or not."""
    group(tmp_path, [*GOOD, 3.2755], machine=machine(count))
    write(tmp_path / "run_5.txt", 3.2755, slow, machine=machine(count))
    assert counts(evidence(tmp_path)) == {"record": parts}
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28, code=len(parts) - 1)
    words = f"{9 if slow > 90 else 3}x slower steps"
    assert found["passed"] is (None if parts[1:] else True)
    assert found["mixture"] == (f"the runs are of 2 paces: 5 of usual steps, 1 of {words}" if parts[1:] else "")
    assert [cell["label"] for cell in found["cells"]][1:] == [words] * len(parts[1:])


@pytest.mark.parametrize("time", ["1e31", "-5", "0", "nan"])
def test_odd_times_are_no_pace(tmp_path, time):
    group(tmp_path, GOOD, machine=machine())
    text = (tmp_path / "run_0.txt").read_text().replace("3.27500 train_time:10000.000", f"3.2755 train_time:{time}")
    (tmp_path / "odd.txt").write_text(text)
    assert counts(evidence(tmp_path)) == {"record": [6]}


def test_a_log_that_counts_its_processes_may_be_slow(tmp_path):
    said = machine() + "Running on device_name=NVIDIA H100 80GB HBM3 with world_size=8\n"
    group(tmp_path, GOOD, machine=said)
    write(tmp_path / "slow.txt", 3.2755, 99.0, machine=said)
    assert counts(evidence(tmp_path)) == {"record": [6]}


def captures(folder, losses, seconds=10.0):
    for i, loss in enumerate(losses):
        console(folder / f"{i}.txt", (loss, seconds + i / 1000))


@pytest.mark.parametrize("names,folders", [
    (("this_pr", "control"), 2), (("new", "old"), 2), (("after", "before"), 2), ((".", "upstream"), 2),
    (("a/logs", "b/logs"), 2), (("run_1", "run_20"), 1), (("logs/1", "logs/2"), 1)])
def test_captures_in_folders_of_other_names_are_not_pooled(tmp_path, capsys, names, folders):
    captures(tmp_path / names[0], GOOD)
    captures(tmp_path / names[1], [3.2761, 3.2763, 3.2765], 10.5)
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28, code=folders - 1)
    assert found["passed"] is (None if folders > 1 else True)
    assert found["mixture"] == ("" if folders == 1 else "the runs are of 2 folders of logs without a source: "
                                f"5 of {names[0]}, 3 of {names[1]}")
    if folders > 1:
        assert [cell["label"] for cell in found["cells"]] == [f"folder {name}" for name in names]
        assert numbers(capsys, "stats", tmp_path, "--target", 3.28, "--cell", f"folder {names[0]}")["passed"]


def test_a_linked_folder_is_named(tmp_path, capsys):
    group(tmp_path / "far", BAD, 12.0)
    group(tmp_path / "mine", GOOD)
    (tmp_path / "mine" / "baseline").symlink_to(tmp_path / "far")
    found = evidence(tmp_path / "mine")
    assert counts(found) == {"record": [5]} and found.notes == ["baseline is a link to a folder: not followed"]
    assert found.notes[0] in command(capsys, "stats", tmp_path / "mine", "--target", 3.28)[1]


# -- several whole logs in a file


def cat(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(texts))
    return path


def whole(loss, seconds=10.0, **options):
    return log_text(loss, seconds, **{"machine": machine(), "tail": "peak memory allocated: 9 MiB\n"} | options)


@pytest.mark.parametrize("form", [whole, lambda *a: BAR + whole(*a), lambda *a: whole(*a) + BAR, lambda *a: log_text(
    *a, machine="").replace(2 * BAR, BAR)], ids=["two bars", "bar first", "bar last", "one bar"])
def test_whole_logs_of_one_source_in_a_file_are_trials(tmp_path, capsys, form):
    for n in (2, 5):
        path = cat(tmp_path / f"{n}.txt", *(form(loss, 10.0 + loss) for loss in GOOD[:n]))
        arm = evidence(path).arm("record")
        assert [sample.loss for sample in arm.samples] == GOOD[:n] and arm.dropped == [] and not arm.mixture
        assert arm.cells[0].processes == (8 if "NVIDIA" in path.read_text() else None)
        assert f"holds {n} whole logs of one source and machine: each is a trial" in numbers(
            capsys, "show", path)["runs"][0]["warnings"]


def test_a_machine_is_counted_once(tmp_path):
    group(tmp_path, GOOD[:2], machine=machine())
    cat(tmp_path / "both.txt", whole(3.27), whole(3.271))
    write(tmp_path / "again.txt", 3.272, 10.5, machine=machine() + machine())
    (cell,) = evidence(tmp_path).arm("record").cells
    assert (cell.processes, len(cell.samples)) == (8, 5)


@pytest.mark.parametrize("what,options", [
    ("sources", {"code": CODE + "x = 1\n"}), ("sources", {"code": "x = 1\n" + CODE}), ("sources", {"code": "y = 1\n"}),
    ("machines", {"machine": machine(1)}), ("machines", {"machine": machine(name="NVIDIA H200")}),
    ("sources and machines", {"code": "y = 1\n", "machine": machine(4)}),
    ("settings", {"machine": machine() + 'Settings: {"lr": 2, "seed": 1}\n'})])
def test_whole_logs_of_other_kinds_are_no_sample(tmp_path, capsys, what, options):
    for first, second in ((whole(3.27), whole(3.29, **options)), (whole(3.27, **options), whole(3.29))):
        path = cat(tmp_path / "z.txt", first, second)
        group(tmp_path, GOOD, machine=machine())
        found = numbers(capsys, "stats", tmp_path, "--target", 3.28)
        why = f"z.txt: holds 2 logs with different {what}: split it"
        assert found["n"] == 5 and f"left out: {why}" in found["warnings"]
        assert len(numbers(capsys, "show", path)["runs"][0]["trial_runs"]) == 2
        assert why[7:] in numbers(capsys, "show", path)["runs"][0]["warnings"]
        assert why in error(capsys, "stats", path)


def test_seeds_in_settings_do_not_part_logs(tmp_path):
    texts = [whole(3.27 + i / 1000, machine=machine() + f'Settings: {{"lr": 2, "seed": {i}}}\n') for i in range(3)]
    assert counts(evidence(cat(tmp_path / "a.txt", *texts))) == {"record": [3]}


def test_date_and_seed_of_one_whole_log_are_not_those_of_all(tmp_path, capsys):
    texts = [whole(3.27 + i / 1000, machine=machine(date=day(i)) + f"Using seed={i}\n") for i in (1, 2)]
    shown = numbers(capsys, "show", cat(tmp_path / "a.txt", *texts))["runs"][0]
    assert (shown["date"], shown["seed"], shown["gpu_count"]) == (None, None, 8)
    shown = numbers(capsys, "show", cat(tmp_path / "a.txt", *texts[:1] * 2))["runs"][0]
    assert (shown["date"], shown["seed"]) == ("2026-08-31 07:01:00", 1)


def test_a_capture_before_a_whole_log_is_no_part_of_its_source(tmp_path):
    path = cat(tmp_path / "a.txt", log_text(3.27).rpartition(BAR)[2], whole(3.271))
    assert evidence(path).arm("record").dropped == ["a.txt: holds 2 logs with different sources and machines: split it"]


def test_a_whole_log_without_steps_hides_none(tmp_path, capsys):
    started = whole(3.27).rpartition(BAR)[0] + BAR
    for texts in ((whole(3.27), started), (started, whole(3.27))):
        path = cat(tmp_path / "a.txt", *texts)
        assert [sample.loss for sample in evidence(path).arm("record").samples] == [3.27]


def test_a_whole_log_that_died_is_left_out(tmp_path):
    cut = whole(3.27).partition("step:3/4")[0]
    for texts in ((cut, whole(3.271)), (whole(3.271), cut)):
        arm = evidence(cat(tmp_path / "a.txt", *texts)).arm("record")
        assert [s.loss for s in arm.samples] == [3.271] and "died at step 2" in arm.dropped[0]


def test_the_end_of_each_whole_log_counts(tmp_path):
    tail = "stopping_early: wallclock_cap train_time:9000ms step:4/9\n"
    texts = [whole(loss, tail=tail).replace("/4 ", "/9 ").replace("step:2/9 val_loss", "step:2/9 x") for loss in GOOD]
    assert [s.loss for s in evidence(cat(tmp_path / "a.txt", *texts)).arm("record").samples] == GOOD


def test_a_source_that_quotes_steps_is_no_log(tmp_path):
    quoting = CODE + '"""\nstep:4/4 val_loss:1.0 train_time:1ms step_avg:1ms\n"""\n'
    for text in (whole(3.27, code=quoting), BAR + whole(3.27, code=quoting)):
        (sample,) = evidence(cat(tmp_path / "a.txt", text)).arm("record").samples
        assert sample.loss == 3.27 and sample.processes == 8


def test_many_whole_logs_are_read_in_linear_time(tmp_path):
    text = "x = 1\n" + BAR + "step:1/1 val_loss:3\n"
    start = time.process_time()
    arm = evidence(cat(tmp_path / "a.txt", text * 20_000)).arm("record")
    assert time.process_time() - start < 10
    assert arm.dropped == ["a.txt: holds 1001 logs or more: split it"]


def test_a_baselines_capture_does_not_join_the_record(tmp_path):
    group(tmp_path, GOOD, machine=machine())
    console(tmp_path / "baseline" / "console.txt", (3.2755, 10.5))
    assert counts(evidence(tmp_path)) == {"record": [5], "baseline": [1]}


# -- copies


def test_a_run_in_two_files_counts_once(tmp_path):
    group(tmp_path, GOOD[:3])
    console(tmp_path / "a_console.txt", *((loss, 10.0 + i / 1000) for i, loss in enumerate(GOOD[:3])))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "x.txt").write_bytes((tmp_path / "run_0.txt").read_bytes())
    arm = evidence(tmp_path).arm("record")
    assert sorted(s.loss for s in arm.samples) == sorted(GOOD[:3])
    assert len(arm.dropped) == 4 and "a_console.txt, trial 2: the same run as run_1.txt" in arm.dropped
    assert all(sample.code for sample in arm.samples)  # of copies the one with a source


def test_of_copies_the_log_with_a_source_counts_whatever_it_holds(tmp_path):
    first, second = ((3.27, 10.0), (3.271, 10.1))
    (tmp_path / "z.txt").write_text(log_text(*first) + log_text(*second).rpartition(BAR)[2])
    console(tmp_path / "a.txt", second)
    assert [sample.name for sample in evidence(tmp_path).arm("record").samples] == ["z.txt, trial 1", "z.txt, trial 2"]


def test_other_steps_are_no_copy(tmp_path):
    for steps in (4, 8):
        text = f"step:{steps}/{steps} val_loss:3.27000 train_time:10000ms step_avg:5.00ms\n"
        (tmp_path / f"{steps}.txt").write_text(text)
    assert counts(evidence(tmp_path)) == {"record": [1, 1]}


def test_two_captures_without_source_count_once(tmp_path):
    console(tmp_path / "all.txt", (3.27, 10.0), (3.271, 10.1))
    console(tmp_path / "run1.txt", (3.271, 10.1))
    arm = evidence(tmp_path).arm("record")
    assert sorted(sample.name for sample in arm.samples) == ["all.txt, trial 1", "run1.txt"]


def test_a_file_that_holds_the_last_line_only_is_a_copy(tmp_path):
    group(tmp_path, GOOD[:2])
    last = (tmp_path / "run_1.txt").read_text().strip().rpartition("\n")[2]
    (tmp_path / "tail.txt").write_text(last + "\n")
    assert counts(evidence(tmp_path)) == {"record": [2]}


def test_a_copy_in_the_other_arm_is_noted(tmp_path):
    group(tmp_path / "this_pr", GOOD[:3])
    group(tmp_path / "baseline", BAD[:3], 12.0)
    (tmp_path / "baseline" / "y.txt").write_bytes((tmp_path / "this_pr" / "run_0.txt").read_bytes())
    console(tmp_path / "all.txt", *((loss, 12.0 + i / 1000) for i, loss in enumerate(BAD[:3])))
    found = evidence(tmp_path)
    assert counts(found) == {"record": [3], "baseline": [3]}
    assert "baseline: y.txt: the same run as run_0.txt, which is of the record" in found.notes
    assert "record: all.txt, trial 1: the same run as run_0.txt, which is of the baseline" in found.notes


def test_runs_that_end_alike_and_differ_before_are_two(tmp_path):
    text = (group(tmp_path, GOOD[:1]) / "run_0.txt").read_text()
    for old, new in (("3.77500", "3.77600"), ("3.27500", "3.27600"), ("10000.000ms", "10001.000ms")):
        (tmp_path / "b.txt").write_text(text.replace(old, new))
        assert counts(evidence(tmp_path)) == {"record": [2]}


def test_a_validation_that_is_nan_says_nothing_of_copies(tmp_path):
    text = log_text(3.27).replace("3.77000", "nan")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    assert counts(evidence(tmp_path)) == {"record": [1]}


def test_another_loss_can_be_the_claim(tmp_path):
    text = log_text(3.30).replace("val_loss:3.30000", "val_loss:3.30000 val_ema_loss:3.27700")
    (tmp_path / "a.txt").write_text(text)
    assert arms.evidence_of([str(tmp_path)], "val_ema_loss").arm("record").samples[0].loss == 3.277
    assert evidence(tmp_path).arm("record").samples[0].loss == 3.3


# -- stats


def test_the_record_alone_gives_the_verdict(tmp_path, capsys):
    """Pooled with its baseline it would pass."""
    group(tmp_path, BAD)
    group(tmp_path / "baseline", [3.2771, 3.2768, 3.2776, 3.2769, 3.2773, 3.2770, 3.2772, 3.2774], 12.0)
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28, code=1)
    assert (found["n"], found["baseline"]["n"], found["passed"]) == (5, 8, False)
    assert found["test"]["p_value"] > 0.5 and found["test"]["t"] > 0
    assert judging.below_target([*BAD, *([3.277] * 7), 3.2771], 3.28) < ALPHA
    test = found["difference"]["train_time_s"]
    assert test["difference"] == pytest.approx(-2.0015, abs=1e-9) and test["ci_low"] < -2.0015 < test["ci_high"] < 0
    gain = found["difference"]["gain"]
    assert (gain["time_s"], gain["ci_low"]) == pytest.approx((2.0015, -test["ci_high"]))
    assert gain["percent"] == pytest.approx(100 * 2.0015 / 12.0035)
    assert gain["percent_low"] < gain["percent"] < gain["percent_high"]
    out = command(capsys, "stats", tmp_path, "--target", 3.28)[1]
    assert "gain on the same machine: +2.00" in out and "not passed (p < 0.01)" in out


def test_a_mixture_has_no_verdict(tmp_path, capsys):
    group(tmp_path, GOOD, machine=machine())
    group(tmp_path / "one", GOOD[:4], 80.0, machine=machine(1))
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28, code=1)
    assert found["passed"] is found["test"]["passed"] is found["test"]["p_value"] is found["mean_val_loss"] is None
    assert found["mixture"] == "the runs are of 2 numbers of processes: 5 of 8, 4 of 1" and found["n"] == 9
    assert [(cell["label"], cell["n"]) for cell in found["cells"]] == [("8 processes", 5), ("1 process", 4)]
    assert found["cells"][0]["mean_val_loss"] == pytest.approx(sum(GOOD) / 5)
    for form in ((), ("--markdown",)):
        code, out, _ = command(capsys, "stats", tmp_path, "--target", 3.28, *form)
        assert code == 1 and "choose one with --cell LABEL_OR_HASH: 8 processes; 1 process" in out
        assert "p =" not in out and "passed" not in out
    assert numbers(capsys, "stats", tmp_path)["passed"] is None


def test_a_cell_is_chosen_by_label_hash_or_folder(tmp_path, capsys):
    group(tmp_path / "new", GOOD, machine=machine())
    group(tmp_path / "old", BAD, 9.0, machine=machine(), code=CODE + "x = 1\n")
    new, old = (evidence(tmp_path / name).arm("record").cells[0] for name in ("new", "old"))
    for name, code, passed in ((new.code, 0, True), (old.code, 1, False), (new.code[:6], 0, True), ("old", 1, False),
                               (new.samples[0].run.trace.code_hash, 0, True)):
        found = numbers(capsys, "stats", tmp_path, "--target", 3.28, "--cell", name, code=code)
        assert (found["passed"], found["n"], found["mixture"]) == (passed, 5, "")
    assert f"set aside: {old.code}" in numbers(capsys, "stats", tmp_path, "--cell", new.code)["notes"][0]
    text = error(capsys, "stats", tmp_path, "--cell", "nothing")
    assert "'nothing' means 0 cells" in text and new.code in text and old.code in text


def test_a_cell_has_to_be_named_clearly(tmp_path, capsys):
    group(tmp_path, GOOD, machine=machine())
    group(tmp_path / "long", GOOD[:4], 20.0, machine=machine(), count=8)
    code = evidence(tmp_path).arm("record").cells[0].code
    assert f"--cell '{code}' means 2 cells of the record: it has step 4; step 8" in error(
        capsys, "stats", tmp_path, "--cell", code)


def test_comments_and_seeds_make_no_cells(tmp_path):
    group(tmp_path / "a", GOOD, code=CODE + "seed = 1\n")
    group(tmp_path / "b", GOOD, 11.0, code=CODE + "seed = 2  # another\n")
    assert counts(evidence(tmp_path)) == {"record": [10]}


def test_an_uneven_baseline_is_not_compared(tmp_path):
    console(tmp_path / "a.txt", (3.27, 10.0), (3.271, 10.1))
    console(tmp_path / "baseline" / "b.txt", (3.28, 12.0), (3.281, 90.0))
    found = evidence(tmp_path)
    assert judging.difference_of(found.arm("record"), found.arm("baseline"))["gain"] is None


def test_the_baseline_on_the_same_machine_with_the_most_steps_is_compared(tmp_path):
    group(tmp_path / "this_pr", GOOD, machine=machine())
    group(tmp_path / "baseline-s8", BAD, 12.0, machine=machine(), count=8)
    group(tmp_path / "baseline-s4", BAD, 10.0, machine=machine(), code=CODE + "x = 1\n")
    group(tmp_path / "baseline-1x", BAD, 99.0, machine=machine(1), count=16)
    found = evidence(tmp_path)
    cell, baseline = found.arm("record").cells[0], found.arm("baseline")
    assert judging.opponent(cell, baseline)[0].steps == 8
    assert judging.difference_of(found.arm("record"), baseline)["gain"]["time_s"] == pytest.approx(2)
    group(tmp_path / "baseline-s8b", BAD[:2], 12.5, machine=machine(), count=8, code=CODE + "y = 1\n")
    other, why = judging.opponent(cell, evidence(tmp_path).arm("baseline"))
    assert other is None and why.startswith("several baselines of as many steps: ")
    group(tmp_path / "h200" / "this_pr", GOOD, machine=machine(name="NVIDIA H200"))
    group(tmp_path / "h200" / "baseline", BAD, machine=machine())
    far = evidence(tmp_path / "h200")
    assert "no baseline with this hardware" in judging.difference_of(far.arm("record"), far.arm("baseline"))["why"]


def session(folder, order, minute=0):
    """A run of each arm in the order given, P or B, minutes apart; a dot is a log without a date."""
    for i, letter in enumerate(order):
        name = folder / ("baseline" if letter == "B" else "this_pr") / f"{9 - i}.txt"
        date = None if letter == "." else day(minute + i)
        write(name, 3.27 + i / 10_000, 10 + i / 100, machine=machine(date=date))


@pytest.mark.parametrize("order,interleaved", [("BPPB", True), ("BBPP", False), ("PPBB", False), ("PPP", None)])
def test_order_of_the_session(tmp_path, capsys, order, interleaved):
    session(tmp_path, order)
    found = numbers(capsys, "stats", tmp_path)["session"]
    assert (found["order"], found["interleaved"]) == (" ".join(order), interleaved)
    assert (found["first"], found["last"]) == ("2026-08-31 07:00:00", f"2026-08-31 07:0{len(order) - 1}:00")
    out = command(capsys, "stats", tmp_path)[1]
    assert ("NOT interleaved" in out) == (interleaved is False) and (", interleaved" in out) == bool(interleaved)


def test_order_that_is_not_known(tmp_path, capsys):
    session(tmp_path, "BP.B")
    assert numbers(capsys, "stats", tmp_path)["session"]["order"] is None
    out = command(capsys, "stats", tmp_path)[1]
    assert "order of the session not known: 1 of the logs do not say when they began" in out


def test_dates_of_file_names_count():
    assert arms.date_in("2026-02-16_21-30-05_time-190_secs_x.txt") == "2026-02-16 21:30:05"
    assert arms.date_in("20260216T2130_x.txt") == "2026-02-16 21:30:00" and arms.date_in("2026-02-16_x.txt") is None


def test_statistics_md(tmp_path, capsys):
    folder = tmp_path / "2026-12-01_Mine"
    session(folder, "BPPBP")
    code, out, _ = command(capsys, "stats", folder, "--target", 3.28, "--markdown")
    assert code == 0 and out.startswith("# Statistics of 2026-12-01_Mine\n") and "B P P B P, interleaved" in out
    for words in ("## record", "## baseline", "| hardware | 8 x NVIDIA H100 80GB HBM3 |", "| commit | not known |",
                  "Python 3.11.1, PyTorch 2.9.0, CUDA 12.6", "| n | 3 |", "| train s | 10.023 +- 0.015 |",
                  "| val loss | 3.27023 +- 0.00015 |", "| leg | seed | log | steps | loss | train s |",
                  "| 2 | - | 8.txt | 4 | 3.27010 | 10.010 |", "| 4 | - | 6.txt | 4 | 3.27030 | 10.030 |",
                  "## Record minus baseline", "| t against 3.28 | -", "| one-sided p |", "gain on the same machine",
                  "cold or warm caches not known"):
        assert words in out
    legs = [line.split("|")[1].strip() for line in out.splitlines() if line.endswith("0 |") and ".txt" in line]
    assert legs == ["2", "3", "5", "1", "4"]
    test = judging.target_numbers(evidence(folder).arm("record").samples, 3.28)
    mean, sd = 3.2702333333, 0.000152753
    assert test["t"] == pytest.approx((mean - 3.28) * math.sqrt(3) / sd, rel=1e-4)


def test_commit_and_seed_of_our_runs(tmp_path, capsys):
    for i in range(2):
        run = make_ours(tmp_path / "mine" / f"r{i}", [4.0, 3.0 + i / 100], seed=40 + i)
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"git": {"commit": "abc123", "dirty": True}}))
    out = command(capsys, "stats", tmp_path / "mine", "--markdown")[1]
    assert "| commit | abc123 with changes |" in out and "| - | 40 | r0 |" in out and "| - | 41 | r1 |" in out
    write(tmp_path / "logs" / "seed_7.txt", 3.2)
    assert "| - | 7 | seed\\_7.txt |" in command(capsys, "stats", tmp_path / "logs", "--markdown")[1]


# -- compare and diff


def test_compare_takes_the_record_of_a_folder(tmp_path, capsys):
    for name, seconds in (("a", 10.0), ("b", 9.0)):
        group(tmp_path / name, GOOD, seconds)
        group(tmp_path / name / "baseline", BAD, 12.0)
    found = numbers(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert [one["n"] for one in found["groups"]] == [5, 5]
    assert found["pairs"][0]["train_time_s"]["difference"] == pytest.approx(-1)
    assert found["groups"][0]["warnings"] == ["left out: baseline: 5 runs, another arm"]


def test_only_side_folders_are_named(tmp_path, capsys):
    for name in ("dev_1", "dev_2"):
        group(tmp_path / name, GOOD, 10.0 + len(name) * (name == "dev_2"))
    for argv in (("stats", tmp_path), ("compare", tmp_path, tmp_path)):
        assert "holds no complete run" in (text := error(capsys, *argv)) or "no complete run in" in text
        assert "its runs are of dev_1, dev_2: give one of these" in text


def test_compare_of_one_folder_is_record_against_baseline(tmp_path, capsys):
    group(tmp_path / "this_pr", GOOD, 10.0, machine=machine())
    group(tmp_path / "baseline", BAD, 12.0, machine=machine(), count=8)
    group(tmp_path / "baseline_short", BAD, 10.5, machine=machine())
    found = numbers(capsys, "compare", tmp_path)
    assert [(one["name"], one["n"], one["steps"]) for one in found["groups"]] == [
        ("baseline", 5, [8]), ("record", 5, [4])]
    pair = found["pairs"][0]
    assert (pair["a"], pair["b"]) == ("baseline", "record") and pair["train_time_s"]["difference"] == pytest.approx(-2)
    assert "has no baseline" in error(capsys, "compare", tmp_path / "this_pr")


def test_compare_has_no_test_over_a_mixture(tmp_path, capsys):
    group(tmp_path / "a", GOOD, machine=machine())
    group(tmp_path / "a" / "one", GOOD[:4], 80.0, machine=machine(1))
    group(tmp_path / "b", BAD, 9.0, machine=machine())
    for names in (("a", "b"), ("b", "a")):
        found = numbers(capsys, "compare", *(tmp_path / name for name in names))
        groups = {one["name"]: one["n"] for one in found["groups"]}
        assert groups == {"a: 8 processes": 5, "a: 1 process": 4, "b": 5}
        assert all(pair[key] is None for pair in found["pairs"] for key in ("val_loss", "train_time_s", "sigma_rule"))
        assert all("2 numbers of processes" in pair["why"] for pair in found["pairs"])
        out = command(capsys, "compare", *(tmp_path / name for name in names), "--no-plot")[1]
        assert "no test of " in out and "passed" not in out
    found = numbers(capsys, "compare", tmp_path / "a", tmp_path / "b", "--cell", "8 processes")
    assert [one["n"] for one in found["groups"]] == [5, 5] and found["pairs"][0]["train_time_s"]["difference"] < 0


def test_compare_of_one_folder_with_a_chosen_cell(tmp_path, capsys):
    group(tmp_path / "new", GOOD, machine=machine())
    group(tmp_path / "new-1x", GOOD, 80.0, machine=machine(1))
    group(tmp_path / "baseline", BAD, 12.0, machine=machine())
    group(tmp_path / "baseline-1x", BAD, 90.0, machine=machine(1))
    assert all(pair["val_loss"] is None for pair in numbers(capsys, "compare", tmp_path)["pairs"])
    found = numbers(capsys, "compare", tmp_path, "--cell", "1 process")
    assert found["pairs"][0]["train_time_s"]["difference"] == pytest.approx(-10)


def test_diffs_effect_is_of_the_records(tmp_path, capsys):
    for name, seconds in (("a", 10.0), ("b", 9.0)):
        group(tmp_path / name, GOOD, seconds)
        group(tmp_path / name / "baseline", BAD, 12.0, code=CODE + "y = 2\n")
    found = numbers(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (found["effect"]["n_a"], found["effect"]["n_b"], found["units"]) == (5, 5, [])
    assert found["effect"]["train_time_s"]["difference"] == pytest.approx(-1)
    group(tmp_path / "a" / "v2", GOOD, 8.0, code=CODE + "x = 1\n")
    found = numbers(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert found["effect"]["train_time_s"]["test"] is found["effect"]["train_time_s"]["a"] is None
    assert any(note.startswith("A: the runs are of 2 code versions") for note in found["notes"])


# -- the board


def chosen(folder, readme=""):
    (folder / "README.md").write_text(readme)
    return leaderboard.record_of(folder)


def test_the_board_takes_the_cell_with_the_most_processes(tmp_path):
    group(tmp_path / "one", GOOD, 80.0, machine=machine(1))
    group(tmp_path / "eight", GOOD[:2], 10.0, machine=machine(8))
    found = chosen(tmp_path)
    assert (found["n"], found["mean_time_s"]) == (2, pytest.approx(10.0005))


def test_the_board_takes_the_fastest_claimed_cell_that_meets_the_target(tmp_path):
    group(tmp_path / "v1", GOOD, 10.0, code=CODE + "a = 1\n")
    group(tmp_path / "v2", GOOD, 9.0, code=CODE + "a = 2\n")
    group(tmp_path / "v3", BAD, 8.0, code=CODE + "a = 3\n")  # above the target
    group(tmp_path / "v4", GOOD + [3.2762], 7.0, code=CODE + "a = 4\n")  # not claimed
    readme = "ttest_1samp(losses, 3.28)\n| v1 | 10.002 |\n| v2 | 9.002 s |\n| v3 | 8.002 |\n"
    assert chosen(tmp_path, readme)["mean_time_s"] == pytest.approx(9.002)
    assert chosen(tmp_path, "v1: mean 3.2766, 10.00 s")["mean_time_s"] == pytest.approx(10.002)
    assert chosen(tmp_path)["n"] == 6


def test_the_board_takes_the_largest_cell_then_the_fastest_then_the_newest(tmp_path):
    group(tmp_path / "v1", GOOD, 10.0, code=CODE + "a = 1\n")
    group(tmp_path / "v2", GOOD, 11.0, code=CODE + "a = 2\n")
    group(tmp_path / "v3", GOOD[:2], 9.0, code=CODE + "a = 3\n")
    assert chosen(tmp_path)["mean_time_s"] == pytest.approx(10.002)
    for i in range(2):
        write(tmp_path / "single" / f"{i}.txt", 3.27, 10.0 + i, code=CODE + f"a = {i}\n", machine=machine(date=day(i)))
    assert chosen(tmp_path / "single")["mean_time_s"] == 11


def test_one_line_of_a_list_is_no_claimed_mean(tmp_path):
    group(tmp_path / "v1", GOOD, 10.0, code=CODE + "a = 1\n")
    group(tmp_path / "v2", [3.2799], 9.0, code=CODE + "a = 2\n")
    assert chosen(tmp_path, "losses = [3.2750, 3.2799], times = [9.000]")["n"] == 5


def test_the_boards_gain_is_against_the_baseline_of_the_folder(tmp_path):
    group(tmp_path / "this_pr", GOOD, 9.0, machine=machine())
    assert chosen(tmp_path)["gain"] is None
    group(tmp_path / "baseline", BAD, 12.0, machine=machine())
    group(tmp_path / "dev_9", GOOD, 1.0, machine=machine())
    gain = chosen(tmp_path)["gain"]
    assert (gain["time_s"], gain["percent"]) == pytest.approx((3, 100 * 3 / 12.002))
    assert gain["ci_low"] < 3 < gain["ci_high"] and (gain["n_record"], gain["n_baseline"]) == (5, 5)


def test_the_target_that_a_readme_names():
    for text in ("ttest_1samp(losses, 3.28, alternative='less')", "is below 3.28", "target loss of 3.28", "≤ 3.28"):
        assert leaderboard.target_in(text) == 3.28
    assert leaderboard.target_in("loss 3.28") == math.inf


# -- record 92: the numbers of its logs


TIMES_92 = [40.107, 39.856, 39.842, 39.840, 39.834, 39.839, 40.020, 39.846, 39.847, 39.932, 39.865, 39.918, 39.836,
            40.282, 39.856, 39.937, 39.821]
LOSSES_92 = [3.2774, 3.2762, 3.2792, 3.2776, 3.2768, 3.2756, 3.2758, 3.2774, 3.2770, 3.2782, 3.2763, 3.2771, 3.2765,
             3.2780, 3.2785, 3.2783, 3.2782]
BASE_TIMES = [73.771, 73.776, 74.039, 73.971, 73.978, 74.091, 73.896, 73.765, 73.715]
BASE_LOSSES = [3.2773, 3.2825, 3.2787, 3.2776, 3.2806, 3.2770, 3.2760, 3.2770, 3.2778]


def test_record_92(tmp_path, capsys):
    """18 runs: 39.914 +- 0.120 s, 3.27731 +- 0.00099, p = 9.4e-10; one log is lost. Its baseline: 73.889 +- 0.137 s,
    3.27828 +- 0.00205."""
    for i, (loss, seconds) in enumerate(zip(LOSSES_92, TIMES_92, strict=True)):
        write(tmp_path / "this_pr" / f"{i}.txt", loss, seconds, machine=machine())
    for i, (loss, seconds) in enumerate(zip(BASE_LOSSES, BASE_TIMES, strict=True)):
        write(tmp_path / "baseline" / f"{i}.txt", loss, seconds, machine=machine(), count=8)
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28)
    assert (found["n"], found["baseline"]["n"], found["passed"]) == (17, 9, True)
    assert [round(found[key], 5) for key in ("mean_val_loss", "sd_val_loss")] == [3.27730, 0.00102]
    assert [round(found[key], 3) for key in ("mean_time_s", "sd_time_s")] == [39.910, 0.123]
    base = found["baseline"]
    assert [round(base[key], 5) for key in ("mean_val_loss", "sd_val_loss")] == [3.27828, 0.00205]
    assert [round(base[key], 3) for key in ("mean_time_s", "sd_time_s")] == [73.889, 0.137]
    assert found["test"]["p_value"] == pytest.approx(4e-9, rel=0.05)
    assert found["difference"]["gain"]["percent"] == pytest.approx(45.99, abs=0.01)


def test_load_groups_names_cells(tmp_path):
    group(tmp_path / "a", GOOD, machine=machine())
    group(tmp_path / "a" / "one", GOOD[:2], 80.0, machine=machine(1))
    groups, dropped, mixtures = logger.load_groups([str(tmp_path / "a"), str(tmp_path / "a" / "one")])
    assert list(groups) == list(dropped) == list(mixtures) == ["a: 8 processes", "a: 1 process", "one"]
    assert [bool(why) for why in mixtures.values()] == [True, True, False]


