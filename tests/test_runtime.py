"""Blocks that take a token in few steps: the steps are what torch makes of them, the models what transformers runs."""

from copy import deepcopy

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import StaticCache

from secateurs import kernels
from secateurs.engines import Request, Sampling
from secateurs.engines.hf import HF
from secateurs.kernels import block
from secateurs.packed import PackedMatrix
from secateurs.packing import pack
from secateurs.runtime import FAST, FEW, FastBlock, load_packed
from test_packed import halved, pruned, sparse

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="installed without a C compiler: no kernels to test")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["portable", "best"])
def level(request, monkeypatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(block, "best_level", lambda: 0)


def matrices(*shapes: tuple[int, int], kinds: str) -> list[PackedMatrix]:
    """Random matrices in the formats that are named, in turn."""
    formats = [kind.split("_") for kind in kinds.split()]
    weights = [halved(sparse(*shape, seed=n)) / 8 for n, shape in enumerate(shapes)]
    return [
        PackedMatrix.of(weight, kind, layout)
        for weight, (layout, kind) in zip(weights, (formats * len(shapes))[: len(shapes)], strict=True)
    ]


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "kinds", ["dense_bf16", "half_int8", "dense_int4", "packed_bf16 packed_bf16 half_int8", "dense_int8 half_bf16"]
)
@pytest.mark.parametrize("width, norms, angles", [(2, False, 3), (6, True, 1), (64, True, 3)])
def test_heads_are_those_of_the_normed_vector_turned_but_for_values(width, norms, angles, kinds):
    layers = matrices((4 * width, 70), (2 * width, 70), (2 * width, 70), kinds=kinds)
    x, norm = random(3, 70), random(70, seed=1)
    biases = [random(4 * width, seed=2), None, random(2 * width, seed=3)]
    weights, (cosine, sine) = random(2, width, seed=3), random(2, angles, 1, width, seed=4)
    normed = rms_norm(x, (70,), norm, 1e-6)
    queries, keys, values = (
        (normed @ layer.dense().T + (0 if bias is None else bias)).view(3, -1, width)
        for layer, bias in zip(layers, biases, strict=True)
    )
    if norms:
        queries, keys = (rms_norm(x, (width,), w, 1e-5) for x, w in zip((queries, keys), weights, strict=True))
    wanted = torch.cat([rotated(queries, cosine, sine), rotated(keys, cosine, sine), values], 1)
    stored = [(layer.stored, bias) for layer, bias in zip(layers, biases, strict=True)]
    head_norms = (*weights, 1e-5) if norms else None
    found = block.before_attention(x, (norm, 1e-6), stored, head_norms, (cosine, sine), [4, 2, 2])
    if "int4" in kinds:  # a few heads of two numbers can be small, and turn as far as they like
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "kinds", ["dense_bf16", "half_bf16", "dense_int4", "half_int8 packed_int8 dense_bf16 dense_int8"]
)
@pytest.mark.parametrize("inner", [1, 8, 37])
@pytest.mark.parametrize("biased", [False, True])
def test_what_comes_after_attention_is_an_mlp_of_what_it_adds(inner, biased, kinds):
    shapes = (40, 48), (inner, 40), (inner, 40), (40, inner)
    layers = matrices(*shapes, kinds=kinds)
    x, seen, norm = random(3, 40), random(3, 48, seed=1), random(40, seed=2)
    biases = [random(rows, seed=n) if biased else None for n, (rows, _) in enumerate(shapes)]

    def layer(n: int, x: torch.Tensor) -> torch.Tensor:
        bias = biases[n]
        return x @ layers[n].dense().T + (0 if bias is None else bias)

    wanted = x + layer(0, seen)
    normed = rms_norm(wanted, (40,), norm, 1e-6)
    wanted = wanted + layer(3, silu(layer(1, normed)) * layer(2, normed))
    output, *mlp = [(layer.stored, bias) for layer, bias in zip(layers, biases, strict=True)]
    found = block.after_attention(x, seen, output, (norm, 1e-6), *mlp)
    if "int4" in kinds:
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("level")
def test_gates_are_right_far_from_zero_and_say_what_is_not_a_number():
    gates = torch.tensor([-3e38, -1e30, -200.0, -88.0, -87.0, -5.0, -1e-6, 1e-6, 0.5, 89.0, 3e30, float("nan")])
    one, many = torch.ones(1, 1), len(gates)
    flat, nothing = PackedMatrix.of(torch.zeros(many, 1), "bf16"), PackedMatrix.of(torch.zeros(1, 1), "bf16")
    for n, gate in enumerate(gates):
        chosen = PackedMatrix.of(torch.eye(many)[n : n + 1], "bf16")
        bias = gates if gate.isnan() else gates.nan_to_num(0)  # it would be in every sum
        mlp = (flat.stored, bias), (flat.stored, torch.ones(many)), (chosen.stored, None)
        zero = torch.zeros(1, 1)
        found = block.after_attention(zero, one, (nothing.stored, None), (one[0], 1.0), *mlp)
        torch.testing.assert_close(found, silu(gate).view(1, 1), rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("mask", ["none", "seen", "added", "shared"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 300])
@pytest.mark.parametrize("width", [3, 20, 64])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_one_token_attends_as_torch_says(group, width, tokens, mask):
    """Of parts of larger tensors, as caches give them; so many heads share keys."""
    queries = random(2, 2 * group + 2, width)[:, : 2 * group]
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
    found = block.attended(queries, keys, values, given, 0.3)
    torch.testing.assert_close(found, wanted.reshape(2, -1), rtol=1e-5, atol=1e-6)
    turned = block.attended(queries, keys.mT.contiguous().mT, values, given, 0.3)  # heads are not contiguous there
    assert torch.equal(turned, found)


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
def test_every_head_is_computed_whatever_the_threads(threads, monkeypatch):
    """With fewer groups of heads than threads a group is divided."""
    queries, keys, values = random(1, 18, 16), random(1, 1, 40, 16, seed=1), random(1, 1, 40, 16, seed=2)
    wanted = block.attended(queries, keys, values, None, 0.3)
    monkeypatch.setattr(block, "ALONE_BELOW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(block.attended(queries, keys, values, None, 0.3), wanted)
    rows = [one.expand(5, *one.shape[1:]) for one in (queries, keys, values)]
    assert torch.equal(block.attended(*rows, None, 0.3), wanted.expand(5, -1))


def test_attention_stays_finite_whatever_the_scores():
    queries, keys = torch.full((1, 1, 8), 100.0), torch.stack([torch.full((8,), s) for s in (100.0, -100.0, 99.0)])
    values = torch.eye(3, 8)
    found = block.attended(queries, keys[None, None], values[None, None], None, 1.0)
    torch.testing.assert_close(found, torch.eye(1, 8))
    unseen = torch.tensor([False, True, True]).view(1, 1, 1, 3)
    found = block.attended(queries, keys[None, None], values[None, None], unseen, 1.0)
    assert found[0, 0] == 0 and found[0, 2] == 1
    nothing = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    assert not block.attended(queries, keys[None, None], values[None, None], nothing, 1.0).any()


def load(family: str, folder, weights="bf16", groups=None):
    """A packed model, and the same with its matrices dense, which goes the way of transformers."""
    pruned(family, folder / "dense", groups)
    pack(str(folder / "dense"), folder / "packed", weights)
    return load_packed(folder / "packed"), load_packed(folder / "packed", expand=True)


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Tokens that were attended to in each step."""
    seen, attended = [], block.attended
    monkeypatch.setattr(block, "attended", lambda *args: (seen.append(args[1].shape[2]), attended(*args))[1])
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_token_of_each_row_goes_the_short_way_to_the_same_logits(family, tmp_path, count):
    model, exact = load(family, tmp_path)
    count.clear()  # of the check that packing makes
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
    count.clear()  # of the check that packing makes
    one = torch.tensor([[5]])

    def check(short: int, rows: int = 1, **options) -> None:
        count.clear()
        found, wanted = (each(input_ids=one.expand(rows, 1), **options).logits for each in (model, exact))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert len(count) == short

    check(2)
    check(0, rows=FEW + 1)
    check(0, attention_mask=torch.zeros(1, 4, 1, 1))  # one mask a head
    check(0, position_bias=random(1, 4, 1, 1))
    for each in (model, exact):
        each.set_attn_implementation("eager")
    check(0)
    assert model(input_ids=one, output_attentions=True).attentions[0].shape == (1, 4, 1, 1)
    for each in (model, exact):
        each.set_attn_implementation("sdpa")
        each.model.layers[0].mlp.act_fn = torch.nn.GELU()
        each.model.layers[1].self_attn.v_proj.bias = torch.nn.Parameter(random(16), requires_grad=False)
    check(1)
    layer, packed = model.model.layers[1].mlp, model.model.layers[1].mlp.down_proj
    layer.down_proj = exact.model.layers[1].mlp.down_proj  # as a LoRA's wrapper would be
    check(0)
    layer.down_proj = packed
    wanted = exact(input_ids=one).logits
    found = model.to(torch.bfloat16)(input_ids=one).logits.float()
    assert not count and float((found - wanted).norm() / wanted.norm()) < 0.05


@torch.no_grad()
def test_another_default_type_changes_nothing(tmp_path, count):
    model, exact = load("qwen3", tmp_path)
    count.clear()  # of the check that packing makes
    one = torch.tensor([[5]]).expand(FEW, 1)
    wanted = exact(input_ids=one).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = model(input_ids=one).logits
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # transformers' angles are rounded then
    assert found.dtype == torch.float32 and len(count) == 2


@torch.no_grad()
def test_a_row_that_begins_with_padding_is_not_lost(tmp_path):
    """Its first token sees nothing, and is kept in the cache."""
    ids, seen = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    outs = []
    for model in load("llama", tmp_path):
        cache = None
        for end in (1, 2, 3):
            options = {"past_key_values": cache, "use_cache": True, "attention_mask": seen[:, :end]}
            out = model(input_ids=ids[:, end - 1 : end], **options)
            cache = out.past_key_values
        outs.append(out.logits)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_caches_and_copies_go_the_short_way(tmp_path, count):
    model, exact = load("qwen3", tmp_path, "int8", groups=8)
    count.clear()  # of the check that packing makes
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
    count.clear()  # of the check that packing makes
    requests = [Request(question_id=str(n), sample=0, prompt_ids=tuple(range(3, 6 + 5 * n)), seed=n) for n in range(5)]
    sampling = Sampling(max_new_tokens=12)
    traces = [
        {one.request.question_id: one.ids for one in HF(model, (1,), 0, 3).generate(requests, sampling)}
        for model in models
    ]
    assert traces[0] == traces[1] and len(count) > 20


def test_each_family_is_the_block_it_says():
    assert all(issubclass(fast, known) and issubclass(fast, FastBlock) for known, fast in FAST.items())
