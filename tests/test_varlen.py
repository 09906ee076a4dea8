"""--backend varlen: attention over packed documents by torch's FlashAttention, against the dense mask. That operator
has no form on a CPU: there one of ours, written out with its signature, stands in. The real one needs a GPU."""
import math

import numpy as np
import pytest
import torch
from helpers import CPU, H100, losses, parse, run_folder, tiny
from test_model import assert_same_gradients, int_tensor, random_docs, random_model, settings

import train_gpt
import train_moe

AMPERE = H100._replace(capability=(8, 0))


def scores(q, k, starts, longest, scale, left, right):
    """(H, N, N) fp32, -inf where a query does not see a key; what is past `longest` tokens of a document sees NaN."""
    position = torch.arange(len(q))
    document = torch.searchsorted(starts, position, right=True)
    first = starts[(document - 1).clamp_min(0)]
    ahead = position[:, None] - position
    seen = (ahead >= -right) & (ahead <= left) & (document[:, None] == document) & (document[:, None] < len(starts))
    found = (scale * torch.einsum("qhk,nhk->hqn", q.float(), k.float())).masked_fill(~seen, -math.inf)
    return found.masked_fill((position - first >= longest)[:, None], math.nan)


def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
            scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
            block_table=None, num_splits=None):
    assert torch.equal(cum_seq_q, cum_seq_k) and cum_seq_q.dtype == torch.int32 and max_q == max_k
    assert not is_causal and dropout_p == 0 and query.shape == key.shape == value.shape
    z = scores(query, key, cum_seq_q, max_q, scale, window_size_left, window_size_right)
    out = torch.einsum("hqn,nhk->qhk", z.softmax(-1), value.float()).type_as(query)
    return out.contiguous(), z.logsumexp(-1), *(query.new_empty(0) for _ in range(3))


def backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
             rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    """As the kernel does: from the output and the log-sum-exps that are handed over, whatever they are of."""
    z = scores(query, key, cum_seq_q, max_q, scale, window_size_left, window_size_right)
    shares = (z - logsumexp[..., None]).exp()
    grad = grad_out.float()
    row = (grad * out.float()).sum(-1).T[..., None]
    slopes = scale * shares * (torch.einsum("qhk,nhk->hqn", grad, value.float()) - row)
    return tuple(x.type_as(query).contiguous() for x in (
        torch.einsum("hqn,nhk->qhk", slopes, key.float()), torch.einsum("hqn,qhk->nhk", slopes, query.float()),
        torch.einsum("hqn,qhk->nhk", shares, grad)))


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """Its schema is torch's own, so a call that torch would refuse fails here, too."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


def both(docs, window: int, kind: str, size: int = 16, narrow: int = 16, longest=None, device="cpu",
         dtype=torch.float32) -> list:
    """Output and gradients with the dense mask and with packed documents."""
    step, copies, results = 8, 1 + (kind == "P"), []
    half = min(window, train_gpt.short_window(window, step))
    dense = train_gpt.dense_mask(docs, int_tensor(window if kind == "L" else half).to(device), copies)
    packed = train_gpt.packed_documents(docs, int_tensor(window), step, longest, [kind])[kind]
    for mask, backend in ((dense, "plain"), (packed, "varlen")):
        torch.manual_seed(0)
        shape = docs.size(0), copies * docs.size(1), 4 // copies
        leaves = [torch.randn(*shape, n).to(device, dtype).requires_grad_() for n in (narrow, narrow, size)]
        y = train_gpt.attend(*leaves, mask, 0.3, backend)
        grads = torch.autograd.grad((y * torch.randn(y.shape).to(device, dtype)).sum(), leaves)
        results.append([y, *grads])
    return results


@pytest.mark.parametrize("kind", ["L", "S", "P"])
@pytest.mark.parametrize("window", [1, 20, 64, 1000])
def test_packed_documents_equal_the_dense_mask_forward_and_backward(window, kind):
    for a, b in zip(*both(random_docs(3, 64, seed=window), window, kind), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("docs", ["one", "all", "row of one"])
def test_any_number_of_documents_fits_up_to_the_size(docs):
    docs = {"one": torch.zeros(2, 64), "all": torch.arange(64).repeat(2, 1), "row of one": torch.zeros(5, 1)}[docs]
    for a, b in zip(*both(docs.int(), 24, "P"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_narrow_queries_and_keys_are_padded():
    for a, b in zip(*both(random_docs(2, 64), 24, "S", size=16, narrow=8), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_sizes_depend_on_that_of_the_batch_only():
    """So nothing is compiled again, and nothing waits for the device."""
    for rows, length in ((2, 64), (1, 4096), (1, 8192)):
        sizes = set()
        for docs in (torch.zeros(rows, length, dtype=torch.int32), torch.arange(length).repeat(rows, 1) // 32):
            packed = train_gpt.packed_documents(docs, int_tensor(5), 8, None, ["L", "P"])
            sizes |= {(x.starts.shape, x.starts.dtype, x.longest) for x in packed.values()}
            assert packed["L"].starts[-1] == rows * length and packed["L"].starts[0] == 0
        most = min(rows * length, max(256, rows * length // 128))
        assert sizes == {((most + 1,), torch.int32, length)}


def test_more_documents_than_fit_are_told():
    docs = np.arange(512, dtype=np.int32)[None]
    train_gpt.check_documents(docs, "flex")
    train_gpt.check_documents(docs[:, :256], "varlen")
    with pytest.raises(train_gpt.UserError, match="has 512 documents, --backend varlen takes 256: use flex or sdpa"):
        train_gpt.check_documents(docs, "varlen")


@pytest.mark.parametrize("unit", ["model", "block"])
def test_the_traced_model_equals_the_sdpa_model_and_a_new_window_traces_nothing(unit, monkeypatch):
    monkeypatch.setattr(train_gpt, "compiled", lambda f, s: torch.compile(f, backend="aot_eager", dynamic=False,
                                                                          fullgraph=True))
    shape = dict(seq_len=(256,), max_doc_len=(256,), eval_seq_len=256, num_layers=3, attention="LPS", window_step=32)
    sdpa, packed = random_model(**shape), random_model(**shape, backend="varlen")
    train_gpt.compile_model(packed, settings(**shape, backend="varlen", compile_unit=unit))
    tokens = torch.randint(50, (2, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for window, seed in ((64, 0), (128, 1)):
        docs = random_docs(2, 256, seed=seed)
        with torch._dynamo.config.patch(error_on_recompile=window != 64):
            assert_same_gradients((sdpa, packed), tokens, docs, window)


def test_the_longest_document_is_that_of_the_stage_and_of_a_row_in_evaluation():
    model = random_model(backend="varlen", seq_len=(64,), max_doc_len=(16,))
    docs = random_docs(2, 64)
    assert {x.longest for x in model.masks(docs, int_tensor(8)).values()} == {16}
    with torch.no_grad():
        assert {x.longest for x in model.masks(docs, int_tensor(8)).values()} == {64}


@pytest.mark.parametrize("script", [train_gpt, train_moe], ids=lambda m: m.__name__)
def test_a_run_has_the_losses_of_the_plain_one(script, tmp_path, monkeypatch):
    """Training with the warm-up, whose documents are no longer than those of training, and evaluation."""
    monkeypatch.setattr(script, "flash_fits", lambda *_: True)
    monkeypatch.setattr(script, "compiled", lambda f, s: f)
    monkeypatch.setattr(script.shutil, "which", lambda *_: "a compiler")
    changes = dict(num_experts=4) if script is train_moe else {}
    found = {}
    for backend in ("varlen", "sdpa"):
        argv = tiny(tmp_path, experiment_name=backend, backend=backend, max_doc_len=16, compile=True, **changes)
        assert script.main(argv) == 0
        found[backend] = losses(run_folder(tmp_path, backend))
    for kind in ("train_loss", "val_loss"):
        assert found["varlen"][kind] == pytest.approx(found["sdpa"][kind], rel=1e-3)


@pytest.mark.parametrize("argv, hardware, backend", [
    ([], AMPERE, "flex"), (["--no-compile"], AMPERE, "varlen"), (["--no-compile"], H100, "sdpa"),
    (["--no-compile", "--dtype", "fp32"], AMPERE, "sdpa"), (["--no-compile", "--device", "cpu"], AMPERE, "sdpa"),
    (["--no-compile", "--head-dim", "12", "--width", "96"], AMPERE, "sdpa"),
    (["--backend", "varlen"], AMPERE, "varlen"),
])
def test_auto_takes_it_where_flex_is_not_compiled(argv, hardware, backend, monkeypatch):
    s = parse(*argv, hardware=hardware, monkeypatch=monkeypatch)
    assert s.backend == backend


@pytest.mark.parametrize("more, hardware", [
    ([], CPU), ([], AMPERE._replace(capability=(7, 5))), (["--dtype", "fp32"], AMPERE),
    (["--head-dim", "12", "--width", "96"], AMPERE), (["--head-dim", "384"], AMPERE)])
def test_what_it_cannot_do_is_a_sentence(more, hardware, monkeypatch):
    with pytest.raises(train_gpt.UserError, match="--backend varlen needs an NVIDIA GPU from 8.0 on, --dtype bf16"):
        parse("--backend", "varlen", *more, hardware=hardware, monkeypatch=monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["L", "S", "P"])
@pytest.mark.parametrize("window", [100, 128, 1000, 10_000])
def test_the_real_operator_equals_the_dense_mask_on_the_gpu(window, kind):
    docs = (random_docs(2, 2048) // 4).cuda()  # 438 are more than it takes
    found = both(docs, window, kind, size=128, narrow=64, device="cuda", dtype=torch.bfloat16)
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() / a.norm() < 1e-2
