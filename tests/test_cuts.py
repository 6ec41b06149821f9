"""Structured cuts: the right parts go, what stays makes up for them, and the smaller model is the masked one."""

import json
from dataclasses import replace
from itertools import combinations, islice

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from families import FAMILIES, SMALL, lively, make_model
from secateurs import checkpoint as checkpoint_file
from secateurs import pruner
from secateurs.calibration import REGIONS, Batch, CalibrationSet, plain_document, region_weights
from secateurs.checkpoint import Checkpoint
from secateurs.collect import Shell
from secateurs.cuts import Depth, Width, anatomy
from secateurs.export import PROBE_FILE
from secateurs.gains import gains
from secateurs.layer import LayerProblem, relative_error
from secateurs.linalg import masked_refit
from secateurs.models import load_model, load_tokenizer
from secateurs.patterns import NM, Columns, Unstructured, stack
from secateurs.prompts import render
from secateurs.questions.tiny import Tiny
from secateurs.solvers import CUT_SOLVERS
from secateurs.solvers.obs import OBS
from secateurs.survey import blocks_to_drop, loss_roots, taylor_costs
from secateurs.trim import Trimmer
from test_checkpoint import Tokenizer, exported
from test_pruner import CALIBRATION, PLAN
from test_solvers import correlated, error, gram_of, problem

CAN_BE_CUT = ["qwen2", "qwen3", "llama", "mistral", "gemma3"]
PATTERNS = [Columns(34), Columns(0), Columns(68), Columns(7, 4), Columns(2, 4, 2), Columns(1, 34, 2)]


def plan_of(cut, model, **changes) -> pruner.Plan:
    patterns = cut.patterns(model)
    return replace(PLAN, solver=OBS(), patterns=patterns, targets=tuple(patterns), **changes)


@pytest.mark.parametrize("name", CUT_SOLVERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_whole_inputs_go_as_many_as_asked_of_every_run(name, pattern):
    p = problem(pattern, d_in=68 if pattern.runs == 1 else 136)
    solution = CUT_SOLVERS[name]().solve(p)
    columns = solution.mask.any(0)
    assert torch.equal(solution.mask, columns.expand(solution.mask.shape))
    assert torch.equal(solution.weight != 0, solution.mask) and solution.mask.is_contiguous()
    groups = columns.view(pattern.runs, -1, pattern.size)
    assert torch.equal(groups.any(2), groups.all(2)) and (groups.any(2).sum(1) == pattern.keep).all()
    assert (~solution.mask).sum() == pattern.num_zeros(*p.weight.shape)


@pytest.mark.parametrize("pattern", [Columns(34), Columns(9, 4)], ids=repr)
def test_what_stays_makes_up_for_what_goes(pattern):
    ways = ("obs", "wanda+refit", "wanda", "magnitude")
    errors = {name: [] for name in ways}
    for seed in range(6):
        p = problem(pattern, seed=seed)
        for name in ways:
            errors[name].append(error(CUT_SOLVERS[name]().solve(p), p))
    obs, refit, wanda, magnitude = (sum(errors[name]) for name in ways)
    assert obs < 0.97 * refit and refit < 0.6 * wanda and wanda < magnitude


def test_the_weights_that_stay_are_the_best_there_are():
    p = problem(Columns(30))
    solution = OBS(damp=1e-6).solve(p)
    torch.testing.assert_close(
        solution.weight, masked_refit(p.goal, p.gram.xtx, solution.mask).float(), rtol=1e-3, atol=1e-3
    )


def test_obs_is_near_the_best_choice_of_inputs():
    found, best = 0.0, 0.0
    for seed in range(8):
        p = problem(Columns(4), d_in=8, tokens=200, seed=seed)
        found += error(OBS(damp=1e-6).solve(p), p)
        one, candidates = OBS().solve(p), []
        for kept in combinations(range(8), 4):
            mask = torch.zeros_like(p.weight, dtype=torch.bool)
            mask[:, list(kept)] = True
            weight = masked_refit(p.goal, p.gram.xtx, mask).float()
            candidates.append(error(replace(one, weight=weight, mask=mask), p))
        best += min(candidates)
    assert best <= found < 1.1 * best


def test_twins_do_not_both_go():
    """Two inputs that say the same are worth one: whichever goes, the other is worth twice as much then."""
    generator = torch.Generator().manual_seed(0)
    x = correlated(400, 20, generator)
    x[:, 1] = x[:, 0] = 3 * x[:, 0]
    p = problem(Columns(10), weight=torch.randn(12, 20, generator=generator), gram=gram_of(x))
    kept = OBS().solve(p).mask.any(0)
    assert kept[:2].sum() == 1


def test_dead_inputs_go_first_and_targets_are_aimed_at():
    generator = torch.Generator().manual_seed(0)
    x = correlated(400, 20, generator)
    x[:, 5:10] = 0
    p = problem(Columns(14), weight=torch.randn(12, 20, generator=generator), gram=gram_of(x))
    kept = OBS().solve(p).mask.any(0)
    assert kept[5:10].sum() == 0 and kept.sum() == 14
    aimed = replace(p, target=2 * p.weight)
    torch.testing.assert_close(OBS().solve(aimed).weight, 2 * OBS().solve(p).weight, rtol=1e-4, atol=1e-4)


def test_columns_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="are chosen among all inputs, not column by column"):
        Columns(4).block_mask(torch.rand(2, 8), 0)
    with pytest.raises(ValueError, match=r"8 inputs are not 3 equal runs with at least 1 groups of 1"):
        Columns(1, 1, 3).check(2, 8)
    with pytest.raises(ValueError, match="keep must be 0 or more"):
        Columns(-1)
    with pytest.raises(ValueError, match="obs removes whole inputs, which 50% does not"):
        OBS().solve(problem(PLAN.pattern))
    assert stack([Columns(4), Columns(4)], [2, 2]) is None


