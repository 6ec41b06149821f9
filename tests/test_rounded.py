"""Solutions of int4 numbers: on the grid, zeros where they were, outputs nearer than plain rounding leaves them."""

import json
from dataclasses import replace

import pytest
import torch

from families import make_model
from secateurs import cell, preview, pruner
from secateurs.checkpoint import Checkpoint
from secateurs.dense import Dense
from secateurs.gains import gains
from secateurs.int4 import EXACT, group_scales, nearest
from secateurs.layer import Outcome, relative_error
from secateurs.linalg import NotPositiveDefiniteError
from secateurs.packed import PackedMatrix
from secateurs.packing import pack
from secateurs.patterns import NM, Columns, Unstructured
from secateurs.recipe import build_solver, load_recipe, solver_label
from secateurs.solvers import CUT_SOLVERS, SOLVERS
from secateurs.solvers.rounded import Rounded
from secateurs.trim import Trimmer
from test_checkpoint import Tokenizer, exported
from test_pruner import CALIBRATION, PLAN
from test_solvers import problem

PATTERNS = [Unstructured(0.0), Unstructured(0.5), Unstructured(0.6, "layer"), NM(4, 8), Columns(80), Columns(9, 8)]


def base_of(pattern):
    return (CUT_SOLVERS["obs"] if isinstance(pattern, Columns) else SOLVERS["admm"])()


def layer(pattern, seed=0, **changes):
    """136 inputs: two groups and a short one."""
    return problem(pattern, d_out=24, d_in=136, tokens=1000, seed=seed, **changes)


def plainly(weight, columns=slice(None)):
    """The weights that stay as `pack` would round them, in their places."""
    found = torch.zeros_like(weight, dtype=torch.float32)
    found[:, columns] = PackedMatrix.of(weight[:, columns].float().contiguous(), "int4").dense()
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_numbers_that_pack_stores_exactly(pattern, dtype):
    p = layer(pattern)
    p = replace(p, weight=p.weight.to(dtype))
    before = p.weight.clone()
    found, base = Rounded(base=base_of(pattern)).solve(p), base_of(pattern).solve(p)
    stay = found.mask.any(0) if isinstance(pattern, Columns) else slice(None)
    assert found.weight.dtype == dtype and torch.equal(found.mask, base.mask) and torch.equal(p.weight, before)
    assert not bool(found.weight[~found.mask].any())
    assert torch.equal(plainly(found.weight, stay), found.weight.float())
    assert not torch.equal(plainly(base.weight, stay), base.weight.float())
    assert found.outcome is Outcome.OK
    if isinstance(pattern, Columns):
        assert torch.equal(found.weight.any(0), found.mask.any(0)), "what went is seen from the weights"


@pytest.mark.parametrize(
    ("pattern", "most"), list(zip(PATTERNS, [0.3, 0.55, 0.6, 0.5, 0.4, 0.4], strict=True)), ids=str
)
def test_outputs_change_less_than_by_plain_rounding(pattern, most):
    """What rounding adds to the error, over five layers, as a part of what plain rounding adds."""
    added = {"plain": 0.0, "rounded": 0.0}
    for seed in range(5):
        p = layer(pattern, seed)
        base, found = base_of(pattern).solve(p), Rounded(base=base_of(pattern)).solve(p)
        stay = base.mask.any(0) if isinstance(pattern, Columns) else slice(None)
        for name, weight in (("plain", plainly(base.weight, stay)), ("rounded", found.weight)):
            added[name] += relative_error(weight, base.weight, p.gram)
    assert added["rounded"] < most * added["plain"]


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.6, "layer"), NM(4, 8)], ids=str)
def test_sweeps_only_bring_it_nearer(pattern):
    p = layer(pattern)
    target = base_of(pattern).solve(p).weight
    errors = [
        relative_error(Rounded(base=base_of(pattern), sweeps=sweeps, damp=1e-6).solve(p).weight, target, p.gram)
        for sweeps in range(4)
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0]


