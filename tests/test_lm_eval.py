"""evals/lm_eval_model.py: log-likelihoods and texts of checkpoints in the harness, and HellaSwag as ours has it."""
import json

import pytest
import test_generate
import test_moe_generate
import torch
from encodings_small import VOCAB, encoding
from helpers import log_probabilities
from test_generate import BYTES, CHARS, save, settings

import data.common
import generate
import train_gpt
import train_moe
from evals import hellaswag

pytest.importorskip("lm_eval")
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from evals import lm_eval_model  # noqa: E402

COPIES = dict(pointer=8, ngram_rows=50, attention="LSPL")


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def model_of(path, **options):
    return lm_eval_model.NanoSpeedrun(str(path), device="cpu", **options)


def plain_scores(path, before: list[int], after: list[int]) -> tuple[float, bool]:
    """By one pass over the whole text and the formulas of the mixture."""
    meta = train_gpt.read_meta(path)
    model, window = generate.load_model(generate.import_script(meta["script"]), path, meta, longest=128)
    logs = log_probabilities(model, (before + after)[:-1], window).log_softmax(-1)
    rows, size = logs[len(before) - 1:], meta["data"]["meta"]["vocab_size"]
    target = torch.tensor(after)
    return float(rows.gather(1, target[:, None]).sum()), bool((rows[:, :size].argmax(-1) == target).all())


@pytest.mark.parametrize("changes", [{}, COPIES], ids=["plain", "copies"])
def test_loglikelihoods_are_those_of_single_passes(tmp_path, changes):
    """In padded batches, with empty contexts; greedy where each token is the likeliest, as a generated one is."""
    path = save(tmp_path, BYTES, settings(**changes))
    lm = model_of(path, batch_size=3)
    pairs = [("ab", " c"), ("", "xyz"), ("a longer one", " with more"), ("q", "é"), ("ab ", "c")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    texts = [("ab", " c"), ("", "xyz"), ("a longer one", " with more"), ("q", "é"), ("ab", " c")]
    for (before, after), (value, greedy) in zip(texts, found, strict=True):
        expected = plain_scores(path, [256, *before.encode()], [*after.encode()])
        assert value == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]
    made = lm.generate_until(instances("generate_until", ("ab", {"until": [], "max_gen_toks": 1})), disable_tqdm=True)
    if made[0].encode() and "\ufffd" not in made[0]:
        assert lm.loglikelihood(instances("loglikelihood", ("ab", made[0])), disable_tqdm=True)[0][1]


def test_rolling_takes_windows_of_the_longest_text(tmp_path):
    path = save(tmp_path, BYTES)
    text = "some text that is longer than two windows" * 2
    tokens = [*text.encode()]
    (whole,) = model_of(path, max_length=128).loglikelihood_rolling(
        instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert whole == pytest.approx(plain_scores(path, [256], tokens)[0], rel=1e-4)
    lm = model_of(path)
    assert lm.loaded.longest == 64
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    first = plain_scores(path, [256], tokens[:64])[0]
    last = plain_scores(path, tokens[17:64], tokens[64:])[0]
    assert found == pytest.approx(first + last, rel=1e-4)


def test_generated_texts_are_those_of_generate_and_end_at_a_stop(tmp_path, capsysbinary):
    path = save(tmp_path, CHARS, settings(**COPIES))
    lm = model_of(path, max_length=60)
    text = {"until": [], "max_gen_toks": 20}
    (found,) = lm.generate_until(instances("generate_until", ("ab", text)), disable_tqdm=True)
    capsysbinary.readouterr()
    assert generate.main(["--checkpoint", str(path), "--device", "cpu", "--temperature", "0", "--prompt", "ab",
                          "--max-tokens", "20"]) == 0
    assert capsysbinary.readouterr().out.decode() == f"ab{found}\n" and len(found) == 20
    stop = found[6:8]
    (cut,) = lm.generate_until(instances("generate_until", ("ab", text | {"until": [stop]})), disable_tqdm=True)
    assert cut == found[:found.index(stop)]
    sampled = text | {"do_sample": True, "temperature": 2.0}
    assert len(lm.generate_until(instances("generate_until", ("ab", sampled)), disable_tqdm=True)[0]) == 20
    assert lm.loglikelihood(instances("loglikelihood", ("ab", "c")), disable_tqdm=True)  # the cache is in a copy


def test_a_mixture_of_experts_has_its_bias(tmp_path):
    s = test_moe_generate.settings(**test_moe_generate.DEEP | test_moe_generate.KINDS["sigmoid_bias"])
    path = test_moe_generate.save_random(tmp_path, s)
    lm = model_of(path)
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", ("123", "456")), disable_tqdm=True)
    encode = lm.loaded.tokenizer.encode
    assert value == pytest.approx(plain_scores(path, encode("123"), encode("456"))[0], rel=1e-4)
    assert isinstance(lm.loaded.model, train_moe.GPT) and lm.loaded.model.router_bias.any()


TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}, cache_dir: {cache}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_hellaswag_is_that_of_ours(tmp_path, monkeypatch):
    """The same tasks from a local file: acc and acc_norm of the harness, raw and per byte there, to the last digit."""
    monkeypatch.setattr(data.common, "named_encoding", lambda name: encoding())
    words = ["the thing", "a rest", "in her error", "on and on", "return self", "zu2 the'll", "is at them", "ringing"]
    tasks = [{"ctx": f"{words[i % 8]} {words[(3 * i) % 8]}", "label": i % 4, "endings": [
        f"{words[(i + j) % 8]} {words[(i * j) % 8]}{'.' * (j + i % 3)}" for j in range(4)]} for i in range(24)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    path = save(tmp_path / "runs", VOCAB, settings(num_layers=2, attention="LL", width=32))
    argv = ["--checkpoint", path, "--input", file, "--device", "cpu", "--row-len", 64, "--output", tmp_path / "ours"]
    assert hellaswag.main([*map(str, argv)]) == 0
    ours = json.loads((tmp_path / "ours").read_text())
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "local.yaml").write_text(TASK.format(file=file, cache=tmp_path / "cache"))
    manager = TaskManager(include_path=str(tmp_path / "task"), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="nanospeedrun", model_args=f"checkpoint={path}", tasks=["local_hellaswag"], task_manager=manager,
        device="cpu", bootstrap_iters=0, log_samples=False)["results"]["local_hellaswag"]
    assert results["acc,none"] == ours["raw"] and results["acc_norm,none"] == ours["per_byte"]
    assert 0 < ours["raw"] < 1 and ours["raw"] != ours["per_byte"]


def test_wrong_arguments_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="train with python train_gpt.py"):
        model_of(tmp_path)
    path = save(tmp_path, BYTES)
    with pytest.raises(ValueError, match="knows checkpoint and max_length, not pretrained"):
        model_of(path, pretrained="x")
    with pytest.raises(ValueError, match="max_length=many"):
        model_of(path, max_length="many")
    assert test_generate.BYTES["eot"] == model_of(path).eot_token_id


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="--device cuda: this machine has no usable CUDA device"):
        lm_eval_model.NanoSpeedrun(str(save(tmp_path, BYTES, settings())), device="cuda")
