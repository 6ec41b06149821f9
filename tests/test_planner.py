"""Where hidden states go, and that it changes nothing; what is planned for, against tensors that are counted."""

from dataclasses import replace

import pytest
import torch

from families import make_model
from secateurs import planner, pruner
from secateurs.models import decoder_blocks
from secateurs.planner import Needs, available, choose, needs, shelf
from secateurs.ranks import Ranks
from secateurs.solvers.rounded import Rounded
from secateurs.tune import Tune
from test_checkpoint import file_at
from test_pruner import CALIBRATION, EVERYTHING, PLAN

NEEDS = Needs(around=1, block=1, grams=1, held_out=1, hidden=10, forward=1, solve=2)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, propagate="dense"), EVERYTHING], ids=["plain", "dense", "all"])
def test_hidden_states_on_disk_change_nothing_and_leave_nothing(plan, tmp_path):
    expected, model = make_model("qwen3"), make_model("qwen3")
    results = pruner.prune(expected, CALIBRATION, plan, batch_tokens=100)
    place = shelf("disk", tmp_path / "beside")
    placed = []

    def noted(hidden):
        kept = place(hidden)
        placed.append(file_at(kept.data_ptr()))
        return kept

    found = pruner.prune(model, CALIBRATION, plan, batch_tokens=100, place=noted)
    each = 1 + (plan.goal != "own") + len(decoder_blocks(model)[1]) * (plan.tune is not None)  # goals, block by block
    assert len(placed) == 8 * each and {file.parent for file in placed} == {tmp_path / "beside"}
    assert [replace(r, seconds=0) for r in found] == [replace(r, seconds=0) for r in results]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert not list((tmp_path / "beside").iterdir())


@pytest.mark.parametrize("where", ["device", "cpu", "disk"])
def test_a_shelf_keeps_what_is_put_on_it(where, tmp_path):
    first, second = torch.randn(2, 3, 5, 8).bfloat16()
    kept = shelf(where, tmp_path)(first.clone())
    assert torch.equal(kept, first)
    kept.copy_(second)
    assert torch.equal(kept, second)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    place = shelf("disk", tmp_path)
    with pytest.raises(OSError):
        place(torch.zeros(1).expand(2**52))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free, where", [(30, "device"), (12, "disk")])
def test_the_first_place_with_room_is_chosen(free, where, monkeypatch):
    monkeypatch.setattr(planner, "available", lambda device: free)
    assert choose(NEEDS, torch.device("cpu")) == where


@pytest.mark.parametrize("free, where", [((30, 99), "device"), ((12, 99), "cpu"), ((12, 10), "disk")])
def test_beside_a_gpu_there_is_the_cpu(free, where, monkeypatch):
    monkeypatch.setattr(planner, "available", lambda device: free[device.type == "cpu"])
    assert choose(NEEDS, torch.device("cuda")) == where


def test_jobs_share_a_device_and_processes_of_torchrun_the_machine_only(monkeypatch):
    monkeypatch.setattr(planner, "available", lambda device: {"cuda": 30, "cpu": 25}[device.type])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    places = [choose(NEEDS, cuda), choose(NEEDS, cuda, Ranks(nearby=2)), choose(NEEDS, cuda, Ranks(0, 2, nearby=2))]
    assert places == ["device", "cpu", "device"]
    monkeypatch.setattr(planner, "available", lambda device: {"cuda": 15, "cpu": 25}[device.type])
    assert [choose(NEEDS, cuda, Ranks(0, count, nearby=count)) for count in (2, 4)] == ["cpu", "disk"]
    assert [choose(NEEDS, cpu), choose(NEEDS, cpu, Ranks(nearby=2))] == ["device", "disk"]


def test_every_limit_of_this_process_counts(tmp_path, monkeypatch):
    files = {"/proc/meminfo": ["MemTotal: 99 kB", "MemAvailable: 50 kB"]}
    monkeypatch.setattr(planner, "_lines", lambda file: files.get(file, []))

    def free() -> int:
        return available(torch.device("cpu"))

    assert free() == 50 * 1024
    files["/proc/self/cgroup"] = ["1:cpu:/slice/job", "0::/slice/job"]
    files |= {"/sys/fs/cgroup/memory.max": ["9000"], "/sys/fs/cgroup/memory.current": ["2000"]}
    assert free() == 7000, "a container's group is the root that it sees"
    files["/sys/fs/cgroup/memory.stat"] = ["anon 100", "inactive_file 500", "slab 7"]
    assert free() == 7500, "pages of files are given back"
    files |= {"/sys/fs/cgroup/slice/memory.max": ["4000"], "/sys/fs/cgroup/slice/memory.current": ["1000"]}
    files |= {"/sys/fs/cgroup/slice/job/memory.max": ["max"], "/sys/fs/cgroup/slice/job/memory.current": ["900"]}
    assert free() == 3000, "a group is limited by those it is in"
    files["/proc/self/limits"] = ["Max cpu time  unlimited  unlimited  seconds", "Max address space  6000  9000  bytes"]
    files["/proc/self/status"] = ["VmPeak:  9 kB", "VmSize:  4 kB"]
    assert free() == 6000 - 4096
    files["/proc/self/limits"] = ["Max address space  unlimited  unlimited  bytes"]
    old = "/sys/fs/cgroup/memory/job/memory"
    files["/proc/self/cgroup"] = ["4:hugetlb,memory:/job"]
    assert free() == 50 * 1024
    files |= {f"{old}.limit_in_bytes": ["5000"], f"{old}.usage_in_bytes": ["4500"]}
    files[f"{old}.stat"] = ["inactive_file 1", "total_inactive_file 1500"]
    assert free() == 2000
    files[f"{old}.usage_in_bytes"] = ["9000"]
    assert free() == 0


