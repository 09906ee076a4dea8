"""export.py: what transformers loads against the checkpoint's model, its cache; model cards and wrong input."""
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import baseline
import moe
import numpy as np
import pytest
import test_baseline_models
import test_generate
import test_moe_generate
import torch
from helpers import environment, log_probabilities, make_data, run_folder, tiny
from test_generate import BYTES, CHARS, random_model, save, settings

import export
import generate
import train_baseline
import train_gpt
import train_moe

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
LENGTH, PROMPT = 40, 9
META = {"data": {"meta": {"vocab_size": test_generate.VOCAB, "eot": None}}, "step": 10}


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """Where transformers puts the code that it loads, and no bars. What torch keeps of its functions that make tensors
    is made before transformers replaces one of them."""
    with torch.device("meta"):
        torch.empty(0)
    before = transformers.dynamic_module_utils.HF_MODULES_CACHE
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.dynamic_module_utils.HF_MODULES_CACHE = before


@pytest.fixture(autouse=True, scope="module")
def code_once():
    """The code of a script is made once for all tests."""
    plain = export.modeling_code
    export.modeling_code = functools.cache(plain)
    yield
    export.modeling_code = plain


def load(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def loaded(folder: Path, script, s, model, vocab_size: int, window: int):
    """What transformers loads from the files of a model."""
    folder.mkdir()
    meta = META | {"data": {"meta": {"vocab_size": vocab_size, "eot": None}}}
    export.write_model(folder, script, s, model, meta, window)
    return load(folder)


def text(vocab_size: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_same(hf, expected: torch.Tensor, tokens: torch.Tensor):
    """Its logits, (T, columns), by a pass over all, and by its cache after a prompt, in pieces of 1, 1, .. and 5."""
    found = hf(tokens).logits[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    out, parts = hf(tokens[:, :PROMPT], use_cache=True), []
    parts.append(out.logits)
    for piece in (*tokens[:, PROMPT:-5].split(1, dim=1), tokens[:, -5:]):
        out = hf(piece, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=0)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[0], found, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert hf(tokens, logits_to_keep=1).logits.shape[1] == 1


@torch.no_grad()
def scores(model, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Logits of all positions, (T, columns); of a model that copies log-probabilities, none of its gate."""
    if getattr(model, "pointer", None) is None:
        return model.head(model.trunk(tokens, torch.zeros_like(tokens), torch.tensor(window, dtype=torch.int32)))[0]
    return log_probabilities(model, tokens[0].tolist(), window)


def drop_gate(logits: torch.Tensor, model) -> torch.Tensor:
    if getattr(model, "pointer", None) is None:
        return logits
    keep = torch.arange(logits.size(-1)) != model.vocab_size
    return logits[..., keep]


# --- every model


@pytest.mark.parametrize("changes", [*test_generate.VARIANTS, dict(attention="LSPL", num_layers=4, mup=True,
                         base_width=32, base_head_dim=16, candidates=(128,)), dict(softcap=(0.0, 0.0, 1.0), pointer=8,
                         ngram_rows=50, qk_dim=8, attention="PSLL")], ids=str)
def test_logits_of_train_gpt(tmp_path, changes):
    s = settings(**changes)
    model, tokens = random_model(s), text(test_generate.VOCAB)
    hf = loaded(tmp_path / "hf", train_gpt, s, model, test_generate.VOCAB, 16)
    assert_same(hf, drop_gate(scores(model, tokens, 16), model), tokens) if model.pointer is None else assert_mixture(
        hf, model, tokens)


def assert_mixture(hf, model, tokens: torch.Tensor):
    """Log-probabilities, which sum to 1, and the class for copying is as good as impossible."""
    expected, found = scores(model, tokens, 16), hf(tokens).logits[0]
    assert found[:, model.vocab_size].max() < -50
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(LENGTH), rtol=0, atol=1e-5)
    torch.testing.assert_close(drop_gate(found, model), drop_gate(expected, model).float(), rtol=1e-4, atol=1e-5)
    assert_same(hf, found.detach(), tokens)


@pytest.mark.parametrize("name", test_moe_generate.KINDS)
def test_logits_of_train_moe(tmp_path, name):
    """With the routers' bias, which is no weight in training, and without noise and drops."""
    s = moe.settings(**test_moe_generate.DEEP | dict(window=16, window_step=8) | test_moe_generate.KINDS[name])
    s = dataclasses.replace(s, moe_impl="loop", dtype="fp32", kernels="none", compile=False)
    model, tokens = moe.random_model(s), text(moe.VOCAB)
    hf = loaded(tmp_path / "hf", train_moe, s, model, moe.VOCAB, 16)
    if model.pointer is None:
        assert_same(hf, scores(model, tokens, 16), tokens)
    else:
        assert_mixture(hf, model, tokens)


def class_of(model_type: str, changes: dict) -> str:
    """The class that a model of train_baseline.py is exported as."""
    gated = changes.get("mlp", "swiglu" if model_type == "moderngpt" else "gelu").endswith("glu")
    if changes.get("window") or model_type not in ("gpt", "moderngpt") or gated != (model_type == "moderngpt"):
        return "NanoSpeedrunForCausalLM"
    modern = "Qwen3ForCausalLM" if changes.get("qk_norm") else "LlamaForCausalLM"
    return "GPT2LMHeadModel" if model_type == "gpt" else modern


@pytest.mark.parametrize("model_type, changes", test_baseline_models.VARIANTS.values(),
                         ids=test_baseline_models.VARIANTS)
def test_logits_of_train_baseline(tmp_path, model_type, changes):
    """GPT-2, and Llama-like models, are transformers' own, without a line of code."""
    s = dataclasses.replace(baseline.settings(model_type, **changes), backend="sdpa")
    model, tokens = baseline.random_model(s), text(baseline.VOCAB, 32)
    hf = loaded(tmp_path / "hf", train_baseline, s, model, baseline.VOCAB, model.window)
    assert type(hf).__name__ == (name := class_of(model_type, changes))
    assert (tmp_path / "hf" / "modeling_nanospeedrun.py").exists() == name.startswith("Nano")
    assert_same(hf, scores(model, tokens, model.window), tokens)


def test_the_comparison_would_notice(tmp_path):
    """One weight, or the window."""
    s = settings(pointer=8)
    model, tokens = random_model(s), text(test_generate.VOCAB)
    hf = loaded(tmp_path / "hf", train_gpt, s, model, test_generate.VOCAB, 16)
    before = hf(tokens).logits
    hf.config.window = 24
    assert (hf(tokens).logits - before).abs().max() > 1e-3
    hf.config.window = 16
    assert torch.equal(hf(tokens).logits, before)
    with torch.no_grad():
        hf.model.pointer.small[0, 0] += 0.1
    assert (hf(tokens).logits - before).abs().max() > 1e-3


def test_the_window_of_evaluation_stretches_the_angles(tmp_path):
    s = settings(eval_window=32)
    save(tmp_path / "runs", BYTES, s)
    hf, tokens = exported(tmp_path, tmp_path / "runs"), text(257, 60)
    (path,) = (tmp_path / "runs" / "checkpoints").iterdir()
    model, window = generate.load_model(train_gpt, path, train_gpt.read_meta(path), longest=60)
    assert window == 32 and hf.config.longer == [16, 32]
    with torch.no_grad():
        assert_same(hf, scores(model, tokens, 32), tokens)


# --- what else transformers does with them


def exported(tmp_path: Path, run: Path, *flags: str):
    """What transformers loads of a run's export."""
    out = tmp_path / "hf"
    assert export.main(["--checkpoint", str(run), "--out", str(out), *flags]) == 0
    return load(out)


COPIES = dict(pointer=8, ngram_rows=50, attention="LSPL")


def test_padded_rows_beams_and_a_longer_text(tmp_path):
    """Left-padded rows have the text that each has alone, by its cache and without; texts outgrow the tables."""
    save(tmp_path / "runs", BYTES, settings(**COPIES))
    hf = exported(tmp_path, tmp_path / "runs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    batch = tokenizer(["a longer text", "b", ""], return_tensors="pt", padding=True)
    assert batch["input_ids"][:, -1].tolist() == [*b"tb", 256]
    options = dict(max_new_tokens=80, min_new_tokens=80, do_sample=False)
    rows = hf.generate(**batch, **options)
    assert torch.equal(rows, hf.generate(**batch, use_cache=False, **options))
    assert rows.shape == (3, 94) and int(rows.max()) < 257
    alone = hf.generate(**tokenizer("b", return_tensors="pt"), **options)
    assert alone[0].tolist() == rows[1, -82:].tolist()
    beams = hf.generate(**batch, max_new_tokens=6, num_beams=3)
    assert torch.equal(beams, hf.generate(**batch, max_new_tokens=6, num_beams=3, use_cache=False))


def test_a_cache_of_the_callers_is_filled(tmp_path):
    """As transformers' own models do it: what was passed is used by the next pass."""
    save(tmp_path / "runs", BYTES, settings(**COPIES))
    hf, tokens = exported(tmp_path, tmp_path / "runs"), text(60)
    with torch.no_grad():
        expected = hf(tokens).logits[0, -5:]
        for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=hf.config)):
            first = hf(tokens[:, :-5], past_key_values=cache)
            assert first.past_key_values is cache and cache.get_seq_length() == LENGTH - 5
            torch.testing.assert_close(hf(tokens[:, -5:], past_key_values=cache).logits[0], expected)


def test_assisted_decoding_is_refused_and_a_trainer_divides_the_loss(tmp_path):
    save(tmp_path / "runs", BYTES, settings())
    hf = exported(tmp_path, tmp_path / "runs")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        hf.generate(text(60), max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert hf.accepts_loss_kwargs is False and len(hf.get_input_embeddings().weight) == hf.config.vocab_size


def test_the_longest_text_is_a_document_of_training_or_the_row_of_validation():
    s = settings(seq_len=(64, 128), max_doc_len=(16,), eval_seq_len=32)
    assert export.longest_text(s, None) == 32
    assert export.longest_text(dataclasses.replace(s, max_doc_len=(0,)), None) == 128


def test_private_needs_a_push(tmp_path, capsys):
    assert export.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "hf"), "--private"]) == 1
    assert "no effect without --push" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["copies", "experts"])
