"""Collectives of a training step on a process group that is not there: how many, in which order, when awaited; and that
nothing of the n-gram table makes the host wait for the device."""
from __future__ import annotations

import moe_ranks
import pytest
import ranks
import torch
from ranks import arrive, parameters
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg
import train_moe as tm

# --- rank 0 of several, alone: what others would send is missing from sums, and their weights never change


class Work:
    def __init__(self, do):
        self.do = do

    def wait(self):
        self.do()
        self.do = lambda: None


class Group:
    """In the place of torch.distributed; writes down kind and number of entries of each collective. `late`: a gather
    writes when it is awaited, else when it is launched."""

    def __init__(self, late: bool = True):
        self.late, self.calls = late, []

    def all_reduce(self, x, async_op=False):
        self.calls.append(("reduce", x.numel()))
        return Work(lambda: None)

    def reduce_scatter_tensor(self, own, whole, async_op=False):
        assert whole.is_contiguous() and own.is_contiguous() and whole.numel() % own.numel() == 0
        self.calls.append(("scatter", whole.numel()))
        own.view(-1).copy_(whole.view(-1)[:own.numel()])
        return Work(lambda: None)

    def all_gather_into_tensor(self, whole, own, async_op=False):
        assert whole.is_contiguous() and own.is_contiguous() and whole.numel() % own.numel() == 0
        self.calls.append(("gather", whole.numel()))
        work = Work(lambda: whole.view(-1)[:own.numel()].copy_(own.view(-1)))
        if not (self.late and async_op):
            work.wait()
        return work

    def all_to_all_single(self, received, sent):
        assert received.is_contiguous() and sent.is_contiguous() and received.shape == sent.shape
        self.calls.append(("exchange", sent.numel()))
        received.copy_(sent)


def group_of(monkeypatch, script=tg, **options) -> Group:
    group = Group(**options)
    monkeypatch.setattr(script, "dist", group)
    return group


def counted(group: Group) -> dict[str, int]:
    kinds = [kind for kind, _ in group.calls]
    return {kind: kinds.count(kind) for kind in ("scatter", "gather", "reduce", "exchange")}


@pytest.mark.parametrize("experts, size, of_experts", [
    (16, 8, 4), (16, 2, 4), (5, 4, 5), (5, 8, 3), (8, 8, 4)])