def test_parts_that_can_be_counted_are_exact():
    model = make_model("llama")
    found = needs(model, PLAN, "sparsegpt", tokens=700, held_out_tokens=100, batch_tokens=200)
    _, blocks = decoder_blocks(model)
    weights = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    inputs = [32, 32, 32, 48]  # of q, k and v; of o; of gate and up; of down
    pruned = sum(m.weight.numel() for m in pruner.prunable(model, PLAN)[0])
    assert found.around == sum(p.nbytes for p in model.parameters()) - sum(weights)
    assert found.block == weights[0]
    dense = needs(
        model, replace(PLAN, propagate="dense"), "sparsegpt", tokens=700, held_out_tokens=100, batch_tokens=200
    )
    assert found.forward == dense.forward
    group = replace(PLAN, propagate="group")
    sizes = {"tokens": 700, "held_out_tokens": 100, "batch_tokens": 200}
    more = needs(model, group, "sparsegpt", **sizes).forward - dense.forward
    assert more == pruned * (4 + 1), "dense weights and masks stay for the next group's pass"
    half = needs(model, group, "sparsegpt", **sizes, stored=torch.bfloat16)
    assert half.forward - dense.forward == pruned * (2 + 1)

    def most(stored: int, stays: int = 0, grams: int = 0, solved: int = 0) -> int:
        """The costliest group first: down, gate and up, q and k and v, o; those of several are put together."""
        there, largest = 0, 0
        for rows, d_in, several in ((32, 48, 0), (96, 32, 1), (64, 32, 1), (32, 32, 0)):
            goal = rows * d_in * stays + 4 * d_in**2 * grams
            work = rows * d_in * (4 * 4 + several * stored + (4 if stored < 4 else 0))
            largest = max(largest, there + rows * d_in * stored + goal + work)
            there += rows * d_in * (stored + 1 + solved) + goal
        return largest

    wanda = needs(model, PLAN, "wanda", **sizes)
    assert wanda.solve == most(4) < needs(model, PLAN, "admm", **sizes).solve
    assert needs(model, PLAN, "wanda", **sizes, stored=torch.bfloat16).solve == most(2)
    imitating = replace(PLAN, goal="residual")
    assert needs(model, imitating, "wanda", **sizes).solve == most(4, 4, 2), "targets, held-out Grams and drifts"
    assert needs(model, PLAN, "admm+", **sizes).solve > needs(model, PLAN, "admm", **sizes).solve
    rounded = needs(
        model, replace(PLAN, solver=Rounded(base=PLAN.solver)), "wanda", tokens=700, held_out_tokens=100,
        batch_tokens=200,
    )  # fmt: skip
    assert rounded.solve > most(4), "rounding takes more than wanda did"
    assert found.grams == sum(4 * d_in**2 for d_in in inputs)
    assert found.held_out == 4 * sum(d_in * (d_in + 25) for d_in in inputs), "a Gram for three quarters of the tokens"
    long = needs(model, PLAN, "wanda", tokens=700, held_out_tokens=100, batch_tokens=200, longest=400)
    assert long.forward == needs(model, PLAN, "wanda", tokens=700, held_out_tokens=100, batch_tokens=400).forward
    few = needs(model, PLAN, "wanda", tokens=700, held_out_tokens=24, batch_tokens=200)
    assert few.held_out == 4 * sum(d_in * 24 for d_in in inputs)
    short = needs(model.bfloat16(), PLAN, "wanda", tokens=700, held_out_tokens=100, batch_tokens=200)
    assert short.held_out == sum(d_in * min(2 * 100, 4 * d_in + 2 * 25) for d_in in inputs)
    model.float()
    assert found.hidden == 700 * 32 * 4
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    mapped = needs(model, PLAN, "wanda", tokens=700, held_out_tokens=100, batch_tokens=200, in_file=tables)
    assert found.around - mapped.around == 2 * 64 * 32 * 4
    assert (mapped.block, mapped.solve) == (found.block, wanda.solve)
    matrices = [f"{m.name}.weight" for block in pruner.prunable(model, PLAN) for m in block]
    mapped = needs(model, PLAN, "wanda", **sizes, in_file=matrices)
    assert found.block - mapped.block == 4 * pruned
    assert mapped.solve == most(4, solved=4), "what is solved takes memory, one after the other"
    more = needs(model, EVERYTHING, "sparsegpt", tokens=700, held_out_tokens=100, batch_tokens=200)
    assert more.hidden == 3 * found.hidden and more.grams == 2 * found.grams
    assert more.held_out == 2 * 100 * 4 * sum(inputs)
    tuned = replace(PLAN, tune=Tune(steps=1, tokens=300))
    assert needs(model, tuned, "wanda", **sizes).forward == (
        pruned * (4 + 1)  # dense weights and masks
        + pruned * (1 + 4 + 16)  # masks of whole parameters, what they were, and what Adam has
        + 300 * 4 * (32 + 32 + 32 + 48 + 64 + 32 + 96 + 32 + 12 * 32)  # inputs and outputs, and what lies between them
    )
    half = needs(model.bfloat16(), tuned, "wanda", **sizes).forward
    assert half == pruned * (2 + 1) + pruned * (1 + 2 + 16) + 300 * 4 * (368 + 384) + weights[0] // 2, "in float32"
    model.float()
    assert needs(model, tuned, "admm", tokens=700, held_out_tokens=1, batch_tokens=9).hidden == 2 * found.hidden


def test_experts_have_grams_of_their_own():
    model = make_model("qwen3_moe")
    found = needs(model, PLAN, "admm", tokens=700, held_out_tokens=100, batch_tokens=200)
    assert found.grams == 4 * (2 * 32**2 + 4 * (32**2 + 16**2))
