"""All blocks of a token in one call: they are what torch makes of them, the models what transformers runs."""

import json
from copy import copy, deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from families import FAMILIES, SMALL
from secateurs import kernels, runtime
from secateurs.engines import Request, Sampling
from secateurs.engines.hf import HF
from secateurs.kernels import Stored, blocks
from secateurs.kernels.blocks import Block
from secateurs.packed import PackedMatrix
from secateurs.packing import pack
from secateurs.runtime import FAST, FEW, FastModel, PackedLinear, Roomy, load_packed
from test_packed import halved, pruned, sparse

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="installed without a C compiler: no kernels to test")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["portable", "best"])
def level(request, monkeypatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(blocks, "best_level", lambda: 0)


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


def as_torch_says(x, layers, biases, norms, scale, window, store, angles, seen):
    """A block with one token a row, after those of `store` (keys, values), where its own are written."""

    def layer(n: int, x: torch.Tensor) -> torch.Tensor:
        return x @ layers[n].dense().T + (0 if biases[n] is None else biases[n])

    rows, width = len(x), angles[0].shape[2]
    normed = rms_norm(x, norms[0].shape, norms[0], 1e-6)
    queries, keys, values = (layer(n, normed).view(rows, -1, width) for n in range(3))
    if len(norms) > 2:
        queries, keys = (rms_norm(one, (width,), w, 1e-4) for one, w in zip((queries, keys), norms[2:], strict=True))
    queries, keys = rotated(queries, *angles), rotated(keys, *angles)
    for stored, new in zip(store, (keys, values), strict=True):
        stored[:, :, -1] = new
    keys, values = (one[:, :, -window:] if window else one for one in store)
    mask = seen[:, None, None, -keys.shape[2] :]
    heads = scaled_dot_product_attention(queries[:, :, None], keys, values, mask, scale=scale, enable_gqa=True)
    x = x + layer(3, heads.reshape(rows, -1))
    normed = rms_norm(x, norms[1].shape, norms[1], 1e-5)
    return x + layer(6, silu(layer(4, normed)) * layer(5, normed))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "kinds", ["dense_bf16", "half_int8", "dense_int4", "packed_bf16 packed_bf16 half_int8", "dense_int8 half_bf16"]
)
@pytest.mark.parametrize("width, normed, angles", [(2, False, 3), (6, True, 1), (64, True, 3)])
@pytest.mark.parametrize("inner, biased", [(1, True), (8, False), (37, True)])
def test_blocks_are_what_torch_makes_of_them(inner, biased, width, normed, angles, kinds):
    """Two in turn, of which the second sees only the last tokens."""
    stream, heads = 70, 4 * width
    shapes = (heads, stream), (2 * width, stream), (2 * width, stream), (stream, heads)
    shapes = *shapes, (inner, stream), (inner, stream), (stream, inner)
    layers = matrices(*shapes, kinds=kinds)
    biases = [random(rows, seed=n) if biased and n != 1 else None for n, (rows, _) in enumerate(shapes)]
    norms = [random(stream, seed=8), random(stream, seed=9), *(random(2, width, seed=10) if normed else ())]
    turn = tuple(random(2, angles, 1, width, seed=11))
    stores, x = random(2, 2, 3, 2, 9, width, seed=12), random(3, stream)
    seen = torch.rand(3, 9, generator=torch.Generator().manual_seed(13)) < 0.7
    seen[:, -1] = True
    known, wanted, found = stores.clone(), x, x.clone()
    for store, window in zip(known, (None, 4), strict=True):
        wanted = as_torch_says(wanted, layers, biases, norms, 0.3, window, store, turn, seen)
    stored = [layer.stored for layer in layers]
    both = [Block(stored, biases, norms, (1e-6, 1e-5, 1e-4), 0.3, window) for window in (None, 4)]
    blocks.run(found, both, stores, turn, seen)
    assert torch.equal(stores[..., :-1, :], known[..., :-1, :])
    if (
        "int4" in kinds
    ):  # its kernel rounds vectors, and heads of two numbers turn as far as they like if they are small
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stores, known, rtol=1e-4, atol=1e-4)


