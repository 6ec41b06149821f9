"""Blocks that take a token in few steps: the steps are what torch makes of them, the models what transformers runs."""

from copy import deepcopy

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import StaticCache

from secateurs import kernels
from secateurs.engines import Request, Sampling
from secateurs.engines.hf import HF
from secateurs.kernels import steps
from secateurs.packed import PackedMatrix, pack
from secateurs.runtime import FAST, FEW, FastBlock, load_packed
from test_packed import halved, pruned, sparse

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="installed without a C compiler: no kernels to test")
near = {"rtol": 1e-5, "atol": 1e-6}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["portable", "best"])
def level(request, monkeypatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(steps, "best_level", lambda: 0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("width", [1, 7, 8, 20, 896])
def test_rows_are_normed_and_gated(width):
    x, weight = random(3, width), random(width, seed=1)
    torch.testing.assert_close(steps.normed(x, weight, 1e-6), rms_norm(x, (width,), weight, 1e-6), **near)
    both = 30 * random(3, 2 * width)
    wanted = silu(both[:, :width]) * both[:, width:]
    torch.testing.assert_close(steps.gated(both), wanted, **near)
    far = torch.tensor([[-1e30, 1e30, float("nan"), -88.0, 2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(steps.gated(far), silu(far[:, :4]) * far[:, 4:], equal_nan=True, **near)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("angles", [1, 3])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_queries_and_keys_are_turned_and_values_are_not(width, norms, angles):
    heads, bias = random(3, 4 + 2 + 2, width), random(8 * width, seed=1)
    weights = random(2, width, seed=2)
    cosine, sine = random(2, angles, 1, width, seed=3)
    whole = heads + bias.view(8, width)
    queries, keys, values = whole.split([4, 2, 2], 1)
    if norms:
        queries, keys = (rms_norm(x, (width,), w, 1e-5) for x, w in zip((queries, keys), weights, strict=True))
    wanted = torch.cat([rotated(queries, cosine, sine), rotated(keys, cosine, sine), values], 1)
    found = heads.clone()
    steps.turn(found, 2, (cosine, sine), bias, (*weights, 1e-5) if norms else None)
    torch.testing.assert_close(found, wanted, **near)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("mask", ["none", "seen", "added", "shared"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 300])
@pytest.mark.parametrize("width", [3, 16, 64])
def test_one_token_attends_as_torch_says(width, tokens, mask):
    """Of parts of larger tensors, as caches give them; heads share keys in threes."""
    queries = random(2, 8, width)[:, :6]
    store = random(3, 2, tokens + 5, 2 * width, seed=1)
    keys, values = store[:2, :, 2 : tokens + 2, :width], store[:2, :, 2 : tokens + 2, width:]
    given = None
    if mask != "none":
        given = torch.rand(1 if mask == "shared" else 2, 1, 1, tokens, generator=torch.Generator().manual_seed(2)) < 0.7
        given[..., -1] = True
    if mask == "added":
        given = torch.where(given, random(2, 1, 1, tokens, seed=3), -torch.inf)
    wanted = scaled_dot_product_attention(
        queries[:, :, None], keys, values, attn_mask=given, scale=0.3, enable_gqa=True
    )
    found = steps.attended(queries, keys, values, given, 0.3)
    torch.testing.assert_close(found, wanted.reshape(2, -1), **near)
    turned = steps.attended(queries, keys.mT.contiguous().mT, values, given, 0.3)  # heads are not contiguous there
    torch.testing.assert_close(turned, found, **near)


def test_attention_stays_finite_whatever_the_scores():
    queries, keys = torch.full((1, 1, 8), 100.0), torch.stack([torch.full((8,), s) for s in (100.0, -100.0, 99.0)])
    values = torch.eye(3, 8)
    found = steps.attended(queries, keys[None, None], values[None, None], None, 1.0)
    torch.testing.assert_close(found, torch.eye(1, 8))
    unseen = torch.tensor([False, True, True]).view(1, 1, 1, 3)
    found = steps.attended(queries, keys[None, None], values[None, None], unseen, 1.0)
    assert found[0, 0] == 0 and found[0, 2] == 1


@pytest.mark.parametrize("format", ["dense bf16", "packed bf16", "half bf16", "dense int8", "half int8", "dense int4"])
def test_joined_matrices_are_one_product_and_parts_of_its_memory(format):
    layout, weights = format.split()
    whole = sparse(24 + 8 + 5, 130)
    whole = halved(whole) if layout == "half" else whole
    matrices = [PackedMatrix.of(part, weights, layout) for part in whole.split([24, 8, 5])]
    if layout == "packed":  # more room than is needed, as a file may have it
        tensors = dict(matrices[0].tensors)
        matrices[0] = PackedMatrix(
            24, 130, tensors | {"values": torch.cat([tensors["values"], torch.ones(9).bfloat16()])}
        )
    found = PackedMatrix.joined(matrices)
    assert found is not None
    joined, parts = found
    joined.check("joined")
    x = random(3, 130)
    assert torch.equal(joined.multiply(x), torch.cat([matrix.multiply(x) for matrix in matrices], 1))
    for part, matrix in zip(parts, matrices, strict=True):
        part.check("part")
        assert torch.equal(part.dense(), matrix.dense()) and torch.equal(part.multiply(x), matrix.multiply(x))
    for name, tensor in joined.tensors.items():
        if name != "starts":
            memory = {part.tensors[name].untyped_storage().data_ptr() for part in parts}
            assert memory == {tensor.untyped_storage().data_ptr()}


def test_matrices_of_several_kinds_are_not_joined():
    half = halved(sparse(20, 64))
    kinds = [PackedMatrix.of(half[:8], "bf16", layout) for layout in ("half", "packed", "dense")]
    assert PackedMatrix.joined(kinds) is None and PackedMatrix.joined(kinds[:2]) is None
    assert PackedMatrix.joined([PackedMatrix.of(half[:7], "bf16"), kinds[0]]) is None
    assert PackedMatrix.joined([kinds[0], PackedMatrix.of(half[:7], "bf16")]) is not None
    assert PackedMatrix.joined([kinds[2], PackedMatrix.of(half[:, :63], "bf16", "dense")]) is None


def load(family: str, folder, weights="bf16", groups=None):
    """A packed model, and the same with its matrices dense, which goes the way of transformers."""
    pruned(family, folder / "dense", groups)
    pack(str(folder / "dense"), folder / "packed", weights)
    return load_packed(folder / "packed"), load_packed(folder / "packed", expand=True)


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Tokens that were attended to in each step."""
    seen, attended = [], steps.attended
    monkeypatch.setattr(steps, "attended", lambda *args: (seen.append(args[1].shape[2]), attended(*args))[1])
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_token_of_each_row_goes_the_short_way_to_the_same_logits(family, tmp_path, count):
    model, exact = load(family, tmp_path)
    assert sum(isinstance(module, FastBlock) for module in model.modules()) == 2
    assert not any(isinstance(module, FastBlock) for module in exact.modules())
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(3, 20, dtype=torch.long)
    padding[1, :5] = 0
    for mask in (None, padding):
        caches = [None, None]
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 14), (14, 15)):  # three tokens at once go the long way
            short = len(count)
            seen = None if mask is None else mask[:, :end]
            outs = [
                one(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, attention_mask=seen)
                for one, cache in zip((model, exact), caches, strict=True)
            ]
            caches = [out.past_key_values for out in outs]
            rows = slice(None) if mask is None or begin else slice(0, 1)  # what padding says is nobody's
            torch.testing.assert_close(outs[0].logits[rows], outs[1].logits[rows], rtol=1e-4, atol=1e-4)
            assert len(count) - short == (2 if end - begin == 1 else 0)
    assert max(count) == 8 if family == "mistral" else max(count) == 15  # its window


@torch.no_grad()
def test_what_the_short_way_does_not_know_goes_the_way_of_transformers(tmp_path, count):
    model, exact = load("qwen2", tmp_path)
    one = torch.tensor([[5]])
    wanted = exact(input_ids=one).logits

    def check(**options) -> None:
        torch.testing.assert_close(model(input_ids=one, **options).logits, wanted, rtol=1e-4, atol=1e-4)

    check()
    assert len(count) == 2
    torch.testing.assert_close(
        model(input_ids=one.expand(FEW + 1, 1)).logits, wanted.expand(FEW + 1, -1, -1), rtol=1e-4, atol=1e-4
    )
    check(attention_mask=torch.zeros(1, 4, 1, 1))  # one mask a head
    model.set_attn_implementation("eager")
    check()
    assert model(input_ids=one, output_attentions=True).attentions[0].shape == (1, 4, 1, 1)
    assert len(count) == 2
    model.set_attn_implementation("sdpa")
    found = model.to(torch.bfloat16)(input_ids=one).logits.float()
    assert len(count) == 2 and float((found - wanted).norm() / wanted.norm()) < 0.05


@torch.no_grad()
def test_other_caches_and_copies_go_the_short_way(tmp_path, count):
    model, exact = load("qwen3", tmp_path, "int8", groups=8)
    ids = torch.tensor([[5, 9, 3]])
    for one in (model, deepcopy(model)):
        cache = StaticCache(config=model.config, max_cache_len=16)
        one(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
        found = one(input_ids=ids[:, 2:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found[:, -1], exact(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert len(count) == 4


def test_traces_are_the_same_either_way(tmp_path, count):
    """The engine keeps rows of several lengths in one buffer, with a mask."""
    models = load("qwen2", tmp_path)
    requests = [Request(question_id=str(n), sample=0, prompt_ids=tuple(range(3, 6 + 5 * n)), seed=n) for n in range(5)]
    sampling = Sampling(max_new_tokens=12)
    traces = [
        {one.request.question_id: one.ids for one in HF(model, (1,), 0, 3).generate(requests, sampling)}
        for model in models
    ]
    assert traces[0] == traces[1] and len(count) > 20


def test_each_family_is_the_block_it_says():
    for known, fast in FAST.items():
        assert issubclass(fast, known) and fast.forward.__wrapped__ is FastBlock.forward
