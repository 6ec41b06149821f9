"""The block loop on tiny random models of every family: exact zeros, true Grams, untouched neighbours, resume."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from families import make_model
from secateurs import collect, pruner
from secateurs.calibration import CODES, REGIONS, CalibrationSet, Document, batches, region_weights
from secateurs.collect import Held, Seen, held_out_energies
from secateurs.layer import Gram
from secateurs.models import decoder_blocks
from secateurs.patterns import NM, Unstructured
from secateurs.pruner import Plan
from secateurs.solvers import ALPS, SparseGPT
from secateurs.solvers.masking import Masking
from secateurs.tune import Tune

HALF = Unstructured(sparsity=0.5)


def documents(count: int, seed: int = 0) -> tuple[Document, ...]:
    """Traces of random ids: prompt, think, answer, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(12, 30, (1,), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        codes = [CODES["prompt"]] * 4 + [CODES["think"]] * (length - 6) + [CODES["answer"]] * 2
        made.append(Document(tuple(ids), tuple(codes)))
    return tuple(made)


CALIBRATION = CalibrationSet(documents(24), documents(4, seed=1), region_weights("rac"))
PLAN = Plan(pattern=HALF, solver=SparseGPT())
EVERYTHING = replace(PLAN, propagate="group", goal="residual", tune=Tune(steps=3, tokens=100))


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plain", "everything"])
def test_every_family_is_pruned_exactly_and_nothing_else_changes(tiny_model, family, plan):
    before = {name: p.clone() for name, p in tiny_model.state_dict().items()}
    results = pruner.prune(tiny_model, CALIBRATION, plan)
    touched = {matrix.name for block in pruner.prunable(tiny_model, PLAN) for matrix in block}
    assert {r.name for r in results} == touched and len(results) == len(touched)
    for block in pruner.prunable(tiny_model, PLAN):
        for matrix in block:
            result = next(r for r in results if r.name == matrix.name)
            assert int((matrix.weight == 0).sum()) == result.zeros == result.zeros_asked
            assert 0 < result.error_train < 1 and result.error_held_out is not None
            assert set(result.error_by_region) <= {"prompt", "think", "answer"}
    parameters = {id(m.parameter) for block in pruner.prunable(tiny_model, PLAN) for m in block}
    for name, parameter in tiny_model.named_parameters():
        if id(parameter) not in parameters:
            assert torch.equal(parameter, before[name]), f"{name} changed"
    if family in ("qwen3_moe", "mixtral"):
        assert any(".experts.3.down_proj" in name for name in touched)
        assert not any("gate.weight" in name or name.endswith("mlp.gate") for name in touched)


def test_grams_equal_those_of_single_documents_at_their_true_positions(tiny_model):
    """Batched, padded and weighted by region, they are those of every document run alone through the whole model."""
    weights = {"prompt": 0.0, "think": 2.0, "answer": 0.5}
    _, blocks = decoder_blocks(tiny_model)
    plan = replace(PLAN, propagate="dense")
    selected = pruner.prunable(tiny_model, plan)
    streams = collect.capture(tiny_model, CALIBRATION, batch_tokens=200)
    for index, block in enumerate(blocks):
        groups = [g for g in collect.groups_of(block, index, selected[index], streams[0]) if g.expert is None]
        with torch.no_grad():
            train = collect.collect(block, index, groups, streams, weights, move=True).train
        for group in groups:
            expected = torch.zeros_like(train[group.name].xtx, dtype=torch.float64)
            seen = []
            handle = group.module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            for document in CALIBRATION.documents:
                seen.clear()
                with torch.inference_mode():
                    tiny_model(input_ids=torch.tensor([document.ids]), use_cache=False)
                x = seen[0].reshape(-1, seen[0].shape[-1]).double()
                weight = torch.tensor([weights[REGIONS[code - 1]] for code in document.codes])
                expected += (x.T * weight) @ x
            handle.remove()
            assert torch.allclose(train[group.name].xtx.double(), expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_expert_grams_hold_the_tokens_routed_to_them():
    model = make_model("mixtral")
    selected = pruner.prunable(model, PLAN)
    _, blocks = decoder_blocks(model)
    streams = collect.capture(model, CALIBRATION, 4096)
    groups = collect.groups_of(blocks[0], 0, selected[0], streams[0])
    with torch.no_grad():
        train = collect.collect(blocks[0], 0, groups, streams, CALIBRATION.weights).train
    down = [g for g in groups if g.part == "down"]
    tokens = sum(len(d.ids) for d in CALIBRATION.documents)
    assert len(down) == 4
    assert sum(train[g.name].tokens for g in down) == 2 * tokens  # top-2 routing


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_expert_grams_are_those_of_each_token_by_itself(kind):
    """In float64, one expert of one token after the other; each counts by the square of its routing weight."""
    weights = {"prompt": 0.5, "think": 2.0, "answer": 1.0}
    model = make_model(kind)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data.normal_(std=0.5)
        elif parameter.ndim > 1:
            parameter.data.mul_(4)  # so that routing weights differ
    streams = collect.capture(model, CALIBRATION, 300)
    _, blocks = decoder_blocks(model)
    with torch.no_grad():
        for stream in streams:
            stream.hidden = stream.run(blocks[0], 0)
        groups = collect.groups_of(blocks[1], 1, pruner.prunable(model, PLAN)[1], streams[0])
        groups = [group for group in groups if group.expert is not None]
        train = collect.collect(blocks[1], 1, groups, streams, weights).train
    expected: dict[tuple, torch.Tensor] = {}

    def watch(experts, args, kwargs):
        hidden, chosen, routed = (*args, *kwargs.values())[:3]
        for x, ids, by, code in zip(hidden.double().flatten(0, -2), chosen, routed, codes, strict=True):
            for expert, weight in zip(ids.tolist(), by.tolist(), strict=True):
                up = experts.gate_up_proj[expert].double()
                if kind == "gpt_oss":
                    both = x @ up + experts.gate_up_proj_bias[expert].double()
                    gate, linear = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
                    inner = (linear + 1) * gate * torch.sigmoid(gate * experts.alpha)
                else:
                    gate, linear = (up @ x).chunk(2)
                    inner = nn.functional.silu(gate) * linear
                scale = weights[REGIONS[code - 1]] * weight**2
                for part, inputs in (("up", x), ("down", inner)):
                    key = expert, part
                    expected[key] = expected.get(key, 0) + scale * torch.outer(inputs, inputs)

    with groups[0].module.register_forward_pre_hook(watch, with_kwargs=True), torch.no_grad():
        for document in CALIBRATION.documents:
            codes = document.codes
            model(input_ids=torch.tensor([document.ids]), use_cache=False)
    assert {(group.expert, group.part) for group in groups if group.name in train} == set(expected)
    for group in groups:
        if group.name in train:
            wanted = expected[group.expert, group.part]
            torch.testing.assert_close(
                train[group.name].xtx.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max())
            )


def test_q_k_v_share_one_gram_and_so_do_gate_and_up():
    model = make_model("qwen3")
    streams = collect.capture(model, CALIBRATION, 4096)
    _, blocks = decoder_blocks(model)
    groups = collect.groups_of(blocks[0], 0, pruner.prunable(model, PLAN)[0], streams[0])
    shared = [sorted(m.name.rsplit(".", 1)[1] for m in g.matrices) for g in groups]
    assert shared == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize(
    "plan",
    [*(replace(PLAN, propagate=propagate) for propagate in ("dense", "block", "group")),
     replace(PLAN, goal="dense"), replace(PLAN, propagate="dense", tune=Tune(steps=3)), EVERYTHING],
    ids=["dense", "block", "group", "goal", "tune", "everything"],
)  # fmt: skip
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, plan):
    whole = make_model("qwen3")
    expected = pruner.prune(whole, CALIBRATION, plan)

    class Killed(BaseException):
        pass

    def kill(done, total, what):
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        pruner.prune(make_model("qwen3"), CALIBRATION, plan, folder=tmp_path, progress=kill)
    assert (tmp_path / "block-00000.json").exists() and not (tmp_path / "block-00001.json").exists()
    resumed = make_model("qwen3")
    results = pruner.prune(resumed, CALIBRATION, plan, folder=tmp_path)
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name])
    assert [replace(r, seconds=0) for r in results] == [replace(r, seconds=0) for r in expected]


