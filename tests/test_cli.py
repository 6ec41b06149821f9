"""The commands as a user types them: the whole pipeline small, mistakes, a kill, Ctrl-C, and equal results twice."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from completions_server import CompletionsServer
from secateurs import ask, cli, evaluate, planner, preview
from secateurs.artifacts import locked
from secateurs.dense import Dense
from secateurs.export import PROBE_FILE
from secateurs.parallel import silent
from secateurs.ranks import Ranks
from secateurs.recipe import load_recipe
from secateurs.study import side_by_side
from secateurs.traces import TraceStore, read_traces

SMALL = [
    "sweep.arm=['prompt', 'rac']", "sweep.sparsity=[0.5]", "sweep.seed=[0]", "calibration.num_tokens=900",
    "calibration.held_out_tokens=400", "evaluate.num_questions=6", "traces.sampling.max_new_tokens=96",
]  # fmt: skip


def arguments(*words: str, sets=SMALL) -> list[str]:
    return [*words, *(part for item in sets for part in ("--set", item))]


def call(monkeypatch, *words: str) -> int:
    """Run a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["secateurs", *words])
    handler = signal.getsignal(signal.SIGINT)
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0


def results(out: Path) -> dict[str, bytes]:
    """What a run leaves that must not depend on when it was stopped: sealed traces and exported weights."""
    found = [*out.rglob("*.parquet"), *out.rglob("model/model.safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *arguments("run", "demo", "--out", str(out))) == 0
    return out


def test_a_run_leaves_reports_traces_and_models_that_load(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["schema"] == "secateurs.report" and report["version"] == 5 and report["reloaded"] == 0
    assert [cell["arm"] for cell in report["cells"]] == ["dense", "prompt", "rac"]
    for cell in report["cells"][1:]:
        assert cell["evaluation"]["questions"] == 6
        assert all(layer["zeros"] == layer["zeros_asked"] for layer in cell["layers"])
        assert 900 <= cell["calibration_tokens"] < 900 + 260
        folder = Path(cell["path"]) / "model"
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in config and "sparsity_config" not in config
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "secateurs.json", "README.md"} <= {
            path.name for path in folder.iterdir()
        }
        side = json.loads((folder / "secateurs.json").read_text())
        weights = load_file(folder / "model.safetensors")
        for layer in side["layers"]:
            zeros = int((weights[layer["name"] + ".weight"] == 0).sum())
            assert zeros == layer["zeros"] and len(layer["mask_sha256"]) == 64
    html = (finished / "report.html").read_text()
    assert "<svg" in html and "prompt" in html
    assert (
        "reloaded: 2 models, with transformers alone: logits are the same to the bit"
        in (finished / "report.md").read_text()
    )


def test_embeddings_and_norms_do_not_change_by_a_bit(finished):
    dense = load_file(str(files("secateurs") / "assets" / "reasoner" / "model.safetensors"))
    for path in finished.rglob("model/model.safetensors"):
        pruned = load_file(path)
        assert set(pruned) == set(dense)
        for name in dense:
            if "_proj" not in name:
                assert torch.equal(dense[name], pruned[name]), name


@pytest.mark.usefixtures("without_reload")
def test_repeating_a_finished_run_does_nothing_twice(finished, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    before |= {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert not list(finished.glob("cells/*/blocks")), "a finished cell keeps its model alone"
    left = next(finished.glob("cells/*")) / "blocks"  # as by a kill right after the last file
    left.mkdir()
    monkeypatch.setattr(evaluate, "reference_states", lambda *_: pytest.fail("no cell needs them"))
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(finished))) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before} and not left.exists()
    said = capsys.readouterr().err
    assert "memory of a prune, estimated: " in said and " of hidden states beside it; " in said
    assert "more than is free" not in said and "processes" not in said


def test_a_plan_without_room_says_so_before_anything_is_done(monkeypatch, capsys):
    recipe = load_recipe("demo")
    memory = preview.plan_check(recipe, Dense(recipe))["memory_bytes"]
    for module in (planner, preview):
        monkeypatch.setattr(module, "available", lambda device: int(1.3 * (memory["on_device"] + memory["hidden"])))
    for jobs, said in ((1, "MB (around"), (3, "MB in each of 3 processes (around")):
        plan = preview.plan_check(recipe, Dense(recipe, Ranks(nearby=jobs)))
        assert plan["processes"] == jobs and plan["hidden_states"] == ("device" if jobs == 1 else "disk")
        cli._memory(plan)
        printed = " ".join(capsys.readouterr().err.split())
        assert said in printed and ("that is more than is free" in printed) == (jobs == 3)
    places = {}
    for place in ("device", "cpu", "disk"):
        recipe = load_recipe("demo", [f"resources.hidden_states='{place}'"])
        for module in (planner, preview):
            monkeypatch.setattr(module, "available", lambda device: memory["on_device"] + memory["hidden"] // 2)
        plan = preview.plan_check(recipe, Dense(recipe))
        cli._memory(plan)
        places[place] = plan["hidden_states"], "that is more than is free" in " ".join(capsys.readouterr().err.split())
    assert places == {"device": ("device", True), "cpu": ("device", True), "disk": ("disk", False)}
    for dry_run in ([], ["--dry-run"]):
        assert call(monkeypatch, "study", "demo", "--jobs", "0", *dry_run) == 2
        assert "--jobs is 0; it must be 1 or more" in capsys.readouterr().err
    assert side_by_side(1, Ranks()) == Ranks() and side_by_side(2, Ranks()) == Ranks(nearby=2)
    with pytest.raises(ValueError, match="--jobs is 2; it must be 1 under torchrun"):
        side_by_side(2, Ranks(0, 2))


@pytest.mark.usefixtures("without_reload")
def test_another_batch_size_and_another_folder_give_the_same_files(finished, tmp_path, monkeypatch):
    sets = [*SMALL, "resources.batch_size=7"]
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(tmp_path / "out"), sets=sets)) == 0
    ours, theirs = results(tmp_path / "out"), results(finished)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name] == theirs[name], name


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_the_same(finished, tmp_path, monkeypatch, kills):
    """kill -9 at random moments of a real process, then run to the end: equal files byte for byte."""
    out, moments = tmp_path / "out", random.Random(0)
    words = arguments("run", "demo", "--out", str(out))
    command = [sys.executable, "-m", "secateurs.cli", *words]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait = time.monotonic() + 60
        while not out.exists() and time.monotonic() < wait:  # importing torch takes most of a short life
            time.sleep(0.05)
        time.sleep(moments.uniform(0.2, 4) if kills == 1 else moments.uniform(0, 9))
        assert process.poll() != 2, "an interrupted run must never be an error"
        process.send_signal(signal.SIGKILL)
        process.wait()
    if kills > 1:
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert call(monkeypatch, *words) == 0
    assert results(out) == results(finished)
    assert not [path for path in out.rglob(".*tmp*")], "temporary files were left"