def test_expert_weights_of_a_layer_are_reduced_and_gathered_in_one_go(experts, size, of_experts, monkeypatch):
    """Four parameters, up and down of two layers, whatever the number of experts; of 5 experts on 4 ranks a collective
    has 4, and on 8 ranks 8 of the 10 matrices of a shape."""
    group = group_of(monkeypatch, tm)
    model, optimizer = moe_ranks.build(moe_ranks.settings(num_experts=experts), tm.World(0, 0, size))
    banks = [bank for bank in optimizer.banks if any(".experts_" in name for name in bank.params)]
    numbers = [len(bank.collectives) for bank in banks]
    assert sum(numbers) == (of_experts if of_experts == 4 else 2 * -(-2 * experts // (4 if size == 4 else 8)))
    moe_ranks.train(model, optimizer, range(1))
    calls = counted(group)
    others = sum(len(bank.collectives) for bank in optimizer.banks if bank.owners > 1) - sum(numbers)
    assert calls["scatter"] == calls["gather"] == sum(numbers) + others
    small = sum(bank.owners == 1 for bank in optimizer.banks)
    assert calls["reduce"] == small + 1 and not calls["exchange"]  # and the routers' sums


def test_on_one_process_a_parameter_is_one_copy():
    _, optimizer = moe_ranks.build(moe_ranks.settings(num_experts=16))
    for bank in optimizer.banks:
        assert [list(dict(pieces)) for pieces in bank.collectives] == [[name] for name in bank.params]


def trained(monkeypatch, script, changes: dict, late: bool) -> dict[str, torch.Tensor]:
    """Weights after three steps as rank 0 of 2."""
    group_of(monkeypatch, script, late=late)
    own = ranks if script is tg else moe_ranks
    model, optimizer = own.build(own.settings(**changes), script.World(0, 0, 2))
    own.train(model, optimizer, range(3))
    return parameters(model)


@pytest.mark.parametrize("unit", ["model", "block"])
@pytest.mark.parametrize("script", [tg, tm], ids=["train_gpt", "train_moe"])
def test_weights_are_there_before_they_are_used(script, unit, monkeypatch):
    """A gather that comes as late as its wait changes nothing."""
    changes = {"compile_unit": unit, "num_layers": 4, "pointer": 16}
    changes |= {"moe_layers": "MDMD"} if script is tm else {}
    early, late = (trained(monkeypatch, script, changes, late) for late in (False, True))
    assert early.keys() == late.keys() and all(torch.equal(early[name], late[name]) for name in early)


@pytest.mark.parametrize("part", ["embed", "value_embeds.0", "blocks.1", "pointer", "lm_head"])
def test_a_wait_that_is_left_out_is_seen(part, monkeypatch):
    """By the test above: the weights of any part, if awaited too late, change the training."""
    changes = {"compile_unit": "block", "num_layers": 4, "pointer": 16}
    expected = trained(monkeypatch, tg, changes, late=True)
    before = tg.wait_before_use
    monkeypatch.setattr(tg, "wait_before_use", lambda model, name, *rest: (
        None if name.startswith(part) else before(model, name, *rest)))
    found = trained(monkeypatch, tg, changes, late=True)
    assert any(not torch.equal(expected[name], found[name]) for name in expected)


def test_a_block_waits_for_its_own_weights_only(monkeypatch):
    group_of(monkeypatch)
    s = ranks.settings(num_layers=4, compile_unit="block")
    model, optimizer = ranks.build(s, tg.World(0, 0, 2))
    ranks.backward(model, optimizer, ranks.random_batch(0))
    optimizer.step(1.0, 0.9)

    def awaited() -> set[str]:
        return {name for bank in optimizer.banks for k in bank.gathers for name in dict(bank.collectives[k])}
    missing = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: missing.append((i, awaited())))
    assert "embed.weight" in awaited()
    ranks.next_token_loss(model, ranks.random_batch(1))
    for i, names in missing:
        assert not {name for name in names if name.startswith((f"blocks.{i}.", "embed"))}
        assert {f"blocks.{later}.attn.qkvo" for later in range(i + 1, 4) if f"blocks.{later}.attn.qkvo" in
                dict(model.named_parameters())} <= names and "lm_head" in names
    assert not awaited()


def test_a_step_without_a_forward_pass_between_waits_itself(monkeypatch):
    """As does a look at blended weights."""
    group_of(monkeypatch)
    model, optimizer = ranks.build(ranks.settings(), tg.World(0, 0, 2))
    for _ in range(2):
        optimizer.last_micro_step = True
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step(1.0, 0.9)
    arrive(optimizer)
    for bank in optimizer.banks:
        if bank.owners > 1:
            own = bank.weights.split(bank.owners * bank.share)[0][:bank.share]
            assert torch.equal(own, bank.state["master"][:bank.share].to(own.dtype))


def test_order_of_collectives(monkeypatch):
    """Value tables are reduced before the gradients of earlier layers exist; weights are sent in the order of use, but
    Muon's first, and the head's last."""
    group, events = group_of(monkeypatch), []
    s = ranks.settings(num_layers=6, value_embeds=3, attention="LSSLSL")
    model = tg.GPT(s, ranks.VOCAB)
    names = {name: p for name, p in model.named_parameters()}
    for name, p in names.items():  # before the optimizer's own
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(name))
    optimizer = tg.MuonAdamW(model, s, tg.World(0, 0, 2))
    ranks.backward(model, optimizer, ranks.random_batch(0))
    for table, layer in ((1, 0), (2, 1)):
        assert events.index(f"value_embeds.{table}.weight") < events.index(f"blocks.{layer}.attn.qkvo")
    group.calls.clear()
    sent = []
    for bank in optimizer.banks:
        monkeypatch.setattr(bank, "send_weights", lambda bank=bank, real=bank.send_weights: (
            real(), sent.append(list(bank.params)) if bank.owners > 1 else None))
    optimizer.step(1.0, 0.9)
    first = [names[0] for names in sent]
    assert [name for name in first if not name.startswith("blocks")] == first[2:] == [
        "embed.weight", *(f"value_embeds.{i}.weight" for i in range(3)), "lm_head"]
    assert [list(dict(pieces))[-1] for pieces in reversed(optimizer.banks[0].collectives)] == (
        sorted(list(dict(pieces))[-1] for pieces in optimizer.banks[0].collectives))


