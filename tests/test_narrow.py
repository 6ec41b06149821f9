"""A narrower residual stream: the same model while all directions are there, the best directions, fitted matrices."""

import json
from dataclasses import asdict, replace
from functools import partial
from itertools import islice

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from families import SMALL, make_model
from secateurs.calibration import CalibrationSet, batches, plain_document, region_weights, worth
from secateurs.checkpoint import Checkpoint
from secateurs.collect import capture
from secateurs.cuts import Hidden
from secateurs.evaluate import drift, reference_states
from secateurs.export import PROBE_FILE, export
from secateurs.gains import gains
from secateurs.models import load_model, load_tokenizer
from secateurs.narrow import NARROWINGS, narrow
from secateurs.prompts import render
from secateurs.pruner import results_in
from secateurs.questions.tiny import Tiny
from secateurs.recipe import load_recipe
from secateurs.trim import StreamTrimmer
from test_checkpoint import FACTS, Tokenizer
from test_cli import call
from test_pruner import CALIBRATION

FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "biases"]
IDS = torch.arange(3, 23)[None]


def saved(family, folder):
    """A tiny checkpoint whose norms have weights that say something, on disk."""
    if family == "biases":
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)).eval()
    else:
        model = make_model(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter += torch.rand(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter += torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return Checkpoint(str(folder))


def narrowed(checkpoint, folder, sparsity=0.25, how="pca+refit", **options):
    return narrow(checkpoint, CALIBRATION, Hidden(sparsity, 4), NARROWINGS[how](), folder, **options)


def opened(found, folder):
    return results_in(folder / "blocks", found.selected, found.checkpoint.opened)


@pytest.mark.parametrize("how", NARROWINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_its_directions_it_is_the_same_model(family, how, tmp_path):
    dense = saved(family, tmp_path / "dense")
    found = narrowed(dense, tmp_path, 0, how)
    same, wanted = load_model(str(tmp_path / "projected")), load_model(str(tmp_path / "dense"))
    assert not torch.allclose(same.get_input_embeddings().weight, wanted.get_input_embeddings().weight, atol=0.01)
    with torch.no_grad():
        torch.testing.assert_close(same(input_ids=IDS).logits, wanted(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    assert same.config.head_dim == 8 and not same.config.tie_word_embeddings
    reference = reference_states(dense.model, list(batches(CALIBRATION.held_out, 64)), dense.opened)
    assert drift(found.checkpoint.model, reference, opened(found, tmp_path), found.lift)["prompt"] < 1e-6
    assert len(found.results) == 14 and all(one.error_held_out < 1e-6 and one.zeros == 0 for one in found.results)


def test_directions_are_the_principal_ones_of_what_norms_receive(tmp_path):
    narrowed(saved("qwen3", tmp_path / "dense"), tmp_path)
    basis = load_file(tmp_path / "directions.safetensors")["directions"].double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-5)
    model, moments = load_model(str(tmp_path / "dense")), torch.zeros(32, 32, dtype=torch.float64)
    norms = [module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))]

    def note(module, args):
        unit = torch.nn.functional.normalize(args[0][0].double(), dim=-1)
        moments.add_(unit.T @ (unit * counts[:, None]))

    for norm in norms:
        norm.register_forward_pre_hook(note)
    for document in CALIBRATION.documents:
        counts = worth(torch.tensor(document.codes), CALIBRATION.weights).double()
        with torch.no_grad():
            model(input_ids=torch.tensor([document.ids]))
    assert len(norms) == 5
    diagonal = basis.T @ moments @ basis
    values = torch.linalg.eigvalsh(moments).flip(0)
    torch.testing.assert_close(diagonal, torch.diag(values), rtol=0, atol=1e-4 * float(values[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_model_that_was_seen(family, tmp_path):
    dense = saved(family, tmp_path / "dense")
    found = narrowed(dense, tmp_path)
    facts = {"provenance": FACTS, "layers": [asdict(one) for one in found.results], "probe_ids": [3, 4, 5, 6]}
    smaller = partial(StreamTrimmer, before=32)
    export(
        found.checkpoint,
        Tokenizer(),
        found.selected,
        opened(found, tmp_path),
        tmp_path / "out",
        smaller=smaller,
        **facts,
    )
    model, probe = load_model(str(tmp_path / "out")), load_file(tmp_path / "out" / PROBE_FILE)
    torch.testing.assert_close(model(input_ids=probe["ids"]).logits, probe["logits"], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "secateurs.json").read_text())["cut"] == {
        "was": {"hidden_size": 32}, "is": {"hidden_size": 24}
    }  # fmt: skip
    of_blocks = [sum(p.numel() for p in one.blocks[0].to_empty(device="cpu").parameters() if p.dim() == 2)
                 for one in (dense, found.checkpoint)]  # fmt: skip
    assert of_blocks[1] == 0.75 * of_blocks[0]
    assert 2 * (of_blocks[0] - of_blocks[1]) == sum(one.zeros for one in found.results)


def test_what_is_fitted_is_nearer_to_the_dense_model(tmp_path):
    """The bundled reasoner, on worked solutions that it was not fitted to: each layer, and the whole."""
    tokenizer, tiny = load_tokenizer("bundled"), Tiny()
    texts = (
        (list(render(tokenizer, tiny.format, q)), tokenizer(tiny.solution(q), add_special_tokens=False)["input_ids"])
        for q in islice(tiny.questions("calibration", 0), 16)
    )
    documents = tuple(plain_document(prompt + solution, "think") for prompt, solution in texts)
    worked = CalibrationSet(documents[:11], documents[11:], region_weights("rac"))
    dense = Checkpoint("bundled")
    reference = reference_states(dense.model, list(batches(worked.held_out, 2048)), dense.opened)
    found, error = {}, {}
    for how in NARROWINGS:
        folder = tmp_path / how
        found[how] = narrow(dense, worked, Hidden(0.2), NARROWINGS[how](), folder)
        states = drift(found[how].checkpoint.model, reference, opened(found[how], folder), found[how].lift)
        error[how] = states["late_think"]
    fitted, projected = found["pca+refit"].results, found["pca"].results
    for one, other in zip(fitted[:3], projected[:3], strict=True):  # these see the same inputs
        assert one.error_held_out < 0.99 * other.error_held_out and one.error_train < 0.99 * other.error_train
    assert min(one.beta for one in fitted) > 0.3 and not any(one.beta for one in projected)
    assert sum(one.error_held_out for one in fitted) < 0.7 * sum(one.error_held_out for one in projected)
    assert error["pca+refit"] < 0.9 * error["pca"]
    seen = opened(found["pca+refit"], tmp_path / "pca+refit")
    unfitted = drift(found["pca+refit"].checkpoint.model, reference, seen, found["pca"].lift)  # the head alone is not
    assert error["pca+refit"] < 0.85 * unfitted["late_think"]


def test_a_layer_is_fitted_by_least_squares(tmp_path):
    """Nearer to the best there is for its inputs than to what it was: damped, and for tokens held out."""
    part = "self_attn.q_proj"
    dense = saved("llama", tmp_path / "dense")
    found = narrowed(dense, tmp_path)
    seen: dict[str, list[torch.Tensor]] = {"x": [], "wanted": []}
    with dense.opened(0), opened(found, tmp_path)(0), torch.no_grad():
        small, large = (checkpoint.blocks[0] for checkpoint in (found.checkpoint, dense))
        small.get_submodule(part).register_forward_pre_hook(lambda module, args: seen["x"].append(args[0]))
        large.get_submodule(part).register_forward_hook(lambda module, args, out: seen["wanted"].append(out))
        for checkpoint, block in ((found.checkpoint, small), (dense, large)):
            for stream in capture(checkpoint.model, replace(CALIBRATION, held_out=()), 10**6):
                real = stream.batch.regions > 0
                stream.run(block, 0)
        x, wanted = (seen[what][-1][real].double() for what in seen)
        weight = small.get_submodule(part).weight.double()
    best = torch.linalg.lstsq(x, wanted).solution.T
    before = load_file(tmp_path / "projected" / "model.safetensors")[f"model.layers.0.{part}.weight"].double()
    lost, least, projected = (float((wanted - x @ one.T).square().sum()) for one in (weight, best, before))
    assert least <= lost < 0.5 * least + 0.5 * projected


def test_a_stopped_one_goes_on_after_its_last_block(tmp_path):
    dense = saved("qwen3", tmp_path / "dense")
    whole = narrowed(dense, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done, total, what):
        raise Stop

    with pytest.raises(Stop):
        narrowed(dense, tmp_path / "stopped", progress=stop)
    assert len(list((tmp_path / "stopped" / "blocks").glob("*.json"))) == 1
    again = narrowed(dense, tmp_path / "stopped")
    strip = (
        [{**asdict(one), "seconds": 0} for one in whole.results],
        [{**asdict(one), "seconds": 0} for one in again.results],
    )
    assert strip[0] == strip[1]
    for index in range(2):
        file = f"blocks/block-{index:05d}.safetensors"
        one, other = (load_file(tmp_path / which / file) for which in ("whole", "stopped"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [one.name for one in narrowed(dense, tmp_path / "stopped").results] == [one.name for one in again.results]


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3_moe"])
def test_other_streams_are_refused(family):
    with pytest.raises(ValueError, match="the stream of .* cannot be made narrower, only that of llama, mistral"):
        Hidden(0.25).patterns(make_model(family))


def test_what_goes_is_counted_before():
    model = load_model("bundled")
    patterns = Hidden(0.25).patterns(model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in patterns}
    zeros = sum(pattern.num_zeros(*shapes[name]) for name, pattern in patterns.items())
    assert zeros == 0.25 * sum(a * b for a, b in shapes.values()) and len(patterns) == 28
    with pytest.raises(ValueError, match="hidden 99% would leave nothing of a stream of 128 numbers in multiples of 8"):
        Hidden(0.99).patterns(model)
    assert "KV cache" not in dict(gains(Hidden(0.25)))["vLLM"]


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        (["prune.solver.name='obs'"], "solver `obs` cannot solve for pattern `hidden`; those that can: pca, pca.refit"),
        (["prune.solver.name='pca'", "prune.goal='residual'"], "`hidden` has a way of its own: it takes no goal"),
        (
            ["prune.solver.name='pca'", "prune.propagate='group'"],
            "`hidden` has a way of its own: it takes no propagate",
        ),
    ],
)
def test_mistakes_teach(options, lesson):
    with pytest.raises(ValueError, match=lesson):
        load_recipe("demo", ["sweep.sparsity=[]", "prune.pattern={name='hidden', sparsity=0.2}", *options])


@pytest.mark.usefixtures("reload_here")
def test_a_run_makes_one_that_answers(tmp_path, monkeypatch, capsys):
    sets = ["sweep.arm=['rac']", "sweep.sparsity=[]", "sweep.seed=[0]", "calibration.num_tokens=600",
            "calibration.held_out_tokens=200", "evaluate.num_questions=2", "traces.sampling.max_new_tokens=96",
            "resources.batch_size=8", "prune.solver.name='pca+refit'",
            "prune.pattern={name='hidden', sparsity=0.1}"]  # fmt: skip
    words = ["run", "demo", "--out", str(tmp_path / "out"), *(part for one in sets for part in ("--set", one))]
    assert call(monkeypatch, *words) == 0
    cell = json.loads((tmp_path / "out" / "report.json").read_text())["cells"][1]
    assert cell["pattern"] == "hidden 10%" and cell["sparsity"] == 0.1 and cell["evaluation"]["questions"] == 2
    assert 0 < cell["hidden_error"]["late_think"] < 0.2
    (folder,) = (tmp_path / "out" / "cells").glob("rac-hidden-10pct-*/model")
    assert not (folder.parent / "projected").exists()
    assert "| `hidden_size` | 128 | 112 |" in (folder / "README.md").read_text()
    assert call(monkeypatch, "mask", "check", str(folder)) == 2
    assert "is smaller than the model it was cut from" in " ".join(capsys.readouterr().err.split())