def test_propagation_changes_what_later_layers_see():
    errors = {}
    for propagate in ("dense", "block", "group"):
        results = pruner.prune(make_model("qwen3"), CALIBRATION, replace(PLAN, propagate=propagate))
        errors[propagate] = [r.error_train for r in results]
    assert errors["dense"][0] == errors["block"][0] == errors["group"][0]
    assert errors["dense"] != errors["block"] != errors["group"]


@pytest.mark.parametrize(("solver", "solves"), [(SparseGPT(), 4), (ALPS(), 7)])
def test_matrices_with_the_same_inputs_are_solved_as_one(solver, solves, monkeypatch):
    """One solve for q, k and v, one for gate and up, each with its own count; ALPS takes every matrix by itself."""
    shapes, solve = [], type(solver).solve
    monkeypatch.setattr(type(solver), "solve", lambda self, problem: shapes.append(problem) or solve(self, problem))
    name = "model.layers.0.self_attn.k_proj"
    plan = replace(PLAN, solver=solver, pattern=Unstructured(0.5, "layer"), patterns={name: Unstructured(0.7, "layer")})
    results = pruner.prune(make_model("qwen3"), CALIBRATION, plan)
    assert len(shapes) == 2 * solves
    assert [r.zeros for r in results if r.name == name] == [int(0.7 * 16 * 32)]
    assert all(r.zeros == r.zeros_asked and r.pattern == "50% per layer" for r in results if r.name != name)