def bf16(weight: torch.Tensor) -> Stored:
    return PackedMatrix.of(weight, "bf16").stored


@pytest.mark.usefixtures("level")
def test_gates_are_right_far_from_zero_and_say_what_is_not_a_number():
    gates = torch.tensor([-3e38, -1e30, -200.0, -88.0, -87.0, -5.0, -1e-6, 1e-6, 0.5, 89.0, 3e30, float("nan")])
    many, one = len(gates), torch.ones(1)
    head, output, flat = bf16(torch.zeros(2, 1)), bf16(torch.zeros(1, 2)), bf16(torch.zeros(many, 1))
    for n, gate in enumerate(gates):
        chosen = bf16(torch.eye(many)[n : n + 1])
        bias = gates if gate.isnan() else gates.nan_to_num(0)  # it would be in every sum
        layers, biases = [head, head, head, output, flat, flat, chosen], [None] * 4 + [bias, torch.ones(many), None]
        found, angles = torch.zeros(1, 1), (torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
        block = Block(layers, biases, (one, one), (1.0, 1.0), 1.0)
        blocks.run(found, [block], [(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))], angles, None)
        torch.testing.assert_close(found, silu(gate).view(1, 1), rtol=1e-6, atol=1e-37, equal_nan=True)


def attended(queries, keys, values, seen=None, scale=0.3, window=None) -> torch.Tensor:
    """What attention gives for keys and values whose last token is the block's own (all numbers are of bfloat16's).

    Row r of x is the unit vector r, so that column r of each projection is what is asked and kept; the rest of x gets
    what comes of it.
    """
    rows, heads, width = queries.shape
    stream = rows + heads * width
    first = [torch.zeros(one[0].numel(), stream) for one in (queries, keys[:, :, -1], values[:, :, -1])]
    for matrix, one in zip(first, (queries, keys[:, :, -1], values[:, :, -1]), strict=True):
        matrix[:, :rows] = one.reshape(rows, -1).T
    output, flat = torch.cat([torch.zeros(rows, heads * width), torch.eye(heads * width)]), torch.zeros(1, stream)
    layers = [bf16(one) for one in (*first, output, flat, flat, flat.T.contiguous())]
    norm = torch.full((stream,), stream**-0.5)  # of a unit vector is one
    x = torch.eye(rows, stream)
    angles = torch.ones(1, 1, width), torch.zeros(1, 1, width)
    blocks.run(x, [Block(layers, [None] * 7, (norm, norm), (0.0, 1.0), scale, window)], [(keys, values)], angles, seen)
    return x[:, rows:]


