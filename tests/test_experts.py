"""Experts that go: the right ones; the router chooses among the rest; the smaller model is the one that was seen."""

import json
from dataclasses import asdict

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from families import SMALL, make_model
from secateurs import experts as experts_file
from secateurs.calibration import REGIONS
from secateurs.checkpoint import Checkpoint
from secateurs.cuts import FewerExperts
from secateurs.experts import EXPERT_SCORES, drop_experts, keeping, only
from secateurs.export import PROBE_FILE, export
from secateurs.gains import gains
from secateurs.models import decoder_blocks, load_model, mixtures
from secateurs.recipe import load_recipe
from secateurs.trim import ExpertTrimmer
from test_checkpoint import FACTS, Tokenizer
from test_pruner import CALIBRATION

MIXTURES = ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next"]
HALF = FewerExperts(0.5)
GROUPED = tf.DeepseekV3Config(  # a router compares the best two of each of two groups of four
    **(SMALL | {"num_key_value_heads": 4}), moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2,
    n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip


def model_of(family):
    torch.manual_seed(0)
    return tf.DeepseekV3ForCausalLM(GROUPED).eval() if family == "grouped" else make_model(family)


def blocks_of(model):
    return decoder_blocks(model)[1]


def dropped(model, tmp_path, cut=HALF, score="reap", **options):
    return drop_experts(model, CALIBRATION, cut, EXPERT_SCORES[score](), tmp_path / "experts.json", **options)


@pytest.mark.parametrize("family", [*MIXTURES, "grouped"])
@pytest.mark.parametrize("propagate", ["block", "dense"])
def test_the_smaller_model_is_the_one_that_was_seen(family, propagate, tmp_path):
    model_of(family).save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(str(tmp_path / "dense"))
    experts = 8 if family == "grouped" else 4
    verdicts = dropped(checkpoint.model, tmp_path, opened=checkpoint.opened, propagate=propagate)
    opened = keeping(verdicts, checkpoint.model, checkpoint.opened)
    layers = [asdict(result) for verdict in verdicts for result in verdict.results]
    facts = {"provenance": FACTS, "layers": layers, "probe_ids": [3, 4, 5, 6], "smaller": ExpertTrimmer}
    export(checkpoint, Tokenizer(), [[] for _ in verdicts], opened, tmp_path / "out", **facts)
    smaller, probe = load_model(str(tmp_path / "out")), load_file(tmp_path / "out" / PROBE_FILE)
    torch.testing.assert_close(smaller(input_ids=probe["ids"]).logits, probe["logits"], rtol=1e-4, atol=1e-5)
    left = {mixture.experts.count for block in blocks_of(smaller) for mixture in mixtures(block)}
    assert left == {experts // 2}
    side = json.loads((tmp_path / "out" / "secateurs.json").read_text())
    assert side["cut"] == {"was": {"experts": experts}, "is": {"experts": experts // 2}}
    assert all(2 * layer["zeros"] == layer["shape"][0] * layer["shape"][1] for layer in layers)
    if family == "grouped":
        kept = verdicts[1].kept["mlp"]
        assert verdicts[0].kept == {} and sum(expert < 4 for expert in kept) == sum(expert >= 4 for expert in kept) == 2
    dense = load_model(str(tmp_path / "dense"))
    gone = sum(layer["zeros"] for layer in layers)
    routers = sum(len(verdict.kept) for verdict in verdicts) * (experts // 2) * (33 if family == "gpt_oss" else 32)
    assert dense.num_parameters() - smaller.num_parameters() == gone + routers
    again = dropped(checkpoint.model, tmp_path)
    assert again == verdicts  # all read back: no block was open


@pytest.mark.parametrize("family", MIXTURES)
def test_only_some_experts_is_the_model_without_the_others(family):
    """The router may not choose those that are gone: as if their logits were at minus infinity."""
    model = make_model(family)
    block = blocks_of(model)[-1]
    (mixture,) = mixtures(block)
    before = [p.clone() for p in block.parameters()]
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with only(mixture, [0, 2]):
            found = mixture.module(x)
            picks = mixture.router(x.view(-1, 32))[2]
            assert picks.max() == 1
        logits = mixture.router(x.view(-1, 32))[0]
        assert torch.equal(logits[:, [0, 2]].topk(2, dim=-1).indices, picks)
        weights = [mixture.experts.run(expert, x.view(-1, 32)) for expert in (0, 2)]
    found = (found[0] if isinstance(found, tuple) else found).view(-1, 32)
    if family in ("mixtral", "gpt_oss"):  # both experts are chosen, with weights that add up to one
        share = logits[:, [0, 2]].softmax(-1)
        torch.testing.assert_close(found, share[:, :1] * weights[0] + share[:, 1:] * weights[1], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True))
    assert mixture.router.num_experts == mixture.experts.module.num_experts == 4


def test_scores_are_those_of_every_token_and_expert_one_by_one(tmp_path, monkeypatch):
    model = make_model("qwen3_moe")
    meters = []
    score = experts_file._score

    def note(*args):
        meters.append(score(*args))
        return meters[-1]

    monkeypatch.setattr(experts_file, "_score", note)
    dropped(model, tmp_path, propagate="dense")
    (mixture,), (meter,) = mixtures(blocks_of(model)[0]), meters[0]
    tokens, norms, squares = torch.zeros(3, 4, dtype=torch.float64)
    caught = []
    handle = mixture.module.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        for document in CALIBRATION.documents:
            caught.clear()
            model(input_ids=torch.tensor([document.ids]))
            _, weight, index = mixture.router(caught[0].view(-1, 32))
            for place, code in enumerate(document.codes):
                for slot in range(2):
                    expert = int(index[place, slot])
                    out = mixture.experts.run(expert, caught[0].view(-1, 32)[place][None])
                    size = float(weight[place, slot] * out.norm())
                    worth = [0.0, *(CALIBRATION.weights.get(r, 0.0) for r in REGIONS)][code]
                    tokens[expert] += worth
                    norms[expert] += worth * size
                    squares[expert] += worth * size**2
    handle.remove()
    torch.testing.assert_close(meter.tokens, tokens)
    torch.testing.assert_close(meter.norms, norms, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(meter.squares, squares, rtol=1e-5, atol=1e-7)
    best = {name: set(meter.best(HALF, make())) for name, make in EXPERT_SCORES.items()}
    assert best["reap"] == set((norms / tokens).topk(2).indices.tolist())
    assert best["output"] == set(squares.topk(2).indices.tolist())
    assert best["frequency"] == set(tokens.topk(2).indices.tolist())


@pytest.mark.parametrize("score", EXPERT_SCORES)
def test_an_expert_that_does_nothing_or_is_never_asked_goes_first(score, tmp_path):
    model = make_model("gpt_oss")
    with torch.no_grad():
        for block in blocks_of(model):
            (mixture,) = mixtures(block)
            if score == "frequency":
                mixture.router.bias[1] = -1e4
            else:
                mixture.experts.module.down_proj[1] *= 1e-4
                mixture.experts.module.down_proj_bias[1] *= 1e-4
    verdicts = dropped(model, tmp_path, FewerExperts(0.25), score)
    assert [verdict.kept["mlp"] for verdict in verdicts] == [[0, 2, 3]] * 2
    errors = [verdict.results[0].error_held_out for verdict in verdicts]
    assert max(errors) < 1e-6 if score == "frequency" else max(errors) < 1
    note = verdicts[0].results[0].note
    assert note == ("1 of 4 experts saw no calibration token" if score == "frequency" else "")


def test_errors_are_those_of_the_mixtures_output(tmp_path):
    model = make_model("qwen3_moe")
    verdicts = dropped(model, tmp_path, propagate="dense")
    (mixture,) = mixtures(blocks_of(model)[0])
    caught = []
    handle = mixture.module.register_forward_hook(lambda module, args, out: caught.append(out))
    with torch.no_grad():
        for document in CALIBRATION.held_out:
            model(input_ids=torch.tensor([document.ids]))
            with only(mixture, verdicts[0].kept["mlp"]):
                model(input_ids=torch.tensor([document.ids]))
    handle.remove()
    lost = sum(float((a - b).square().sum()) for a, b in zip(caught[::2], caught[1::2], strict=True))
    size = sum(float(a.square().sum()) for a in caught[::2])
    assert verdicts[0].results[0].error_held_out == pytest.approx(lost / size, rel=1e-4)


def test_it_goes_on_after_the_last_block_that_was_written(tmp_path):
    model = make_model("qwen3_moe")
    whole = dropped(model, tmp_path)
    entries = json.loads((tmp_path / "experts.json").read_text())
    (tmp_path / "experts.json").write_text(json.dumps(entries[:1]))
    again = dropped(model, tmp_path)
    assert [one.kept for one in again] == [one.kept for one in whole]
    assert again[1].results[0].error_held_out == whole[1].results[0].error_held_out


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        dropped(make_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="is none of 4 experts: ask for more than 12.5 %"):
        dropped(make_model("mixtral"), tmp_path, FewerExperts(0.1))
    nested = tf.HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, head_dim=8)
    with pytest.raises(ValueError, match="HunYuanMoEV1Moe has no router that secateurs knows"):
        dropped(tf.HunYuanMoEV1ForCausalLM(nested), tmp_path)
    with pytest.raises(ValueError, match="would leave 1 of 4 experts, and a token goes to 2"):
        dropped(make_model("mixtral"), tmp_path, FewerExperts(0.75))
    with pytest.raises(ValueError, match="would leave 1 of 4 experts of each of 2 groups, and a token goes to 2"):
        dropped(model_of("grouped"), tmp_path, FewerExperts(0.75))
    pattern = "prune.pattern={name='experts', sparsity=0.5}"
    with pytest.raises(
        ValueError, match="solver `admm` cannot solve for pattern `experts`; .* output, reap, frequency"
    ):
        load_recipe("demo", [pattern, "sweep.solver=[{name='admm'}]"])
    with pytest.raises(ValueError, match="takes no goal and no tune"):
        load_recipe("demo", [pattern, "sweep.solver=[{name='reap'}]", "prune.goal='residual'"])
    assert "50 % of the experts' memory" in gains(HALF)[0][1]


def test_a_checkpoint_that_sees_keeps_what_it_sees_with(tmp_path):
    """The text model does not use the vision tower, which the folder's configuration still has."""
    small = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    text = {**small, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
    seeing = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = tf.Qwen3_5MoeConfig(text_config=text, vision_config=seeing)
    tf.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint(str(tmp_path / "dense"))
    unused = {key for key, _ in checkpoint.unused()}
    assert unused and all("visual" in key for key in unused)
    verdicts = dropped(checkpoint.model, tmp_path, opened=checkpoint.opened)
    facts = {"provenance": FACTS, "layers": [], "probe_ids": [3, 4, 5, 6], "smaller": ExpertTrimmer}
    opened = keeping(verdicts, checkpoint.model, checkpoint.opened)
    export(checkpoint, Tokenizer(), [[] for _ in verdicts], opened, tmp_path / "out", **facts)
    options = {"output_loading_info": True}
    model, found = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **options)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert model.config.get_text_config().num_experts == 2
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(kept[key], whole[key]) for key in unused)


def test_a_model_that_does_not_say_how_many_experts_a_token_goes_to_is_refused(monkeypatch):
    model = make_model("mixtral")
    monkeypatch.setattr("secateurs.cuts.CHOSEN", ("number_of_experts",))
    with pytest.raises(ValueError, match="MixtralForCausalLM does not say to how many experts a token goes"):
        HALF.check(model)
