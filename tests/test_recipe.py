"""Strict recipes: every mistake is one sentence that says where, and shipped recipes parse."""

from importlib.resources import files
from pathlib import Path

import pytest

from secateurs.calibration import region_weights
from secateurs.recipe import build_pattern, build_solver, load_recipe, pattern_label
from secateurs.solvers import SOLVERS, SparseGPT

SHIPPED = [Path(entry.name).stem for entry in (files("secateurs") / "recipes").iterdir()]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_parse(name):
    assert load_recipe(name).title


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prune.patern.sparsity=0.5", "unknown key `prune.patern`. Did you mean `prune.pattern`?"),
        ("sed=3", "unknown key `sed`. Did you mean `seed`?"),
        ("prune.pattern.sparsity=1.5", "prune.pattern: sparsity is 1.5, but it must be in [0, 1)"),
        ("sweep.sparsity=[1.5]", "sweep.sparsity: sparsity is 1.5, but it must be in [0, 1)"),
        ("prune.solver.name=sparsegtp", "unknown solver `sparsegtp`. Did you mean `sparsegpt`?"),
        ("prune.solver.dampp=1", "unknown key of solver `sparsegpt` `dampp`. Did you mean `damp`?"),
        (
            "prune.solver.damp=x",
            "solver `sparsegpt`: damp: input should be a valid number, unable to parse string as a number, found 'x'",
        ),
        ("prune.solver.block_size=0", "block_size is 0, but a block needs at least 1 column"),
        ("calibration.arm=racc", "unknown calibration arm `racc`. Did you mean `rac`?"),
        ("calibration.arm={thinks=1.0}", "calibration.arm: unknown region `thinks`. Did you mean `think`?"),
        ("calibration.arm={think=-1.0}", "weight of region `think` must be 0 or more"),
        ("traces.questions.name=tyny", "unknown question set `tyny`. Did you mean `tiny`?"),
        ("traces.filters.corect=true", "unknown trace filter `corect`. Did you mean `correct`?"),
        ("evaluate.num_questions=many", "evaluate.num_questions: input should be a valid integer, found 'many'"),
        ("prune.propagate=layer", "prune.propagate: input should be 'dense', 'block' or 'group', found 'layer'"),
        ("prune.goal=dens", "prune.goal: input should be 'own', 'dense' or 'residual', found 'dens'"),
        ("prune.tune.rate=2.0", "prune.tune.rate: input should be less than 1, found 2.0"),
        ("prune.allocator.name=curve", "unknown allocator `curve`. Did you mean `curves`?"),
        ("prune.allocator={name='owl', spread=1.0}", "prune.allocator: spread is 1.0, but it must be in [0, 0.5)"),
        ("prune.allocator={name='owl'}", "prune: allocator `owl` gives every matrix a number of zeros, which only an"),
        ("prune.pattern={name='nm', n=2, m=4}", "sweep.sparsity needs a prune.pattern with a sparsity"),
        (
            "prune.pattern={name='width', sparsity=0.3}",
            "solver `sparsegpt` cannot solve for pattern `width`; those that",
        ),
        (
            "prune.solver={name='obs'}",
            "solver `obs` cannot solve for pattern `unstructured`; those that can: magnitude",
        ),
        ("sweep.sparsity=[0.5, 0.5]", "one name in the report: corpus, unstructured per row 50 %, sparsegpt, seed 0;"),
        ("sweep.seed=[1, 1]", "one name in the report: corpus, unstructured per row 40 %, sparsegpt, seed 1;"),
        ("sweep.pattern=[{name='depth', sparsity=1.0}]", "sparsity is 1.0, but it must be in [0, 1)"),
        ("traces.filters={min_tokens=100000}", "filters.min_tokens is 100000, but no trace has more than"),
        ("traces.engine.timeout=inf", "traces.engine.timeout = inf, but a number must be finite"),
        ("prune.solver={name='sparsegpt', damp=nan}", "prune.solver.damp = nan, but a number must be finite"),
        ("model=''", "model: string should have at least 1 character"),
        ("nonsense", "--set nonsense: expected key=value"),
        ("seed.a.b=1", "`seed` is a value, not a table"),
    ],
)
def test_mistakes_teach(override, sentence):
    with pytest.raises(ValueError) as error:
        load_recipe("demo", ["seed=1", override])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_cut_takes_no_targets():
    cut = ["prune.pattern={name='width', sparsity=0.3}", "prune.solver={name='obs'}"]
    assert load_recipe("demo", cut).patterns[0]["name"] == "width"
    by_loss = "prune.pattern={name='width', sparsity=0.3, score='loss'}"
    with pytest.raises(ValueError, match='score = "loss" needs solver `obs`, found `wanda`'):
        load_recipe("demo", ["sweep.sparsity=[]", by_loss, "prune.solver.name='wanda'"])
    with pytest.raises(ValueError, match="pattern `width` cuts every block alike: it takes no targets and no ignore"):
        load_recipe("demo", [*cut, "prune.ignore=['o_proj']"])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe `dmo`. Did you mean `demo`?"):
        load_recipe("dmo")
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such file"):
        load_recipe("nowhere.toml")
    (tmp_path / "broken.toml").write_text("seed = ")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(str(tmp_path / "broken.toml"))