@pytest.mark.parametrize("restarts", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_processes_of_torchrun_work_together_and_a_dead_one_loses_nothing(finished, tmp_path, restarts):
    """One of two is killed in a prune: both end, torchrun starts two others, or who runs the command again, and traces
    and models are those of one."""
    out, torchrun = tmp_path / "out", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = arguments("run", "demo", "--out", str(out))
    command = [sys.executable, *torchrun, f"--max-restarts={restarts}", "-m", "secateurs.cli", *run]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait, shares = time.monotonic() + 120, set()
    while not list(out.glob("cells/*/blocks/*.json")) and time.monotonic() < wait:
        held = (path for path in out.glob("*/.*.parts/*/*/*/active.jsonl") if path.exists() and path.stat().st_size)
        shares |= {path.relative_to(out).parts[0] + path.relative_to(out).parts[2] for path in held}
        time.sleep(0.02)
    assert shares >= {"traces1-of-2", "traces2-of-2"}  # each process sampled
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    wait = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < wait:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not (out / "report.json").exists()
    assert (process.wait(timeout=120) == 0) is bool(restarts)
    assert restarts or subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert not list(out.rglob("*.parts"))
    for kind in ("traces", "dense"):
        (mine,), (theirs,) = ((at / kind).glob("*/") for at in (out, finished))
        assert read_traces(mine, sealed_only=True) == read_traces(theirs, sealed_only=True)
    report = json.loads((out / "report.json").read_text())
    assert [cell["evaluation"]["questions"] for cell in report["cells"]] == [6, 6, 6]
    cells = sorted(path.parent.name for path in finished.glob("cells/*/prune.json"))
    assert sorted(path.parent.name for path in out.glob("cells/*/prune.json")) == cells
    for cell in cells:
        weights, expected = (load_file(at / "cells" / cell / "model" / "model.safetensors") for at in (out, finished))
        for name, weight in expected.items():
            assert ((weights[name] == 0) == (weight == 0)).float().mean() > 0.995, name
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0.02 * float(weight.abs().max()))


