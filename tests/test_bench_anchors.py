"""bench/cpu.py --anchors: GPT-2 124M beside other programs, in small, and with a stand-in for llm.c."""
import json

import numpy as np
import pytest

from bench import anchors, cpu

TINY = anchors.Size(1, 16)


@pytest.fixture
def data(tmp_path):
    return anchors.make_tokens(tmp_path / "random")


@pytest.fixture
def checkout(tmp_path):
    """What looks like llm.c: its program says what it was given, then trains for ever."""
    folder = tmp_path / "llm.c"
    folder.mkdir()
    (folder / "train_gpt2.c").write_text("int main() {}")
    (folder / "Makefile").write_text("train_gpt2:\n\tcp program train_gpt2 && chmod +x train_gpt2\n")
    (folder / "program").write_text(
        "#!/bin/sh\nset -e\nls gpt2_124M.bin dev/data/tinyshakespeare/tiny_shakespeare_train.bin\n"
        "echo 'val loss 11.0'\nfor i in 1 2 3 4; do echo \"step $i: train loss 11.0 (took ${i}0.5 ms)\"; done\n"
        "exec sleep 1000\n")
    return folder


def test_ours_and_transformers_train_the_same_tokens(data):
    for program in (anchors.ours, anchors.transformers):
        times = program(data, TINY, 3, 1)
        assert len(times) == 3 and all(t > 0 for t in times)


def test_llmc_is_built_from_a_copy_and_stopped(checkout, data, tmp_path, monkeypatch):
    monkeypatch.setattr(anchors, "PADDED", 2)
    before = sorted(path.name for path in checkout.rglob("*"))
    program = anchors.Llmc(checkout, tmp_path / "copy", data)
    assert program(data, TINY, 4, 1) == [10.5, 20.5, 30.5, 40.5]
    assert sorted(path.name for path in checkout.rglob("*")) == before


def test_a_program_that_ends_early_is_told(checkout, data, tmp_path, monkeypatch):
    monkeypatch.setattr(anchors, "PADDED", 2)
    (checkout / "program").write_text("#!/bin/sh\necho 'step 0: train loss 11.0 (took 7.0 ms)'\n")
    with pytest.raises(RuntimeError, match="ended after 1 of 4 steps"):
        anchors.Llmc(checkout, tmp_path / "copy", data)(data, TINY, 4, 1)


def test_weights_have_the_sizes_of_gpt2(tmp_path, monkeypatch):
    """As many numbers as its 124,475,904 padded parameters, by the same sums for a small width."""
    monkeypatch.setattr(anchors, "WIDTH", 8)
    monkeypatch.setattr(anchors, "PADDED", 16)
    anchors.write_weights(tmp_path / "w.bin", 3)
    found = np.fromfile(tmp_path / "w.bin", dtype="<f4", offset=1024)
    header = np.fromfile(tmp_path / "w.bin", dtype="<i4", count=256)
    assert header[:8].tolist() == [20240326, 3, 1024, 50257, 3, 12, 8, 16]
    assert len(found) == 16 * 8 + 1024 * 8 + 3 * (12 * 8 * 8 + 13 * 8) + 2 * 8
    norms = found[-16:]  # gain and bias of the last norm
    assert norms.tolist() == [1.0] * 8 + [0.0] * 8 and 0.015 < found[:128].std() < 0.025


def test_programs_take_turns_and_llmc_has_one_size(data, capsys):
    calls = []

    def program(name, ms):
        def run(_data, size, steps, layers):
            calls.append((name, size))
            return [1e9] * anchors.SKIPPED + [ms] * (steps - anchors.SKIPPED)
        return run

    programs = {"train_baseline.py": program("ours", 10.0), "transformers": program("hf", 20.0),
                "llm.c": program("c", 40.0)}
    sizes = anchors.Size(1, 10), anchors.Size(2, 10)
    found = anchors.measure(programs, data, sizes, 2, 5, 1)
    assert [name for name, _ in calls] == ["ours", "hf", "c"] * 2 + ["ours", "hf"] * 2
    assert found[sizes[0], "train_baseline.py"] == [1000.0] * 2 and found[sizes[1], "transformers"] == [1000.0] * 2
    text = anchors.table(found)
    assert "| 1 x 10 | llm.c | 250 (250 to 250) | 4.00 (4.00 to 4.00) |" in text
    assert "| 2 x 10 | transformers | 1000 (1000 to 1000) | 2.00 (2.00 to 2.00) |" in text


def test_the_command_writes_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(anchors, "ours", lambda *_: [1e9, 1e9, 5.0])
    monkeypatch.setattr(anchors, "transformers", lambda *_: [1e9, 1e9, 10.0])
    flags = ["--anchors", "--quick", "--steps", "1", "--json", str(tmp_path / "out.json")]
    assert cpu.main(flags) == 0
    found = json.loads((tmp_path / "out.json").read_text())["tokens_per_s"]
    assert [(row["program"], row["runs"]) for row in found] == [
        ("train_baseline.py", [51200.0]), ("transformers", [25600.0])]
    assert "2.00 (2.00 to 2.00)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--llmc", "x"], "--llmc is read with --anchors only"),
    (["--anchors", "--steps", "0"], "--steps must be at least 1"),
    (["--anchors", "--llmc", "nowhere"], "--llmc nowhere: no train_gpt2.c there"),
])
def test_wrong_flags_are_one_sentence(flags, words, capsys):
    assert cpu.main(flags) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
