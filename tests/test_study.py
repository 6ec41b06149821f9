"""What a grid of cells shares, in one process or several, killed or not; everything that a recipe can ask for."""

import json
import pickle
import time

import pytest
import torch
from safetensors.torch import load_file

from processes import fork_workers, started
from secateurs.parallel import Workers
from secateurs.recipe import load_recipe
from secateurs.report import read
from secateurs.study import study
from test_cli import SMALL, arguments, call, results


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("without_reload")
def test_solvers_of_one_run_share_traces_and_dense_answers(tmp_path, monkeypatch, capsys):
    sets = [*SMALL[1:], "sweep.arm=['rac']", "sweep.solver=[{name='wanda'}, {name='sparsegpt', damp=0.02}]"]
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(tmp_path / "out"), sets=sets)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [cell["solver"] for cell in report["cells"]] == ["none", "wanda", "sparsegpt(damp=0.02)"]
    assert len(list((tmp_path / "out" / "traces").iterdir())) == len(list((tmp_path / "out" / "dense").iterdir())) == 1
    errors = [sum(layer["error_held_out"] for layer in cell["layers"]) for cell in report["cells"][1:]]
    assert errors[1] < errors[0], "each cell was pruned by its own solver"
    (leaks,) = report["leaks"]
    assert leaks["evaluation"] == 6 and leaks["calibration"] >= 3 and leaks["equal"] == leaks["near"] == 0
    assert "6 evaluation questions against" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert call(monkeypatch, *arguments("run", "demo", "--dry-run", "--json", sets=sets)) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 2
    assert call(monkeypatch, "show", "demo", "--set", "sweep.solver=[{name='wandb'}]") == 2
    assert "sweep.solver: unknown solver `wandb`. Did you mean `wanda`?" in " ".join(capsys.readouterr().err.split())


def test_processes_are_sent_no_model(tmp_path, monkeypatch):
    """One seed and one cell: both are done here, with the model, before there is more for which processes start."""
    sent = []

    class Spied(Workers):
        def run(self, tasks):
            found = super().run(tasks)
            sent.append((len(tasks), len(pickle.dumps(self.make)), "_here" in vars(self)))
            return found

    monkeypatch.setattr("secateurs.study.Workers", Spied)
    study(load_recipe("demo", [*SMALL[1:], "sweep.arm=['rac']", "evaluate.num_questions=0"]), tmp_path, jobs=2)
    assert [count for count, _, _ in sent] == [1, 0, 1]
    assert all(size < 10_000 and not kept for _, size, kept in sent)


@pytest.mark.usefixtures("without_reload")
def test_everything_at_once_meets_the_same_budget_and_is_measured_once(tmp_path, monkeypatch):
    sets = [
        *SMALL[3:], "prune.tune.steps=2", "evaluate.num_questions=0", "calibration.num_tokens=500",
        "calibration.held_out_tokens=250", "prune.solver={name='admm', steps=3, levels=2}",
    ]  # fmt: skip
    monkeypatch.setattr("secateurs.survey.REACH", 1)
    words = arguments("run", "quality", "--out", str(tmp_path / "out"), sets=sets)
    assert call(monkeypatch, *words) == 0
    (record,) = (tmp_path / "out" / "cells").glob("*/prune.json")
    layers = json.loads(record.read_text())["layers"]
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    assert sum(layer["zeros"] for layer in layers) == sum(size * 7 // 10 for size in sizes)
    assert all(layer["zeros"] == layer["zeros_asked"] for layer in layers)
    assert len({round(layer["zeros"] / size, 3) for layer, size in zip(layers, sizes, strict=True)}) > 3
    assert any(layer["alpha"] > 0 for layer in layers) and any(layer["beta"] > 0 for layer in layers)
    assert all(layer["block_error"][1] <= layer["block_error"][0] for layer in layers)
    (survey,) = (tmp_path / "out" / "surveys").iterdir()
    before = survey.stat().st_mtime_ns
    monkeypatch.setattr("secateurs.cell.survey", None)  # nothing is measured again
    assert call(monkeypatch, *words, "--set", "prune.allocator={name='atp', step=0.01}") == 0
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    assert survey.stat().st_mtime_ns == before


@pytest.mark.usefixtures("without_reload")
def test_a_study_in_processes_killed_on_the_way_ends_as_a_run(tmp_path, monkeypatch, one_thread):
    """Grams shared between cells or not, in one process or two, killed or not: equal files."""
    sets = [
        *SMALL[2:], "sweep.arm=['prompt', 'rac']", "sweep.sparsity=[0.4, 0.5]", "prune.propagate='dense'",
        "calibration.num_tokens=400", "calibration.held_out_tokens=150", "traces.sampling.max_new_tokens=32",
        "evaluate.num_questions=3",
    ]  # fmt: skip
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(tmp_path / "alone"), sets=sets)) == 0
    words = arguments("study", "demo", "--jobs", "2", "--out", str(tmp_path / "study"), sets=sets)
    with monkeypatch.context() as patch:
        fork_workers(patch)
        process = started(words)
    wait = time.monotonic() + 120
    while not list(tmp_path.glob("study/cells/*/blocks/*.json")) and time.monotonic() < wait:
        time.sleep(0.02)
    assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / "study" / "report.json").exists()
    assert call(monkeypatch, *words) == 0
    assert results(tmp_path / "study") == results(tmp_path / "alone")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "study")]
    assert [len(report["cells"]) for report in reports] == [5, 5] and len(reports[0]["comparisons"]) == 2
    assert reports[0]["comparisons"] == reports[1]["comparisons"]
    for arm in ("prompt", "rac"):
        shares = {cell["seconds"]["prune, shared"] for cell in reports[0]["cells"] if cell["arm"] == arm}
        assert len(shares) == 1 and min(shares) > 0
    known = [json.loads(path.read_text())["seconds"] for path in tmp_path.glob("alone/cells/*/prune.json")]
    assert all(seconds["prune, shared"] > 0 for seconds in known) and len(known) == 4


