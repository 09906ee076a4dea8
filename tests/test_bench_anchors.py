"""bench/cpu.py --anchors: GPT-2 124M beside other programs, in small, and with stand-ins for llm.c and nanochat."""
import json
import math

import numpy as np
import pytest
from helpers import make_data

from bench import anchors, cpu
from data.common import shard_path, write_shard

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
    (["--nanochat", "x"], "--nanochat is read with --anchors only"),
    (["--anchors", "--nanochat", "nowhere"], "no scripts/base_train.py; git clone karpathy/nanochat"),
    (["--anchors", "--steps", "0"], "--steps must be at least 1"),
    (["--anchors", "--llmc", "nowhere"], "--llmc nowhere: no train_gpt2.c there"),
])
def test_wrong_flags_are_one_sentence(flags, words, capsys):
    assert cpu.main(flags) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


# --- nanochat: a stand-in for its checkout


@pytest.fixture
def nanochat(tmp_path):
    """What looks like nanochat: its scripts note how they are called; its model gives every target 1 nat."""
    folder = tmp_path / "nanochat"
    for name in ("scripts", "nanochat"):
        (folder / name).mkdir(parents=True)
    noted = "import sys, os\nname = os.path.basename(sys.argv[0])\n"
    noted += "open('calls', 'a').write(' '.join([name, *sys.argv[1:]]) + '\\n')\n"
    (folder / "scripts" / "tok_train.py").write_text(noted + "print('saved')\n")
    (folder / "scripts" / "base_train.py").write_text(noted + "print('done')\n")
    (folder / "nanochat" / "dataset.py").write_text(
        "import glob, os\nfrom pyarrow import parquet\n\ndef parquets_iter_batched(split):\n"
        "    paths = sorted(glob.glob(os.environ['NANOCHAT_BASE_DIR'] + '/base_data_climbmix/*.parquet'))\n"
        "    (path,) = paths[:-1] if split == 'train' else paths[-1:]\n"
        "    yield parquet.read_table(path).column('text').to_pylist()\n")
    (folder / "nanochat" / "checkpoint_manager.py").write_text(
        "import torch\n\nclass Tokens:\n    def encode(self, texts, prepend, append):\n"
        "        return [[256, *text.encode(), 256] for text in texts]\n\n"
        "    def get_vocab_size(self):\n        return 257\n\nclass Model(torch.nn.Linear):\n"
        "    def forward(self, x, y, loss_reduction):\n        assert x.shape == y.shape and x.size(1) <= 8\n"
        "        assert x[0, 0] == 256 and (x[0, 1:] == y[0, :-1]).all()\n"
        "        return torch.ones(x.numel())\n\ndef load_model(source, device, phase, model_tag, step):\n"
        "    said = {'max_seq_len': 8, 'user_config': {'total_batch_size': 64}}\n"
        "    return Model(2, 3), Tokens(), said\n")
    return folder


@pytest.fixture
def texts(tmp_path):
    pytest.importorskip("pyarrow")
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, words in {"train": ["one", "two", "é"], "val": ["three", "äöü"]}.items():
        tokens = [token for word in words for token in (256, *word.encode())]
        write_shard(shard_path(folder, "texts", split, 0), np.array(tokens, dtype="<u2"))
    return folder


def test_documents_are_whole(texts, tmp_path):
    assert anchors.documents(texts, "train") == ["one", "two", "é"]
    with pytest.raises(FileNotFoundError, match="make them with python data/stdlib.py"):
        anchors.documents(tmp_path, "val")


def test_pieces_end_at_ends_of_lines_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(anchors, "PIECE", 6)
    texts = ["ab\ncd\nef\n", "a long line\nx", "y"]
    found = anchors.pieces(texts)
    assert sorted(found) == ["a long line\n", "ab\ncd\n", "ef\n", "x", "y"]
    assert found == anchors.pieces(texts)


def test_nanochat_trains_on_pieces_and_is_evaluated_on_whole_documents(nanochat, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(anchors, "pieces", lambda texts: [letter for text in texts for letter in text])
    anchors.Nanochat(nanochat, tmp_path / "base", texts)
    from pyarrow import parquet
    train, val = (parquet.read_table(path).column("text").to_pylist()
                  for path in sorted((tmp_path / "base").rglob("*.parquet")))
    assert train == list("onetwoé") and val == ["three", "äöü"]


def test_nanochat_gets_the_documents_and_as_many_cpu_seconds(nanochat, texts, tmp_path, monkeypatch):
    """Eleven bytes in two documents: 13 targets of 1 nat, ends among them. A start costs 3 seconds, a step 0.5."""
    program = anchors.Nanochat(nanochat, tmp_path / "base", texts)
    assert program.train(3) > 0
    tokenizer, training = (nanochat / "calls").read_text().splitlines()
    assert tokenizer == "tok_train.py --vocab-size=4096"
    assert "--depth=4" in training and training.endswith("--num-iterations=3")
    trained = []
    monkeypatch.setattr(program, "train", lambda steps: trained.append(steps) or 3 + 0.5 * steps)
    found = program(20.2)
    assert trained == [1, 9, 35]
    assert found == ("nanochat", round(13 / 11 / math.log(2), 4), 20.5, 9, 35, 35 * 2048)
    assert program(0).steps == 2


def test_what_a_script_of_nanochat_says_is_told(nanochat, texts, tmp_path):
    (nanochat / "scripts" / "tok_train.py").write_text("import rustbpe_that_is_not_there\n")
    with pytest.raises(RuntimeError, match="nanochat: ModuleNotFoundError: No module named 'rustbpe_that"):
        anchors.Nanochat(nanochat, tmp_path / "base", texts)


def test_the_command_compares_with_nanochat(nanochat, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    data = make_data(tmp_path / "text", vocab_size=257, eot=256, train=[words(9)], val=[words(2)])
    where = ["--data", str(data), "--json", str(tmp_path / "x.json")]
    assert cpu.main(["--anchors", "--quick", "--nanochat", str(nanochat), *where]) == 0
    ours, theirs = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert (ours["program"], ours["steps"], theirs["steps"]) == ("train_gpt.py", 9, 2)
    assert f"| train_gpt.py | {ours['val_bpb']} | {ours['cpu_s']} |" in capsys.readouterr().out


def words(seed: int) -> np.ndarray:
    letters = np.random.default_rng(seed).integers(97, 123, 6000)
    letters[::100] = 256
    return letters
