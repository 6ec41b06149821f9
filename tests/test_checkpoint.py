"""Checkpoints read and written a block at a time: the same model to the bit, and no block more in memory."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from families import FAMILIES, make_model
from secateurs import cell, collect, pruner, reload
from secateurs.calibration import Batch, batches
from secateurs.checkpoint import INDEX, Checkpoint, faster, give_back, save
from secateurs.collect import final_states, logits_of
from secateurs.cuts import Width
from secateurs.evaluate import drift, reference_states
from secateurs.export import PROBE_FILE, export
from secateurs.models import load_model, window
from secateurs.reload import Reloaded, verify
from secateurs.solvers.obs import OBS
from secateurs.trim import Trimmer
from test_pruner import CALIBRATION, EVERYTHING, PLAN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(family: str, folder: Path, dtype: str = "float32") -> Path:
    """A tiny model's checkpoint in several shards."""
    model = make_model(family).to(DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def in_blocks(checkpoint: Checkpoint) -> set[str]:
    return {name for name in checkpoint.model.state_dict() if name.startswith(f"{checkpoint.prefix}.")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_read_alone_is_that_of_the_whole_model(family, dtype, tmp_path):
    folder = saved(family, tmp_path, dtype)
    whole, checkpoint = load_model(str(folder)).state_dict(), Checkpoint(str(folder))
    buffers = dict(load_model(str(folder)).named_buffers())
    state, inside = checkpoint.model.state_dict(), in_blocks(checkpoint)
    assert inside and all(state[name].is_meta for name in inside)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items() if name not in inside)
    computed = dict(checkpoint.model.named_non_persistent_buffers())
    assert computed and all(torch.equal(tensor, buffers[name]) for name, tensor in computed.items())
    seen = set()
    for index in range(len(checkpoint.blocks)):
        with checkpoint.opened(index):
            for name, tensor in checkpoint.model.state_dict().items():
                if name.startswith(f"{checkpoint.prefix}.{index}."):
                    assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name])
                    seen.add(name)
                assert name not in inside or tensor.is_meta == (not name.startswith(f"{checkpoint.prefix}.{index}."))
    assert seen == inside and all(checkpoint.model.state_dict()[name].is_meta for name in inside)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_head_stay_in_their_files_and_compute_as_if_they_did_not(family, dtype, tmp_path):
    """States and logits bit for bit those of the whole model in float32; scaled embeddings (Gemma) among them."""
    folder = saved(family, tmp_path, dtype)
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = Checkpoint(str(folder), compute_dtype="float32")
    few = [Batch(ids, torch.ones_like(ids)) for ids in (torch.tensor([[5, 3, 5, 63]]), torch.tensor([[0, 1, 2]]))]
    for compute in (final_states, lambda *arguments: [logits[:] for logits in logits_of(*arguments)]):
        for found, expected in zip(compute(checkpoint.model, few, checkpoint.opened), compute(whole, few), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, expected)
    for batch, logits in zip(few, logits_of(whole, few), strict=True):
        torch.testing.assert_close(logits[1:3], whole(batch.ids).logits[0, 1:3])
    tables = [checkpoint.model.get_input_embeddings(), checkpoint.model.get_output_embeddings()]
    names = {name for name, p in checkpoint.model.named_parameters() if any(p is table.weight for table in tables)}
    assert names and names <= checkpoint.in_file
    for table in tables:
        assert table.weight.dtype == checkpoint.stored
        assert sys.platform != "linux" or file_at(table.weight.data_ptr()).parent == folder