def test_shares_that_a_killed_run_of_several_processes_left_are_not_asked_again(finished, tmp_path, monkeypatch):
    recipe = load_recipe("demo", SMALL)
    dense, (sealed,) = Dense(recipe), (finished / "traces").iterdir()
    parts = tmp_path / "traces" / f".{sealed.name}.parts"
    for which in (0, 1):
        ask._share_of_traces(recipe, 0, parts / f"{which + 1}-of-2" / "traces", dense, (which, 2), lambda *args: None)
    with (parts / "2-of-2" / "traces" / sealed.name / "active.jsonl").open("ab") as journal:
        journal.write(b'{"torn')
    answered = {trace.key for part in parts.glob("*/traces/*") for trace in read_traces(part)}
    assert len(answered) > 5
    asked = []
    engine = ask.trace_engine

    class Counted:
        def generate(self, requests, sampling):
            for request in requests:
                asked.append((request.question_id, request.sample))
                yield from engine(recipe, dense).generate([request], sampling)

    monkeypatch.setattr(ask, "trace_engine", lambda recipe, dense: Counted())
    traced = ask.trace(recipe, tmp_path, 0, dense)
    assert [*traced.held_out, *traced.traces] == read_traces(sealed, sealed_only=True)
    assert not answered & set(asked) and not parts.exists()


def test_what_is_complete_is_asked_of_nobody_and_time_is_counted_once(finished, tmp_path):
    class Deaf(Ranks):
        def tell(self, value):
            raise AssertionError("there was nothing to do")

    recipe, (sealed,) = load_recipe("demo", SMALL), (finished / "traces").iterdir()
    shutil.copytree(finished, tmp_path / "out")
    dense = Dense(recipe, Deaf(0, 2))
    traced = ask.trace(recipe, tmp_path / "out", 0, dense)
    ask.answer(recipe, tmp_path / "out" / "dense", None, "dense", 0, dense, "evaluate", lambda *args: None)
    assert [*traced.held_out, *traced.traces] == read_traces(sealed, sealed_only=True)
    before = json.loads((sealed / "timing.json").read_text())["seconds"]
    whole = tmp_path / "out" / "traces" / sealed.name
    for number in range(2):  # as two processes would, which then find nothing to add
        ranks = SimpleNamespace(
            index=number, count=2, first=False, gather=lambda value: [value], together=lambda work: work()
        )
        ask._answer_share(lambda *args: None, whole, SimpleNamespace(ranks=ranks, forget=lambda: None), silent)
    ask._gather_parts(whole)
    assert json.loads((whole / "timing.json").read_text())["seconds"] == before


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "secateurs.cli", *arguments("trace", "demo", "--out", str(tmp_path / "out"))]
    big = ["--set", "calibration.num_tokens=200000"]
    process = subprocess.Popen([*command, *big], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("active.jsonl")) and time.monotonic() < wait:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors and "Traceback" not in errors
    (store,) = (tmp_path / "out" / "traces").iterdir()
    assert len(read_traces(store)) > 0


class InterruptedWhileWriting(io.RawIOBase):
    """A terminal at which Ctrl-C is pressed while the first text is on its way to it."""

    def __init__(self):
        self.text = b""

    def writable(self):
        return True

    def write(self, data):
        first, self.text = not self.text, self.text + bytes(data)
        if first:
            os.kill(os.getpid(), signal.SIGINT)
        return len(data)


def test_ctrl_c_in_the_middle_of_a_line_of_progress_is_no_error(tmp_path, monkeypatch):
    terminal = InterruptedWhileWriting()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(terminal), line_buffering=True))
    monkeypatch.setattr(ask, "trace", lambda *_, **__: print("a line of progress", file=sys.stderr))
    assert call(monkeypatch, *arguments("trace", "demo", "--out", str(tmp_path / "out"))) == 130
    assert terminal.text.decode().splitlines()[-1] == "interrupted; run the same command again to go on"


