"""Models of train_baseline.py against their papers' equations, which baseline.py writes plainly, and against Hugging
Face's GPT-2 and Llama; documents, causality, initial weights, experts."""
import math

import pytest
import torch
import torch.nn.functional as F
from baseline import TYPES, Plain, documents_of, logits, loss, packed, random_model, random_tokens, settings
from helpers import VOCAB

import train_baseline as tb
from train_baseline import GPT, FineMixture

MODERN = {
    "plain": {}, "GQA": dict(num_kv_heads=2), "MQA": dict(num_kv_heads=1),
    "gelu": dict(mlp="gelu"), "relu2": dict(mlp="relu2"), "geglu": dict(mlp="geglu"),
    "QK-norm": dict(qk_norm=True, num_kv_heads=2),
    "no gains": dict(norm_gain=False), "window": dict(window=5), "tied": dict(tied="on"),
    "base": dict(rope_base=50.0), "two heads": dict(head_dim=16), "formula": dict(backend="plain", window=7),
}
VARIANTS = {
    **{f"moderngpt, {name}": ("moderngpt", changes) for name, changes in MODERN.items()},
    "gpt": ("gpt", {}), "gpt, relu2": ("gpt", dict(mlp="relu2")), "gpt, own head": ("gpt", dict(tied="off")),
    "gpt, window": ("gpt", dict(window=6, backend="plain")),
    "ngpt": ("ngpt", {}), "ngpt, window": ("ngpt", dict(window=9, mlp="geglu")),
    "moegpt": ("moegpt", dict(dense_first=0)), "moegpt, dense first": ("moegpt", dict(num_experts=5, top_k=3)),
    "moegpt, GQA": ("moegpt", dict(num_kv_heads=2, num_shared=2, qk_norm=True, norm_gain=False)),
    "moegpt, nothing shared": ("moegpt", dict(num_shared=0, top_k=1, mlp="relu2")),
}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], error: float = 2e-5):
    """Tensors by name, each to a fraction of its largest entry, or to rounding: gradients of biases of keys are zero.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = max(tensor.abs().max().item(), 0.1)
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=error * size, msg=name)


def gradients(model: GPT, value: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


# --- the equations


@pytest.mark.parametrize("model_type, changes", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients_are_those_of_the_equations(model_type, changes):
    """Of rows of 1, 2 and 3 documents, which the equations take one by one. With mixtures their balance, too."""
    s = settings(model_type, **changes)
    model, batch = random_model(s), packed(3)
    plain, (found, found_balance) = Plain(model, s), loss(model, s, batch)
    expected, balance = 0.0, 0.0
    for row in batch.split(1, dim=1):
        expected = expected + sum(plain.loss(*document) for document in documents_of(row))
        balance = balance + (plain.balance() * row.size(2) if s.mixture_layers else 0.0)  # of a row, all its documents
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_balance, torch.as_tensor(balance), rtol=1e-5, atol=0)
    assert_close(gradients(model, found + found_balance), gradients(model, expected + balance), 1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_documents_of_a_row_do_not_see_each_other(model_type):
    """In packed rows they have the logits, and so the losses, that each has alone in a row."""
    s = settings(model_type)
    model, batch = random_model(s), packed(3)
    documents = [torch.stack((*document, torch.zeros_like(document[0])))[:, None] for document in documents_of(batch)]
    alone = torch.cat([logits(model, s, document)[0] for document in documents])
    found = logits(model, s, batch).flatten(0, 1)
    assert len(documents) == 6 and found.shape == alone.shape
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    total = sum(loss(model, s, document)[0] for document in documents)
    torch.testing.assert_close(loss(model, s, batch)[0], total, rtol=1e-5, atol=0)
    one = batch.clone()
    one[2] = 0  # the same tokens as one document a row
    assert abs(loss(model, s, one)[0] - total) > 0.01


@pytest.mark.parametrize("changes", [{}, dict(window=6)])
@pytest.mark.parametrize("model_type", TYPES)
def test_no_token_sees_a_later_one_and_all_see_an_earlier_one(model_type, changes):
    s = settings(model_type, num_layers=2, **changes)
    model, batch = random_model(s), packed(1)
    changed = batch.clone()
    changed[0, 0, 17] = (batch[0, 0, 17] + 1) % VOCAB
    before, after = (logits(model, s, b)[0] for b in (batch, changed))
    differing = (before - after).abs().amax(-1) > 1e-4
    last = 17 + 2 * (s.window - 1) if s.window else 31  # two layers look twice as far back
    assert differing.nonzero().flatten().tolist() == [*range(17, last + 1)]
    assert torch.equal(before[:17], after[:17])


def test_a_learned_position_counts_from_the_start_of_its_document():
    docs = torch.tensor([[4, 4, 4, 7, 7, 8, 9, 9], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert tb.document_positions(docs).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [*range(8)]]


def test_rows_beyond_the_longest_document_need_no_positions():
    """max_doc_len 8 in rows of 32: 8 positions, which must serve evaluation as well."""
    model = GPT(s := settings("gpt", max_doc_len=8), VOCAB)
    assert model.positions.weight.shape == (8, 32) and s.eval_seq_len == 8


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_backends_agree_and_ignored_targets_have_no_loss(model_type, backend):
    s = settings(model_type, window=9)
    model, batch = random_model(s), packed(3)
    expected = loss(model, s, batch)
    for block in model.blocks:
        block.attn.backend = backend
    torch.testing.assert_close(loss(model, s, batch), expected, rtol=1e-5, atol=0)
    batch[1, :, 4:] = tb.IGNORE
    some = F.cross_entropy(logits(model, s, batch)[:, :4].flatten(0, 1), batch[1, :, :4].flatten().long())
    torch.testing.assert_close(loss(model, s, batch)[0] / 12, some, rtol=1e-5, atol=0)


# --- Hugging Face's models


def copied(pairs: list[tuple[torch.Tensor, torch.Tensor]]):
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)


def gpt2_pairs(model: GPT, hf) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(own, theirs) of all parameters, or of all gradients where there are; theirs as views in our layout."""
    w = {name: p for name, p in hf.transformer.named_parameters()}
    pairs = [(model.embed.weight, w["wte.weight"]), (model.positions.weight, w["wpe.weight"]),
             (model.norm.weight, w["ln_f.weight"]), (model.norm.bias, w["ln_f.bias"])]
    for i, block in enumerate(model.blocks):
        for own, name in ((block.attn_norm, "ln_1"), (block.mlp_norm, "ln_2")):
            pairs += [(own.weight, w[f"h.{i}.{name}.weight"]), (own.bias, w[f"h.{i}.{name}.bias"])]
        weight, bias = w[f"h.{i}.attn.c_attn.weight"], w[f"h.{i}.attn.c_attn.bias"]
        attn, mlp = block.attn, block.mlp
        for own, weights, biases in zip((attn.q, attn.k, attn.v), weight.chunk(3, 1), bias.chunk(3), strict=True):
            pairs += [(own.weight, weights.T), (own.bias, biases)]
        for own, name in ((attn.out, "attn.c_proj"), (mlp.up, "mlp.c_fc"), (mlp.down, "mlp.c_proj")):
            pairs += [(own.weight, w[f"h.{i}.{name}.weight"].T), (own.bias, w[f"h.{i}.{name}.bias"])]
    return pairs


