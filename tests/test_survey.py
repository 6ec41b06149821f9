"""What is measured of a dense model: KL of one matrix pruned alone, on the model as it was, which it is afterwards."""

from dataclasses import replace

import pytest
import torch

from families import lively, make_model
from secateurs import survey as surveys
from secateurs.calibration import Document
from secateurs.collect import swapped
from secateurs.pruner import prunable, prune
from secateurs.survey import survey
from test_pruner import CALIBRATION, PLAN, documents


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_the_model_is_as_it_was_and_every_matrix_has_a_rising_curve(name):
    model = lively(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    selected = prunable(model, PLAN)
    seen = []
    layers = survey(model, CALIBRATION, selected, 0.5, curves=True, progress=lambda *step: seen.append(step))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {layer.name for layer in layers} == {matrix.name for block in selected for matrix in block}
    for layer in layers:
        sparsities = [s for s, _ in layer.curve]
        assert sparsities == [pytest.approx(0.35 + 0.05 * step) for step in range(7)]
        assert 0 <= layer.curve[0][1] <= layer.curve[-1][1] and layer.loss(0.5) > 0
        assert 0 <= layer.outliers < 0.2
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen}) and seen[-1][0] == seen[-1][1]


def test_a_loss_is_the_divergence_of_the_model_with_that_matrix_pruned():
    model = lively("qwen3")
    layers = survey(model, CALIBRATION, prunable(model, PLAN), 0.5, curves=True)
    name = "model.layers.1.mlp.down_proj"
    alone = replace(PLAN, targets=(name,), pattern=surveys.Unstructured(0.5, "layer"), solver=surveys.ADMM())
    with torch.no_grad():
        ids = [torch.tensor([document.ids]) for document in CALIBRATION.held_out]
        dense = [model(input_ids=one).logits[0].log_softmax(-1) for one in ids]
        prune(model, CALIBRATION, replace(alone, propagate="dense"))
        pruned = [model(input_ids=one).logits[0].log_softmax(-1) for one in ids]
    lost = sum(float((before.exp() * (before - after)).sum()) for before, after in zip(dense, pruned, strict=True))
    tokens = sum(len(document.ids) for document in CALIBRATION.held_out)
    found = next(layer for layer in layers if layer.name == name)
    assert found.loss(0.5) == pytest.approx(lost / tokens, rel=0.1)  # a path's solve is not quite a single one


def test_experts_of_a_block_share_what_they_lose_together(monkeypatch):
    model = make_model("mixtral")
    calls = []
    monkeypatch.setattr(surveys, "swapped", lambda weights: calls.append(list(weights)) or swapped(weights))
    survey(model, CALIBRATION, prunable(model, PLAN), 0.5, curves=True)
    together = [len(matrices) for matrices in calls if ".experts." in matrices[0].name]
    assert together == [4, 4, 4, 4]  # gate_up and down, in two blocks


def test_an_expert_that_no_held_out_token_reaches_is_judged_on_what_calibrates():
    model = lively("mixtral")
    (whole,) = documents(1)
    calibration = replace(CALIBRATION, held_out=(Document(whole.ids[:3], whole.codes[:3]),))
    layers = survey(model, calibration, prunable(model, PLAN), 0.5, curves=True)
    assert all(layer.loss(0.5) > 0 for layer in layers), "three tokens cannot reach all"


def test_without_curves_nothing_is_solved():
    model = make_model("qwen3")
    layers = survey(model, CALIBRATION, prunable(model, PLAN), 0.5, curves=False)
    assert all(layer.curve == () for layer in layers)
    assert len({layer.outliers for layer in layers if layer.block == 0}) == 1


def test_curves_need_held_out_documents():
    model = make_model("qwen3")
    with pytest.raises(ValueError, match="raise held_out_tokens"):
        survey(model, replace(CALIBRATION, held_out=()), prunable(model, PLAN), 0.5, curves=True)


def test_the_probe_is_bounded(monkeypatch):
    monkeypatch.setattr(surveys, "PROBE_TOKENS", 40)
    batches = []
    monkeypatch.setattr(
        surveys, "_log_probabilities", lambda model, batch: batches.append(batch.tokens) or torch.zeros(3, 4)
    )
    model = make_model("qwen3")
    selected = [prunable(model, PLAN)[0][:1], []]
    survey(model, replace(CALIBRATION, held_out=documents(50)), selected, 0.5, curves=True)
    assert max(batches) < 80