def test_ctrl_c_while_a_server_is_waited_for_is_no_error(tmp_path, monkeypatch, capsys):
    with CompletionsServer(264, fault=lambda prompt, attempt: "slow") as server:
        threading.Thread(target=interrupt_when, args=(lambda: server.bodies,), daemon=True).start()
        table = f'traces.engine={{name="openai", servers=["{server.url}"], model="bundled"}}'
        words = arguments("trace", "demo", "--out", str(tmp_path / "out"), "--set", table)
        assert call(monkeypatch, *words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; run the same command again to go on"


def interrupt_when(something) -> None:
    wait = time.monotonic() + 60
    while not something() and time.monotonic() < wait:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_error_on_the_way_out_of_ctrl_c_is_none(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            raise RuntimeError("closed while it ran")

    monkeypatch.setattr(ask, "trace", interrupted)
    assert call(monkeypatch, *arguments("trace", "demo", "--out", str(tmp_path / "out"))) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; run the same command again to go on"


def test_what_ends_a_run_while_seconds_are_written_stores_nothing_twice(tmp_path, monkeypatch):
    class Ended(BaseException):
        pass

    def ended(self, seconds):
        raise Ended

    monkeypatch.setattr(TraceStore, "add_seconds", ended)
    recipe = load_recipe("demo", SMALL)
    with pytest.raises(Ended):
        ask.trace(recipe, tmp_path / "out", 0, Dense(recipe))
    (store,) = (tmp_path / "out" / "traces").iterdir()
    assert read_traces(store)


@pytest.mark.usefixtures("without_reload")
def test_a_run_from_before_the_probe_had_its_name_is_gone_on_with(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    for probe in (tmp_path / "out").rglob(PROBE_FILE):
        probe.rename(probe.with_name("secateurs_probe.safetensors"))
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(tmp_path / "out"))) == 0
    assert len(list((tmp_path / "out").rglob(PROBE_FILE))) == 2
    assert not list((tmp_path / "out").rglob("secateurs_probe.safetensors"))


def test_trace_prints_the_store_and_a_plan_runs_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(out), "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["cells"] == 2
        and plan["trace_tokens_per_seed"] == 1300
        and plan["memory_bytes"]["on_device"] > 0
        and plan["seconds_estimate"]["trace"] > 0
    )
    assert call(monkeypatch, *arguments("run", "demo", "--out", str(out), "--dry-run")) == 0
    assert "nothing was run" in capsys.readouterr().out and not out.exists()
    assert call(monkeypatch, *arguments("trace", "demo", "--out", str(out), "--json")) == 0
    line = json.loads(capsys.readouterr().out)
    assert len(read_traces(line["store"], sealed_only=True)) == line["traces"] and line["tokens"] >= 1300


