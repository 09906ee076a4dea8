"""The model: attention backends against each other and against a loop, causality, documents, formulas of the parts."""
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex_module

import train_gpt
from train_gpt import GPT, Settings

VOCAB = 50


def settings(**changes) -> Settings:
    """A tiny model, all choices made."""
    base = dict(num_layers=4, width=64, head_dim=16, value_embeds=1, attention="LSSL", seq_len=(64,),
                batch_tokens=(128,), window=(32,), window_start=32,
                window_step=8, eval_seq_len=64, device="cpu", dtype="fp32", backend="sdpa",
                compile=False, micro_tokens=128)
    return Settings(**{**base, **changes})


def random_model(**changes) -> GPT:
    """A model whose every parameter is random, the zero-initialized ones too."""
    model = GPT(settings(**changes), VOCAB)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


def random_docs(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Document numbers that rise along each row, with a few long and many short documents."""
    rng = np.random.default_rng(seed)
    steps = rng.random((rows, length)) < rng.choice([0.002, 0.02, 0.2], size=(rows, 1))
    return torch.from_numpy(np.cumsum(steps, axis=1).astype(np.int32))


def seen(docs: torch.Tensor, window: int) -> torch.Tensor:
    """Who sees whom, spelled out pair by pair: (B, T, T) bool."""
    rows, length = docs.shape
    return torch.tensor([[[k <= q and q - k < window and docs[b, q] == docs[b, k] for k in range(length)]
                          for q in range(length)] for b in range(rows)])


def int_tensor(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


# --- attention


@pytest.mark.parametrize("window", [1, 5, 24, 1000])
def test_dense_mask_is_the_rule_pair_by_pair(window):
    docs = random_docs(3, 24)
    assert torch.equal(train_gpt.dense_mask(docs, int_tensor(window))[:, 0], seen(docs, window))


def documents(kind: str, rows: int, length: int) -> torch.Tensor:
    """Document numbers that rise along each row: random ones, or a special case."""
    position = torch.arange(length).repeat(rows, 1)
    return {"random": random_docs(rows, length, seed=length), "one": torch.zeros_like(position), "each": position,
            "blocks": position // 128, "odd": (position + 77) // 128 * 3, "end": (position > length - 200) * position,
            "last": (position == length - 1).long()}[kind].int()


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("kind", ["random", "one", "each", "blocks", "odd", "end", "last"])
@pytest.mark.parametrize("length, window", [(128, 1), (128, 128), (256, 64), (256, 127), (256, 128), (640, 129),
                                            (640, 256), (640, 300), (1024, 5000), (1024, 1)])
def test_block_mask_is_that_of_torch_and_nearest_first(kind, length, window, copies):
    docs = documents(kind, 3, length)
    mask = train_gpt.block_mask(docs, int_tensor(window), copies)
    expected = flex_module.create_block_mask(mask.mask_mod, 3, None, copies * length, copies * length, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for side, nearest in (("kv", -1), ("q", 1)):
        for part in (side, f"full_{side}"):
            counts, wanted = (getattr(m, f"{part}_num_blocks") for m in (mask, expected))
            lists, wanted_lists = (getattr(m, f"{part}_indices") for m in (mask, expected))
            assert torch.equal(counts, wanted) and lists.shape == wanted_lists.shape and lists.is_contiguous()
            assert counts.dtype == lists.dtype == torch.int32
            assert 0 <= lists.min() and lists.max() < lists.size(-1), "what is not counted is a block, too"
            for b, _, block in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
                count = counts[b, 0, block]
                assert lists[b, 0, block, :count].tolist() == sorted(
                    wanted_lists[b, 0, block, :count].tolist(), reverse=nearest < 0)


def test_masks_of_paired_heads_repeat_each_token():
    docs, window = random_docs(2, 128), int_tensor(20)
    once = train_gpt.dense_mask(docs, window)
    twice = train_gpt.dense_mask(docs, window, copies=2)
    assert torch.equal(twice, once.repeat_interleave(2, 2).repeat_interleave(2, 3))
    mask = train_gpt.block_mask(docs, window, copies=2)
    q, k = torch.arange(256)[:, None], torch.arange(256)
    assert torch.equal(mask.mask_mod(1, 0, q, k), once[1, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_masks_are_one_graph_for_training_and_evaluation(monkeypatch):
    """Grad mode is a guard of every graph."""
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(train_gpt, "compiled", lambda f, s: torch.compile(f, backend=backend, dynamic=False,
                                                                          fullgraph=True))
    model = random_model(num_layers=3, attention="LPS", window_step=128, backend="flex", seq_len=(256,))
    train_gpt.compile_model(model, settings(compile_unit="block"))
    docs = random_docs(2, 256)
    for training in (True, False, True):
        with torch.set_grad_enabled(training):
            assert model.masks(docs, int_tensor(128)).keys() == set("LPS")
    assert len(graphs) == 1


def flex_gradients(docs, window, allow_cpu_backward, compile_it=False):
    """Output of both backends on the same input, and gradients where the backend has them."""
    generator = torch.Generator().manual_seed(2)
    results = []
    for mask in (train_gpt.dense_mask(docs, window), train_gpt.block_mask(docs, window)):
        generator.manual_seed(2)
        q, k, v, g = (torch.randn(docs.size(0), docs.size(1), 2, 16, generator=generator) for _ in range(4))
        leaves = [x.requires_grad_(allow_cpu_backward) for x in (q, k, v)]
        attend = torch.compile(train_gpt.attend, dynamic=False) if compile_it else train_gpt.attend
        y = attend(*leaves, mask, 0.3, "sdpa" if isinstance(mask, torch.Tensor) else "flex")
        results.append([y.detach(), *(torch.autograd.grad((y * g).sum(), leaves) if allow_cpu_backward else [])])
    return results


@pytest.mark.parametrize("window", [40, 128, 200, 10_000])
def test_eager_flex_equals_sdpa_forward_and_backward(window, monkeypatch):
    # torch refuses FlexAttention's backward on CPUs because it has no kernel; its reference implementation works
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    sdpa, flex = flex_gradients(random_docs(2, 384, seed=window), int_tensor(window), allow_cpu_backward=True)
    for a, b in zip(sdpa, flex, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_plain_attention_equals_sdpa_forward_and_backward():
    docs, results = random_docs(2, 96), []
    mask = train_gpt.dense_mask(docs, int_tensor(20))
    for backend in ("sdpa", "plain"):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 96, 2, 16, requires_grad=True) for _ in range(3)]
        y = train_gpt.attend(*leaves, mask, 0.3, backend)
        results.append([y, *torch.autograd.grad((y * torch.randn(y.shape, device=y.device)).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_flex_equals_sdpa():
    for window in (100, 300):  # one graph: the window is a tensor
        sdpa, flex = flex_gradients(random_docs(2, 384), int_tensor(window), allow_cpu_backward=False, compile_it=True)
        torch.testing.assert_close(sdpa[0], flex[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("unit", ["model", "block"])
def test_the_traced_flex_model_equals_the_eager_sdpa_model_forward_and_backward(unit, monkeypatch):
    """Block masks made inside the graph (model) or handed to it (block) trace as one graph, and a new window traces
    nothing. aot_eager: on a CPU there is no kernel to compile to, and torch's guard against training has to be off."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(train_gpt, "compiled", lambda f, s: torch.compile(f, backend="aot_eager", dynamic=False,
                                                                          fullgraph=True))
    shape = dict(seq_len=(256,), eval_seq_len=256, num_layers=3, attention="LPS", window_step=128)
    sdpa, flex = random_model(**shape), random_model(**shape, backend="flex")
    train_gpt.compile_model(flex, settings(**shape, backend="flex", compile_unit=unit))
    tokens = torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    docs = random_docs(2, 256)
    for window in (128, 256):
        with torch._dynamo.config.patch(error_on_recompile=window != 128):
            assert_same_gradients((sdpa, flex), tokens, docs, window)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [100, 128, 1000, 10_000])
