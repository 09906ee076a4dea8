"""Where parts meet: n-grams and a step that breaks off, processes and sums, the clock and --iterations, stages and
the longest document."""
import helpers
import moe
import pytest
import torch
from clocked import clock
from helpers import assert_same_state, load_state, make_data, records, run_folder, steps_saved, tiny
from recipe import run_flags, run_processes

import train_gpt
import train_moe


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_of_a_step_that_was_broken_off_are_not_saved(every, tmp_path, monkeypatch):
    """In the second micro-step of step 6, when those of the first have come to the n-grams."""
    argv = dict(ngram_rows=64, ngram_every=every, micro_tokens=64, eval_every=0)
    assert train_gpt.main(tiny(tmp_path, experiment_name="whole", **argv)) == 0

    def forward(self, *args, forward=train_gpt.GPT.forward):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.GPT, "forward", forward)
        assert train_gpt.main(tiny(tmp_path, **argv)) == 1
    assert steps_saved(run_folder(tmp_path)) == [5]
    assert train_gpt.main(tiny(tmp_path, **argv, resume="latest")) == 0
    assert_same_state(*(load_state(run_folder(tmp_path, name), 8) for name in ("whole", "x")))


def test_a_checkpoint_has_the_rows_of_n_grams_of_all_processes_once(tmp_path):
    """Within a cycle: a pair and a triple of each token of its steps."""
    make_data(tmp_path / "data")
    sums = {}
    for size in (1, 2):
        argv = dict(experiment_name=f"n{size}", ngram_rows=64, ngram_every=3, iterations=2, eval_every=0)
        run_processes(size, run_flags(tmp_path / "data", tmp_path / "logs", **argv))
        state = load_state(run_folder(tmp_path, f"n{size}"), 2)
        rows, grads = (state[f"/optimizer/state/{key}/ngrams.table"] for key in ("rows", "grads"))
        assert len(rows) == len(grads) == 2 * 2 * 256
        sums[size] = grads.new_zeros(64, grads.size(1)).index_add_(0, rows, grads)
    torch.testing.assert_close(sums[2], sums[1], rtol=1e-3, atol=1e-6)


def test_a_run_by_the_clock_that_ended_goes_on_with_more_iterations(tmp_path):
    more = dict(max_seconds=2, iterations=16, allow_change="iterations", resume="latest")
    with clock(train_gpt, lambda step, rank: 50):
        assert train_gpt.main(tiny(tmp_path, max_seconds=1)) == 0
        assert train_gpt.main(tiny(tmp_path, **more)) == 0
    assert records(run_folder(tmp_path))[-1]["step"] == 40



@pytest.mark.parametrize("script, own", [(train_gpt, helpers), (train_moe, moe)], ids=["gpt", "moe"])
def test_the_longest_document_is_that_of_all_stages_of_a_length(script, own):
    """FlashAttention leaves out what lies beyond it."""
    ends = (0.3, 0.6, 1.0)
    model = script.GPT(own.settings(stage_ends=ends, max_doc_len=(0, 24, 16), seq_len=(32, 16, 32)), 64)
    assert model.longest == {32: 32, 16: 24}