def short(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of few bits."""
    return random(*shape, seed=seed).bfloat16().float()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("mask", ["none", "seen", "window", "both"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 300])
@pytest.mark.parametrize("width", [3, 20, 64])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_one_token_attends_as_torch_says(group, width, tokens, mask):
    """Of parts of larger tensors, as caches give them; so many heads share keys."""
    queries, store = short(2, 2 * group, width), short(3, 2, tokens + 5, 2 * width, seed=1)
    keys, values = store[:2, :, 2 : tokens + 2, :width], store[:2, :, 2 : tokens + 2, width:]
    seen = torch.rand(2, tokens, generator=torch.Generator().manual_seed(2)) < 0.7
    seen[:, -1] = True
    seen, window = seen if mask in ("seen", "both") else None, 5 if mask in ("window", "both") else None
    last = torch.arange(tokens) >= tokens - (window or tokens)
    given = (last if seen is None else last & seen).expand(2, tokens)[:, None, None]
    wanted = scaled_dot_product_attention(
        queries[:, :, None], keys, values, attn_mask=given, scale=0.3, enable_gqa=True
    )
    found = attended(queries, keys, values, seen, window=window)
    torch.testing.assert_close(found, wanted.reshape(2, -1), rtol=1e-5, atol=1e-6)


def test_every_head_is_computed_whatever_the_threads(monkeypatch):
    """With fewer groups of heads than threads a group is divided."""
    queries, keys, values = short(1, 18, 16), short(1, 1, 80, 16, seed=1), short(1, 1, 80, 16, seed=2)
    found = []
    for threads in (1, 2, 3, 4, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(attended(queries, keys, values))
        rows = [one.repeat(5, *[1] * (one.ndim - 1)) for one in (queries, keys, values)]
        assert torch.equal(attended(*rows), found[-1].expand(5, -1))
    assert all(torch.equal(one, found[0]) for one in found)


def test_attention_stays_finite_whatever_the_scores():
    queries, keys = torch.full((1, 1, 8), 100.0), torch.stack([torch.full((8,), s) for s in (100.0, -100.0, 99.0)])
    keys, values = keys[None, None], torch.eye(3, 8)[None, None]
    torch.testing.assert_close(attended(queries, keys, values, scale=1.0), torch.eye(1, 8))
    found = attended(queries, keys, values, torch.tensor([[False, True, True]]), scale=1.0)
    assert found[0, 0] == 0 and found[0, 2] == 1
    assert not attended(queries, keys, values, torch.zeros(1, 3, dtype=torch.bool), scale=1.0).any()


@pytest.mark.parametrize("change", [lambda one: one.double(), lambda one: one.mT.contiguous().mT])
def test_what_c_would_read_wrongly_is_refused(change):
    queries, keys = short(1, 2, 4), short(1, 2, 5, 4)
    with pytest.raises(ValueError, match="float32"):
        attended(queries, change(keys), keys)


def load(family: str, folder, weights="bf16", groups=None):
    """A packed model, and the same with its matrices dense, which goes the way of transformers."""
    pruned(family, folder / "dense", groups)
    pack(str(folder / "dense"), folder / "packed", weights)
    return load_packed(folder / "packed"), load_packed(folder / "packed", expand=True)


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Tokens that each block of each step attended to."""
    seen, run = [], blocks.run

    def counted(x, parts, stored, *others) -> None:
        seen.extend(min(keys.shape[2], part.window or 1000) for (keys, _), part in zip(stored, parts, strict=True))
        run(x, parts, stored, *others)

    monkeypatch.setattr(blocks, "run", counted)
    return seen


@pytest.fixture
def mixed(monkeypatch) -> None:
    """A family whose second block alone has a window."""
    config = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    monkeypatch.setitem(FAMILIES, "mixed", lambda: Qwen2ForCausalLM(config))


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixed"])
@torch.no_grad()
def test_a_token_of_each_row_goes_the_short_way_to_the_same_logits(family, tmp_path, count):
    model, exact = load(family, tmp_path)
    count.clear()  # of the check that packing makes
    assert isinstance(model.model, FastModel) and not isinstance(exact.model, FastModel)
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(3, 20, dtype=torch.long)
    padding[1, :5] = 0
    own = (padding.cumsum(1) - 1).clamp(min=0)  # rows begin where padding ends
    for mask, positions in ((None, None), (padding, None), (padding.bool(), own), (None, own[:1] + 3)):
        caches = [None, None]
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 14), (14, 15)):  # three tokens at once go the long way
            short = len(count)
            seen = None if mask is None else mask[:, :end]
            options = {"position_ids": None if positions is None else positions[:, begin:end], "attention_mask": seen}
            outs = [
                one(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **options)
                for one, cache in zip((model, exact), caches, strict=True)
            ]
            caches = [out.past_key_values for out in outs]
            rows = slice(None) if mask is None or begin else slice(0, 1)  # what padding says is nobody's
            torch.testing.assert_close(outs[0].logits[rows], outs[1].logits[rows], rtol=1e-4, atol=1e-4)
            assert len(count) - short == (2 if end - begin == 1 else 0)
    assert max(count) == 8 if family == "mistral" else max(count) == 15  # its window
    assert min(count[-2:]) == 8 if family in ("mistral", "mixed") else min(count[-2:]) == 15