def with_gradients_for_weights(model) -> None:
    """Gradients take the place of the weights, so that the same pairs show them."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)


def test_gpt_is_hugging_faces_gpt2():
    """At one set of random weights: number of parameters, loss of two rows, all gradients."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)
    hf = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1 * torch.randn_like(p))
    s = settings("gpt", num_layers=3, width=48, head_dim=12, mlp_ratio=4)
    model = GPT(s, 128)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())
    copied(gpt2_pairs(model, hf))
    batch = packed(1).repeat(1, 2, 1)
    batch[0, 1] = (batch[0, 1] * 7 + 3) % 128
    found = loss(model, s, batch)[0] / 64
    expected = F.cross_entropy(hf(batch[0]).logits.flatten(0, 1), batch[1].flatten().long())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    for each in (model, hf):
        with_gradients_for_weights(each)
    for own, other in (pairs := gpt2_pairs(model, hf)):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * max(other.abs().max().item(), 1e-2))
    assert sum(own.numel() for own, _ in pairs) == sum(p.numel() for p in model.parameters())


def half_negated(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Our RoPE turns the other way: the same model has the second half of each head's rows negated."""
    heads = weight.clone().unflatten(0, (-1, head_dim))
    heads[:, head_dim // 2:] *= -1
    return heads.flatten(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_moderngpt_is_hugging_faces_llama(kv_heads):
    """Epsilon of RMSNorm, frequencies of RoPE, which query heads share keys, which of two matrices is the gate."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    s = settings("moderngpt", num_kv_heads=kv_heads, rope_base=500.0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=s.mlp_hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=500.0)
    hf, model = transformers.LlamaForCausalLM(config).eval(), GPT(s, 128)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.2 * torch.randn_like(p))
    pairs = [(model.embed.weight, hf.model.embed_tokens.weight), (model.lm_head.weight, hf.lm_head.weight),
             (model.norm.weight, hf.model.norm.weight)]
    for own, other in zip(model.blocks, hf.model.layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        pairs += [(own.attn_norm.weight, other.input_layernorm.weight),
                  (own.mlp_norm.weight, other.post_attention_layernorm.weight),
                  (own.attn.q.weight, half_negated(attention.q_proj.weight, 8)),
                  (own.attn.k.weight, half_negated(attention.k_proj.weight, 8)),
                  (own.attn.v.weight, attention.v_proj.weight), (own.attn.out.weight, attention.o_proj.weight),
                  (own.mlp.up.weight, mlp.up_proj.weight), (own.mlp.gate.weight, mlp.gate_proj.weight),
                  (own.mlp.down.weight, mlp.down_proj.weight)]
    copied(pairs)
    batch = packed(1)
    torch.testing.assert_close(logits(model, s, batch), hf(batch[0]).logits, rtol=1e-4, atol=1e-4)


# --- initial weights and sizes


@pytest.mark.parametrize("model_type", TYPES)
def test_initial_weights(model_type):
    """GPT-2's: 0.02, residual projections 0.02 / sqrt(2 layers), gains 1, biases 0."""
    s = settings(model_type, width=96, num_layers=3, seq_len=64, batch_tokens=128)
    stds = {}
    for name, p in GPT(s, 512).named_parameters():
        last = name.split(".")[-1]
        if p.dim() > 1:
            stds[name] = p.std().item() * (96**0.5 if model_type == "ngpt" else 50)
            small = name.endswith(tb.RESIDUAL) and model_type != "ngpt"
            assert stds[name] == pytest.approx(6**-0.5 if small else 1, rel=0.05 if p.numel() > 2000 else 0.15), name
        elif not name.endswith(tb.FP32_PARAMETERS):
            assert p.eq(1.0 if last == "weight" else 0.0).all(), name
    assert len(stds) >= 16


def test_initial_loss_is_that_of_a_uniform_guess():
    for model_type in TYPES:
        model = GPT(s := settings(model_type), 128)
        found = loss(model, s, packed(2))[0].item() / 64
        assert found == pytest.approx(math.log(128), abs=0.6 if model_type == "ngpt" else 0.1)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_seed_alone_decides_the_initial_weights(model_type):
    s, other = settings(model_type), settings(model_type, seed=1)
    torch.manual_seed(77)
    first = GPT(s, VOCAB).state_dict()
    torch.rand(5)
    assert all(torch.equal(tensor, first[name]) for name, tensor in GPT(s, VOCAB).state_dict().items())
    assert not torch.equal(GPT(other, VOCAB).embed.weight, first["embed.weight"])


@pytest.mark.parametrize("mlp, hidden", [("gelu", 128), ("relu2", 128), ("swiglu", 96), ("geglu", 96)])
def test_a_gated_mlp_has_about_as_many_parameters(mlp, hidden):
    """2/3 of 4 * 32 is 85.3, rounded up to a multiple of 32."""
    s = settings("moderngpt", mlp=mlp, mlp_ratio=4)
    block = GPT(s, VOCAB).blocks[0].mlp
    matrices = 3 if mlp.endswith("glu") else 2
    assert s.mlp_hidden == hidden
    assert sum(p.numel() for p in block.parameters()) == matrices * 32 * hidden


def test_gpt2_124m_has_124_million_parameters():
    """Hugging Face's gpt2: 124,439,808, with 50257 tokens; here the table is padded to 50304."""
    s = tb.parse_settings(["--preset", "gpt2", "--device", "cpu", "--dtype", "fp32", "--no-compile"], 1)[0]
    with torch.device("meta"):
        model = GPT(s, 50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 47 * 768


def test_experts_of_a_token_have_an_mlps_size_unless_it_is_given():
    """The hidden size 96 among 2 + 1 experts, to a multiple of 16."""
    for changes, size in (({}, 32), (dict(top_k=4), 16), (dict(expert_hidden=24), 24)):
        assert settings("moegpt", mlp_ratio=4, **{"expert_hidden": 0} | changes).expert_hidden == size


# --- ngpt


def test_initial_scales_of_ngpt_are_the_published_ones():
    """Effective values 0.05 for both steps, else 1; what is stored sets how fast they learn (section 2.5)."""
    s, root = settings("ngpt"), 32**-0.5
    sizes = {"attn.qk_scale": (root, 32), "mlp.up_scale": (1.0, s.mlp_hidden), "mlp.gate_scale": (1.0, s.mlp_hidden),
             "attn_step": (root, 32), "mlp_step": (root, 32)}
    expected = {f"blocks.{i}.{name}": row for i in range(2) for name, row in sizes.items()}
    expected["logit_scale"] = (root, 128)
    found = {name: p for name, p in GPT(s, 128).named_parameters() if p.dim() == 1}
    assert found.keys() == expected.keys()
    for name, (value, size) in expected.items():
        assert found[name].unique().tolist() == pytest.approx([value]) and found[name].numel() == size, name
    model, x = GPT(s, 128), torch.eye(32)[:2]
    moved = model.blocks[0].add(x[0], x[1], model.blocks[0].attn_step)  # 0.05 of the way, then back to norm 1
    assert (moved[1] / moved[0]).item() == pytest.approx(0.05 / 0.95, rel=1e-5)


def test_states_of_ngpt_are_unit_vectors_and_its_logits_are_bounded():
    s = settings("ngpt")
    model, batch, states = random_model(s), packed(3), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: states.extend((inputs[0], output)))
    z = logits(model, s, batch)
    assert len(states) == 4
    for x in states:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3, 32), rtol=1e-6, atol=0)
    scale = (model.logit_scale * 32**0.5).abs()
    assert (z.abs() <= scale * 1.00001).all() and (z.abs() > 0.3 * scale).any()


# --- mixture of experts


def mixture(top_k: int = 2, seed: int = 0, **changes) -> FineMixture:
    s = settings("moegpt", dense_first=0, top_k=top_k, **changes)
    return random_model(s, seed).blocks[0].mlp


def test_experts_without_tokens_have_zero_gradients():
    layer = mixture(num_experts=6)
    x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(5))
    x[..., 0] = 1
    with torch.no_grad():
        layer.router[:, 0] = torch.tensor([90.0, 90, 90, 0, 0, 0])
    layer(x).square().sum().backward()
    for expert in layer.experts[:3]:
        assert all(p.grad.any() for p in expert.parameters())
    for expert in layer.experts[3:]:
        assert all(p.grad is not None and not p.grad.any() for p in expert.parameters())