def test_loading_leaves_the_random_numbers_alone_and_training_goes_on(tmp_path, kind):
    """No seed is set; gradients of all weights, also of copies, n-grams and experts; half precision loads."""
    if kind == "copies":
        save(tmp_path / "runs", BYTES, settings(**COPIES))
    else:
        s = moe.settings(**test_moe_generate.DEEP | test_moe_generate.KINDS["shared, fine"])
        test_moe_generate.save_random(tmp_path / "runs", s)
    hf = exported(tmp_path, tmp_path / "runs")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(tmp_path / "hf")
    assert torch.equal(torch.rand(3), expected)
    tokens = text(60)
    out = hf(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hf.parameters())
    half = load(tmp_path / "hf", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(tokens).logits.isfinite().all()


def test_a_trained_run_writes_the_same_text_and_needs_no_file_of_ours(tmp_path, capsysbinary):
    """With averaged weights; in another process, without this project, through transformers' pipeline."""
    shards = dict(train=[byte_documents(3000, 1)], val=[byte_documents(500, 2)])
    make_data(tmp_path / "data", vocab_size=257, eot=256, **shards)
    argv = tiny(tmp_path, tail=0.5, tail_steps=4, pointer=8, ngram_rows=50, iterations=8)
    assert train_gpt.main(argv) == 0
    run = run_folder(tmp_path)
    exported(tmp_path, run)
    capsysbinary.readouterr()
    assert generate.main(["--checkpoint", str(run), "--device", "cpu", "--temperature", "0", "--prompt", "ab",
                          "--max-tokens", "30"]) == 0
    expected = capsysbinary.readouterr().out.decode(errors="replace")[:-1]
    code = """
import sys
from transformers import pipeline
p = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
ours = {"train_gpt", "exports", "export", "generate"} & {name.split(".")[0] for name in sys.modules}
print(repr((sorted(ours), p("ab", max_new_tokens=30, do_sample=False)[0]["generated_text"])))
"""
    env = environment(PYTHONPATH="", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "hf")], env=env, cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == ([], expected)
    said = (tmp_path / "hf" / "README.md").read_text()
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert f"| validation loss | {loss:.4f} nats per token" in said and "| tokens | 1,024 |" in said
    assert "tail: 0.5" in said and str(tmp_path) not in said and "made by a test" in said
    assert str(tmp_path) not in (tmp_path / "hf" / "config.json").read_text()