def test_widths_add_up_to_the_parameters_that_were_asked_for():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**(SMALL | {"intermediate_size": 512, "num_attention_heads": 8})))
    body = anatomy(model)
    assert body.in_block == sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.6):
        for attention, count in (("none", 1), ("heads", 4), ("kv_heads", 2)):
            if attention != "none" and 0 < sparsity < 1 / count:
                with pytest.raises(ValueError, match=f"takes none of the {count} .*: ask for {100 // count} % or more"):
                    Width(sparsity, attention, multiple=4).kept(body)
                continue
            heads, kv_heads, neurons = Width(sparsity, attention, multiple=4).kept(body)
            left = 2 * kv_heads * (heads + 1) * body.head_dim * body.d_model + neurons * body.in_neuron
            assert abs(1 - left / body.in_block - sparsity) <= 2 * body.in_neuron / body.in_block
            assert neurons % 4 == 0 and 0 < heads <= 4 and 0 < kv_heads <= 2
    assert Width(0.25, "heads").kept(body) == (3, 2, 384) and Width(0.5, "kv_heads").kept(body) == (4, 1, 256)
    with pytest.raises(ValueError, match=r"width 97% would leave no neuron: 512 of them have .* of a block's"):
        Width(0.97, "none").kept(body)
    with pytest.raises(ValueError, match=r"width 1% takes nothing: neurons go 32 at a time, which is .* % of a block"):
        Width(0.01).kept(body)
    with pytest.raises(ValueError, match=r"depth 10% is 0 of 2 blocks; it must be 1 to 1"):
        Depth(0.1).count(2)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CAN_BE_CUT])
def test_other_models_are_refused(family):
    with pytest.raises(ValueError, match="cannot be cut: every block must have self_attn.q_proj"):
        Width(0.5).patterns(make_model(family))


def test_norms_over_all_heads_and_biases_of_blocks_that_go_are_refused():
    """Where each of four heads has a quarter of the stream, a norm over all of them is as long as that is."""
    whole = SMALL | {"num_key_value_heads": 4}
    with pytest.raises(ValueError, match="cannot be cut"):
        Width(0.5, "heads").patterns(tf.Olmo2ForCausalLM(tf.Olmo2Config(**whole, pad_token_id=0)))
    biased = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    with pytest.raises(ValueError, match="blocks of LlamaForCausalLM have biases that would stay"):
        Depth(0.5).patterns(biased)
    assert Width(0.25, multiple=4).patterns(biased)
    with pytest.raises(ValueError, match="takes none of a group's only head: ask for another attention"):
        Width(0.5, "heads", multiple=4).patterns(tf.LlamaForCausalLM(tf.LlamaConfig(**whole)))
    with pytest.raises(ValueError, match="ask for 33.4 % or more, or for another attention"):
        Width(0.3, "kv_heads").kept(replace(anatomy(biased), heads=6, kv_heads=3))
    of_places = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**SMALL, eos_token_id=0))
    with pytest.raises(ValueError, match=r"DiffLlamaForCausalLM depend on their place \(self_attn.lambda_init\)"):
        Depth(0.5).patterns(of_places)
    with pytest.raises(ValueError, match="DiffLlamaForCausalLM pairs its heads"):
        Width(0.5, "heads", multiple=4).patterns(of_places)
    for model in (
        tf.StableLmForCausalLM(tf.StableLmConfig(**SMALL)),
        tf.HeliumForCausalLM(tf.HeliumConfig(**SMALL, head_dim=8, pad_token_id=0)),
    ):  # whose heads share out the stream, whatever head_dim says
        with pytest.raises(ValueError, match="has no configuration with 2 heads and 2 of keys and values of 8 numbers"):
            Width(0.5, "heads", multiple=4).patterns(model)
        assert Width(0.5, multiple=4).patterns(model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot be cut: .* no cut changes$"):
        Width(0.5).patterns(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)))