class OtherNorm(torch.nn.Module):
    """Named and weighed as the family's."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


CHANGES = {  # of a model's second block
    "activation": lambda block: setattr(block.mlp, "act_fn", torch.nn.GELU()),
    "norm": lambda block: setattr(block, "input_layernorm", OtherNorm(block.input_layernorm)),
    "second norm": lambda block: setattr(block, "post_attention_layernorm", OtherNorm(block.input_layernorm)),
    "mlp": lambda block: setattr(block, "mlp", torch.nn.Identity()),
    "forward": lambda block: setattr(block.mlp, "forward", torch.zeros_like),
    "hook": lambda block: block.mlp.register_forward_hook(lambda _, args, out: 2 * out),
    "hook before": lambda block: block.self_attn.v_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "bias": lambda block: setattr(block.mlp.down_proj, "bias", torch.nn.Parameter(random(32).double())),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_block_that_is_not_its_familys_goes_the_long_way(change, tmp_path, count):
    models = load("qwen2", tmp_path)
    count.clear()  # of the check that packing makes
    ids = torch.tensor([[5]])
    before = models[0](input_ids=ids).logits
    assert len(count) == 2
    if change == "bias":
        models = (models[0], deepcopy(models[0]))
    for model in models:
        CHANGES[change](model.model.layers[1])
    if change == "bias":
        models[1].model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(random(32))
    found, wanted = (model(input_ids=ids).logits.float() for model in models)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(count) == (4 if change == "bias" else 2) and not torch.allclose(before, wanted, atol=1e-4)


@torch.no_grad()
def test_what_the_short_way_does_not_know_goes_the_way_of_transformers(tmp_path, count):
    model, exact = load("qwen2", tmp_path)
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
    check(0, rows=3, position_ids=torch.tensor([9]))
    check(0, use_cache=False)
    for each in (model, exact):
        each.set_attn_implementation("eager")
    check(0)
    for each in (model, exact):
        each.set_attn_implementation("sdpa")
        each.train()
    check(0)
    count.clear()
    for each in (model, exact):
        each.eval()
    embedded = model.model.embed_tokens(one)
    outs = [each.model(inputs_embeds=embedded, return_dict=False)[0] for each in (model, exact)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert isinstance(model.model(input_ids=one, return_dict=False), tuple) and not count
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=one)
    assert not count
    packed = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = exact.model.layers[1].mlp.down_proj  # as a LoRA's wrapper would be
    check(0)
    model.model.layers[1].mlp.down_proj = packed
    check(2)
    count.clear()
    wanted = exact(input_ids=one).logits
    found = model.to(torch.bfloat16)(input_ids=one).logits.float()
    assert not count and float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("options", [{"output_attentions": True}, {"output_hidden_states": True}])
@torch.no_grad()
def test_what_is_recorded_of_blocks_is_there(options, tmp_path):
    model, exact = load("qwen3", tmp_path)
    for each in (model, exact):
        each.set_attn_implementation("eager" if "output_attentions" in options else "sdpa")
    one = torch.tensor([[5]])
    found, wanted = (each(input_ids=one, **options) for each in (model, exact))
    for name in ("attentions", "hidden_states"):
        if f"output_{name}" in options:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    (name,) = options
    setattr(model.config, name, True)
    assert model(input_ids=one)[name.removeprefix("output_")]


class Watched(DynamicCache):
    """Keeps what it is given."""

    def update(self, key_states, *args, **kwargs):
        vars(self).setdefault("given", []).append(key_states.clone())
        return super().update(key_states, *args, **kwargs)


@torch.no_grad()
def test_caches_are_used_as_transformers_would(tmp_path, count):
    model, exact = load("llama", tmp_path)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))

    def begin(each, cache=None, until=8):
        return each(
            input_ids=ids[:, :until], past_key_values=DynamicCache() if cache is None else cache, use_cache=True
        ).past_key_values

    def end(each, cache, rows=3, **options):
        return each(input_ids=ids[:rows, 8:], past_key_values=cache, use_cache=True, **options).logits[:, -1]

    wanted = end(exact, begin(exact))
    count.clear()
    cache = Watched()
    torch.testing.assert_close(end(model, begin(model, cache)), wanted, rtol=1e-4, atol=1e-4)
    assert not count and len(cache.given) == 4
    torch.testing.assert_close(end(model, begin(model)), wanted, rtol=1e-4, atol=1e-4)
    assert len(count) == 2
    cache = begin(model)
    with pytest.raises(RuntimeError):
        end(model, cache, rows=1)  # of three rows
    assert len(count) == 2
    with torch.inference_mode():
        cache = begin(model)
        end(model, cache)
    for each in (copy(cache), deepcopy(cache)):  # what goes on with a copy changes nothing in the other
        each.layers = [copy(layer) for layer in each.layers]
        kept = [layer.keys.clone() for layer in cache.layers]
        for _ in range(2):
            end(model, each)
        more = end(model, deepcopy(cache))
        torch.testing.assert_close(end(model, cache), more, rtol=0, atol=0)
        assert all(
            torch.equal(layer.keys[:, :, : one.shape[2]], one) for layer, one in zip(cache.layers, kept, strict=True)
        )
    cache = begin(model)
    cache.layers[0].crop(-3)
    count.clear()
    with pytest.raises(RuntimeError):
        end(model, cache, attention_mask=torch.eye(3, 6))
    assert not count
    hidden = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: hidden.append((out, out.clone())))
    end(model, begin(model))
    assert torch.equal(*hidden[-1])


@pytest.mark.parametrize("strange", ["part", "one row of many", "turned"])
@torch.no_grad()
def test_a_mask_is_read_as_it_is(strange, tmp_path):
    both, outs = load("llama", tmp_path), []
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[:, [0, 8]] = True
    for each in both:
        cache = each(input_ids=ids[:, :8], use_cache=True).past_key_values
        mask = {"part": seen[:, :9], "one row of many": seen[1:2, :9].expand(3, 9)}.get(
            strange, seen[:, :9].T.contiguous().T
        )
        outs.append(each(input_ids=ids[:, 8:], past_key_values=cache, attention_mask=mask, use_cache=True).logits)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


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
def test_copies_go_the_short_way_and_other_caches_the_long_one(tmp_path, count):
    model, exact = load("qwen3", tmp_path, "int8", groups=8)
    count.clear()  # of the check that packing makes
    ids = torch.tensor([[5, 9, 3]])
    wanted = exact(input_ids=ids).logits[:, -1]
    for one in (model, deepcopy(model)):
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
            one(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
            found = one(input_ids=ids[:, 2:], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found[:, -1], wanted, rtol=1e-4, atol=1e-4)
    assert len(count) == 4


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}, {}])
def test_generate_says_the_same_either_way(options, tmp_path, monkeypatch):
    """With beams the cache is put in order, after a guess it is cropped."""
    monkeypatch.setattr(runtime, "GROW", 3)
    ids, seen = torch.tensor([[5, 9, 3, 5, 9, 3], [0, 0, 7, 8, 7, 8]]), torch.ones(2, 6, dtype=torch.long)
    seen[1, :2] = 0
    if "prompt_lookup_num_tokens" in options:  # takes one row
        ids, seen = ids[:1], seen[:1]
    both = [one.generate(ids, attention_mask=seen, max_new_tokens=16, **options) for one in load("llama", tmp_path)]
    assert torch.equal(*both) and both[0].shape[1] > 6


@torch.no_grad()
def test_a_cache_grows_as_others_do(monkeypatch):
    monkeypatch.setattr(runtime, "GROW", 2)
    plain, roomy = DynamicLayer(), Roomy(DynamicLayer())
    for n, tokens in enumerate((3, 1, 1, 1, 2, 5, 1)):
        new = random(2, 3, 2, tokens, 4, seed=n)
        for layer in (plain, roomy):
            both = layer.update(*new)
            assert both == (layer.keys, layer.values)
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        if n == 3:  # as after guesses, of beams, and in a copy that goes its own way
            copied = deepcopy(roomy)
            copied.update(*random(2, 3, 2, 1, 4, seed=99))
            for layer in (plain, roomy):
                layer.crop(-2)
                layer.reorder_cache(torch.tensor([2, 0, 0]))
    stored = roomy.store[0]
    roomy.update(*random(2, 3, 2, 1, 4))
    assert roomy.store[0] is stored
    with pytest.raises(RuntimeError):
        roomy.update(*random(2, 1, 2, 1, 4))
    assert roomy.store[0] is stored
    roomy.reset()
    assert roomy.update(*new)[0].shape[2] == 1


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_traces_are_the_same_either_way(family, tmp_path, count):
    """The engine keeps rows of several lengths in one buffer, with a mask."""
    models = load(family, tmp_path)
    count.clear()  # of the check that packing makes
    requests = [Request(question_id=str(n), sample=0, prompt_ids=tuple(range(3, 6 + 5 * n)), seed=n) for n in range(5)]
    sampling = Sampling(max_new_tokens=12)
    traces = [
        {one.request.question_id: one.ids for one in HF(model, (1,), 0, 3).generate(requests, sampling)}
        for model in models
    ]
    assert traces[0] == traces[1] and len(count) > 20


def test_each_family_is_the_decoder_it_says():
    assert all(issubclass(fast, known) and issubclass(fast, FastModel) for known, fast in FAST.items())


def test_what_the_familys_code_refuses_does_not_reach_c(tmp_path, count):
    """Angles of half a head, as a configuration may ask for though nothing of the family turns a part of one."""
    load("qwen3", tmp_path)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    count.clear()  # of the check that packing makes
    with pytest.raises(RuntimeError, match="must match the size"), torch.no_grad():
        load_packed(tmp_path / "packed")(input_ids=torch.tensor([[5]]))
    assert not count


def spoil(folder, change) -> None:
    """Write the tensors of a packed folder anew, changed."""
    tensors = load_file(folder / "packed.safetensors")
    change(tensors)
    save_file(tensors, folder / "packed.safetensors")


BIAS, NORM, HEADS, TABLE = (
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.embed_tokens.weight",
)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize(
    "family, key, change, said",
    [
        ("qwen2", BIAS, lambda one: None, f"there is no {BIAS}"),
        ("qwen2", BIAS, lambda one: one[:1], rf"{BIAS} is \(1,\) in bfloat16, the model's \(32,\)"),
        ("qwen2", BIAS, lambda one: one.int(), rf"{BIAS} is \(32,\) in int32, the model's \(32,\) in float32"),
        ("qwen2", BIAS, lambda one: one / 0, f"{BIAS} in packed.safetensors holds numbers that are not finite"),
        ("llama", BIAS, lambda one: torch.ones(32), f"{BIAS} is not the model's"),
        ("qwen3", NORM, lambda one: None, f"there is no {NORM}"),
        ("qwen3", NORM, lambda one: one[:1], rf"{NORM} is \(1,\) in bfloat16, the model's \(32,\)"),
        ("qwen3", HEADS, lambda one: None, f"there is no {HEADS}"),
        ("qwen3", HEADS, lambda one: one[:4], rf"{HEADS} is \(4,\) in bfloat16, the model's \(8,\)"),
        ("qwen3", HEADS, lambda one: one.int(), rf"{HEADS} is \(8,\) in int32, the model's \(8,\)"),
        ("qwen3", TABLE, lambda one: None, f"there is no {TABLE}"),
        ("qwen3", TABLE, lambda one: one[:50], rf"{TABLE} is \(50, 32\) in bfloat16, the model's \(64, 32\)"),
        ("qwen3", TABLE, lambda one: one[:, :31], rf"{TABLE} is \(64, 31\) in bfloat16, the model's \(64, 32\)"),
        ("qwen3", TABLE, lambda one: one.int(), rf"{TABLE} is \(64, 32\) in int32, the model's \(64, 32\)"),
        ("qwen3", TABLE, lambda one: one / 0, f"{TABLE} in packed.safetensors holds numbers that are not finite"),
    ],
)
def test_what_is_not_packed_must_be_the_models(family, key, change, said, expand, tmp_path):
    pruned(family, tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")

    def changed(tensors) -> None:
        new = change(tensors.pop(key, None))
        tensors |= {} if new is None else {key: new.contiguous()}

    spoil(tmp_path / "packed", changed)
    with pytest.raises(ValueError, match=said):
        load_packed(tmp_path / "packed", expand=expand)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "weights, groups, part",
    [
        ("bf16", None, "values"),
        ("bf16", 8, "kept"),
        ("int8", None, "scale"),
        ("int4", None, "scales"),
    ],
)
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_packed_numbers_that_are_not_finite_are_refused(number, weights, groups, part, tmp_path):
    pruned("qwen3", tmp_path / "dense", groups)
    pack(str(tmp_path / "dense"), tmp_path / "packed", weights)
    spoil(tmp_path / "packed", lambda tensors: tensors[f"{UP}.{part}"].view(-1)[:1].fill_(number))
    with pytest.raises(ValueError, match=f"{UP}.{part} in packed.safetensors holds numbers that are not finite"):
        load_packed(tmp_path / "packed")


@pytest.mark.parametrize("expand", [False, True])
@torch.no_grad()
def test_a_packed_model_computes_in_the_type_and_lies_where_it_is_told_to(expand, tmp_path):
    pruned("qwen2", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    model, ids = load_packed(tmp_path / "packed", expand=expand), torch.arange(3, 10)[None]
    wanted = model(input_ids=ids).logits
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    stored = [dict(one.matrix.tensors) for one in packed]
    for change in (model.half, model.bfloat16):
        found = change()(input_ids=ids).logits
        assert found.dtype == model.dtype != torch.float32
        assert float((found.float() - wanted).norm() / wanted.norm()) < 0.02
    assert len(packed) == (0 if expand else 15) and stored == [one.matrix.tensors for one in packed], "all are the same"
    model.share_memory().to("meta")
    assert all(one.is_meta for one in (*model.parameters(), *model.buffers(), model.model.embed_tokens.table))
    assert all(tensor.is_meta for one in packed for tensor in one.matrix.tensors.values())


@pytest.mark.skipif(kernels.has_triton(), reason="there are kernels for what lies elsewhere")
def test_a_matrix_that_was_moved_where_no_kernel_is_is_multiplied_all_the_same():
    matrix = PackedMatrix.of(sparse(5, 70), "int8", "dense").to(torch.device("meta"))
    assert matrix.multiply(torch.ones(2, 70, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 40}, {"num_key_value_heads": 1}, {"head_dim": 4}], ids=str)
def test_matrices_of_another_size_than_the_models_are_refused(sizes, tmp_path):
    pruned("qwen3", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    config = tmp_path / "packed" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    with pytest.raises(ValueError, match=r"_proj is \d+ x \d+, the model's \d+ x \d+"):
        load_packed(tmp_path / "packed", expand=False)
