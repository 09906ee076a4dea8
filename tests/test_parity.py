"""The visible loop, train(run), against one written here without a Run: the same losses and weights, bit by bit. What
surrounds a run (log, clock, signals, checkpoints, evaluation) must not touch what is computed."""
import pytest
import torch
from helpers import assert_same_state, flatten_state, load_state, losses, run_folder, tiny

import train_gpt as tg

CONFIGURATIONS = {
    "stages, further targets, accumulation": dict(
        iterations=9, stage_ends=(1 / 3, 2 / 3, 1.0), batch_tokens=(64, 128, 256), seq_len=(16, 32, 32), mtp=(2, 1, 0),
        max_doc_len=(16, 16, 32), window=(8, 16, 32), window_start=8, stage_lr=(1.0, 1.5, 0.5), micro_tokens=64,
        warmup_steps=2, eval_every=4, save_every=2, adam_weight_decay=0.1),
    "width transfer": dict(
        mup=True, base_width=16, base_head_dim=8, mup_embedding="sqrt", schedule="wsd", micro_tokens=32,
        log_every=3, eval_every=0, long_docs="clip", eval_window=48),
}


def plain_loop(s: tg.Settings) -> tuple[dict, dict]:
    """Losses by step, and the state as a checkpoint holds it."""
    corpus, alone, stages = tg.open_corpus(s.data), tg.World(), tg.stage_table(s)
    model = tg.GPT(s, corpus.meta["vocab_size"])
    optimizer, loader = tg.MuonAdamW(model, s, alone), tg.Loader(s, corpus, alone)
    stream = tg.ValStream(corpus, s.eval_tokens, s.eval_seq_len)
    found = {"train_loss": {}, "val_loss": {}}
    for step in range(s.iterations):
        stage = tg.stage_at(stages, step)
        window = torch.tensor(tg.window_at(s, stages, step), dtype=torch.int32)
        batch, loss_of_step = loader.next(step)[0], torch.zeros(())
        assert batch.shape == (stage.batch_tokens // s.micro_tokens, 3, s.micro_tokens // stage.seq_len, stage.seq_len)
        for number, (inputs, targets, docs) in enumerate(batch, start=1):
            optimizer.last_micro_step = number == len(batch)
            summed = model(inputs, tg.future_targets(targets, docs, stage.mtp), docs, window)
            objective = torch.zeros(())
            for weight, loss in zip(tg.future_weights(stages, step), summed, strict=True):
                objective = objective + weight / stage.batch_tokens * loss
            objective.backward()
            loss_of_step += summed[0].detach() / stage.batch_tokens
        optimizer.step(tg.lr_scale(s, stages, step), tg.momentum_at(s, step))
        found["train_loss"][step + 1] = loss_of_step.item()
        if step + 1 == s.iterations or s.eval_every and (step + 1) % s.eval_every == 0:
            now = tg.window_at(s, stages, step + 1)
            found["val_loss"][step + 1] = tg.evaluate(model, stream, s, alone, now)
    loader.close()
    return found, flatten_state({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_visible_loop_computes_what_a_plain_one_does(name, tmp_path):
    argv = tiny(tmp_path, **{"tail": 0.0} | CONFIGURATIONS[name])  # no tail average
    s = tg.parse_settings(argv, 1)[0]
    expected, state = plain_loop(s)
    assert tg.main(argv) == 0
    folder = run_folder(tmp_path)
    told = losses(folder)
    logged = {n: loss for n, loss in expected["train_loss"].items() if n % s.log_every == 0 or n == s.iterations}
    assert told == {"train_loss": logged, "val_loss": expected["val_loss"]}
    assert_same_state(state, load_state(folder, s.iterations))
    assert expected["train_loss"][s.iterations] < expected["train_loss"][1]