def test_overrides_are_toml_values_or_text():
    recipe = load_recipe("demo", ["prune.solver={name='wanda'}", "title=two words", "sweep.seed=[7]"])
    assert recipe.prune.solver == {"name": "wanda"} and recipe.title == "two words" and recipe.seeds == [7]


def test_tables_become_objects():
    assert build_solver({"name": "sparsegpt", "damp": 0.1}) == SparseGPT(damp=0.1)
    assert build_solver({"name": "sparsegpt-reference"}) == SparseGPT(block_size=128, damping="mean")
    assert str(build_pattern({"name": "nm", "n": 2, "m": 4})) == "2:4"
    for name in SOLVERS:
        build_solver({"name": name})


def test_n_of_m_has_a_short_name():
    sets = ["sweep.sparsity=[]", "prune.pattern=4:8", "sweep.pattern=['2:4', '1:4']"]
    recipe = load_recipe("demo", sets)
    assert recipe.prune.pattern == {"name": "nm", "n": 4, "m": 8}
    assert [str(build_pattern(pattern)) for pattern in recipe.patterns] == ["2:4", "1:4"]
    with pytest.raises(ValueError, match="prune.pattern: the pattern 5:4 keeps 5 of every 4 weights"):
        load_recipe("demo", ["sweep.sparsity=[]", "prune.pattern=5:4"])
    with pytest.raises(ValueError, match="prune.pattern: a pattern is a table, as .*, or \"4:8\"; found 'depth'"):
        load_recipe("demo", ["prune.pattern=depth"])


def test_arms():
    assert region_weights("rac") == {"prompt": 1.0, "think": 1.0, "answer": 1.0}
    assert region_weights({"corpus": 0.5, "think": 2.0}) == {"corpus": 0.5, "think": 2.0}
    with pytest.raises(ValueError, match="needs a region with a positive weight"):
        region_weights({"think": 0.0})


def test_a_goal_needs_inputs_that_can_differ():
    with pytest.raises(ValueError, match='prune: goal "dense" needs propagate "block" or "group"'):
        load_recipe("demo", ["prune.goal=dense", "prune.propagate=dense"])


def test_patterns_that_differ_in_scope_alone_have_names_of_their_own():
    both = "sweep.pattern=[{name='unstructured', sparsity=0.5}, {name='unstructured', sparsity=0.5, scope='layer'}]"
    names = [pattern_label(cell.prune.pattern) for cell in load_recipe("demo", ["sweep.sparsity=[]", both]).grid]
    assert set(names) == {"unstructured per row", "unstructured"}


def test_the_grid_is_every_combination_with_nothing_left_to_sweep():
    sets = ["sweep.sparsity=[]", "sweep.pattern=[{name='nm', n=2, m=4}, {name='unstructured', sparsity=0.5}]"]
    grid = load_recipe("demo", [*sets, "sweep.arm=['rac', {think=1.0}]", "sweep.solver=[{name='admm'}]"]).grid
    assert [(cell.prune.pattern["name"], cell.calibration.arm) for cell in grid] == [
        ("nm", "rac"), ("nm", {"think": 1.0}), ("unstructured", "rac"), ("unstructured", {"think": 1.0}),
    ]  # fmt: skip
    assert all(cell.prune.solver == {"name": "admm"} and len(cell.grid) == 1 for cell in grid)
    with pytest.raises(ValueError, match=r"sweep\.sparsity and sweep\.pattern both say what to remove"):
        load_recipe("demo", sets[1:])