def test_compiled_flex_equals_sdpa_on_the_gpu_forward_and_backward(window):
    docs, window = random_docs(2, 2048).cuda(), int_tensor(window).cuda()
    attend, outputs = torch.compile(train_gpt.attend, dynamic=False), []
    for mask in (train_gpt.dense_mask(docs, window), train_gpt.block_mask(docs, window)):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 2048, 4, 64).to("cuda", torch.bfloat16).requires_grad_() for _ in range(3)]
        y = attend(*leaves, mask, 0.12, "sdpa" if isinstance(mask, torch.Tensor) else "flex")
        outputs.append([y, *torch.autograd.grad((y * torch.randn(y.shape, device=y.device)).sum(), leaves)])
    for a, b in zip(*outputs, strict=True):
        assert (a - b).norm() / a.norm() < 1e-2


# --- what a position may depend on


def assert_same_gradients(models: tuple[GPT, GPT], tokens, docs, window: int):
    """Loss and gradients of two models agree."""
    losses = [next_token_loss(model, tokens, tokens, docs, window) for model in models]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(
        losses, models, strict=True)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * a.abs().max().item(), rtol=1e-3)


def next_token_loss(model: GPT, inputs, targets, docs, window: int = 32) -> torch.Tensor:
    return model(inputs, targets[None], docs, int_tensor(window))[0]