def test_tables_of_another_type_than_the_rest_are_read(tmp_path):
    """As transformers' loader makes them; and a head of a model that hands states over in the head's type computes."""
    folder = saved("llama", tmp_path, "bfloat16")
    whole = load_model(str(folder))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tables = {key: tensor.float() for key, tensor in tensors.items() if "embed" in key or "lm_head" in key}
        save_file(tensors | tables, file, {"format": "pt"})
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.in_file <= in_blocks(checkpoint) and checkpoint.model.dtype == checkpoint.dtype == torch.bfloat16
    assert torch.equal(checkpoint.model.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    head = Checkpoint(str(saved("llama", tmp_path / "again", "bfloat16")), compute_dtype="float32").model.lm_head
    assert head(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_in_its_file_is_known(family, dtype, tmp_path):
    """Of a block that computes in float32: what is stored so and put together with nothing else, and no more."""
    folder = saved(family, tmp_path, dtype)
    checkpoint = Checkpoint(str(folder), compute_dtype="float32")
    said, found = checkpoint.in_file & in_blocks(checkpoint), set[str]()
    for index, block in enumerate(checkpoint.blocks):
        with checkpoint.opened(index):
            numbers = block.named_parameters(prefix=f"{checkpoint.prefix}.{index}")
            found |= {name for name, p in numbers if file_at(p.data_ptr()).parent == folder}
    assert said == found
    assert (dtype == "float32") == any(name.endswith("o_proj.weight") for name in said)


def file_at(address: int) -> Path:
    """The file that is mapped to an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return Path(line.split(maxsplit=5)[5]) if line.count("/") else Path()
    return Path()


def test_an_embedding_of_another_shape_is_named(tmp_path):
    folder = saved("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(64, 32\) in the checkpoint, and \(65, 32\) in the"):
        Checkpoint(str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc and /proc")
def test_freed_memory_goes_back_to_the_system():
    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

    tensors = [torch.ones(2**14) for _ in range(2000)]  # of 64 kB: glibc takes them from its heap
    tensors = tensors[::50]  # what stays, here and there, keeps the rest from being the heap's end
    before = own()
    give_back(torch.device("cpu"))
    assert before - own() > 50e6 and len(tensors) == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_from_its_checkpoint_a_model_is_what_it_is_in_memory(family, tmp_path):
    """Bit for bit: the results, the exported weights, and everything in the files that was not pruned."""
    folder, out = saved(family, tmp_path / "dense", "bfloat16"), tmp_path / "pruned"
    whole, checkpoint = load_model(str(folder)), Checkpoint(str(folder))
    expected = pruner.prune(whole, CALIBRATION, PLAN)
    results = exported(checkpoint, Tokenizer(), PLAN, out)
    assert [replace(r, seconds=0) for r in results] == [replace(r, seconds=0) for r in expected]
    selected = pruner.prunable(checkpoint.model, PLAN)
    again = load_model(str(out)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.state_dict().items())
    pruned = {f"{matrix.name}.weight" for block in selected for matrix in block}
    pruned |= {
        f"{one.split('.experts.')[0]}.experts.{kind}" for one in pruned for kind in ("gate_up_proj", "down_proj")
    }
    files = {file.name for file in folder.glob("*.safetensors")}
    assert len(files) > 1 and files == {file.name for file in out.glob("*.safetensors")}
    untouched = 0
    for name in files:
        before, after = load_file(folder / name), load_file(out / name)
        assert list(before) == list(after)
        for key in before:
            if checkpoint.names[key] not in pruned:
                assert torch.equal(before[key], after[key])
                untouched += 1
    assert untouched
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


FACTS = {"arm": "rac", "pattern": "50%", "sparsity": 0.5, "solver": "sparsegpt", "seed": 0, "calibration_tokens": 1,
         "model": "tiny", "hashes": {}, "key": "k", "secateurs": "0", "recipe": {}, "held_out": {}}  # fmt: skip


class Tokenizer:
    """Enough of one for an export that nothing is sampled from."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def exported(checkpoint: Checkpoint, tokenizer, plan: pruner.Plan, out: Path, **options) -> list[pruner.LayerResult]:
    """Prune a checkpoint, its blocks beside `out`, and export it."""
    blocks = out.parent / "blocks"
    streamed = {"opened": checkpoint.opened, "stored": checkpoint.stored}
    results = pruner.prune(checkpoint.model, CALIBRATION, plan, folder=blocks, **streamed)
    selected = pruner.prunable(checkpoint.model, plan)
    opened, layers = pruner.results_in(blocks, selected, checkpoint.opened), [asdict(result) for result in results]
    facts = {"provenance": FACTS, "layers": layers, "probe_ids": [3, 4, 5]}
    export(checkpoint, tokenizer, selected, opened, out, **(facts | options))
    return results


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_a_bfloat16_checkpoint_computed_in_float32_ends_in_bfloat16(family, plan, tmp_path):
    """Near what it is when computed as stored, closer to what float32 makes of it; every file as exact as ever."""
    folder = saved(family, tmp_path / "dense", "bfloat16")
    errors = {}
    for compute in ("checkpoint", "float32"):
        checkpoint = Checkpoint(str(folder), compute_dtype=compute)
        assert checkpoint.stored == torch.bfloat16 and checkpoint.dtype == getattr(torch, compute, torch.bfloat16)
        out = tmp_path / compute / "pruned"
        results = exported(checkpoint, Tokenizer(), plan, out)
        assert all(result.zeros == result.zeros_asked for result in results)
        errors[compute] = [result.error_held_out for result in results]
        blocks = [tensor for file in out.parent.glob("blocks/*.safetensors") for tensor in load_file(file).values()]
        assert {tensor.dtype for tensor in blocks} == {torch.bfloat16}
        assert sum(int((tensor == 0).sum()) for tensor in blocks) == sum(result.zeros for result in results)
        again, shell = load_model(str(out)), Checkpoint(str(out))
        assert again.dtype == torch.bfloat16
        for index, block in enumerate(shell.blocks):
            saved_ones = load_file(out.parent / "blocks" / f"block-{index:05d}.safetensors")
            with shell.opened(index):
                for matrix in collect.matrices_of(block, f"{shell.prefix}.{index}"):
                    assert torch.equal(matrix.weight, saved_ones[matrix.name]), "what was measured is what was written"
    assert errors["checkpoint"] != errors["float32"]
    assert sum(errors["float32"]) == pytest.approx(sum(errors["checkpoint"]), rel=0.05)


def test_what_is_faster_depends_on_the_cpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    half, single = torch.bfloat16, torch.float32
    for units, expected in (({"amx_bf16": True}, half), ({"avx512_bf16": False, "fma3": True}, single)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", units.copy)
        assert faster(half, cpu, "auto") == expected
        assert faster(torch.float16, cpu, "auto") == faster(single, cpu, "auto") == single
        assert faster(half, gpu, "auto") == faster(half, cpu, "checkpoint") == half
        assert faster(half, gpu, "float32") == single


def test_drift_is_the_same_block_by_block(tmp_path):
    folder = saved("qwen3", tmp_path)
    whole, checkpoint = load_model(str(folder)), Checkpoint(str(folder))
    held = list(batches(CALIBRATION.held_out, 60))
    reference = reference_states(checkpoint.model, held, checkpoint.opened)
    with torch.inference_mode():
        states = [whole.model(input_ids=batch.ids, use_cache=False).last_hidden_state for batch in held]
    assert all(torch.equal(a, b) for a, b in zip(reference.states, states, strict=True))
    assert drift(whole, reference)["prompt"] == 0
    assert all(torch.equal(a, b) for a, b in zip(final_states(whole, held), states, strict=True))


def edited(folder: Path, change) -> Path:
    """The checkpoint with `change` made to the tensors of each file."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layer", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_missing_is_named(layer, tmp_path):
    folder = edited(saved("llama", tmp_path), lambda tensors: tensors.pop(layer, None))
    for load in (Checkpoint, load_model):  # before anything is asked of it
        with pytest.raises(ValueError, match=f"cannot be loaded: the checkpoint has no {layer}"):
            load(str(folder))


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path):
    def cut(tensors):
        if (name := "model.layers.1.mlp.up_proj.weight") in tensors:
            tensors[name] = tensors[name][:40].clone()

    checkpoint = Checkpoint(str(edited(saved("llama", tmp_path), cut)))
    message = r"up_proj.weight is \(40, 32\) in the checkpoint, and \(48, 32\) in the model"
    with pytest.raises(ValueError, match=message), checkpoint.opened(1):
        pass


def test_a_shard_that_is_missing_or_elsewhere_is_named(tmp_path):
    folder = saved("llama", tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / "moved")
    with pytest.raises(ValueError, match=f"there is no {first.name} in"):
        Checkpoint(str(folder))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: "../" + name for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"there is no \.\./model"):
        Checkpoint(str(folder))


def test_an_exported_folder_loads_in_a_clean_process(tmp_path, monkeypatch, request):
    tokenizer = tf.AutoTokenizer.from_pretrained(Path(pruner.__file__).parent / "assets" / "reasoner")
    plan, half = replace(PLAN, targets=("mlp.*",)), tmp_path / "half"
    load_model("bundled").bfloat16().save_pretrained(half)
    folders = [tmp_path / "as stored" / "out", tmp_path / "in float32" / "out"]
    exported(Checkpoint("bundled"), tokenizer, plan, folders[0])
    exported(Checkpoint(str(half), compute_dtype="float32"), tokenizer, plan, folders[1])
    here, elsewhere = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda")
    changed = tmp_path / "changed"
    shutil.copytree(folders[0], changed)
    tensors = load_file(changed / PROBE_FILE)
    del tensors["computed"]  # as before 25 November 2026
    tensors["logits"][0, 0, 0] += 0.02 * tensors["logits"].abs().max()
    save_file(tensors, changed / PROBE_FILE, {"device": elsewhere})
    found = verify([*folders, changed])
    assert 0.01 < found.pop(str(changed)).off < 0.03, "another kind of device rounds otherwise"
    assert found == {str(folder): Reloaded(0, whole=True) for folder in folders}
    monkeypatch.setattr(reload, "available", lambda device: 0)
    found = verify([*folders, changed])
    assert 0.01 < found.pop(str(changed)).off < 0.03
    assert found == {str(folder): Reloaded(0, whole=False) for folder in folders}, "block by block, to the bit as well"
    stored = [name for file in folders[0].glob("*.safetensors") for name in load_file(file)]
    assert set(stored) <= set(load_model("bundled").state_dict()), "vLLM and SGLang read all of these files"
    assert not [file for kind in ("bin", "pt", "pth", "gguf") for file in folders[0].glob(f"*.{kind}")]
    save_file(tensors, changed / PROBE_FILE, {"device": here})
    monkeypatch.setattr(reload, "available", lambda device: 10**12)
    request.getfixturevalue("reload_here")
    with pytest.raises(RuntimeError, match="logits after reloading differ"):
        verify([changed])


def test_a_model_has_room_as_what_it_is_computed_in(tmp_path, monkeypatch):
    """Stored in 16 bits and computed in 32, with ten and with five sixths of its room."""
    out = tmp_path / "out"
    exported(Checkpoint(str(saved("qwen3", tmp_path, "bfloat16")), compute_dtype="float32"), Tokenizer(), PLAN, out)
    size = sum(4 * tensor.numel() for tensor in load_model(str(out)).state_dict().values())
    asked = []
    monkeypatch.setattr(reload, "_asked", lambda code, folders, trust: asked.append(code) or {})
    for room in (10 / 6, 5 / 6):
        monkeypatch.setattr(reload, "available", lambda device, room=room: room * size)
        verify([out])
    assert asked == [reload.TRANSFORMERS, reload.BLOCKS]


def test_a_probe_goes_beyond_windows_and_keeps_what_comes_last(tmp_path):
    windows = {family: window(make_model(family)) for family in ("gemma3", "gpt_oss", "qwen3", "llama")}
    assert windows == {"gemma3": 8, "gpt_oss": 8, "qwen3": 0, "llama": 0}
    ids = list(islice(cycle(range(64)), 90))
    folder = saved("gemma3", tmp_path)
    exported(Checkpoint(str(folder)), Tokenizer(), PLAN, tmp_path / "out", probe_ids=ids)
    probe, model = load_file(tmp_path / "out" / PROBE_FILE), load_model(str(tmp_path / "out"))
    assert probe["ids"].tolist() == [ids] and probe["logits"].shape[:2] == (1, 64)
    with torch.inference_mode():
        logits = model(input_ids=probe["ids"]).logits[:, -64:]
    torch.testing.assert_close(probe["logits"], logits, rtol=1e-4, atol=1e-5)
    every = [id for one in (*CALIBRATION.held_out, *CALIBRATION.documents) for id in one.ids]
    held = sum(len(one.ids) for one in CALIBRATION.held_out)
    assert 8 + 64 <= held < held + 64 < len(every)
    assert [cell._probe(CALIBRATION, beyond) for beyond in (0, 8, held)] == [every[: n + 64] for n in (0, 8, held)]
    for too_many in (len(every), cell.PROBED_WINDOW + 1):
        assert cell._probe(CALIBRATION, too_many) == every[:64]


def test_an_expert_that_is_missing_is_said_in_a_sentence(tmp_path):
    gone = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    checkpoint = Checkpoint(str(edited(saved("mixtral", tmp_path), lambda tensors: tensors.pop(gone, None))))
    with (
        pytest.raises(ValueError, match="experts.* cannot be put together from the checkpoint's tensors: [^\n]*$"),
        checkpoint.opened(1),
    ):
        pass


def configured(folder: Path, **entries) -> Path:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | entries))
    return folder


def test_every_kind_of_quantised_checkpoint_is_refused(tmp_path, monkeypatch):
    for number, entry in enumerate(
        [{"quantization_config": {"quant_method": "gptq"}}, {"compression_config": {"format": "x"}},
         {"quantization": {"bits": 4}}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}]
    ):  # fmt: skip
        folder = configured(saved("llama", tmp_path / str(number)), **entry)
        for load in (Checkpoint, load_model):
            with pytest.raises(ValueError, match="is quantised .*use the original"):
                load(str(folder))
    monkeypatch.setattr("secateurs.checkpoint.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ValueError, match="`some/model` is quantised"):
        Checkpoint("some/model")
    folder = saved("llama", tmp_path / "bare")
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is quantised"):
        Checkpoint(str(folder))
    up = "model.layers.0.mlp.up_proj.weight"
    bytes8 = edited(
        saved("llama", tmp_path / "8"), lambda t: t.update({up: t[up].to(torch.float8_e4m3fn)} if up in t else {})
    )
    with pytest.raises(ValueError, match=rf"{up} is quantised \(F8_E4M3\): use the original"):
        Checkpoint(str(bytes8))


def test_ties_that_the_files_contradict_are_refused(tmp_path):
    folder = configured(saved("llama", tmp_path), tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ties .*lm_head.weight.*, which differ: set tie_word_embeddings to false"):
        Checkpoint(str(folder))


def test_of_one_file_and_an_index_both_loaders_read_the_file(tmp_path):
    folder = saved("llama", tmp_path)
    assert (folder / "model.safetensors.index.json").exists()
    other = make_model("llama")
    save_file(other.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    table = other.get_input_embeddings().weight
    for model in (Checkpoint(str(folder), compute_dtype="float32").model, load_model(str(folder))):
        torch.testing.assert_close(model.get_input_embeddings().weight.float(), table, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("code", "lesson"),
    [
        ("import sys; sys.exit('no such thing')", "though it is written: no such thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9, perhaps for want of memory"),
        ("raise SystemExit(3)", "it ended with 3"),
    ],
)
def test_a_reload_that_ends_badly_is_a_sentence(code, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(reload, "TRANSFORMERS", code)
    monkeypatch.setattr(reload, "_in_memory", lambda folder: 0)
    with pytest.raises(RuntimeError, match=lesson):
        verify([tmp_path])


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("secateurs.checkpoint.save_file", full)
    with pytest.raises(OSError, match=f"^{tmp_path}: I/O error: No space left on device"):
        save({"a": torch.zeros(3)}, tmp_path / "model-part-0")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Which of the two is read depends on the reader, so one would stay dense."""
    folder, name = saved("llama", tmp_path), "model.layers.0.mlp.up_proj.weight"
    own = json.loads((folder / INDEX).read_text())["weight_map"][name]
    other = next(file for file in sorted(folder.glob("*.safetensors")) if file.name != own)
    save_file(load_file(other) | {name: load_file(folder / own)[name]}, other, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is in model-.* and in model-.*: take it out of one of them"):
        Checkpoint(str(folder))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": 4}}'])
def test_an_index_that_is_none_is_said_in_a_sentence(index, tmp_path):
    folder = saved("llama", tmp_path)
    (folder / INDEX).write_text(index)
    with pytest.raises(ValueError, match="is not an index of safetensors files|there is no 3 in"):
        Checkpoint(str(folder))


def test_an_index_beside_a_single_file_is_not_copied(tmp_path):
    folder = saved("llama", tmp_path / "dense")
    save_file(make_model("llama").state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    Checkpoint(str(folder)).copy_to(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]


def test_numbers_that_are_no_weights_are_refused_before_anything_is_done(tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"

    def change(to):
        return lambda tensors: tensors.update({up: to(tensors[up])} if up in tensors else {})

    whole = edited(saved("llama", tmp_path / "whole"), change(lambda w: w.to(torch.int8)))
    with pytest.raises(ValueError, match=rf"{up} is quantised \(I8\)"):
        Checkpoint(str(whole))
    for number in (torch.nan, torch.inf):
        wrong = change(lambda w, number=number: w.index_fill(0, torch.tensor([3]), number))
        checkpoint = Checkpoint(str(edited(saved("llama", tmp_path / str(number)), wrong)))
        with checkpoint.opened(0):
            pass
        with pytest.raises(ValueError, match=f"{up} holds numbers that are not finite"), checkpoint.opened(1):
            pass
    (whole / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no table"):
        Checkpoint(str(whole))


@pytest.mark.parametrize(("files", "config"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_what_is_cut_is_written_as_it_was_measured_whatever_types_are_named(files, config, tmp_path):
    folder = configured(saved("llama", tmp_path / "dense", files), dtype=config)
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.stored == torch.bfloat16
    cut = Width(0.3, multiple=4).patterns(checkpoint.model)
    plan = replace(PLAN, solver=OBS(), patterns=cut, targets=tuple(cut))
    exported(checkpoint, Tokenizer(), plan, tmp_path / "out", smaller=Trimmer, probe_ids=list(range(3, 60)))
    probe, model = load_file(tmp_path / "out" / PROBE_FILE), load_model(str(tmp_path / "out"))
    assert torch.equal(model(input_ids=probe["ids"]).logits.float()[:, -len(probe["logits"][0]) :], probe["logits"])


TUPLES = {
    "bloom": lambda blocks: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=blocks, n_head=4)
    ),
    "falcon": lambda blocks: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4)
    ),
    "gptj": lambda blocks: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=blocks, n_head=4, rotary_dim=8)
    ),
    "mpt": lambda blocks: tf.MptForCausalLM(tf.MptConfig(vocab_size=64, d_model=32, n_layers=blocks, n_heads=4)),
}


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("family", TUPLES)
def test_blocks_that_give_tuples_run_one_by_one(family, blocks):
    """A state without its tuple loses a dimension at every block, and after three there is none left."""
    model, ids = TUPLES[family](blocks), torch.arange(3, 30)[None]
    with torch.no_grad():
        (found,) = logits_of(model.eval(), [Batch(ids, torch.ones_like(ids))])
        torch.testing.assert_close(found[:], model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)
