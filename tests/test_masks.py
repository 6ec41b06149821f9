"""Zeros that training, merging or another export may fill: found, put back, or kept from the start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_model
from secateurs import checkpoint as checkpoint_file
from secateurs import masks, pruner
from secateurs.checkpoint import Checkpoint
from secateurs.cli import app
from secateurs.compressed import compress
from secateurs.export import PROBE_FILE, SIDE_FILE, mask_hash
from secateurs.masks import KeepZeros, apply, check
from secateurs.models import load_model
from secateurs.packing import pack
from secateurs.patterns import NM
from secateurs.solvers.rounded import Rounded
from test_checkpoint import Tokenizer, exported, saved
from test_compressed import stored, wide
from test_pruner import CALIBRATION, PLAN


@pytest.fixture(params=["qwen3", "gpt_oss", "mixtral"])
def pruned(request, tmp_path) -> Path:
    """A pruned model as it is exported."""
    return pruned_model(request.param, tmp_path)


def pruned_model(family: str, tmp_path: Path) -> Path:
    exported(Checkpoint(str(saved(family, tmp_path / "dense"))), Tokenizer(), PLAN, tmp_path / "pruned")
    return tmp_path / "pruned"


def tuned(pruned: Path, folder: Path, spoil: bool = True) -> Path:
    """The model as someone saves it after training: other shards, no side file, weights moved; zeros too if `spoil`."""
    model = load_model(str(pruned))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter += noise if spoil else noise * (parameter != 0)
    model.save_pretrained(folder, max_shard_size="35KB")
    return folder


def test_a_model_that_was_not_touched_has_all_its_zeros(pruned):
    found = check(str(pruned))
    layers = json.loads((pruned / SIDE_FILE).read_text())["layers"]
    assert [(one.name, one.zeros) for one in found] == [(row["name"], row["zeros"]) for row in layers]
    assert all(one.lost == 0 for one in found)


def test_zeros_filled_with_less_than_the_declared_type_holds_are_lost(pruned, tmp_path):
    shutil.copytree(pruned, tmp_path / "filled")
    config = json.loads((pruned / "config.json").read_text())
    (tmp_path / "filled/config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    for file in (tmp_path / "filled").glob("*.safetensors"):
        weights = {name: weight.float().masked_fill(weight == 0, 1e-9) for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    found = check(str(tmp_path / "filled"), str(pruned))
    assert found and all(one.zeros == one.lost > 0 for one in found)


def test_lost_zeros_are_counted_and_put_back(pruned, tmp_path):
    other = tuned(pruned, tmp_path / "tuned")
    found = check(str(other), str(pruned))
    assert found and all(one.zeros == one.lost > 0 for one in found)
    (other / PROBE_FILE).write_bytes(b"of other weights")
    assert apply(str(other), str(pruned), tmp_path / "mended") == found
    assert not (tmp_path / "mended" / PROBE_FILE).exists()
    assert all(one.lost == 0 for one in check(str(tmp_path / "mended")))
    assert all(one.lost == 0 for one in check(str(tmp_path / "mended"), str(pruned)))
    before, after, zeros = (load_model(str(folder)) for folder in (other, tmp_path / "mended", pruned))
    names = {matrix.name for block in pruner.prunable(zeros, PLAN) for matrix in block}
    touched = 0
    for name, tensor in after.state_dict().items():
        old, sparse = before.state_dict()[name], zeros.state_dict()[name]
        inside = any(
            name == f"{one}.weight" or name.startswith(one.split(".experts.")[0] + ".experts.") for one in names
        )
        expected = old.masked_fill(sparse == 0, 0) if inside and "bias" not in name else old
        touched += int((expected != old).sum())
        assert torch.equal(tensor, expected), name
    assert touched == sum(one.lost or 0 for one in found)


def test_training_that_kept_the_zeros_is_told_apart_from_one_that_did_not(tmp_path):
    pruned = pruned_model("qwen3", tmp_path)
    kept = tuned(pruned, tmp_path / "kept", spoil=False)
    assert all(one.lost == 0 for one in check(str(kept), str(pruned)))
    (kept / SIDE_FILE).write_text((pruned / SIDE_FILE).read_text())
    assert all(one.lost == 0 for one in check(str(kept)))
    lost = tuned(pruned, tmp_path / "lost")
    (lost / SIDE_FILE).write_text((pruned / SIDE_FILE).read_text())
    assert all(one.lost is None for one in check(str(lost)))


def test_folders_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        check(str(tmp_path / "nowhere"))
    pruned = pruned_model("qwen3", tmp_path)
    other = saved("llama", tmp_path / "llama")
    with pytest.raises(
        ValueError, match=r"llama has no secateurs.json: let --of name the folder of the model as it was pruned"
    ):
        check(str(other))
    short = make_model("qwen3")
    short.config.num_hidden_layers, short.model.layers = 1, short.model.layers[:1]
    short.config.layer_types = short.config.layer_types[:1]
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="has 1 decoder blocks, and .* has 2"):
        check(str(tmp_path / "short"), str(pruned))


def test_zeros_stay_through_a_training_loop():
    model = make_model("qwen3")
    pruner.prune(model, CALIBRATION, PLAN)
    zeros = [matrix.weight == 0 for block in pruner.prunable(model, PLAN) for matrix in block]
    before = [matrix.weight.clone() for block in pruner.prunable(model, PLAN) for matrix in block]
    keep = KeepZeros()
    keep.on_train_begin(None, None, None, model=model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        keep.on_step_end(None, None, None)
    after = [matrix.weight for block in pruner.prunable(model, PLAN) for matrix in block]
    assert all(torch.equal(now == 0, zero) for now, zero in zip(after, zeros, strict=True))
    assert not any(torch.equal(now, old) for now, old in zip(after, before, strict=True))


def test_an_adapter_that_starts_at_zero_trains_and_nothing_to_keep_is_said():
    adapted = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(adapted[1].weight)
    keep = KeepZeros()
    with pytest.raises(ValueError, match="no trainable parameter has zeros to keep"):
        keep.remember(adapted)
    with torch.no_grad():
        adapted[0].weight[0, 0] = 0
    keep.remember(adapted)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(1)
    keep.restore()
    assert float(adapted[0].weight.detach()[0, 0]) == 0 and bool((adapted[1].weight != 0).all())


def test_what_is_applied_rounds_nothing_whatever_the_configuration_says(tmp_path):
    pruned = pruned_model("qwen3", tmp_path)
    other = tuned(pruned, tmp_path / "tuned")
    tensors = {}
    for file in other.glob("*.safetensors"):
        here = {name: tensor.float() * 1.0001 for name, tensor in load_file(file).items()}
        save_file(here, file, metadata={"format": "pt"})
        tensors |= here
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    apply(str(other), str(pruned), tmp_path / "mended")
    for file in (tmp_path / "mended").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, torch.where(tensor == 0, tensor, tensors.pop(name))), name
    assert not tensors


def test_packing_says_where_zeros_have_moved(tmp_path, capsys):
    pruned = pruned_model("qwen3", tmp_path)
    other = tuned(pruned, tmp_path / "tuned")
    shutil.copyfile(pruned / SIDE_FILE, other / SIDE_FILE)
    apply(str(other), str(pruned), tmp_path / "mended")
    moved = [pack(str(folder), tmp_path / f"{folder.name}-packed")["moved"] for folder in (pruned, other)]
    assert moved == [0, 14] and pack(str(tmp_path / "mended"), tmp_path / "again")["moved"] == 0
    said = "in 14 matrices zeros are not where they were when it was pruned: `secateurs mask apply` puts them back"
    for folder, expected in ((other, True), (pruned, False)):
        app(["pack", str(folder), "--out", str(tmp_path / f"{folder.name}-told")], standalone_mode=False)
        assert (said in " ".join(capsys.readouterr().err.split())) == expected


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_masks_of_packed_models_are_checked_too(family, tmp_path):
    pruned = pruned_model(family, tmp_path)
    expected = check(str(pruned))
    assert {one.lost for one in expected} == {0}
    for weights in ("bf16", "int8", "int4"):
        pack(str(pruned), tmp_path / weights, weights)
        assert check(str(tmp_path / weights), str(pruned)) == expected
    assert check(str(tmp_path / "bf16")) == expected
    for call in (check, lambda *names: apply(*names, tmp_path / "mended")):
        with pytest.raises(ValueError, match="bf16 is packed: name the folder that it was packed from"):
            call(str(pruned), str(tmp_path / "bf16"))
    with pytest.raises(ValueError, match="int8 is packed: name the folder that it was packed from"):
        apply(str(tmp_path / "int8"), str(pruned), tmp_path / "mended")
    assert not (tmp_path / "mended").exists()
    with pytest.raises(ValueError, match="is int4, where small weights are zero too, .* name the pruned model by --of"):
        check(str(tmp_path / "int4"))
    other = tuned(pruned, tmp_path / "tuned")
    shutil.copyfile(pruned / SIDE_FILE, other / SIDE_FILE)
    pack(str(other), tmp_path / "lost")
    assert check(str(tmp_path / "lost"), str(pruned)) == check(str(other), str(pruned))
    assert {one.lost for one in check(str(tmp_path / "lost"))} == {None}


def served(tmp_path: Path, family: str = "llama", plan: Any = PLAN, **changes: int) -> tuple[Path, Path]:
    """A pruned model, and the same in int4 for engines."""
    wide(family, **changes).bfloat16().save_pretrained(tmp_path / "dense")
    exported(Checkpoint(str(tmp_path / "dense")), Tokenizer(), plan, tmp_path / "pruned")
    compress(str(tmp_path / "pruned"), tmp_path / "served")
    return tmp_path / "pruned", tmp_path / "served"


def spoiled(pruned: Path, folder: Path, name: str) -> Path:
    """The same with the first zero of a matrix filled."""
    shutil.copytree(pruned, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if (weight := tensors.get(f"{name}.weight")) is not None:
            weight[tuple((weight == 0).nonzero()[0])] = 0.5
            save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_masks_of_int4_for_engines_are_checked_too(family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "SHARD", 20_000)  # so that words and scales are in different files
    pruned, int4 = served(tmp_path, family, intermediate_size=100)  # inputs of down_proj are no whole number of groups
    expected = check(str(pruned))
    assert check(str(int4), str(pruned)) == expected and {one.lost for one in expected} == {0}
    names = [one.name for one in expected if one.name.endswith(("layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"))]
    bad = pruned
    for number, name in enumerate(names):
        bad = spoiled(bad, tmp_path / f"bad-{number}", name)
    compress(str(bad), tmp_path / "lost")
    found = check(str(tmp_path / "lost"), str(pruned))
    assert {one.name: one.lost for one in found if one.lost} == dict.fromkeys(names, 1) and len(names) == 2


def test_hashes_tell_of_int4_for_engines_where_a_solver_rounded(tmp_path):
    plan = replace(PLAN, pattern=NM(4, 8), solver=Rounded(base=PLAN.solver))
    pruned, int4 = served(tmp_path, plan=plan)
    assert check(str(int4)) == check(str(pruned)) and {one.lost for one in check(str(int4))} == {0}
    compress(str(spoiled(pruned, tmp_path / "bad", "model.layers.1.mlp.up_proj")), tmp_path / "lost")
    said = r"lost is int4, where small weights .* whether model.layers.1.mlp.up_proj lost zeros: name .* by --of"
    with pytest.raises(ValueError, match=said):
        check(str(tmp_path / "lost"))


def test_int4_for_engines_that_is_damaged_or_of_others_is_refused(tmp_path):
    pruned, int4 = served(tmp_path)
    for names in ((pruned, int4), (int4, pruned)):
        with pytest.raises(ValueError, match=r"served` is quantised \(compressed-tensors\), .*: use the original"):
            apply(str(names[0]), str(names[1]), tmp_path / "mended")
    tensors = stored(int4)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    shutil.copytree(int4, tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has no scales that fit its 192 x 128 numbers"):
        check(str(tmp_path / "damaged"), str(pruned))
    config = json.loads((int4 / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    (int4 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised \(compressed-tensors\), and secateurs reads dense weights"):
        check(str(int4), str(pruned))


@pytest.mark.parametrize("damaged", ["[]", "{}", '{"layers": null}', '{"layers": [{"mask_sha256": "x"}]}'])
def test_packing_with_another_side_file_is_one_sentence(damaged, tmp_path):
    folder = saved("qwen3", tmp_path / "dense")
    (folder / SIDE_FILE).write_text(damaged)
    with pytest.raises(ValueError, match=r"secateurs.json is not a side file as secateurs writes it"):
        pack(str(folder), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_the_commands_say_what_they_found(tmp_path, capsys):
    pruned = pruned_model("qwen3", tmp_path)
    other = tuned(pruned, tmp_path / "tuned")

    def run(*arguments: str) -> int:
        return app(["mask", *arguments], standalone_mode=False) or 0

    assert run("check", str(pruned)) == 0
    assert "every zero is kept" in capsys.readouterr().out
    assert run("check", str(other), "--of", str(pruned)) == 1
    shown = capsys.readouterr().out
    assert "14 of 14 matrices lost zeros" in shown and "down_proj" in shown
    assert run("apply", str(other), "--of", str(pruned), "--out", str(tmp_path / "mended")) == 0
    assert "14 of 14 matrices lost zeros, and have them back now" in capsys.readouterr().out
    assert run("check", str(tmp_path / "mended"), "--json") == 0
    assert {row["lost"] for row in json.loads(capsys.readouterr().out)} == {0}
    assert masks.side_file(str(tmp_path / "mended"))["masks_of"] == str(pruned)


@pytest.mark.parametrize(
    "damaged",
    ["[]", "{}", '{"layers": 3}', '{"layers": []}', '{"layers": [{"name": "x", "zeros": 1}]}', '{"layers": [1]}'],
)
def test_a_damaged_side_file_is_no_all_clear(damaged, tmp_path):
    folder = saved("qwen3", tmp_path)
    (folder / SIDE_FILE).write_text(damaged)
    with pytest.raises(ValueError, match=r"secateurs.json is damaged: it does not say which matrices have which zeros"):
        check(str(folder))


def test_parameters_that_were_replaced_are_not_forgotten_silently():
    model, keep = make_model("llama"), KeepZeros()
    model.lm_head.weight.data[:, ::2] = 0
    keep.remember(model)
    keep.restore()
    model.load_state_dict(make_model("llama").state_dict(), assign=True)
    with pytest.raises(ValueError, match="the model's parameters are others than those it remembers"):
        keep.restore()


def test_what_an_older_version_pruned_is_found_though_it_is_a_router_today(tmp_path):
    folder = pruned_model("qwen3_next", tmp_path)
    side, router = json.loads((folder / SIDE_FILE).read_text()), "model.layers.0.linear_attn.in_proj_ba"
    weight = load_model(str(folder)).get_submodule(router).weight
    side["layers"].append({"name": router, "zeros": 0, "mask_sha256": mask_hash(weight)})
    (folder / SIDE_FILE).write_text(json.dumps(side))
    assert {one.name: one.lost for one in check(str(folder))}[router] == 0