@pytest.mark.parametrize(
    ("name", "writers"),
    [("llama", ["o_proj", "down_proj"]), ("phi3", ["o_proj", "down_proj"]), ("gemma3", []), ("mixtral", [])],
)
def test_what_a_block_adds_to_the_stream_is_found_by_watching(name, writers):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(name).to(dtype)
        _, blocks = decoder_blocks(model)
        with torch.no_grad():
            streams = collect.capture(model, CALIBRATION, 4096)
            found = collect.writers_of(blocks[0], 0, streams[0])
        names = {module: place.rsplit(".", 1)[-1] for place, module in blocks[0].named_modules()}
        assert [names[module] for module in found] == writers


def test_held_out_errors_are_those_of_the_tokens_whether_kept_as_they_were_or_as_a_gram():
    """Of regions with more tokens than inputs there is a Gram, of others the inputs; weighted tokens (experts') too."""
    generator = torch.Generator().manual_seed(0)
    weight, dense = (torch.randn(6, 8, generator=generator) for _ in range(2))
    x, codes = torch.randn(60, 8, generator=generator), torch.tensor(([1] * 2 + [2] * 10 + [3] * 3) * 4)
    for worth in (None, torch.rand(60, generator=generator)):
        parts = [Seen(x[i::3], codes[i::3], None if worth is None else worth[i::3]) for i in range(3)]
        held = Held()
        for part in parts:
            held.add(part)
        short = Held()
        short.add(Seen(x.bfloat16(), codes, worth))
        assert set(short.grams) == {2}, "12 tokens in 16 bits are smaller than 8 inputs squared in 32"
        assert set(held.grams) == {2, 3} and {int(code) for one in held.seen for code in one.codes} == {1}
        found, expected = (held_out_energies(weight, dense, one) for one in (held, Held(parts)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        like = Gram.zeros(8, "cpu")
        torch.testing.assert_close(held.gram(like).xtx, Held(parts).gram(like).xtx)
        assert held.gram(like).tokens == 60


def test_drifts_equal_those_of_single_documents():
    """Block 1 after block 0 was damaged: sums of (dense - now) x now, for inputs and for the residual stream."""
    model, dense = make_model("llama"), make_model("llama")
    plan = replace(PLAN, goal="residual", propagate="group")
    with torch.no_grad():
        streams = collect.capture(model, CALIBRATION, 200, twin=True)
        blocks = (decoder_blocks(model)[1], decoder_blocks(dense)[1])
        for stream in streams:
            stream.dense = stream.run(blocks[0][0], 0)
        for parameter in blocks[0][0].parameters():
            parameter.mul_(0.8)
        for stream in streams:
            stream.hidden = stream.run(blocks[0][0], 0)
        selected = pruner.prunable(model, plan)[1]
        groups = collect.groups_of(blocks[0][1], 1, selected, streams[0])
        writers = collect.writers_of(blocks[0][1], 1, streams[0])
        o_proj = next(matrix for matrix in selected if matrix.name.endswith("o_proj"))
        before = {o_proj: o_proj.weight.clone()}
        o_proj.weight.mul_(0.5)  # solved already, so the dense pass must see the weights from before
        options = {"imitate": True, "writers": writers, "dense": before}
        sums = collect.collect(blocks[0][1], 1, groups, streams, region_weights("think"), **options)
        assert torch.equal(o_proj.weight, before[o_proj] * 0.5)
        expected = {}
        for document in CALIBRATION.documents:
            seen = []
            for one, layers in zip((model, dense), blocks, strict=True):
                states = {}
                places = {"down_proj": layers[1].mlp.down_proj, "mid": layers[1].post_attention_layernorm,
                          "o_proj": layers[1].self_attn.o_proj, "in": layers[1].input_layernorm}  # fmt: skip
                handles = [
                    module.register_forward_pre_hook(lambda m, args, n=name, s=states: s.__setitem__(n, args[0][0]))
                    for name, module in places.items()
                ]
                one(input_ids=torch.tensor([document.ids]), use_cache=False)
                for handle in handles:
                    handle.remove()
                seen.append({name: state.double() for name, state in states.items()})
            now, then = seen
            rows = torch.tensor(document.codes) == CODES["think"]
            for name, stream in (("o_proj", "in"), ("down_proj", "mid")):
                for kind, off in (("inputs", then[name] - now[name]), ("stream", then[stream] - now[stream])):
                    expected[name, kind] = expected.get((name, kind), 0) + off[rows].T @ now[name][rows]
    for (name, kind), value in expected.items():
        drift = next(drift for group, drift in sums.train_drift.items() if group.endswith(name))
        torch.testing.assert_close(
            getattr(drift, kind).double(), value, rtol=1e-3, atol=1e-5 * float(value.abs().max())
        )


def test_goals_and_fine_tunes_bring_the_model_closer_to_the_dense_one():
    dense, distances, results = make_model("qwen3"), {}, {}
    for parameter in dense.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)  # so that blocks matter
    calibration = replace(CALIBRATION, documents=documents(400), held_out=documents(60, seed=1))
    plans = {
        "own": PLAN,
        "dense": replace(PLAN, goal="dense"),
        "residual, group": replace(PLAN, goal="residual", propagate="group"),
        "tune": replace(PLAN, tune=Tune(steps=60, tokens=1000)),
    }
    ids = [torch.tensor([document.ids]) for document in calibration.held_out]
    with torch.no_grad():
        states = [dense.model(input_ids=one).last_hidden_state for one in ids]
        for name, plan in plans.items():
            model = deepcopy(dense)
            results[name] = pruner.prune(model, calibration, plan)
            distances[name] = sum(
                float((model.model(input_ids=one).last_hidden_state - state).square().sum())
                for one, state in zip(ids, states, strict=True)
            )
    assert distances["residual, group"] < distances["dense"] < distances["own"]
    assert distances["tune"] < 0.9 * distances["own"]
    assert all(r.alpha == r.beta == 0 and r.block_error is None for r in results["own"])
    assert all(r.alpha == 0 for r in results["dense"] if r.block == 0)
    assert any(r.alpha > 0 for r in results["dense"] if r.block == 1)
    assert any(r.beta > 0 for r in results["residual, group"])
    assert all(r.block_error[1] < r.block_error[0] for r in results["tune"])


def test_a_goal_that_nothing_can_come_of_is_refused():
    with pytest.raises(ValueError, match='goal "dense" needs propagate "block" or "group"'):
        replace(PLAN, goal="dense", propagate="dense")


def test_batch_size_changes_no_mask():
    masks = []
    for batch_tokens in (1, 100, 100_000):
        model = make_model("qwen3")
        pruner.prune(model, CALIBRATION, PLAN, batch_tokens=batch_tokens)
        masks.append([m.weight != 0 for block in pruner.prunable(model, PLAN) for m in block])
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))


