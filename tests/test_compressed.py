"""Folders in compressed-tensors' format: the same weights, unpacked here by hand, and a configuration that says so."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_model
from secateurs import checkpoint as checkpoint_file
from secateurs.checkpoint import Checkpoint, weight_files
from secateurs.compressed import compress
from secateurs.packing import pack
from secateurs.patterns import NM
from secateurs.solvers.rounded import Rounded
from test_checkpoint import Tokenizer, exported
from test_cli import call
from test_pruner import PLAN

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def stored(folder) -> dict[str, torch.Tensor]:
    return {key: value for name in weight_files(folder) for key, value in load_file(folder / name).items()}


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A layer's weights, word by word as the format says."""
    rows, d_in = tensors[f"{name}.weight_shape"].tolist()
    words, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    assert words.dtype == torch.int32 and words.shape == (rows, d_in // 8) and scales.shape == (rows, d_in // 64)
    whole = torch.stack([(words >> 4 * place & 15) - 8 for place in range(8)], 2).view(rows, d_in)
    return whole * scales.repeat_interleave(64, 1)


def wide(family, **changes):
    config = make_model(family).config
    for key, value in (WIDE | changes).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return type(make_model(family))(config).eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_what_a_solver_rounded_is_packed_exactly_with_its_zeros(family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "SHARD", 100_000)
    wide(family).bfloat16().save_pretrained(tmp_path / "dense")
    plan = replace(PLAN, pattern=NM(4, 8), solver=Rounded(base=PLAN.solver))
    exported(Checkpoint(str(tmp_path / "dense")), Tokenizer(), plan, tmp_path / "pruned")
    found = compress(str(tmp_path / "pruned"), tmp_path / "out")
    assert found["rounded_off"] == 0 and found["bytes"] < 0.28 * found["dense_bytes"]
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "out")
    names = [key.removesuffix(".weight_packed") for key in after if key.endswith(".weight_packed")]
    assert len(names) == found["matrices"] >= 8
    for name in names:
        weight = before.pop(f"{name}.weight").float()
        assert torch.equal(unpacked(after, name), weight) and float((weight == 0).float().mean()) >= 0.5
        assert after[f"{name}.weight_scale"].dtype == torch.bfloat16
    assert all(torch.equal(after[key], value) for key, value in before.items()), "what is not packed stays"
    assert len(after) == len(before) + 3 * len(names)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert group["weights"].items() >= {"num_bits": 4, "group_size": 64, "symmetric": True}.items()
    assert settings["ignore"] == ["lm_head"]
    assert (tmp_path / "out" / "secateurs.json").exists() and len(weight_files(tmp_path / "out")) > 1


def test_plain_rounding_is_measured_and_layers_that_do_not_fit_stay(tmp_path, capsys, monkeypatch):
    wide("llama", intermediate_size=100).save_pretrained(tmp_path / "dense")
    said = ["pack", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--weights", "int4"]
    assert call(monkeypatch, *said, "--format", "compressed-tensors") == 0
    assert "12 matrices in int4: " in (out := " ".join(capsys.readouterr().err.split())) and "off by" in out
    after = stored(tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.weight" in after, "its 100 inputs are no whole number of groups"
    before = stored(tmp_path / "dense")["model.layers.1.mlp.up_proj.weight"]
    rounded = unpacked(after, "model.layers.1.mlp.up_proj")
    assert 0.05 < float((rounded - before).norm() / before.norm()) < 0.15
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize("how", [["int8"], ["int4", "--format", "compressed-tensors"]], ids=["ours", "for engines"])
def test_zeros_that_have_moved_since_are_told_of(how, tmp_path, capsys, monkeypatch):
    wide("llama").save_pretrained(tmp_path / "dense")
    exported(Checkpoint(str(tmp_path / "dense")), Tokenizer(), PLAN, tmp_path / "pruned")

    def said(out: str) -> str:
        words = ["pack", str(tmp_path / "pruned"), "--out", str(tmp_path / out), "--weights", *how]
        assert call(monkeypatch, *words) == 0
        return " ".join(capsys.readouterr().err.split())

    assert "zeros are not where they were" not in said("sound")
    tensors = stored(tmp_path / "pruned")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[tuple((weight == 0).nonzero()[0])] = 0.5
    save_file(tensors, tmp_path / "pruned" / "model.safetensors", {"format": "pt"})
    assert "in 1 matrices zeros are not where they were when it was pruned: `secateurs mask apply`" in said("spoiled")


def test_a_packed_folder_has_a_card_of_its_own_with_the_licence_of_the_model(tmp_path):
    wide("llama").save_pretrained(tmp_path / "dense")
    head = ["license:", "- mit", "- other", "tags: [x]", "license_name: some"]
    (tmp_path / "dense" / "README.md").write_text("\n".join(["---", *head, "---", "# Old", "license: none", ""]))
    exported(Checkpoint(str(tmp_path / "dense")), Tokenizer(), PLAN, tmp_path / "pruned")
    pack(str(tmp_path / "pruned"), tmp_path / "packed")
    pack(str(tmp_path / "dense"), tmp_path / "whole", "int4")
    compress(str(tmp_path / "pruned"), tmp_path / "served")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("pruned", "packed", "whole", "served")}
    for name, card in cards.items():
        assert "\nlicense:\n- mit\n- other\nlicense_name: some\n---\n# " in card and "[x]" not in card, name
        assert ("load anywhere" in card) == (name == "pruned") and "Old" not in card
    packed, whole, served = (cards[name] for name in ("packed", "whole", "served"))
    assert "library_name: secateurs" in packed and "load_packed(folder)" in packed and "vLLM, SGLang and" in packed
    assert "# tiny, pruned (50%) and packed with" in packed and f"Made from `{tmp_path / 'pruned'}` by" in packed
    assert "15 matrices, 14 of them without their zeros." in packed
    assert f"# {tmp_path / 'dense'}, packed with" in whole and "pack --weights int4`:\n15 matrices, 0 of them" in whole
    assert "library_name: transformers" in served and "--format compressed-tensors`:\n14 matrices" in served
    assert "secateurs.json" in served and "secateurs.json" not in whole and "load_packed" not in served


def test_what_cannot_be_packed_so_is_refused(tmp_path, capsys, monkeypatch):
    make_model("qwen3_moe").save_pretrained(tmp_path / "experts")
    make_model("llama").save_pretrained(tmp_path / "small")
    for model, said in (("experts", "has experts, which are not packed so"), ("small", "inputs in groups of 64")):
        with pytest.raises(ValueError, match=said):
            compress(str(tmp_path / model), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists: name another folder"):
        compress(str(tmp_path / "small"), tmp_path)
    pack(str(tmp_path / "small"), tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is packed already"):
        compress(str(tmp_path / "packed"), tmp_path / "out")
    said = ["pack", str(tmp_path / "small"), "--out", str(tmp_path / "out"), "--format"]
    for more, lesson in (
        (["compressed-tensors"], "stores int4: add --weights int4 (found bf16)"),
        (["gguf", "--weights", "int4"], "--format is 'gguf'; it must be secateurs or compressed-tensors"),
    ):
        assert call(monkeypatch, *said, *more) == 2
        assert lesson in " ".join(capsys.readouterr().err.split())