@pytest.mark.parametrize("inner", [False, True])
def test_kinds_of_blocks_that_the_file_leaves_to_be_computed_are_written(inner, tmp_path):
    """Blocks that see a window and those that see all take turns: without the first, the others would change sides."""
    config = tf.Gemma2Config(**(SMALL | {"num_hidden_layers": 4}), head_dim=8, sliding_window=8)
    torch.manual_seed(0)
    tf.Gemma2ForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    settings = json.loads((tmp_path / "dense" / "config.json").read_text())
    del settings["layer_types"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint(str(tmp_path / "dense"))
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"text_config": settings} if inner else settings))
    (tmp_path / "out").mkdir()
    trimmer = Trimmer(checkpoint, tmp_path / "out")
    trimmer.blocks, trimmer.sizes = [1, 2, 3], {"intermediate_size": 48}
    trimmer.close()
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(found) == ["text_config"] if inner else "text_config" not in found
    found = found["text_config"] if inner else found
    kinds = ["sliding_attention", "full_attention"]
    assert found["layer_types"] == [kinds[index % 2] for index in (1, 2, 3)] and found["num_hidden_layers"] == 3


CUTS = {
    "heads": (Width(0.5, "heads", multiple=4), {"intermediate_size": 20, "num_attention_heads": 2}),
    "neurons": (Width(0.25, "none", multiple=4), {"intermediate_size": 28}),
    "kv heads": (Width(0.5, "kv_heads", multiple=4), {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "blocks": (Depth(0.5), {"num_hidden_layers": 1}),
}


RESIDUAL = {"propagate": "group", "goal": "residual"}


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [*((family, kind, {}) for family in CAN_BE_CUT for kind in CUTS), *(("llama", kind, RESIDUAL) for kind in CUTS)],
)
def test_the_smaller_model_is_the_masked_one(family, kind, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "SHARD", 30_000)
    cut, sizes = CUTS[kind]
    make_model(family).save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(str(tmp_path / "dense"))
    plan = plan_of(cut, checkpoint.model, **changes)
    exported(checkpoint, Tokenizer(), plan, tmp_path / "out", smaller=Trimmer)
    smaller, probe = load_model(str(tmp_path / "out")), load_file(tmp_path / "out" / PROBE_FILE)
    torch.testing.assert_close(smaller(input_ids=probe["ids"]).logits, probe["logits"], rtol=1e-4, atol=1e-5)
    stored = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert stored <= set(smaller.state_dict()), "some engines read all of these files"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(config[key] == value for key, value in sizes.items()) and config["head_dim"] == 8
    assert len(config.get("layer_types", [0] * config["num_hidden_layers"])) == config["num_hidden_layers"]
    wanted = sum(p.numel() for p in type(smaller)(smaller.config).parameters())
    assert sum(p.numel() for p in smaller.parameters()) == wanted
    side = json.loads((tmp_path / "out" / "secateurs.json").read_text())
    assert side["cut"]["is"].items() >= sizes.items() and side["cut"]["was"]["num_hidden_layers"] == 2
    dense = sum(p.numel() for p in make_model(family).parameters())
    assert sum(p.numel() for p in smaller.parameters()) < dense
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_blocks_of_different_sizes_are_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(str(tmp_path / "dense"))
    plan = plan_of(Width(0.25, "none", multiple=4), checkpoint.model)
    uneven = dict(plan.patterns) | {"model.layers.1.mlp.down_proj": Columns(8)}
    with pytest.raises(ValueError, match="block 1 keeps .*'intermediate_size': 8.* but those before it"):
        exported(checkpoint, Tokenizer(), replace(plan, patterns=uneven), tmp_path / "out", smaller=Trimmer)
    assert not (tmp_path / "out").exists()
    lopsided = {"model.layers.0.self_attn.o_proj": Columns(3, 8), "model.layers.1.self_attn.o_proj": Columns(3, 8)}
    with pytest.raises(ValueError, match=r"block 0: heads of a group that stay, by group: \["):
        plan = replace(plan, patterns=lopsided, targets=tuple(lopsided))
        exported(Checkpoint(str(tmp_path / "dense")), Tokenizer(), plan, tmp_path / "again" / "out", smaller=Trimmer)


def deep(idle: int):
    """A model of four blocks, one of which adds next to nothing to the residual stream."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**(SMALL | {"num_hidden_layers": 4}))).eval()
    with torch.no_grad():
        for part in (model.model.layers[idle].self_attn.o_proj, model.model.layers[idle].mlp.down_proj):
            part.weight *= 1e-3
    return model


@pytest.mark.parametrize("score", ["drop", "angle"])
@pytest.mark.parametrize("idle", [0, 2, 3])
def test_a_block_that_does_nothing_goes_first(score, idle):
    assert blocks_to_drop(deep(idle), CALIBRATION, Depth(0.25, score)) == [idle]


def test_each_block_that_goes_is_the_one_that_matters_least_then():
    model, heard = deep(1), []
    found = blocks_to_drop(
        model, CALIBRATION, Depth(0.5), progress=lambda done, total, what: heard.append((done, total))
    )
    assert heard[-1] == (7, 7) and 1 in found and len(found) == 2
    batch = Batch(*(torch.tensor([part]) for part in (CALIBRATION.documents[0].ids, [1] * 10**3)))
    batch = Batch(batch.ids, batch.regions[:, : batch.ids.shape[1]])
    shell = Shell(model)

    def final(without):
        hidden = shell.enter(batch)
        for index, block in enumerate(model.model.layers):
            if index not in without:
                args, kwargs = shell.call(batch, index)
                out = block(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return shell.leave(batch, hidden)

    with torch.no_grad():
        lost = {second: (final({1, second}) - final(set())).norm() for second in (0, 2, 3)}
    (second,) = set(found) - {1}
    assert lost[second] < 1.5 * min(lost.values())


def test_who_gains_depends_on_what_is_left():
    smaller = dict(gains(Width(0.25)))
    assert smaller["vLLM"] == "about 1 / (1 - 0.25) in its blocks" and "secateurs pack (CPU)" not in smaller
    fewer = dict(gains(Depth(0.25)))["llama.cpp"]
    assert "a smaller KV cache" in fewer and "lost most of their answers" in fewer
    for engine in ("vLLM", "SGLang", "TensorRT-LLM"):
        assert "no faster" in dict(gains(Unstructured(0.5)))[engine]
        assert dict(gains(NM(2, 4)))[engine].startswith("loads it as a dense model; its 2:4 ")
    assert all("pack" in gains(pattern)[-1][0] for pattern in (Unstructured(0.5), NM(2, 4)))
    for pattern in (NM(4, 8), NM(2, 4), NM(1, 2), NM(3, 8)):
        assert "twice" in gains(pattern)[-1][1]
    for pattern in (Unstructured(0.5), NM(1, 4), NM(5, 8), NM(8, 16)):
        assert "4:8 is faster" in gains(pattern)[-1][1]


def test_what_errors_cost_is_the_spread_of_the_gradients():
    """One document and one output at a time, by a zero that is added to the output and asked for its gradient."""
    model, names = make_model("qwen3"), ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    columns = {names[0]: Columns(30), names[1]: Columns(1, size=16)}
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    roots = loss_roots(model, CALIBRATION, columns)
    assert learning == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in names:
        spread, tokens = torch.zeros(32, 32, dtype=torch.float64), 0
        for document in CALIBRATION.documents:
            ids = torch.tensor([document.ids])
            counts = torch.tensor([0.0, *(CALIBRATION.weights.get(region, 0.0) for region in REGIONS)])
            nothing = torch.zeros(1, len(document.ids), 32, requires_grad=True)
            hook = model.get_submodule(name).register_forward_hook(lambda module, args, out, more=nothing: out + more)
            surprise = -model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            (gradient,) = torch.autograd.grad((surprise * counts[torch.tensor(document.codes[1:])]).sum(), nothing)
            hook.remove()
            spread += gradient[0].double().T @ gradient[0].double()
            tokens += len(document.ids)
        found = roots[name].double().T @ roots[name].double()
        torch.testing.assert_close(found, spread / tokens, rtol=1e-3, atol=1e-3 * float((spread / tokens).abs().max()))


def test_what_a_neuron_or_head_does_is_the_gradient_of_a_gate_on_it():
    """One document at a time, by a gate on each group of inputs at each token that is 1 and asked for its gradient."""
    model = lively("qwen3")
    columns = {"model.layers.0.mlp.down_proj": Columns(30), "model.layers.1.self_attn.o_proj": Columns(3, size=8)}
    found = taylor_costs(model, CALIBRATION, columns)
    for name, pattern in columns.items():
        effects, tokens = 0.0, 0
        for document in CALIBRATION.documents:
            ids = torch.tensor([document.ids])
            counts = torch.tensor([0.0, *(CALIBRATION.weights.get(region, 0.0) for region in REGIONS)])
            linear = model.get_submodule(name)
            gates = torch.ones(1, len(document.ids), linear.in_features // pattern.size, requires_grad=True)
            spread = gates.repeat_interleave(pattern.size, dim=-1)
            hook = linear.register_forward_pre_hook(lambda module, args, spread=spread: (args[0] * spread,))
            surprise = -model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            (gradient,) = torch.autograd.grad((surprise * counts[torch.tensor(document.codes[1:])]).sum(), gates)
            hook.remove()
            effects, tokens = effects + gradient[0].square().sum(0), tokens + len(document.ids)
        torch.testing.assert_close(found[name], effects / tokens, rtol=1e-3, atol=1e-3 * float(found[name].max()))
    pruner.prune(model, CALIBRATION, replace(PLAN, solver=OBS(), patterns=columns, targets=tuple(columns), costs=found))
    for name, pattern in columns.items():
        gone = (model.get_submodule(name).weight == 0).all(0).view(-1, pattern.size).all(1)
        cheapest = found[name].argsort()[: len(gone) - pattern.keep]
        assert gone.nonzero().squeeze(1).tolist() == sorted(cheapest.tolist())


def test_what_is_said_to_cost_least_goes_and_what_stays_makes_up_for_it():
    p = problem(Columns(15, size=2), d_in=68)
    costs = torch.arange(34.0).roll(5)
    found = OBS().solve(replace(p, costs=costs))
    assert found.mask[0].view(34, 2).all(1).nonzero().squeeze(-1).tolist() == [*range(5), *range(24, 34)]
    kept = found.mask.any(0)
    alone = OBS().solve(replace(p, costs=kept.view(34, 2).any(1).float()))
    assert torch.equal(found.weight, alone.weight)
    masked = relative_error(p.weight * found.mask, p.weight, p.gram)
    assert relative_error(found.weight, p.weight, p.gram) < 0.9 * masked


def test_inputs_go_by_the_outputs_that_matter_and_what_stays_is_refitted_for_all():
    p = problem(Columns(34), d_in=68)
    one = torch.zeros(1, len(p.weight))
    one[0, 3] = 2.0  # as if nothing but the fourth output mattered
    alone = LayerProblem(name="alone", weight=p.weight[3:4], gram=p.gram, pattern=p.pattern)
    found, wanted = OBS().solve(replace(p, loss_root=one)), OBS().solve(alone)
    assert torch.equal(found.mask[0], wanted.mask[0]) and not torch.equal(found.mask, OBS().solve(p).mask)
    torch.testing.assert_close(found.weight[3], wanted.weight[0], rtol=1e-4, atol=1e-5)
    same = OBS().solve(replace(p, loss_root=torch.eye(len(p.weight))))
    assert torch.equal(same.mask, OBS().solve(p).mask)


def test_a_cut_by_loss_keeps_more_of_it():
    """The bundled reasoner, on worked solutions that it has not seen: how much more than the dense one they surprise it
    without a third of its neurons."""
    tokenizer, tiny = load_tokenizer("bundled"), Tiny()
    documents = [
        plain_document((*render(tokenizer, tiny.format, q), *tokenizer(tiny.solution(q))["input_ids"]), "think")
        for q in islice(tiny.questions("calibration", 0), 100)
    ]
    worked = CalibrationSet(tuple(documents[:60]), tuple(documents[:1]), region_weights("rac"))

    def surprise(model) -> float:
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([one.ids])).logits[0, :-1] for one in documents[60:]]
        targets = torch.cat([torch.tensor(one.ids[1:]) for one in documents[60:]])
        return float(torch.nn.functional.cross_entropy(torch.cat(logits), targets))

    dense = load_model("bundled").float()
    plan, before, more = plan_of(Width(0.3, "none", multiple=8), dense), surprise(dense), {}
    for score, roots in {"output": {}, "loss": loss_roots(dense, worked, plan.patterns)}.items():
        model = load_model("bundled").float()
        pruner.prune(model, worked, replace(plan, loss_roots=roots))
        more[score] = surprise(model) - before
    assert more["loss"] < 0.85 * more["output"]