@pytest.mark.usefixtures("reload_here")
def test_mixtures_nm_and_the_other_solvers_run_too(tmp_path, monkeypatch, capsys):
    sets = [
        *SMALL[2:5], SMALL[6], "sweep.arm=[{corpus=0.5, prompt=1.0, think=2.0}]", "sweep.sparsity=[]",
        "prune.pattern={name='nm', n=2, m=4}", "prune.solver={name='wanda'}", "prune.propagate='dense'",
    ]  # fmt: skip
    words = arguments("prune", "demo", "--out", str(tmp_path / "out"), sets=sets)
    assert call(monkeypatch, *words) == 0
    (weights,) = (tmp_path / "out").rglob("model/model.safetensors")
    for name, weight in load_file(weights).items():
        if "_proj" in name:
            assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    shown = capsys.readouterr().out
    assert (
        "1 model was pruned and asked nothing; the error of layers on held-out traces is 0." in shown
        and "wanda" in shown
    )
    before, record = read(tmp_path / "out").unasked, tmp_path / "out" / "report.json"
    record.unlink()
    monkeypatch.setattr("secateurs.study.verify", refuse)
    assert call(monkeypatch, *words) == 2
    shown = capsys.readouterr()
    assert "does not load" in shown.err and "report:" in shown.out and f"model: {weights.parent}" in shown.out
    after = read(tmp_path / "out")
    assert after.unasked == before and after.reloaded is None, "a model that does not load loses nothing of the report"


def refuse(_, **__):
    raise RuntimeError("the exported model does not load")


@pytest.mark.usefixtures("reload_here")
def test_cuts_leave_smaller_models_that_answer(tmp_path, monkeypatch, capsys):
    cuts = "[{name='width', sparsity=0.3, score='loss'}, {name='depth', sparsity=0.25}]"
    sets = [
        "sweep.arm=['rac']", "sweep.sparsity=[]", "sweep.seed=[0]", "prune.solver.name='obs'",
        "calibration.num_tokens=600", SMALL[6],
        "calibration.held_out_tokens=200", "evaluate.num_questions=2", f"sweep.pattern={cuts}",
    ]  # fmt: skip
    words = arguments("run", "demo", "--out", str(tmp_path / "out"), sets=sets)
    assert call(monkeypatch, *words[:2], "--dry-run", "--json", *words[4:]) == 0
    zeros = json.loads(capsys.readouterr().out)["zeros"]
    assert set(zeros) == {"width 30% by loss", "depth 25%"} and all(zeros.values())
    assert call(monkeypatch, *words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [cell["pattern"] for cell in report["cells"]] == ["dense", "width 30% by loss", "depth 25%"]
    assert report["cells"][1]["sparsity"] == 0.3 and report["cells"][1]["evaluation"]["questions"] == 2
    (survey,) = (tmp_path / "out" / "surveys").glob("*.json")
    assert len(json.loads(survey.read_text())["dropped"]) == 1
    (roots,) = (tmp_path / "out" / "surveys").glob("*.safetensors")
    assert len(load_file(roots)) == 4  # a `down_proj` in each block
    (folder,) = (tmp_path / "out" / "cells").glob("rac-depth-25pct-*/model")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    assert "| `num_hidden_layers` | 4 | 3 |" in (folder / "README.md").read_text()
    assert call(monkeypatch, "mask", "check", str(folder)) == 2
    assert "is smaller than the model it was cut from" in " ".join(capsys.readouterr().err.split())
