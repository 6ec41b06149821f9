"""The benchmark scripts run and print what they promise; no figure of theirs is a test."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_solvers_on_a_synthetic_layer(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "solvers.py"), "--synthetic", "64", "--patterns", "0.5,2:4"]
    command += ["--solvers", "sparsegpt+refit(steps=3),admm", "--threads", "1", "--json", str(out)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results = json.loads(out.read_text())["results"]
    assert [(row["pattern"], row["solver"]) for row in results] == [
        (pattern, solver)
        for pattern in ("0.5", "2:4")
        for solver in ("sparsegpt-reference", "sparsegpt+refit(steps=3)", "admm")
    ]
    for row in results:
        assert len(row["layers"]) == 3 and f"| {row['solver']} |" in text
        if row["solver"] != "sparsegpt-reference":
            assert row["train"] < 1 and row["test"] < 1


def test_problems_hold_weights_and_three_grams_that_share_no_question(tmp_path):
    out = tmp_path / "problems.safetensors"
    command = [
        sys.executable,
        str(BENCHMARKS / "problems.py"),
        "demo",
        str(out),
        "--blocks",
        "0",
        "--matrices",
        "o_proj",
    ]
    command += ["--set", "calibration.num_tokens=900", "--set", "calibration.held_out_tokens=900"]
    command += ["--set", "resources.batch_size=8", "--set", "traces.sampling.max_new_tokens=128"]
    subprocess.run(command, check=True, capture_output=True)
    command = [sys.executable, str(BENCHMARKS / "solvers.py"), str(out), "--patterns", "0.5", "--solvers", "admm"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text.startswith("1 matrices, scope layer") and "| 0.5 | admm |" in text