def test_region_weights_reach_the_solver():
    think_only = replace(CALIBRATION, weights=region_weights("think"))
    results = {}
    for name, calibration in (("rac", CALIBRATION), ("think", think_only)):
        results[name] = pruner.prune(make_model("qwen3"), calibration, PLAN)[0].error_train
    assert results["rac"] != results["think"]


def test_targets_and_ignore():
    plan = replace(PLAN, targets=("mlp.*",), ignore=("re:down_proj$",))
    names = [m.name for block in pruner.prunable(make_model("qwen3"), plan) for m in block]
    assert len(names) == 4 and all(name.endswith(("gate_proj", "up_proj")) for name in names)
    with pytest.raises(ValueError, match=r"`mpl\.\*` matches no prunable layer; names look like"):
        pruner.prunable(make_model("qwen3"), replace(PLAN, targets=("mpl.*",)))


def test_a_pattern_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match="q_proj: 2:5 needs a number of inputs that 5 divides, but this layer has 32"):
        pruner.prunable(make_model("qwen3"), replace(PLAN, pattern=NM(n=2, m=5)))


def test_an_expert_without_tokens_is_reported():
    model = make_model("qwen3_moe")

    def route(hidden):  # everything to experts 1 and 2
        count = len(hidden)
        return torch.zeros(count, 4), torch.full((count, 2), 0.5), torch.tensor([[1, 2]]).expand(count, 2)

    model.model.layers[0].mlp.gate.forward = route
    results = pruner.prune(model, CALIBRATION, replace(PLAN, solver=Masking(score="wanda")))
    experts = [r for r in results if r.block == 0 and ".experts." in r.name]
    tokens = sum(len(document.ids) for document in CALIBRATION.documents)
    starved = [r for r in experts if "no calibration token reached this expert" in r.note]
    assert len(starved) == 4 and {r.tokens for r in experts if r not in starved} == {tokens}
    assert {(r.tokens, r.note.rsplit("; ", 1)[1], r.name.rsplit(".", 1)[1]) for r in starved} == {
        (0, "the Gram of all experts was used", "gate_up_proj"),
        (0, "all its inputs counted alike", "down_proj"),
    }
    assert all(r.zeros == r.zeros_asked for r in experts)


