"""The benchmark scripts run and print what they promise; no figure of theirs is a test."""

import ast
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from secateurs.kernels import library
from secateurs.packing import pack
from test_packed import pruned

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, capsys):
    """What a script prints when it is run with some words; in this process, as a new one imports torch again."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        capsys.readouterr()
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_what_a_script_takes_from_the_package_is_there(name):
    """Also where it needs a GPU, a peer or an hour."""
    for node in ast.walk(ast.parse((BENCHMARKS / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateurs":
            module = import_module(node.module)
            for one in node.names:
                if not hasattr(module, one.name):
                    import_module(f"{node.module}.{one.name}")


def test_solvers_on_a_synthetic_layer(tmp_path, script):
    out = tmp_path / "result.json"
    solvers = "sparsegpt+refit(steps=3),alps,admm"
    text = script(
        "solvers.py", "--synthetic", 64, "--patterns", "0.5,2:4", "--solvers", solvers, "--threads", 1, "--json", out
    )
    results = json.loads(out.read_text())["results"]
    assert [(row["pattern"], row["solver"]) for row in results] == [
        (pattern, solver)
        for pattern in ("0.5", "2:4")
        for solver in ("sparsegpt-reference", "sparsegpt+refit(steps=3)", "alps", "admm")
    ]
    for row in results:
        assert len(row["layers"]) == 3 and f"| {row['solver']} |" in text
        if row["solver"] != "sparsegpt-reference":
            assert row["train"] < 1 and row["test"] < 1
    tests = {(row["pattern"], row["solver"]): row["test"] for row in results}
    for pattern in ("0.5", "2:4"):  # few inputs, three massive: 1.2 times ALPS' where the support is not let settle
        assert tests[pattern, "admm"] < 1.03 * tests[pattern, "alps"]


def test_problems_hold_weights_and_three_grams_that_share_no_question(tmp_path, script):
    out = tmp_path / "problems.safetensors"
    sets = [
        "calibration.num_tokens=200", "calibration.held_out_tokens=200", "resources.batch_size=8",
        "traces.sampling.max_new_tokens=32",
    ]  # fmt: skip
    changes = [word for change in sets for word in ("--set", change)]
    printed = script("problems.py", "demo", out, "--blocks", 0, "--matrices", "o_proj", *changes)
    tensors = load_file(out)
    name = "model.layers.0.self_attn.o_proj"
    parts = {part: int(tensors[f"{name}.{part}.tokens"]) for part in ("train", "validation", "test")}
    assert set(tensors) == {f"{name}.weight"} | {f"{name}.{part}{end}" for part in parts for end in ("", ".tokens")}
    assert printed.endswith(f"1 matrices, {parts} tokens\n")  # every token of every part once: none is in two of them
    traces = [trace for path in out.with_suffix("").rglob("*.parquet") for trace in pq.read_table(path).to_pylist()]
    assert sum(parts.values()) == sum(len(t["prompt_ids"]) + len(t["completion_ids"]) - 1 for t in traces)
    text = script("solvers.py", out, "--patterns", 0.5, "--solvers", "admm", "--threads", 1)
    assert text.startswith("1 matrices, scope layer") and "| 0.5 | admm |" in text


@pytest.mark.skipif(library() is None, reason="installed without a C compiler: no kernels to time")
def test_kernels_of_every_layout_are_timed_side_by_side(script):
    words = ["--shape", "2048x2048", "--threads", 1, "--batch", "1,3", "--rounds", 1]
    rows = [line.split("│")[1:-1] for line in script("cpu_kernel.py", *words).splitlines() if "2048x2048" in line]
    assert [row[2].strip() for row in rows] == ["1", "3"]
    for row in rows:
        assert all(float(cell.split()[0]) > 0 for cell in row[3:11]) and row[11].endswith(" int8 ")


@pytest.mark.slow
def test_a_whole_prune_is_timed_part_by_part(tmp_path, script):
    small = ["--shape", "tiny", "--device", "cpu", "--layers", 2, "--tokens", 2048, "--solvers", "sparsegpt"]
    small += ["--propagate", "block,dense"]
    printed = script("gpu_prune.py", tmp_path / "model", *small)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| sparsegpt |")]
    assert [row[1] for row in rows] == ["block", "dense"]
    for row in rows:
        assert float(row[3].replace(",", "")) > 0 and sum(float(share.rstrip("%")) for share in row[6:12]) > 95


@pytest.mark.skipif(library() is None, reason="installed without a C compiler: no kernels to time")
def test_one_call_beside_transformers_blocks(tmp_path, script):
    pruned("qwen3", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed", "bf16")
    text = script("one_call.py", tmp_path / "packed", "--contexts", "3,5", "--batch", 2, "--tokens", 2, "--rounds", 1)
    assert [line.split("│")[2:4] for line in text.splitlines() if "packed" in line] == [
        [" 2    ", " 3       "], [" 2    ", " 5       "]
    ]  # fmt: skip