def logits_of(model: GPT, tokens: torch.Tensor, docs: torch.Tensor, window: int = 32) -> torch.Tensor:
    return model.head(model.trunk(tokens, docs, int_tensor(window)))


@pytest.mark.parametrize("changes", [dict(skip="unet"), dict(skip="single"), dict(skip="none"), dict(ngram_rows=64),
                                     dict(attention="LPPL")], ids=str)
def test_future_tokens_change_nothing_earlier(changes):
    model = random_model(**changes)
    tokens = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    docs, changed = torch.zeros_like(tokens), tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % VOCAB
    before, after = logits_of(model, tokens, docs), logits_of(model, changed, docs)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:44], after[:, 40:44])


@pytest.mark.parametrize("changes", [{}, dict(attention="LPPL", ngram_rows=64)], ids=str)
def test_documents_of_a_row_do_not_see_each_other(changes):
    model = random_model(**changes)
    tokens = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    docs = torch.zeros_like(tokens)
    docs[:, 30:] = 1
    changed = tokens.clone()
    changed[:, :30] = (changed[:, :30] + 1) % VOCAB
    before, after = logits_of(model, tokens, docs), logits_of(model, changed, docs)
    assert torch.equal(before[:, 30:], after[:, 30:])
    alone = logits_of(model, tokens[:, 30:], docs[:, 30:])  # rotary attention depends on distances only
    torch.testing.assert_close(before[:, 30:], alone, atol=1e-4, rtol=1e-4)


def test_the_reach_of_a_token_is_the_sum_of_the_windows():
    model = random_model(num_layers=2, attention="LS", value_embeds=0)
    tokens = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    docs, changed = torch.zeros_like(tokens), tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    difference = (logits_of(model, tokens, docs, 16) - logits_of(model, changed, docs, 16)).abs().amax(dim=(0, 2))
    reach = (16 - 1) + 1 + (8 - 1) + 1  # long window, key offset, short window, smear
    assert difference[reach] > 0 and (difference[reach + 1:] == 0).all()


# --- parts


def test_a_new_model_predicts_every_token_alike():
    model = GPT(settings(), VOCAB)
    tokens = torch.randint(VOCAB, (2, 64), dtype=torch.int32)
    loss = next_token_loss(model, tokens, tokens, torch.zeros_like(tokens)) / 128
    assert loss.item() == pytest.approx(math.log(128), abs=1e-5)  # the padded vocabulary