def test_zeros_of_a_matrix_that_is_only_rounded_stay():
    p = layer(Unstructured(0.0))
    sparse = torch.where(p.weight.abs() < 0.7, 0.0, p.weight)
    found = Rounded(base=base_of(p.pattern)).solve(replace(p, weight=sparse))
    assert bool(found.mask.all()) and not bool(found.weight[sparse == 0].any())
    assert relative_error(found.weight, sparse, p.gram) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_input_that_stays_is_seen_and_costs_nothing(dtype):
    """One with so much energy that its weights are tiny beside those of its group: all of them are rounded to 0."""
    p = layer(Columns(136))
    p.gram.xtx[5] *= 300
    p.gram.xtx[:, 5] *= 300
    p.weight[:, 5] /= 300
    p.weight[:, 70:] = 0  # nothing there to keep
    p = replace(p, weight=p.weight.to(dtype))
    found = Rounded(base=base_of(p.pattern)).solve(p).weight
    assert torch.equal(found.any(0), p.weight.any(0)), "`trim` sees what stays"
    without = found.masked_fill(found.abs() < 1e-6, 0)
    assert torch.equal(plainly(found), without.float()) and not bool(without[:, 5].any())
    errors = [relative_error(weight, p.weight, p.gram) for weight in (found, without)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_what_went_otherwise_is_reported():
    pattern = Unstructured(0.5)
    few = Rounded(base=base_of(pattern)).solve(problem(pattern, d_in=136, tokens=20))
    assert few.outcome is Outcome.RANK_DEFICIENT and bool(few.weight.isfinite().all())
    p = layer(pattern)
    p.gram.xtx.diagonal().sub_(0.1 * p.gram.xtx.diagonal().mean())  # no Gram any more: it takes more than a percent
    for base in (base_of(pattern), SOLVERS["magnitude"]()):
        raised = Rounded(base=base).solve(p)
        assert raised.outcome is Outcome.DAMPING_RAISED and raised.stats["damp"] > 0.01
    assert Rounded(base=base_of(pattern), damp=0.5).solve(layer(pattern)).stats["damp"] == 0.5
    broken = layer(Unstructured(0.0))
    broken.gram.xtx.fill_(-1.0).fill_diagonal_(1.0)
    with pytest.raises(NotPositiveDefiniteError, match="^layer: "):
        Rounded(base=base_of(broken.pattern)).solve(broken)


@pytest.mark.parametrize("energy", [0.0, 1e-14])
def test_dead_inputs_are_rounded_to_what_is_nearest(energy):
    p = layer(Unstructured(0.0))
    p.gram.xtx[7:30] *= energy**0.5
    p.gram.xtx[:, 7:30] *= energy**0.5
    found = Rounded(base=base_of(p.pattern)).solve(p)
    assert found.outcome is Outcome.DEAD_INPUTS
    off = (found.weight - p.weight)[:, 7:30].abs()
    assert float(off.max() / p.weight.abs().max()) < 0.35, "clipped at most, where others decide on the scale"
    assert float(off.median()) < 0.15


def test_a_target_is_rounded_and_zeros_of_the_weight_stay():
    p = layer(Unstructured(0.0))
    target, sparse = torch.randn(p.weight.shape), torch.where(p.weight.abs() < 0.7, 0.0, p.weight)
    found = Rounded(base=base_of(p.pattern)).solve(replace(p, weight=sparse, target=target)).weight
    assert not bool(found[sparse == 0].any())
    assert relative_error(found, target.masked_fill(sparse == 0, 0), p.gram) < 0.01


def test_scales_go_by_what_inputs_bring():
    energy = torch.ones(64)
    energy[:8] = 1e6
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    def off(scales):
        return (nearest(weight, scales) * scales - weight)[:, :8].square().sum()

    assert float(off(group_scales(weight, energy)) / off(group_scales(weight))) < 0.75


def test_scales_are_exact_and_found_again():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (200, 100), generator=generator).float()
    numbers[0], numbers[1], numbers[2] = 7, torch.arange(100) % 2, 0
    numbers[3] = torch.where(torch.arange(100) % 2 == 0, 6, -4)
    scales = group_scales(torch.randn(200, 100, generator=generator), digits=EXACT)
    assert torch.equal(scales, torch.ldexp((torch.frexp(scales)[0] * 32).round() / 32, torch.frexp(scales)[1]))
    weight = numbers * scales.repeat_interleave(64, 1)[:, :100]
    assert torch.equal(weight.bfloat16().float(), weight)
    again = group_scales(weight)
    again[again == 0] = 1
    assert torch.equal(torch.cat([nearest(part, one[:, None]) * one[:, None]
        for part, one in zip(weight.split(64, 1), again.T, strict=True)], 1), weight)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, propagate="group", goal="residual")], ids=["plain", "everything"])