def test_experts_of_a_module_are_collected_in_one_pass(monkeypatch):
    passes = []
    monkeypatch.setattr(pruner, "collect", lambda *a, **k: passes.append(a[2]) or collect.collect(*a, **k))
    pruner.prune(make_model("mixtral"), CALIBRATION, replace(PLAN, propagate="group"))
    names = [[group.name.split(".layers.0.")[1] for group in groups] for groups in passes[: len(passes) // 2]]
    experts = [[f"mlp.experts.{e}.{part}" for e in range(4)] for part in ("gate_up_proj", "down_proj")]
    assert names == [["self_attn.q_proj"], ["self_attn.o_proj"], *experts]


def test_an_experts_gram_gets_a_little_of_all_experts():
    """As much as 0.3 d_in tokens of the pool would add at the weight of its own; nothing for `down_proj`."""
    model = make_model("qwen3_moe")
    streams = collect.capture(model, CALIBRATION, 4096)
    block, selected = decoder_blocks(model)[1][0], pruner.prunable(model, PLAN)[0]
    with torch.no_grad():
        groups = collect.groups_of(block, 0, selected, streams[0])
        sums = collect.collect(block, 0, groups, streams, CALIBRATION.weights)
    bare = {name: gram for name, gram in sums.train.items() if ".experts." in name}
    pools = collect.pools_of(groups, sums)
    (pool,) = pools.values()
    ups = [group for group in groups if group.expert is not None and group.part == "up"]
    assert pool.tokens == sum(bare[group.name].tokens for group in ups)
    for group in [group for group in groups if group.expert is not None]:
        own = bare[group.name]
        found = collect.inputs_of(group, sums, pools).gram
        share = 0.3 * own.d_in / own.tokens * own.weight_sum / pool.weight_sum if group.part == "up" else 0
        expected = own.xtx + share * pool.xtx if share else own.xtx
        torch.testing.assert_close(found.xtx, expected)
        assert (found.tokens, found.weight_sum) == (own.tokens, own.weight_sum)


def test_bf16_weights_stay_bf16_with_exact_zeros():
    model = make_model("llama").to(torch.bfloat16)
    results = pruner.prune(model, CALIBRATION, replace(PLAN, pattern=NM(n=2, m=4)))
    for block in pruner.prunable(model, PLAN):
        for matrix in block:
            assert matrix.weight.dtype == torch.bfloat16
            groups = (matrix.weight != 0).reshape(-1, 4).sum(1)
            assert (groups <= 2).all()
    assert all(r.zeros == r.zeros_asked for r in results)


def test_linears_that_the_block_never_calls_are_named():
    model = make_model("qwen3")
    model.model.layers[1].unused = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="unused is never called by its block"):
        pruner.prune(model, CALIBRATION, PLAN)


def test_plans_that_see_the_same_inputs_share_their_grams(tiny_model, tmp_path, monkeypatch):
    """Solved together, plans give what each gives alone, and the block loop then only reads them back."""
    dense = replace(PLAN, propagate="dense")
    plans = {
        tmp_path / "a": dense,
        tmp_path / "b": replace(dense, pattern=Unstructured(sparsity=0.3)),
        tmp_path / "c": replace(dense, solver=Masking(score="wanda")),
    }
    alone = {folder: pruner.prune(deepcopy(tiny_model), CALIBRATION, plan) for folder, plan in plans.items()}
    before = {name: p.clone() for name, p in tiny_model.state_dict().items()}
    passes = []
    collected = pruner.collect
    monkeypatch.setattr(pruner, "collect", lambda *args, **options: passes.append(1) or collected(*args, **options))

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruner.solve_alike(deepcopy(tiny_model), CALIBRATION, plans, progress=stop)
    pruner.solve_alike(tiny_model, CALIBRATION, plans)
    _, blocks = decoder_blocks(tiny_model)
    assert len(passes) == len(blocks) + 1  # the block that was not finished, again
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.state_dict().items())
    monkeypatch.setattr(pruner, "capture", None)
    for folder, plan in plans.items():
        results = pruner.prune(deepcopy(tiny_model), CALIBRATION, plan, folder=folder)
        assert [replace(r, seconds=0) for r in results] == [replace(r, seconds=0) for r in alone[folder]]
    with pytest.raises(ValueError, match="share Grams"):
        pruner.solve_alike(tiny_model, CALIBRATION, {tmp_path / "d": PLAN})


