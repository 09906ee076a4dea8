"""Bad input: each ends with one sentence on stderr that names what is wrong and how to repair it, never a traceback."""
import json
import math
import os

import pytest
import torch
from helpers import (
    EOT,
    VOCAB,
    documents,
    load_state,
    make_data,
    records,
    run_folder,
    script,
    steps_saved,
    tiny,
    write_shard,
)

import train_gpt
from train_gpt import GPT, MuonAdamW, Run, UserError, parse_settings


@pytest.fixture
def fails(capsys):
    """A function that runs the script and checks that it fails with one sentence that has all the words."""
    def check(argv, *words: str, code: int = 1, lines: int = 1) -> str:
        try:
            got = train_gpt.main([str(a) for a in argv])
        except SystemExit as stopped:  # argparse
            got = stopped.code
        error = capsys.readouterr().err
        assert got == code and error.startswith("error: ") and error.endswith("\n")
        assert error.count("error: ") == 1 and error.count("\n") == lines and "Traceback" not in error
        assert [word for word in words if word not in error] == [], error
        return error
    return check


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


# --- data


@pytest.mark.parametrize("name, command", [
    ("stdlib", "python data/stdlib.py"), ("shakespeare_char", "python data/shakespeare_char.py"),
    ("fineweb10B", "python data/cached_fineweb.py 9"), ("mine", "python data/fineweb.py --input"),
])
def test_no_data_names_the_command_that_makes_it(name, command, tmp_path, fails):
    fails(tiny(tmp_path, data=tmp_path / name), "no train shards", str(tmp_path / name), command)


def test_no_validation_shards(tmp_path, fails):
    argv = tiny(tmp_path)
    (tmp_path / "data" / "data_val_000000.bin").unlink()
    fails(argv, "no val shards", str(tmp_path / "data"), "make them with: python data/")


def test_data_that_is_a_file(tmp_path, fails):
    (tmp_path / "tokens.bin").write_bytes(b"x")
    fails(tiny(tmp_path, data=tmp_path / "tokens.bin"), "no train shards in", "tokens.bin")