def balance(layer: FineMixture, x: torch.Tensor) -> torch.Tensor:
    """The load-balancing loss of the rows times tokens."""
    layer(x)
    return layer.balance


def test_the_balance_of_equal_shares_is_1_and_of_one_set_of_experts_the_most():
    layer = mixture(num_experts=4)
    x = torch.zeros(1, 32, 32)
    x[0, torch.arange(32), torch.arange(32) % 4] = 1  # token t points at expert t % 4 and the next one
    with torch.no_grad():
        layer.router.zero_()
        for e in range(4):
            layer.router[e, e], layer.router[(e + 1) % 4, e] = 3.0, 2.0
    assert balance(layer, x).item() == pytest.approx(32)  # times tokens
    x[:] = x[0, 0]
    a, b, c = (math.exp(v) for v in (3, 2, 0))
    assert balance(layer, x).item() == pytest.approx(32 * 2 * (a + b) / (a + b + 2 * c))


def test_the_balance_raises_the_scores_of_idle_experts():
    """A step against its gradient."""
    layer = mixture(num_experts=4)
    x = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(5))
    x[..., 0] = 1
    with torch.no_grad():
        layer.router[:, 0] = torch.tensor([9.0, 9, 0, 0])

    def scores() -> torch.Tensor:
        return F.linear(x, layer.router).softmax(-1).mean((0, 1)).detach()

    before = scores()
    balance(layer, x).backward()
    assert layer.router.grad.any() and not any(p.grad is not None for n, p in layer.named_parameters() if n != "router")
    with torch.no_grad():
        layer.router -= 0.01 * layer.router.grad / layer.router.grad.norm()
    assert (scores() > before)[2:].all()


def test_the_balance_is_of_each_row_so_micro_steps_do_not_change_it():
    layer = mixture()
    x = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(6))
    whole, parts = balance(layer, x), sum(balance(layer, rows) for rows in x.split(1))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


def test_a_document_gets_the_same_experts_wherever_it_is():
    """Logits of a row do not depend on the rows beside it: experts have no capacity."""
    s = settings("moegpt", dense_first=0)
    model = random_model(s)
    batch = torch.stack((random_tokens(3), random_tokens(3), torch.zeros(3, 32, dtype=torch.int32)))
    alone = torch.cat([logits(model, s, row) for row in batch.split(1, dim=1)])
    torch.testing.assert_close(logits(model, s, batch), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_documents_one_by_one_are_the_masked_rows(model_type, monkeypatch):
    s = settings(model_type)
    model, batch = random_model(s), packed(4)
    masked, model.by_document = logits(model, s, batch), True
    monkeypatch.setattr(tb, "attention_mask", None)
    torch.testing.assert_close(logits(model, s, batch), masked, rtol=1e-4, atol=1e-5)