@pytest.mark.parametrize(("room", "looks"), [(collect.CALL_BYTES, 3), (0, 12)], ids=["remembered", "no room"])
def test_what_a_decoder_hands_to_its_blocks_is_made_once_a_batch(room, looks, monkeypatch):
    model, made = make_model("gemma3"), collect.Shell._watched  # windowed and full masks
    looked: list[object] = []
    monkeypatch.setattr(collect.Shell, "_watched", lambda self, batch: looked.append(batch) or made(self, batch))
    monkeypatch.setattr(collect, "CALL_BYTES", room)
    shell, some = collect.Shell(model), list(collect.batches(documents(9), 60))[:3]
    with torch.no_grad():
        calls = [[shell.call(batch, 1) for batch in some] for _ in range(4)]
    assert len(looked) == looks
    for again in calls[1:]:
        for (args, options), (args_again, options_again) in zip(calls[0], again, strict=True):
            assert len(args) == len(args_again)
            torch.testing.assert_close(options, options_again, rtol=0, atol=0)


def test_a_pass_that_only_collects_stops_before_the_last_matrix(tiny_model):
    _, blocks = decoder_blocks(tiny_model)
    matrices = pruner.prunable(tiny_model, PLAN)[0]
    streams = collect.capture(tiny_model, CALIBRATION, batch_tokens=200)
    groups = collect.groups_of(blocks[0], 0, matrices, streams[0])
    ends: list[nn.Module] = []
    handle = blocks[0].register_forward_hook(lambda *_: ends.append(blocks[0]))
    with torch.no_grad():
        short = collect.collect(blocks[0], 0, groups, streams, CALIBRATION.weights).train
        assert not ends
        whole = collect.collect(blocks[0], 0, groups, streams, CALIBRATION.weights, move=True).train
        assert len(ends) == len(streams)
    handle.remove()
    assert short.keys() == whole.keys()
    assert all(torch.equal(short[name].xtx, whole[name].xtx) for name in whole)