def test_list_show_and_report(finished, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "list", "solvers") == 0
    assert "sparsegpt" in capsys.readouterr().out.split()
    assert call(monkeypatch, "show", "demo", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "bundled"
    assert call(monkeypatch, "report", str(finished), "--out", str(tmp_path / "r"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"]
    assert (tmp_path / "r" / "report.html").exists()


def damaged(tmp_path: Path, cut: bool) -> Path:
    """A copy of the bundled reasoner whose weights file is cut short, or whose config says it is quantised."""
    folder = tmp_path / "model"
    shutil.copytree(str(files("secateurs") / "assets" / "reasoner"), folder)
    if cut:
        os.truncate(folder / "model.safetensors", 5000)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return folder


MISTAKES = [
    (["run", "nowhere.toml"], "recipe nowhere.toml: no such file"),
    (["run", "dmo"], "Did you mean `demo`?"),
    (["run", "demo", "--set", "model='./nothing-here'"], "model `./nothing-here`: no such folder"),
    (["run", "demo", "--set", "prune.pattern.sparsity=1.5"], "sparsity is 1.5, but it must be in [0, 1)"),
    (
        ["prune", "demo", "--set", "sweep.sparsity=[]", "--set", "prune.pattern={name='nm', n=2, m=5}"],
        "2:5 needs a number of inputs that 5 divides",
    ),
    (["run", "demo", "--set", "prune.targets=['mlp.oops']"], "`mlp.oops` matches no prunable layer"),
    (
        ["run", "demo", "--set", "evaluate.num_questions=9999999", "--set", "traces.questions={name='svamp'}"],
        "evaluate.num_questions is 9,999,999, the set has",
    ),
    (["list", "solver"], "Did you mean `solvers`?"),
    (["report", "no/such/run"], "no/such/run"),
    (["run", "demo", "--set", "traces.questions={name='jsonl', path='q.jsonl'}"], "q.jsonl: no such file"),
    (["run", "demo", "--out", "/proc/nothing"], "/proc/nothing"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert sentence in errors and errors.count("error:") == 1 and "Traceback" not in errors


@pytest.mark.parametrize(("cut", "sentence"), [(True, "cannot be loaded"), (False, "is quantised (gptq)")])
def test_damaged_and_quantised_checkpoints(cut, sentence, tmp_path, monkeypatch, capsys):
    folder = damaged(tmp_path, cut)
    assert call(monkeypatch, "run", "demo", "--out", str(tmp_path / "out"), "--set", f"model='{folder}'") == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_one_sentence_and_a_rerun_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    real, written = os.write, [0]

    def full(descriptor, content):
        written[0] += len(content)
        if written[0] > 6000:
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert call(patch, *arguments("trace", "demo", "--out", str(out))) == 2
    assert "no space left on device" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, *arguments("trace", "demo", "--out", str(out), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1300


def test_a_full_disk_is_named_where_a_copy_does_not_fit():
    error = OSError(28, "No space left on device", "model/weights", None, "out/weights")  # as shutil.copyfile raises it
    assert cli._sentence(error) == "out/weights: no space left on device"


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console(stderr=True, force_terminal=False))

    def said() -> list[str]:
        with cli._bars(2) as progress:
            for layer in range(3):
                progress("prune rac", layer + 1, 30, "layers")
            progress("trace", 1000, 0, "tokens")
            progress("prune rac", 30, 30, "layers")
            progress("prune rac", 1, 30, "layers")
            progress("prune rac", 2, 30, "layers")
        return capsys.readouterr().err.splitlines()

    assert said() == [], "not within the first minute"
    monkeypatch.setattr(cli, "EVERY", 0.0)
    lines = said()
    assert lines[0].startswith("prune rac: 1 of 30 layers") and lines[2].startswith("prune rac: 3 of 30 layers, 0:")
    assert lines[2].endswith(" left") and lines[3] == "trace: 1,000 tokens"
    assert lines[5] == "prune rac: 1 of 30 layers", "begun anew: not with no time left, as the one that was done"
    assert lines[6].startswith("prune rac: 2 of 30 layers, 0:")


@pytest.mark.usefixtures("without_reload")
def test_a_cell_that_another_run_prunes_stops_this_one(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")
    for record in (tmp_path / "out").glob("cells/*/prune.json"):
        record.unlink()
    with ExitStack() as stack:
        for folder in (tmp_path / "out").glob("cells/*"):
            stack.enter_context(locked(folder, "cell"))
        assert call(monkeypatch, *arguments("prune", "demo", "--out", str(tmp_path / "out"))) == 2
    assert f"process {os.getpid()} is writing this cell; wait for it" in " ".join(capsys.readouterr().err.split())
    (finished_record,) = sorted(finished.glob("cells/*/prune.json"))[:1]
    damaged = tmp_path / "out" / finished_record.relative_to(finished)
    damaged.write_text("{}")
    assert call(monkeypatch, *arguments("prune", "demo", "--out", str(tmp_path / "out"))) == 2
    assert "prune.json is damaged: remove it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("without_reload")
def test_filters_that_none_passes_end(tmp_path, monkeypatch, capsys):
    never = ["traces.filters={correct=true}", "traces.sampling.max_new_tokens=2", "calibration.num_tokens=100",
             "calibration.held_out_tokens=20"]  # fmt: skip
    words = ["prune", "demo", "--out", str(tmp_path), *(word for one in never for word in ("--set", one))]
    assert call(monkeypatch, *words) == 2
    assert "no trace passed the filters: {'correct': " in " ".join(capsys.readouterr().err.split())