# --- n-grams


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result's size, or whose Python number, depends on values of tensors."""
    REFUSED = ("_local_scalar_dense", "nonzero", "unique", "coalesce", "masked_select", "repeat_interleave", "equal")

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word in name for word in self.REFUSED), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("size", [1, 2])
def test_n_grams_do_not_wait_for_the_device(size, monkeypatch):
    group_of(monkeypatch)
    s = ranks.settings(ngram_rows=64, ngram_every=2)
    model = tg.GPT(s, ranks.VOCAB, tg.World(0, 0, size))
    bank = tg.NgramBank(model.ngrams, tg.match_rules(tg.parameter_table(s), ["ngrams.table"])["ngrams.table"], s,
                        tg.World(0, 0, size))
    before = model.ngrams.table.detach().clone()
    with NoWaiting():
        for step in range(1, 5):
            inputs, _, docs = ranks.random_batch(step)
            found = model.ngrams(inputs, docs)
            (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
            bank.step(1.0, step)
    assert not bank.came and not torch.equal(before, model.ngrams.table)
    with pytest.raises(AssertionError, match="nonzero"), NoWaiting():
        (before == 0).nonzero()


def test_n_grams_send_one_vector_a_token_each_way(monkeypatch):
    group = group_of(monkeypatch)
    s, size = ranks.settings(ngram_rows=64), 4
    ngrams = tg.Ngrams(s, tg.World(1, 1, size))
    assert ngrams.table.shape == (64, s.width // size) == (64, 8)
    inputs, _, docs = ranks.random_batch(0)
    ngrams(inputs, docs).sum().backward()
    tokens = inputs.numel()
    assert group.calls == [("gather", 2 * size * tokens), *[("exchange", tokens * s.width)] * 2]


def test_columns_of_all_ranks_are_the_vectors_of_one(monkeypatch):
    """Both directions of the exchange, with the parts that the ranks would send put together by hand."""
    s, size = ranks.settings(ngram_rows=64), 4
    whole = tg.Ngrams(s, tg.World())
    with torch.no_grad():
        whole.table.normal_(generator=torch.Generator().manual_seed(0))
    inputs, _, docs = ranks.random_batch(0)
    expected = whole(inputs, docs)
    parts, sent = torch.stack((inputs, docs)).chunk(size, dim=1), {}
    monkeypatch.setattr(tg, "gathered", lambda *_: torch.cat([x.transpose(0, 1) for x in parts]))
    for turn in ("send", "receive"):
        for rank in range(size):
            one = tg.Ngrams(s, tg.World(rank, rank, size))
            one.table.data = whole.table.detach().chunk(size, dim=1)[rank]
            monkeypatch.setattr(tg, "exchanged", lambda world, x, turn=turn: (
                sent.setdefault((world.rank, turn), x) if turn == "send" else
                torch.cat([sent[other, "send"].chunk(size)[world.rank] for other in range(size)])))
            found = one(*parts[rank])
            if turn == "receive":
                torch.testing.assert_close(found, expected.chunk(size)[rank], rtol=0, atol=0)
                monkeypatch.setattr(tg, "exchanged", lambda world, x: sent.setdefault((world.rank, "back"), x))
                found.backward(torch.arange(found.numel()).view_as(found).float())
    own = torch.cat([x.chunk(size)[2] for x in (sent[rank, "back"] for rank in range(size))])
    grads = torch.arange(expected[:3].numel()).float().view(-1, s.width).repeat(size, 1)  # the same on each rank
    assert torch.equal(own, grads.chunk(size, dim=1)[2])