@pytest.mark.parametrize(
    ("plan", "passes"),
    [(replace(PLAN, propagate="dense"), 1), (PLAN, 2), (replace(PLAN, goal="residual"), 3)],
    ids=["dense", "block", "residual"],
)
def test_a_token_passes_a_block_no_more_often_than_it_must_and_the_head_never(plan, passes, family):
    """To collect; behind what was solved; and through the dense block, where that is imitated. But for few, to see
    which matrices have the same inputs."""
    model, seen = make_model(family), Counter[int]()
    for index, matrices in enumerate(pruner.prunable(model, plan)):
        matrices[0].module.register_forward_pre_hook(
            lambda _, args, index=index: seen.update({index: args[0][..., 0].numel()})
        )
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the head was called"))
    calibration = CalibrationSet(documents(72), documents(12, seed=1), region_weights("rac"))
    pruner.prune(model, calibration, plan, batch_tokens=200)
    every = (*calibration.documents, *calibration.held_out)
    total = sum(batch.ids.numel() for batch in batches(every, 200))
    assert len(seen) == 2
    for tokens in seen.values():
        assert passes <= tokens / total < passes + 0.3


def test_a_disk_that_is_full_at_a_block_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    model = make_model("qwen3")
    with monkeypatch.context() as patch:
        patch.setattr("secateurs.checkpoint.save_file", full)
        with pytest.raises(OSError, match=f"^{tmp_path}.*: No space left on device"):
            pruner.prune(model, CALIBRATION, PLAN, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_left_to_prune_is_a_mistake():
    with pytest.raises(ValueError, match="prune.ignore leaves nothing that could be pruned"):
        pruner.prunable(make_model("llama"), replace(PLAN, ignore=("*",)))
    with pytest.raises(ValueError, match=r"`re:\(` holds no regular expression: .*"):
        pruner.prunable(make_model("llama"), replace(PLAN, targets=("re:(",)))