SHARDS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-3]), ["is damaged", "3021 bytes, 3024"]),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"xx"), ["is damaged", "3026 bytes, 3024"]),
    "wrong magic": (lambda path: write_shard(path, [1] * 9, magic=7), ["is no token shard", "magic 7", "20240520"]),
    "wrong version": (lambda path: write_shard(path, [1] * 9, version=2), ["is no token shard", "version 2"]),
    "no tokens": (lambda path: write_shard(path, []), ["is damaged", "1024 bytes"]),
    "negative count": (lambda path: write_shard(path, [], count=-5), ["is damaged"]),
    "header says more": (lambda path: write_shard(path, [1] * 9, count=10), ["is damaged", "1042 bytes, 1044"]),
    "half a header": (lambda path: path.write_bytes(bytes(512)), ["is no token shard", "truncated header"]),
    "empty": (lambda path: path.write_bytes(b""), ["is no token shard", "truncated header"]),
    "text": (lambda path: path.write_text("hello " * 500), ["is no token shard", "magic"]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", SHARDS)
def test_damaged_shard(damage, split, tmp_path, fails):
    make_data(tmp_path / "data", train=[documents(1000, 0)], val=[documents(1000, 1)])
    path = tmp_path / "data" / f"data_{split}_000000.bin"
    change, words = SHARDS[damage]
    change(path)
    fails(tiny(tmp_path), str(path), *words, "make it again with python data/fineweb.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_token_beyond_the_vocabulary(split, tmp_path, fails):
    tokens = documents(1000, 0)
    tokens[200] = VOCAB  # among those that are evaluated
    make_data(tmp_path / "data", **{split: [tokens]})
    fails(tiny(tmp_path), f"data_{split}_000000.bin holds token id 64", "vocabulary", "64", "make it again with")


def test_token_beyond_the_vocabulary_in_a_later_shard_keeps_what_was_trained(tmp_path, fails):
    """It is met when the shard is opened: the checkpoints before it are there."""
    tokens = documents(1000, 0)
    tokens[500] = 65535
    make_data(tmp_path / "data", train=[documents(1000, 1), tokens])
    fails(tiny(tmp_path, iterations=50, save_every=2, eval_every=0), "data_train_000001.bin holds token id 65535")
    assert steps_saved(run_folder(tmp_path))


@pytest.mark.parametrize("change, words", [
    (dict(splits={"train": {"tokens": 7}, "val": {"tokens": 500}}), ["says 7 train tokens, the shards hold 3000"]),
    (dict(splits={"train": {"tokens": 3000}, "val": {"tokens": 7}}), ["says 7 val tokens, the shards hold 500"]),
    (dict(vocab_size="many"), ["cannot be read", "many"]),
    (dict(vocab_size=None), ["cannot be read"]),
    (dict(vocab_size=0), []),
    (dict(vocab_size=-4), []),
    (dict(eot="end"), []),
    (dict(eot=64), []),  # beyond the vocabulary
    (dict(splits=[]), ["cannot be read"]),
    (dict(splits={"train": 5}), ["cannot be read"]),
    (dict(splits={"train": None, "val": {"tokens": 7}}), ["says 7 val tokens, the shards hold 500"]),
], ids=str)
def test_meta_that_contradicts_the_shards_or_itself(change, words, tmp_path, fails):
    argv = tiny(tmp_path)
    edit_meta(tmp_path / "data", **change)
    fails(argv, str(tmp_path / "data"), *words, "again with", "python data/")


@pytest.mark.parametrize("key", ["vocab_size", "eot", "splits"])
def test_meta_without_a_key_that_is_needed(key, tmp_path, fails):
    argv = tiny(tmp_path)
    path = tmp_path / "data" / "meta.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    fails(argv, str(path), "cannot be read", key, "make it again with python data/fineweb.py")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '"text"', "\x00"])
def test_meta_that_is_no_object(text, tmp_path, fails):
    argv = tiny(tmp_path)
    (tmp_path / "data" / "meta.json").write_text(text)
    fails(argv, "meta.json", "cannot be read", "make it again with python data/fineweb.py")


def test_fineweb_shards_without_meta_are_those_of_gpt2(tmp_path, capsys):
    """The published FineWeb shards: 50257 tokens, 50256 at a document's start; no bits per byte."""
    made = make_data(tmp_path / "fineweb10B", [[50256, *range(500)]], [[50256, *range(400)]], vocab_size=50257)
    for path in [*made.glob("*.bin")]:
        path.rename(path.with_name(path.name.replace("fineweb10B", "fineweb")))
    (made / "meta.json").unlink()
    assert train_gpt.main(tiny(tmp_path, iterations=1, data=made)) == 0
    assert "vocabulary 50257" in capsys.readouterr().out
    assert [r["val_bpb"] for r in records(run_folder(tmp_path)) if "val_bpb" in r] == [None, None]


@pytest.mark.parametrize("name", ["data", "fineweb10B"])  # a name alone says nothing of the tokens
def test_other_shards_without_meta_are_refused(name, tmp_path, fails):
    """Byte data that was half made, or copied without it, is not taken for GPT-2's tokens."""
    made = make_data(tmp_path / name)
    (made / "meta.json").unlink()
    fails(tiny(tmp_path, data=made), str(made / "meta.json"), "cannot be read", "make it again with")


def test_advice_names_the_command_that_made_the_data(tmp_path, fails):
    """With its control characters shown."""
    made = make_data(tmp_path / "data", vocab_size=9, made_with="python data/fineweb.py --input 'a\x1b[1m.txt'")
    fails(tiny(tmp_path, data=made), "eot 63", r"again with python data/fineweb.py --input 'a\x1b[1m.txt'")


@pytest.mark.parametrize("change", [
    {"vocab_size": "64"}, {"vocab_size": 64.5}, {"vocab_size": True}, {"vocab_size": 10**30}, {"eot": -5},
    {"eot": 63.0},
    {"splits": {"train": {"tokens": "3000"}}}, {"splits": {"val": {"tokens": 500, "bytes": -1}}}, {"tokenizer": None},
    {"splits": {"val": {"bytes": "1000"}}}, {"name": 7}, {"tokenizer": {"kind": 3}},
], ids=str)
def test_meta_of_wrong_types_is_told(change, tmp_path, fails):
    argv = tiny(tmp_path)
    edit_meta(tmp_path / "data", **change)
    fails(argv, str(tmp_path / "data"), "again with")


@pytest.mark.parametrize("value", ["1e400", "NaN", "[" * 10**5, "1" * 10**4], ids=["inf", "nan", "nested", "digits"])
def test_meta_that_json_reads_oddly_is_told(value, tmp_path, fails):
    argv = tiny(tmp_path)
    path = tmp_path / "data" / "meta.json"
    path.write_text(path.read_text().replace('"vocab_size": 64', f'"vocab_size": {value}'))
    fails(argv, str(path), "cannot be read", "again with")


def test_a_pipe_in_place_of_a_shard_is_refused(tmp_path, fails):
    """Opening it would wait for ever."""
    argv = tiny(tmp_path)
    (tmp_path / "data" / "data_train_000001.bin").unlink()
    os.mkfifo(tmp_path / "data" / "data_train_000001.bin")
    fails(argv, "data_train_000001.bin is no file", "again with")


@pytest.mark.parametrize("wanted", [500, 10**9])
def test_more_evaluation_tokens_than_there_are(wanted, tmp_path, fails):
    """Of 500 tokens 499 can be predicted."""
    fails(tiny(tmp_path, eval_tokens=wanted), f"--eval_tokens {wanted}", "has 499 validation tokens", "--eval_tokens 0")


def test_validation_split_of_one_token(tmp_path, fails):
    make_data(tmp_path / "data", val=[[EOT]])
    error = fails(tiny(tmp_path, eval_tokens=0), "0 validation tokens")
    assert "use --eval_tokens 0" not in error, "advises what was given"


def test_row_longer_than_every_shard(tmp_path, fails):
    make_data(tmp_path / "data", train=[documents(100, 0), documents(90, 1)])
    argv = tiny(tmp_path, seq_len=128, batch_tokens=128, max_doc_len=0)
    fails(argv, "no shard of", str(tmp_path / "data"), "128", "lower --seq_len")


# --- settings


@pytest.mark.parametrize("argv, words, lines", [
    (["--learning-rate", "1"], ["--learning-rate"], 1),
    (["--muon_lr", "high"], ["--muon-lr", "high"], 1),
    (["--iterations", ""], ["--iterations"], 1),
    (["--muon-lr"], ["--muon-lr", "expected one argument"], 1),
    (["words"], ["unrecognized arguments: words"], 1),
    (["--wandb"], ["--wandb (now --tracker wandb)"], 1),
    (["--muon-lrr", "2", "--zzzz", "--xs"], ["--muon-lrr (did you mean --muon-lr?), --zzzz (--help", "--xs ("], 1),
    (["--experiment-name", "a/b"], ["--experiment_name 'a/b'", "letters"], 2),
    (["--iterations", "-3"], ["--iterations -3", ">0"], 2),
    (["--device", "gpu"], ["--device gpu", "auto or cpu or cuda"], 2),
    (["--backend", "flex", "--seq-len", "128", "--eval-seq-len", "128"], ["--backend flex", "CUDA", "sdpa"], 2),
    (["--warmup-steps", "8"], ["--warmup_steps 8", "--iterations 8"], 2),
    (["--seq-len", "48"], ["--batch_tokens 128", "--seq_len 48"], 2),
    (["--seq-len", "64", "--micro-tokens", "32"], ["--micro_tokens 32", "--seq_len 64"], 2),
    (["--window", "8,16"], ["--window has 2 values", "--stage_ends 1"], 2),
], ids=str)
def test_settings_that_cannot_work(argv, words, lines, tmp_path, fails):
    fails([*tiny(tmp_path), *argv], *words, code=2, lines=lines)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("argv, words", [
    (["--preset", "gpu"], ["--preset gpu needs a CUDA device", "--preset cpu"]),
    (["--preset", "speedrun", "--ngram-rows", "1000"], ["--preset speedrun needs a CUDA device"]),
    (["--device", "cuda"], ["--device cuda", "no usable CUDA device"]),
])
def test_cuda_where_there_is_none(argv, words, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(argv, *words, code=2, lines=2)


def test_number_of_processes_that_cannot_work(tmp_path, fails, monkeypatch):
    """As torchrun announces it; told once, before any connection is made."""
    for key, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    fails(tiny(tmp_path), "3 processes cannot share the 4 rows", "use 1, 2, 4 processes", code=2, lines=2)


def test_only_the_first_process_tells(tmp_path, capsys, monkeypatch):
    for key, value in {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert train_gpt.main(tiny(tmp_path)) == 2
    assert capsys.readouterr() == ("", "")


def test_every_allowed_number_of_processes_passes(tmp_path):
    for size in (1, 2, 4):
        parse_settings(tiny(tmp_path), size)
    with pytest.raises(UserError, match="use 1, 2, 4 processes"):
        parse_settings(tiny(tmp_path), 8)


def test_log_folder_that_is_a_file(tmp_path, fails):
    argv = tiny(tmp_path)
    (tmp_path / "logs").write_text("in the way")
    fails(argv, str(tmp_path / "logs"))


def test_script_of_a_shell_tells_one_sentence(tmp_path):
    """The whole way: exit code, nothing on stdout, one line on stderr."""
    done = script(train_gpt.__file__, "--data", tmp_path / "none", "--device", "cpu")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no train shards in") and done.stderr.count("\n") == 1


# --- training that fails


def all_finite(folder) -> bool:
    states = [load_state(folder, step) for step in steps_saved(folder)]
    return all(tensor.isfinite().all() for state in states for tensor in state.values())


def loss_is(value: float, monkeypatch, from_step: int):
    """The model's loss is `value` from this step (0-based) on, and so are its gradients if it is not finite."""
    factor = [1.0]

    def next_batch(self, step, real=Run.next_batch):
        factor[0] = value if step >= from_step else 1.0
        return real(self, step)
    monkeypatch.setattr(Run, "next_batch", next_batch)
    monkeypatch.setattr(GPT, "forward", lambda self, *args, real=GPT.forward: real(self, *args) * factor[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 3, 10])
@pytest.mark.parametrize("from_step", [4, 5, 7])
def test_loss_that_is_not_finite_stops(value, log_every, from_step, tmp_path, fails, monkeypatch):
    """The step is named, and all checkpoints before it, and none after it, are there and good."""
    loss_is(value, monkeypatch, from_step)
    argv = tiny(tmp_path, save_every=1, keep=99, log_every=log_every, eval_every=0)
    fails(argv, f"the loss of step {from_step + 1} is {value}", "lower --muon-lr", str(tmp_path / "logs"))
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == list(range(1, from_step + 1)) and all_finite(folder)
    assert records(folder)[-1]["status"] == "nan" and records(folder)[-1]["step"] == from_step + 1


def test_learning_rate_that_explodes(tmp_path, fails):
    """Nothing is patched: a rate far too large makes weights overflow."""
    fails(tiny(tmp_path, muon_lr=1e30, adam_lr=1e30, save_every=1, keep=99, tail=0.0), "is nan")
    assert all_finite(run_folder(tmp_path))


def ruin_weights(monkeypatch, after_step: int):
    """The update of this step (1-based) ends in NaN, though its loss, that of the weights before, was finite."""
    def step(self, *args, real=MuonAdamW.step):
        real(self, *args)
        if self.steps == after_step:
            for bank in self.banks:
                bank.state["master"].fill_(math.nan)
                bank.receive_weights()
    monkeypatch.setattr(MuonAdamW, "step", step)


@pytest.mark.parametrize("after_step, eval_every", [(6, 0), (6, 3), (8, 0)])
def test_weights_that_are_not_finite_are_not_saved(after_step, eval_every, tmp_path, fails, monkeypatch):
    """Found by the look at the weights before a checkpoint, or by the validation before it."""
    ruin_weights(monkeypatch, after_step)
    fails(tiny(tmp_path, save_every=2, keep=99, eval_every=eval_every), f"after step {after_step}", "lower --muon-lr")
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == list(range(2, after_step, 2)) and all_finite(folder)
    assert (records(folder)[-1]["status"], records(folder)[-1]["step"]) == ("nan", after_step)


def test_validation_loss_that_is_not_finite_stops(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: math.nan)
    fails(tiny(tmp_path, save_every=3), "validation loss", "step 4", "nan")
    assert steps_saved(run_folder(tmp_path)) == [3]


def test_out_of_memory_names_the_setting(tmp_path, fails, monkeypatch):
    def forward(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(GPT, "forward", forward)
    fails(tiny(tmp_path), "out of memory", "smaller --micro-tokens")


def test_tiny_settings_are_valid(tmp_path):
    """The runs above fail for the reason that each test gives: without a fault the flags train."""
    assert train_gpt.main(tiny(tmp_path)) == 0
    assert records(run_folder(tmp_path))[-1]["val_loss"] > 0 and all_finite(run_folder(tmp_path))