def test_ignored_targets_have_no_loss():
    model, tokens = random_model(), torch.randint(VOCAB, (1, 64), dtype=torch.int32)
    docs, half = torch.zeros_like(tokens), tokens.clone()
    half[:, 32:] = train_gpt.IGNORE
    logits = logits_of(model, tokens, docs)
    expected = F.cross_entropy(logits[0, :32], tokens[0, :32].long(), reduction="sum")
    assert next_token_loss(model, tokens, half, docs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_softcap_is_a_shifted_tanh():
    model, x = random_model(softcap=(30.0, 0.0, 7.5)), torch.randn(1, 3, 64)
    raw = F.linear(train_gpt.norm(x), model.lm_head)
    torch.testing.assert_close(model.head(x), 15 * torch.tanh(raw / 15) + 15, atol=1e-4, rtol=1e-4)
    assert torch.equal(random_model(softcap=(0.0, 0.0, 1.0)).head(x), raw)


def test_yarn_slows_only_what_turns_less_than_32_times_in_the_window():
    """Frequencies read off the second row of the table: angle = frequency."""
    def frequencies(*windows: int) -> torch.Tensor:
        cos, sin = train_gpt.rotary_table(2, 64, 1024.0, *windows)
        return torch.atan2(sin[1, 0, :16], cos[1, 0, :16]).double()  # the first quarter is turned
    plain, longer = frequencies(), frequencies(512, 1024)
    turns = 512 * plain / (2 * math.pi)
    torch.testing.assert_close(longer[turns >= 32], plain[turns >= 32])
    torch.testing.assert_close(longer[turns <= 1], plain[turns <= 1] / 2)
    between = (turns > 1) & (turns < 32)
    assert between.any() and ((longer < plain) & (longer > plain / 2))[between].all()
    assert torch.equal(frequencies(512, 512), plain) and torch.equal(frequencies(512, 0), plain)


def test_paired_heads_see_the_keys_of_both():
    """One softmax over the keys of heads h and h + H/2, written out."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 4, 8)
    docs = torch.tensor([[0, 0, 0, 0, 1, 1]])
    mask = train_gpt.dense_mask(docs, int_tensor(3), copies=2)
    found = train_gpt.attend(*map(train_gpt.pair, (q, k, v)), mask, 0.5, "sdpa").reshape(1, 6, 4, 8)
    for t in range(6):
        for h in range(4):
            tokens = [u for u in range(max(0, t - 2), t + 1) if docs[0, u] == docs[0, t]]
            keys = torch.cat([k[0, tokens, h % 2], k[0, tokens, h % 2 + 2]])
            values = torch.cat([v[0, tokens, h % 2], v[0, tokens, h % 2 + 2]])
            expected = (0.5 * keys @ q[0, t, h]).softmax(0) @ values
            torch.testing.assert_close(found[0, t, h], expected, atol=1e-5, rtol=1e-4)


def test_offset_keys_take_the_unrotated_half_of_the_token_before():
    attention = train_gpt.Attention(settings(), "L")
    k = torch.randn(1, 5, 2, 8)
    follows = torch.tensor([False, True, True, False, True])[None, :, None, None]
    moved = attention.offset_keys(k, follows)
    for t, source in enumerate([0, 0, 1, 3, 3]):
        assert torch.equal(moved[0, t, :, [0, 1, 4, 5]], k[0, t, :, [0, 1, 4, 5]])
        assert torch.equal(moved[0, t, :, [2, 3, 6, 7]], k[0, source, :, [2, 3, 6, 7]])
    for kind in "SP":
        assert torch.equal(train_gpt.Attention(settings(), kind).offset_keys(k, follows), k)


def test_without_component_is_orthogonal_to_the_direction():
    y, v = torch.randn(2, 3, 4, 8)
    left = train_gpt.without_component(y, v)
    torch.testing.assert_close((left * v).sum(-1), torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y - left, (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True) * v)


def test_future_targets_stay_inside_their_document():
    targets = torch.tensor([[11, 12, 13, 14, 15, 16]])
    docs = torch.tensor([[0, 0, 0, 1, 1, 1]])
    expected = [[11, 12, 13, 14, 15, 16], [12, 13, -1, 15, 16, -1], [13, -1, -1, 16, -1, -1]]
    assert train_gpt.future_targets(targets, docs, 2)[:, 0].tolist() == expected
    assert train_gpt.future_targets(targets, docs, 0).tolist() == [targets.tolist()]


def test_the_losses_of_further_tokens_are_cross_entropies_with_the_same_logits():
    model = random_model()
    tokens = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    docs = random_docs(2, 64, seed=5)
    targets = train_gpt.future_targets(tokens, docs, 2)
    logits = logits_of(model, tokens, docs).flatten(0, 1).log_softmax(-1)
    for loss, row in zip(model(tokens, targets, docs, int_tensor(32)), targets.flatten(1).tolist(), strict=True):
        expected = -sum(logits[i, target] for i, target in enumerate(row) if target >= 0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_of_further_tokens_halve_and_the_last_fades_within_its_stage():
    stages = train_gpt.stage_table(settings(iterations=30, stage_ends=(1 / 3, 2 / 3, 1.0), mtp=(2, 1, 0)))
    assert train_gpt.future_weights(stages, 0) == [1, 0.5, 0.25]
    assert train_gpt.future_weights(stages, 5) == [1, 0.5, 0.125]
    assert train_gpt.future_weights(stages, 10) == [1, 0.5]
    assert train_gpt.future_weights(stages, 15) == [1, 0.25]
    assert train_gpt.future_weights(stages, 20) == train_gpt.future_weights(stages, 29) == [1]


def test_ngram_rows_depend_on_the_last_tokens_of_the_document_only():
    tokens = torch.tensor([[5, 7, 9, 5, 7, 9, 5, 7, 9]], dtype=torch.int32)
    docs = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    (pairs, triples), kinds = train_gpt.ngram_rows(tokens, docs, 500)
    assert pairs[0] == pairs[6] == 499 and triples[[0, 1, 6, 7]].tolist() == [999] * 4  # nothing to look back at
    assert pairs[1] == pairs[4] == pairs[7] and pairs[2] == pairs[5] == pairs[8] and len({*pairs[1:4].tolist()}) == 3
    assert triples[2] == triples[5] == triples[8] and kinds[1, 2] == kinds[1, 5] == kinds[1, 8]
    many = torch.randint(50304, (1, 50304), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows, kinds = train_gpt.ngram_rows(many, torch.zeros_like(many), 500)
    assert rows[0].unique().numel() == rows[1].unique().numel() == 500 and rows[1].min() == 500 and rows.max() == 999
    assert all(kind.unique().numel() > 0.9 * train_gpt.NGRAM_SIGNS for kind in kinds)
    same = rows[0][:, None] == rows[0][None, :2000]  # what shares a row mostly differs in its signs
    assert (kinds[0][:, None] == kinds[0][None, :2000])[same].float().mean() < 0.02


def test_rotation_depends_on_distance_and_leaves_half_of_the_pairs_alone():
    cos, sin = train_gpt.rotary_table(40, 16, 1024.0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 40, 1, 16)
    rq, rk = train_gpt.rotate(q, cos, sin), train_gpt.rotate(k, cos, sin)
    assert (rq[0, 5, 0] @ rk[0, 2, 0]).item() == pytest.approx((rq[0, 33, 0] @ rk[0, 30, 0]).item(), abs=1e-4)
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))
    still = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(rq[..., still], q[..., still].contiguous())
    assert not torch.allclose(rq[0, 1, 0, :4], q[0, 1, 0, :4])


def test_layer_table_of_record_28():
    table = train_gpt.layer_table(Settings(attention=train_gpt.auto_attention(12, paired=False), skip="unet"))
    assert "".join(layer.attention for layer in table) == "LSSSLSS-SSSL"
    assert [layer.value_table for layer in table] == [0, 1, 2] + [None] * 6 + [0, 1, 2]
    assert [layer.skip_from for layer in table] == [None] * 6 + [5, 4, 3, 2, 1, 0]
    assert train_gpt.auto_attention(12, paired=True) == "LSPSLPS-PSSL"
    single = train_gpt.layer_table(Settings(attention="L" * 12, skip="single"))
    assert [(i, layer.skip_from) for i, layer in enumerate(single) if layer.skip_from is not None] == [(6, 3)]


def test_parameter_count_of_record_28():
    s = Settings(attention=train_gpt.auto_attention(12, False), backend="sdpa", eval_seq_len=128, seq_len=(128,))
    model = GPT(s, 50257)
    counts = train_gpt.parameter_counts(model)
    assert counts["hidden"] == 11 * 4 * 768**2 + 12 * 8 * 768**2
    assert counts["embedding"] == 4 * 50304 * 768 and counts["head"] == 50304 * 768
    assert counts["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("off", [
    dict(smear=False), dict(attn_gate=False), dict(value_embeds=0), dict(value_embeds=2), dict(value_gate=False),
    dict(skip="none"), dict(skip="unet"), dict(backout=False), dict(attention="L-SL"), dict(attention="LPSL"),
    dict(key_offset=False), dict(xsa=False), dict(ngram_rows=64), dict(softcap=(0.0, 0.0, 1.0)),
    dict(softcap=(30.0, 0.0, 7.5)),
], ids=str)
def test_every_part_can_be_left_out_and_then_changes_the_output(off):
    tokens = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    docs = torch.zeros_like(tokens)
    whole, without = random_model(), random_model(**off)
    shared = dict(whole.named_parameters())
    with torch.no_grad():
        for name, p in without.named_parameters():
            if name in shared:
                p.copy_(shared[name])
    assert not torch.allclose(logits_of(whole, tokens, docs), logits_of(without, tokens, docs), atol=1e-3)
    next_token_loss(without, tokens, tokens, docs).backward()
    assert [name for name, p in without.named_parameters() if p.grad is None and name != "ngrams.table"] == []


def test_weights_depend_on_the_seed_alone():
    a, b, c = GPT(settings(seed=1), VOCAB), GPT(settings(seed=1), VOCAB), GPT(settings(seed=2), VOCAB)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)