def test_experts_are_rounded_too(family, plan):
    model = make_model(family)
    results = pruner.prune(model, CALIBRATION, replace(plan, solver=Rounded(base=plan.solver)))
    assert all(result.zeros == result.zeros_asked for result in results)
    for matrix in (matrix for block in pruner.prunable(model, plan) for matrix in block):
        assert torch.equal(plainly(matrix.weight), matrix.weight), matrix.name


@pytest.fixture(scope="module")
def rounded_off_dense(tmp_path_factory) -> float:
    return pack("bundled", tmp_path_factory.mktemp("dense") / "packed", "int4")["rounded_off"]


@pytest.mark.parametrize("pattern", ['{name="width", sparsity=0.3}', '{name="depth", sparsity=0.25}', '"4:8"'])
def test_a_cut_model_is_rounded_in_all_its_matrices(pattern, rounded_off_dense, tmp_path):
    solver = "admm" if ":" in pattern else "obs"
    given = ["sweep.pattern=[]", "sweep.sparsity=[]", "sweep.arm=[]", "sweep.seed=[]", f"prune.pattern={pattern}"]
    recipe = load_recipe("demo", [*given, f"sweep.solver=[{{name='{solver}', weights='int4'}}]"])
    recipe = recipe.grid[0]
    dense = Dense(recipe)
    plan = cell.plan_of(recipe, dense)
    exported(Checkpoint(dense.checkpoint.name), Tokenizer(), plan, tmp_path / "out",
             smaller=None if ":" in pattern else Trimmer)  # fmt: skip
    assert pack(str(tmp_path / "out"), tmp_path / "packed", "int4")["rounded_off"] == 0
    assert 0.05 < rounded_off_dense < 0.2


def test_a_recipe_says_so_and_what_does_not_go_is_refused(capsys):
    spec = {"name": "sparsegpt", "damp": 0.1, "weights": "int4"}
    assert build_solver(spec) == Rounded(base=SOLVERS["sparsegpt"](damp=0.1))
    assert solver_label(spec) == "sparsegpt(damp=0.1, weights=int4)"
    with pytest.raises(ValueError, match="solver `admm`: weights can be \"int4\", found 'int8'"):
        build_solver({"name": "admm", "weights": "int8"})
    with pytest.raises(ValueError, match="unknown key of solver `admm` `weight`. Did you mean `weights`"):
        build_solver({"name": "admm", "weight": "int4"})
    with pytest.raises(ValueError, match="unknown key of solver `reap` `weights`"):
        build_solver({"name": "reap", "weights": "int4"})
    for name in (["admm"], {"a": 1}, 3):
        with pytest.raises(ValueError, match="unknown solver"):
            build_solver({"name": name})
    with pytest.raises(ValueError, match="takes no tune"):
        load_recipe("demo", ["prune.tune.steps=5", "sweep.solver=[{name='admm', weights='int4'}]"])
    assert [engine for engine, _ in gains(NM(4, 8), rounded=True)][-2] == "secateurs pack --weights int4 (CPU)"
    assert "experts are refused" in gains(NM(4, 8), rounded=True)[-1][1], "as `compress` has it"


def test_a_probe_of_solvers_takes_each_with_its_own_pattern(tmp_path):
    given = ["sweep.sparsity=[]", "prune.pattern={name='width', sparsity=0.3}"]
    recipe = load_recipe("demo", [*given, "sweep.solver=[{name='obs'}, {name='obs', weights='int4'}]"])
    dense = Dense(recipe)
    plan = preview.plan_check(recipe, dense)
    other = recipe.model_copy(update={"sweep": recipe.sweep.model_copy(update={"solver": recipe.solvers[::-1]})})
    assert preview.plan_check(other, dense)["prunable_parameters"] == plan["prunable_parameters"]
    assert preview.estimate(recipe, dense, plan)["prune"] > 0
    json.dumps(plan)