def byte_documents(total: int, seed: int) -> np.ndarray:
    """Tokens of documents of 40 letters."""
    letters = np.random.default_rng(seed).integers(97, 110, (total // 41 + 1, 41))
    letters[:, 0] = 256
    return letters.flatten()[:total]


def test_gpt2_of_a_run(tmp_path):
    """Through the command line; the tokenizer keeps what GPT-2's own class would not: eot before a text."""
    s = baseline.settings("gpt")
    model = baseline.GPT(s, 257)
    state = {"model": model.state_dict()}
    meta = test_generate.ABOUT | {"settings": dataclasses.asdict(s), "script": "train_baseline.py",
                                  "data": {"fingerprint": "", "meta": BYTES}}
    train_baseline.write_checkpoint(tmp_path / "runs", 8, state, meta, keep=1)
    hf = exported(tmp_path, tmp_path / "runs")
    assert type(hf) is transformers.GPT2LMHeadModel
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    assert pipe.tokenizer("ab")["input_ids"] == [256, 97, 98]
    assert len(pipe("ab", max_new_tokens=4)[0]["generated_text"]) >= 2
    assert "trust_remote_code" not in (tmp_path / "hf" / "README.md").read_text()


# --- wrong input


def error_of(capsys, *flags) -> str:
    capsys.readouterr()
    assert export.main([str(flag) for flag in flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    run = save(tmp_path / "runs", CHARS).parent.parent
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = tmp_path / "hf"
    assert "train with python train_gpt.py" in error_of(capsys, "--checkpoint", tmp_path / "none", "--out", out)
    assert "not empty" in error_of(capsys, "--checkpoint", run, "--out", tmp_path / "full")
    assert "not empty" in error_of(capsys, "--checkpoint", run, "--out", tmp_path / "full" / "file")
    assert "--out" in error_of(capsys, "--checkpoint", run)
    assert "NAME/REPO" in error_of(capsys, "--checkpoint", run, "--out", out, "--push", "mine")
    assert "apache-2.0" in error_of(capsys, "--checkpoint", run, "--out", out, "--licence", "a b")
    with monkeypatch.context() as patched:
        patched.setattr(export, "missing_packages", lambda: ["transformers", "safetensors"])
        said = error_of(capsys, "--checkpoint", run, "--out", out)
        assert "pip install transformers safetensors" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "runs"]


def test_a_model_that_differs_is_not_exported(tmp_path, capsys, monkeypatch):
    """As when RECORD has a new technique that exports/modeling.py does not know."""
    run, plain = save(tmp_path / "runs", BYTES).parent.parent, export.modeling_code
    other = "return root.square()\n", "return root\n"
    monkeypatch.setattr(export, "modeling_code", lambda script: plain(script).replace(*other))
    assert "exports/modeling.py must follow" in error_of(capsys, "--checkpoint", run, "--out", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_damaged_checkpoint_is_passed_over_and_an_empty_folder_is_taken(tmp_path, capsys):
    first = save(tmp_path / "runs", BYTES, step=9)
    second = save(tmp_path / "runs", BYTES, step=10)
    os.truncate(second / "state.pt", 100)
    (tmp_path / "hf").mkdir()
    exported(tmp_path, tmp_path / "runs")
    assert str(first) in capsys.readouterr().err
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "modeling_nanospeedrun.py"}


def test_grokking_has_no_language_model(tmp_path, capsys):
    path = save(tmp_path / "runs", CHARS, script="train_grokking.py")
    assert "does not fit this train_grokking.py" in error_of(capsys, "--checkpoint", path, "--out", tmp_path / "hf")


# --- the code


@pytest.mark.parametrize("script", [train_gpt, train_moe, train_baseline])
def test_the_code_is_the_scripts_and_brings_nothing_else(tmp_path, script):
    """All its lines are lines of the script or of exports/modeling.py, in which nothing is undefined that is reached;
    no operator is registered; it asks for torch and transformers alone."""
    code = export.modeling_code(script)
    known = set((ROOT / f"{script.__name__}.py").read_text().splitlines())
    known |= set((ROOT / "exports" / "modeling.py").read_text().splitlines())
    extra = [line for line in code.splitlines() if line and line not in known]
    assert len(extra) <= 2, extra
    standard = {"__future__", "typing", "math", "functools", "dataclasses", "contextvars"}
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) <= {"torch", "transformers", *standard}
    assert "triton" not in code and "custom_op" not in code and "argparse" not in code
    (tmp_path / "code.py").write_text(code)
    if shutil.which("ruff") or Path(sys.executable).with_name("ruff").exists():
        command = [str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--select", "F821",
                   str(tmp_path / "code.py")]
        found = subprocess.run(command, capture_output=True, text=True)
        names = set(re.findall(r"Undefined name `(\w+)`", found.stdout))
        assert names <= ({"ngram_rows", "norm", "POINTER_BLOCK"} if script is train_baseline else set())
