"""The block loop on tiny random models of every family: exact zeros, true Grams, untouched neighbours, resume."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from families import make_model
from secateurs import pruner
from secateurs.calibration import CODES, CalibrationSet, Document, region_weights
from secateurs.models import decoder_blocks
from secateurs.patterns import NM, Unstructured
from secateurs.pruner import Plan
from secateurs.solvers import SparseGPT
from secateurs.solvers.masking import Masking

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


def test_every_family_is_pruned_exactly_and_nothing_else_changes(tiny_model, family):
    before = {name: p.clone() for name, p in tiny_model.state_dict().items()}
    results = pruner.prune(tiny_model, CALIBRATION, PLAN)
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
    """Batched, padded and split by region, the Grams are those of every document run alone through the whole model."""
    _, blocks = decoder_blocks(tiny_model)
    plan = replace(PLAN, propagate="dense")
    selected = pruner.prunable(tiny_model, plan)
    streams = pruner._capture(tiny_model, CALIBRATION, batch_tokens=200)
    for index, block in enumerate(blocks):
        groups = [g for g in pruner._groups(block, index, selected[index], streams[0]) if g.expert is None]
        with torch.inference_mode():
            train, _ = pruner._collect(block, index, groups, streams, advance=True)
        for group in groups:
            expected = torch.zeros_like(train[group.name]["think"].xtx, dtype=torch.float64)
            seen = []
            handle = group.module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            for document in CALIBRATION.documents:
                seen.clear()
                with torch.inference_mode():
                    tiny_model(input_ids=torch.tensor([document.ids]), use_cache=False)
                x = seen[0].reshape(-1, seen[0].shape[-1])[torch.tensor(document.codes) == CODES["think"]].double()
                expected += x.T @ x
            handle.remove()
            assert torch.allclose(
                train[group.name]["think"].xtx.double(), expected, rtol=1e-4, atol=1e-4 * expected.max()
            )


def test_expert_grams_hold_the_tokens_routed_to_them():
    model = make_model("mixtral")
    selected = pruner.prunable(model, PLAN)
    _, blocks = decoder_blocks(model)
    streams = pruner._capture(model, CALIBRATION, 4096)
    groups = pruner._groups(blocks[0], 0, selected[0], streams[0])
    with torch.inference_mode():
        train, _ = pruner._collect(blocks[0], 0, groups, streams)
    down = [g for g in groups if g.part == "down"]
    tokens = sum(len(d.ids) for d in CALIBRATION.documents)
    assert len(down) == 4
    assert sum(gram.tokens for g in down for gram in train[g.name].values()) == 2 * tokens  # top-2 routing


def test_q_k_v_share_one_gram_and_so_do_gate_and_up():
    model = make_model("qwen3")
    streams = pruner._capture(model, CALIBRATION, 4096)
    _, blocks = decoder_blocks(model)
    groups = pruner._groups(blocks[0], 0, pruner.prunable(model, PLAN)[0], streams[0])
    shared = [sorted(m.name.rsplit(".", 1)[1] for m in g.matrices) for g in groups]
    assert shared == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("propagate", ["dense", "block", "group"])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, propagate):
    plan = replace(PLAN, propagate=propagate)
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
    assert any("no calibration token reached this expert" in r.note for r in experts)
    assert all(r.zeros == r.zeros_asked for r in experts)


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
