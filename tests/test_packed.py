"""Packed matrices and models: the same bits as dense kernels, the same answers as the model that was packed."""

import json
import pickle
from copy import deepcopy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import cache_utils

from families import SMALL, make_model
from processes import fork_workers
from secateurs import collect, kernels
from secateurs.artifacts import write_json
from secateurs.bench import Quality, Row, Speed, _Bench, bench, load_any, table, to_html
from secateurs.export import mask_hash
from secateurs.models import BUNDLED, linears, load_model, model_path
from secateurs.packed import PackedMatrix
from secateurs.packing import _rounded, pack
from secateurs.runtime import FEW, PackedLinear, load_packed
from test_cli import call

compiled = pytest.mark.skipif(kernels.library() is None, reason="installed without a C compiler: no kernels to test")
SHAPES = [(1, 1), (3, 7), (5, 8), (8, 63), (9, 64), (17, 65), (4, 130), (33, 200), (70, 577)]


def sparse(rows: int, d_in: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Random weights, half of them zero; one row without weights and one without zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, d_in, generator=generator)
    weight *= torch.rand(rows, d_in, generator=generator) < density
    weight[0] = 0
    weight[-1] = torch.randn(d_in, generator=generator)
    return weight


def halved(weight: torch.Tensor, m: int = 8) -> torch.Tensor:
    """The larger half of each m weights of a row, as 4:8 or 2:4 keep them."""
    rows, d_in = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -d_in % m)).view(rows, -1, m)
    largest = groups.abs().argsort(2, descending=True).argsort(2) < m // 2
    return (groups * largest).view(rows, -1)[:, :d_in].contiguous()


def levels() -> list[int]:
    """Those that this processor can run: the lower ones too, but on ARM."""
    best = kernels.best_level()
    return [0, best] if kernels.level_name(best) == "neon" else list(range(best + 1))


def check_products(x: torch.Tensor, wanted: torch.Tensor, *matrices: PackedMatrix) -> dict[int, torch.Tensor]:
    """Products of the first matrix, vector by vector, are those that are wanted; any batch, any number of threads and
    the other matrices give the same bits. Returns them by level."""
    first, products = matrices[0], {}
    bound = 1e-5 * (x.abs().double() @ first.dense().abs().double().T) + 1e-12
    for level in levels():
        alone = torch.cat([first.multiply(row[None], level=level, threads=1) for row in x])
        assert bool(((alone.double() - wanted).abs() <= bound).all())
        for batch in (1, 2, 3, 4, 8, 9):
            for threads in (1, 2):
                for matrix in matrices:
                    found = matrix.multiply(x[:batch], level=level, threads=threads)
                    assert torch.equal(found, alone[:batch])
        products[level] = alone
    return products


@compiled
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_products_are_those_of_the_dense_kernel_to_the_bit(shape, weights):
    weight = sparse(*shape)
    packed, dense = (PackedMatrix.of(weight, weights, layout) for layout in ("packed", "dense"))
    assert (packed.layout, dense.layout) == ("packed", "dense") and torch.equal(packed.dense(), dense.dense())
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ packed.dense().double().T
    check_products(x, wanted, packed, dense)


@compiled
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_halves_are_right_whatever_the_batch_and_the_threads(shape, weights):
    half = PackedMatrix.of(halved(sparse(*shape)), weights, "half")
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(1))
    check_products(x, x.double() @ half.dense().double().T, half)


@compiled
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_whole_numbers_with_halves_are_those_of_the_dense_kernel_to_the_bit(shape, weights):
    """Sums of small whole numbers are exact in any order, so nothing may differ where the order does."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-100, 101, shape, generator=generator).float()
    weight[:, 0] = 127  # int8 takes them as they are
    weight = halved(weight)
    half, dense = (PackedMatrix.of(weight, weights, layout) for layout in ("half", "dense"))
    assert torch.equal(half.dense(), weight) and torch.equal(dense.dense(), weight)
    x = torch.randint(-50, 51, (9, shape[1]), generator=generator).float()
    for level in levels():
        assert torch.equal(half.multiply(x, level=level), x @ weight.T)
        assert torch.equal(dense.multiply(x, level=level), x @ weight.T)


def test_a_matrix_is_stored_in_halves_where_no_eight_columns_keep_more_than_four():
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    for m in (4, 8):
        assert PackedMatrix.of(halved(weight, m), "bf16").layout == "half"
    more = halved(weight)
    more[7, 40:45] = 1.0
    assert PackedMatrix.of(more, "int8").layout == "packed" and PackedMatrix.of(more, "int4").layout == "dense"
    with pytest.raises(ValueError, match="at most four of each eight columns"):
        PackedMatrix.of(more, "bf16", "half")
    few = halved(weight) * (torch.arange(160) % 8 < 4)
    assert 0 < float((few != 0).float().mean()) < 0.35 and PackedMatrix.of(few, "bf16").layout == "packed"
    long = halved(torch.randn(1030, 64))  # more rows than are packed at a time
    assert torch.equal(PackedMatrix.of(long.bfloat16(), "bf16").dense(), long.bfloat16().float())
    nothing = PackedMatrix.of(torch.zeros(0, 8), "bf16")
    assert nothing.layout == "dense" and nothing.dense().shape == (0, 8)
    large = halved(torch.randn(512, 1024))
    assert PackedMatrix.of(large, "bf16").nbytes == pytest.approx(512 * 1024 * 9.5 / 8, rel=0.001)
    assert PackedMatrix.of(large, "int8").nbytes == pytest.approx(512 * 1024 * 5.5 / 8, rel=0.01)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_halves_and_a_bitmap_are_one_matrix(weights):
    half = PackedMatrix.of(halved(sparse(33, 200)), weights, "half")
    packed = half.with_bitmap()
    assert packed.layout == "packed" and packed.kind == weights and torch.equal(packed.dense(), half.dense())


@pytest.mark.parametrize("part", ["kept", "places"])
def test_halves_of_the_wrong_size_are_refused(part):
    matrix = PackedMatrix.of(halved(sparse(5, 70)), "bf16", "half")
    matrix.check("layer")
    for wrong in (matrix.tensors[part][:-1].contiguous(), matrix.tensors[part].float()):
        with pytest.raises(ValueError, match="its tensors are not those of a 5 x 70 matrix"):
            PackedMatrix(5, 70, {**matrix.tensors, part: wrong}).check("layer")


@compiled
def test_whatever_places_say_a_kernel_stays_inside_its_vectors():
    """Three bits stay in a group of eight; what a damaged file says of columns that are not there is worth nothing."""
    matrix = PackedMatrix.of(halved(torch.ones(8, 65)), "bf16", "half")
    places = torch.full_like(matrix.tensors["places"], 255)
    damaged = PackedMatrix(8, 65, {**matrix.tensors, "places": places})
    damaged.check("layer")
    assert torch.equal(damaged.dense()[:, 7:64:8], torch.full((8, 8), 4.0)) and int(damaged.dense().sum()) == 8 * 32
    for level in levels():
        assert torch.equal(damaged.multiply(torch.ones(1, 65), level=level), torch.full((1, 8), 32.0))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Vectors as products with int4 see them: 8 bits for each number, and a scale for each 64."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).view(len(x), -1, 64)
    largest = groups.abs().amax(2, keepdim=True)
    numbers = (groups * torch.where(largest > 0, 127 / largest, 0)).round()
    return (numbers * (largest / 127)).view(len(x), -1)[:, : x.shape[1]]


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_int4_are_those_of_rounded_vectors(shape):
    matrix = PackedMatrix.of(sparse(*shape), "int4")
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(1))
    x[4] = 0
    wanted = rounded(x).double() @ matrix.dense().double().T
    alone = check_products(x, wanted, matrix)
    broken = x.clone()
    broken[3, 0] = float("nan")
    for level in levels():
        found = matrix.multiply(broken, level=level)
        assert bool(found[3].isnan().all()) and torch.equal(found[:3], alone[level][:3])


def test_int4_loses_less_than_the_largest_weight_at_seven_would():
    weight = sparse(64, 1000)
    matrix = PackedMatrix.of(weight, "int4")
    groups = torch.nn.functional.pad(weight, (0, 24)).view(64, -1, 64)
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-9) / 7
    plain = ((groups / scale).round() * scale - groups).square().sum()
    assert float((matrix.dense() - weight).square().sum() / plain) < 0.8
    assert bool((matrix.dense()[weight == 0] == 0).all())
    assert matrix.nbytes == pytest.approx(64 * 1024 * 4.25 / 8) and matrix.layout == "dense"
    with pytest.raises(ValueError, match="int4 is stored dense"):
        PackedMatrix.of(weight, "int4", "packed")


@pytest.mark.parametrize("part", ["weight", "scales"])
def test_int4_of_the_wrong_size_is_refused(part):
    matrix = PackedMatrix.of(sparse(5, 70), "int4")
    matrix.check("layer")
    short = matrix.tensors[part][:, :-1].contiguous()
    more = {"scale": torch.ones(5), "bits": torch.zeros(5, 2, dtype=torch.int64)}
    for wrong in ({part: short}, *({key: tensor} for key, tensor in more.items())):
        with pytest.raises(ValueError, match="its tensors are not those of a 5 x 70 matrix"):
            PackedMatrix(5, 70, {**matrix.tensors, **wrong}).check("layer")


@compiled
@pytest.mark.parametrize("format", ["packed_bf16", "packed_int8", "half_bf16", "half_int8", "dense_int4", "dense_int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expanded_by_a_kernel_or_without_it_is_the_same(shape, format, monkeypatch):
    layout, weights = format.split("_")
    weight = sparse(*shape)
    matrix = PackedMatrix.of(halved(weight) if layout == "half" else weight, weights, layout)
    assert matrix.format == format
    expanded = [matrix.dense(), *(matrix.stored.expand(level=level) for level in levels())]
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert all(torch.equal(one, matrix.dense()) for one in expanded)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_zeros_stay_and_the_rest_is_rounded_as_it_should_be(weights):
    weight = sparse(33, 200)
    for layout in ("packed", "dense"):
        back = PackedMatrix.of(weight, weights, layout).dense()
        assert bool((back[weight == 0] == 0).all())
        largest = weight.abs().amax(1, keepdim=True)
        bound = largest / 254 * 1.001 if weights == "int8" else weight.abs() / 256
        assert bool(((back - weight).abs() <= bound).all())
    assert PackedMatrix.of(sparse(33, 200, 0.9), weights).layout == "dense"
    assert PackedMatrix.of(weight, weights).layout == "packed"


def test_what_one_product_reads_is_nine_sixteenths():
    matrix = PackedMatrix.of(sparse(512, 1024), "bf16")
    assert matrix.nbytes == pytest.approx(512 * 1024 * 2 * 9 / 16, rel=0.02)
    assert PackedMatrix.of(sparse(512, 1024), "int8").nbytes == pytest.approx(512 * 1024 * 5 / 8, rel=0.02)


def pruned(family: str, folder, groups: int | None = None):
    """A tiny model with half of its linears' weights at zero (of each `groups`), and the same in float32 as stored."""
    model = make_model(family)
    with torch.no_grad():
        for block in model.get_decoder().layers:
            for linear in linears(block).values():
                weight = linear.weight
                kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
                weight.copy_(halved(weight, groups) if groups else weight * kept)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_model(str(folder)).float()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3", "phi3", "qwen3_moe", "qwen3_next"])
def test_a_packed_model_is_the_model(family, tmp_path):
    dense = pruned(family, tmp_path / "dense")
    found = pack(str(tmp_path / "dense"), tmp_path / "packed")
    assert found["packed"] > 0 and 0.4 < found["density"] < 0.9 and found["bytes"] < 0.9 * found["dense_bytes"]
    model = load_packed(tmp_path / "packed")
    for length in (5, FEW + 20):  # by the kernels, and with matrices made dense
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    if family != "qwen3_next":  # its states are float32 here and rounded there
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_model_in_halves_is_the_model(weights, tmp_path):
    dense = pruned("qwen3", tmp_path / "dense", groups=8)
    found = pack(str(tmp_path / "dense"), tmp_path / "packed", weights)
    model, exact = (load_packed(tmp_path / "packed", expand=expand) for expand in (None, True))
    if kernels.library() is not None:
        layouts = [module.matrix.layout for module in model.modules() if isinstance(module, PackedLinear)]
        assert layouts.count("half") == found["packed"] == 14
    for length in (5, FEW + 20):
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            torch.testing.assert_close(logits, exact(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
            if weights == "bf16":
                torch.testing.assert_close(logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_an_int4_model_is_near_what_its_weights_say(family, tmp_path):
    dense = pruned(family, tmp_path / "dense")
    found = pack(str(tmp_path / "dense"), tmp_path / "packed", "int4")
    assert found["packed"] == 0 and found["bytes"] < 0.6 * found["dense_bytes"]
    model, exact = (load_packed(tmp_path / "packed", expand=expand) for expand in (False, True))
    kinds = {name: module.matrix.kind for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert kinds.pop("lm_head") == "int8" and set(kinds.values()) == {"int4"}
    for name in kinds:
        assert bool((exact.get_submodule(name).weight[dense.get_submodule(name).weight == 0] == 0).all())
    for length, bound in ((5, 0.02), (FEW + 20, 1e-5)):  # by the kernels, which round vectors too; and made dense
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            wanted, logits = exact(input_ids=ids).logits, model(input_ids=ids).logits
        assert float((logits - wanted).norm() / wanted.norm()) < bound


def test_masks_are_the_ones_that_were_pruned(tmp_path):
    dense = pruned("qwen3", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed", "int8")
    model = load_packed(tmp_path / "packed")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if kernels.library() is not None:
        assert len(packed) == 15  # the head too
    for name, module in packed.items():
        kept = module.matrix.dense() != 0
        weight = dense.get_submodule(name).weight
        assert bool((kept <= (weight != 0)).all())
        if module.matrix.layout == "packed":  # what is kept and rounds to zero is still kept
            bits = PackedMatrix(module.matrix.rows, module.matrix.d_in, module.matrix.tensors | {
                "values": torch.ones_like(module.matrix.tensors["values"])
            })  # fmt: skip
            assert mask_hash(bits.dense()) == mask_hash(weight)


@compiled
def test_a_matrix_that_was_used_can_be_sent_away_and_used_again(monkeypatch):
    """What shares a tensor with another process moves it; and there may be no kernels there."""
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(1))
    for layout in ("packed", "half", "dense"):
        matrix = PackedMatrix.of(halved(sparse(5, 70)), "bf16", layout)
        wanted = matrix.multiply(x)
        for tensor in matrix.tensors.values():
            tensor.share_memory_()
        assert torch.equal(matrix.multiply(x), wanted)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(kernels, "library", lambda: None)
            sent = pickle.loads(pickle.dumps(matrix))
        assert torch.equal(sent.multiply(x), wanted) and sent.stored is not matrix.stored


@compiled
def test_a_copy_of_a_packed_model_has_weights_of_its_own(tmp_path):
    pruned("qwen2", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        copied = deepcopy(model)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                for tensor in module.matrix.tensors.values():
                    tensor.zero_()
        assert torch.equal(copied(input_ids=ids).logits, wanted)
        assert not torch.equal(model(input_ids=ids).logits, wanted)


def test_without_kernels_the_answers_are_the_same(tmp_path, monkeypatch):
    dense = pruned("qwen2", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.warns(UserWarning, match="no compiled kernels here, so the model is unpacked and no faster"):
        model, computes = load_any(str(tmp_path / "packed"))
    assert computes == "float32, made dense, no compiled kernels"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="installed without its compiled kernels"):
        PackedMatrix.of(torch.ones(1, 1), "bf16").multiply(torch.ones(1, 1))


def test_kernels_that_cannot_be_used_are_none_and_said(tmp_path, monkeypatch):
    (tmp_path / f"_packed{kernels.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    with pytest.warns(UserWarning, match="the compiled kernels cannot be used .*: install secateurs again"):
        assert kernels.library.__wrapped__() is None


def test_what_a_packed_model_cannot_do_is_said(tmp_path):
    pruned("qwen2", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    for expand in (None, True):
        with pytest.raises(ValueError, match="holds no weights that transformers could save: copy its folder"):
            load_packed(tmp_path / "packed", expand=expand).save_pretrained(tmp_path / "saved")
    model = load_packed(tmp_path / "packed")
    with pytest.raises(RuntimeError, match="tensor of 0 elements"), torch.no_grad():  # as transformers has it
        model(input_ids=torch.zeros(0, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="is packed already"):
        pack(str(tmp_path / "packed"), tmp_path / "again")
    with pytest.raises(ValueError, match="packed exists: name another folder"):
        pack(str(tmp_path / "dense"), tmp_path / "packed")
    with pytest.raises(ValueError, match="is named twice"):
        bench(["a", "b", "a"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU that torch can use"):
            bench(["a"], device="cuda")


def test_damage_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"has no packed.json; `secateurs pack` makes such a folder"):
        load_packed(model_path(BUNDLED))
    pack(BUNDLED, tmp_path / "packed")
    record = tmp_path / "packed" / "packed.json"
    sound = record.read_text()
    for damaged in ("[]", "{}", json.dumps({**json.loads(sound), "matrices": []})):
        record.write_text(damaged)
        with pytest.raises(ValueError, match="packed.json is not of this version of secateurs: pack the model again"):
            load_packed(tmp_path / "packed")
    record.write_text(sound)
    file = tmp_path / "packed" / "packed.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up_proj" not in key}, file)
    with pytest.raises(ValueError, match="packed model .* cannot be loaded"):
        load_packed(tmp_path / "packed")
    short = dict(tensors)
    short["model.layers.0.mlp.up_proj.weight"] = short["model.layers.0.mlp.up_proj.weight"][:, :-1].clone()
    save_file(short, file)
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.up_proj: its tensors are not those of a 384 x 128 matrix"
    ):
        load_packed(tmp_path / "packed")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="packed model .* cannot be loaded"):
        load_packed(tmp_path / "packed")
    with pytest.raises(ValueError, match="unknown type `float23`; there are float32"):
        load_any("bundled@float23")


WRONG = {  # in a packed matrix whose last row is full
    "more bits than weights": lambda one: {"bits": one["bits"].index_fill(0, torch.tensor([1]), -1)},
    "a bit beyond the last column": lambda one: {"bits": one["bits"] + torch.tensor([[0, 0]] * 4 + [[0, 32]])},
    "a row that begins elsewhere": lambda one: {"starts": one["starts"].index_fill(0, torch.tensor([2]), 10**6)},
    "all rows a weight later": lambda one: {
        "starts": one["starts"] + 1, "values": torch.cat([one["values"], one["values"][-1:]])
    },
    "too few weights": lambda one: {"values": one["values"][:10]},
    "too little behind them": lambda one: {"values": one["values"][:-1]},
    "strides": lambda one: {"bits": one["bits"].T.contiguous().T},
    "another type": lambda one: {"values": one["values"].half()},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bitmap_that_does_not_fit_its_weights_is_refused(wrong):
    """A kernel trusts what it is given, so nothing untrue may reach one."""
    matrix = PackedMatrix.of(sparse(5, 70), "bf16")
    matrix.check("layer")
    with pytest.raises(ValueError, match="its tensors are not those of a 5 x 70 matrix"):
        PackedMatrix(5, 70, matrix.tensors | WRONG[wrong](matrix.tensors)).check("layer")


def test_the_commands_pack_and_time(tmp_path, monkeypatch, capsys):
    fork_workers(monkeypatch)
    assert call(monkeypatch, "pack", "bundled", "--out", str(tmp_path / "packed"), "--weights", "int8") == 0
    assert "0 of 29 matrices packed, 100.0 % of weights kept" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "pack", "bundled", "--out", str(tmp_path / "other"), "--weights", "int9") == 2
    assert "--weights is 'int9'; it must be bf16, int8 or int4" in capsys.readouterr().err
    assert call(monkeypatch, "pack", "bundled", "--out", str(tmp_path / "four"), "--weights", "int4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] < 0.3 * 2 * 840_000
    words = ["bench", "bundled", str(tmp_path / "packed"), "--batch", "1", "--context", "8", "--tokens", "2"]
    words += ["--rounds", "2", "--threads", "1", "--recipe", "demo", "--set", "evaluate.num_questions=2", "--json"]
    words += ["--asked", "2"]
    kept = []
    monkeypatch.setattr(
        "secateurs.artifacts.write_json", lambda path, data: (kept.append(data), write_json(path, data))
    )
    assert call(monkeypatch, *words, "--out", str(tmp_path / "figures.json")) == 0
    result = json.loads(capsys.readouterr().out)
    told = [[bool(row["quality"]) for row in found["rows"] if row["speeds"]] for found in kept]
    assert told == [[False, False]] * 2 + [[True, True]] * 2, "after each round, and each time they were asked"
    assert result == json.loads((tmp_path / "figures.json").read_text())
    page = (tmp_path / "figures.html").read_text()
    assert (
        "1 row after 8 tokens" in page
        and "(2 of 2: 34 to 100 %" in page
        and page.count('<tr><th scope="row">bundled') == 3
    )
    dense, packed = result["rows"]
    assert dense["speeds"][0]["times_first"] == 1 and packed["speeds"][0]["tokens_per_second"] > 0
    assert packed["weight_bytes"] < 0.5 * dense["weight_bytes"] and dense["quality"]["questions"] == 2
    assert dense["quality"]["correct"] == packed["quality"]["correct"] == 2 and dense["quality"]["of_first"] == 1
    assert call(monkeypatch, "bench", "bundled", "--out", str(tmp_path / "figures.html")) == 2
    assert "it should end in .json" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "bench", "bundled", "--recipe", "demo", "--set", "evaluate.num_questions=0") == 2
    assert "the recipe asks no questions" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "bench", "bundled", "--batch", "1,x") == 2
    assert "--batch is '1,x'; it should look like 1,4,8" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_bench(tmp_path, monkeypatch):
    fork_workers(monkeypatch)
    with pytest.raises(ValueError, match="model `/nowhere`: no such folder"):
        bench(["/nowhere"], rounds=1)
    with pytest.raises(ValueError, match=f"{tmp_path}/ is named twice"):
        bench([str(tmp_path), f"{tmp_path}/"], rounds=1)


def test_packed_models_can_be_made_dense_and_a_model_that_is_never_right_has_no_time_per_answer(tmp_path, monkeypatch):
    dense = pruned("qwen2", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    model = load_packed(tmp_path / "packed", expand=True)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(ValueError, match="no kernel multiplies packed matrices on cpu here"):
        load_packed(tmp_path / "packed", expand=False)
    rows = [Row(name, "float32", 1, speeds=[Speed(1, 8, 0.1, 5.0, 1.0)]) for name in ("a", "b")]
    lengths = {"one": 4, "two": 6}
    rows[0].quality = Quality({"one": 1.0, "two": 0.0}, lengths, [3.0, 2.0, 4.0])
    rows[1].quality = Quality({"one": 0.0, "two": 0.0}, lengths, [3.0])
    found = table(rows)
    assert [row["quality"]["points"] for row in found] == [0.0, -0.5]
    assert found[0]["quality"]["spread"] == 2 and found[1]["quality"]["of_first_interval"][1] is None
    assert [row["quality"]["seconds_per_correct"] for row in found] == [3.0, None]
    page = to_html({"rows": found, "machine": {"cpu": "x", "threads": 1, "torch": "2"}})
    assert "3.00 s (1 of 2: 5 to 95 %)" in page and "- s (0 of 2: 0 to 66 %; ratio -)" in page
    json.dumps(found, allow_nan=False)


def test_embeddings_that_do_more_and_norms_without_weights_run(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    models = {
        "scaled": tf.XGLMForCausalLM(tf.XGLMConfig(**sizes, max_position_embeddings=64)),
        "bare": tf.OlmoForCausalLM(tf.OlmoConfig(**SMALL, pad_token_id=0)),
    }
    ids = torch.arange(3, 30)[None]
    for name, model in models.items():
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        model.save_pretrained(tmp_path / name)
        assert pack(str(tmp_path / name), tmp_path / f"{name}-packed")["checked"]
        packed, dense = load_packed(tmp_path / f"{name}-packed"), load_model(str(tmp_path / name))
        with torch.no_grad():
            torch.testing.assert_close(packed(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


FAULTS = {
    "a zero that is none": lambda weight: weight + (weight == 0) * weight.abs().max(),
    "a weight that is none": lambda weight: weight * (weight != weight.max()),
    "another sign": lambda weight: -weight,
    "another row's weights": lambda weight: weight.roll(1, 0),
    "half a weight": lambda weight: weight / 2,
    "no number": lambda weight: weight / weight,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("weights, groups", [("bf16", None), ("bf16", 8), ("int8", None), ("int8", 8), ("int4", None)])
def test_a_matrix_that_is_not_stored_as_it_was_is_seen(weights, groups, fault, tmp_path, monkeypatch):
    pruned("llama", tmp_path / "dense", groups)
    of = PackedMatrix.of.__func__
    monkeypatch.setattr(
        PackedMatrix, "of", classmethod(lambda cls, weight, *others: of(cls, FAULTS[fault](weight), *others))
    )
    with pytest.raises(
        RuntimeError, match=f"layers.0.self_attn.q_proj is not the same when it is packed as .*_{weights}"
    ):
        pack(str(tmp_path / "dense"), tmp_path / "packed", weights)
    assert not (tmp_path / "packed").exists()


def test_what_is_rounded_is_said(tmp_path, monkeypatch, capsys):
    model = pruned("llama", tmp_path / "bfloat16")
    model.model.layers[0].mlp.up_proj.weight.data[1] *= 1.001
    model.half().save_pretrained(tmp_path / "float16")
    for folder, weights, said in (("bfloat16", "bf16", False), ("float16", "bf16", True), ("float16", "int8", True)):
        words = ["pack", str(tmp_path / folder), "--out", str(tmp_path / f"{folder}-{weights}"), "--weights", weights]
        assert call(monkeypatch, *words) == 0
        heard = " ".join(capsys.readouterr().err.split())
        assert (f"its weights are rounded to {weights}: off by 0." in heard) == said


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_weights_of_any_size_are_what_they_were(weights):
    weight = sparse(300, 130).pow(3)  # what is best for some of int4's groups is to clip the largest
    weight[1], weight[2] = 1e-42, 1e15  # as decay leaves them: no scale of int4 is so small
    off, whole = _rounded("one", weight, PackedMatrix.of(weight, weights))
    assert 0 < off < 0.02 * whole


def test_what_the_runtime_would_say_otherwise_is_not_packed(tmp_path, monkeypatch):
    pruned("gemma3", tmp_path / "dense")
    monkeypatch.setattr("secateurs.runtime.PackedEmbedding.forward", lambda self, ids: self.table[ids].float())
    with pytest.raises(ValueError, match="the runtime does not say what Gemma3ForCausalLM says: logits are off by"):
        pack(str(tmp_path / "dense"), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    monkeypatch.setattr("secateurs.runtime.PackedEmbedding.forward", lambda self, ids: self.weight)
    with pytest.raises(ValueError, match=r"the runtime cannot run Gemma3ForCausalLM \(AttributeError: .*weight"):
        pack(str(tmp_path / "dense"), tmp_path / "packed")
    monkeypatch.setattr("secateurs.packing.available", lambda device: 1000)
    found = pack(str(tmp_path / "dense"), tmp_path / "packed")
    assert not found["checked"] and found["why_unchecked"] == "no room here to load it"
    monkeypatch.undo()
    monkeypatch.setattr(collect.Shell, "_watched", lambda self, batch: [][0])
    found = pack(str(tmp_path / "dense"), tmp_path / "other")
    assert not found["checked"] and "does not run block by block (" in found["why_unchecked"]


@pytest.mark.parametrize("family", ["qwen3_next", "mistral"])
def test_a_bench_has_the_caches_of_the_model(family, tmp_path, monkeypatch):
    """States of a linear attention, and of a window no more keys than it sees."""
    lengths = []
    update = cache_utils.DynamicSlidingWindowLayer.update
    monkeypatch.setattr(
        cache_utils.DynamicSlidingWindowLayer, "update",
        lambda self, *args, **kwargs: (update(self, *args, **kwargs), lengths.append(self.keys.shape[2]))[0],
    )  # fmt: skip
    make_model(family).save_pretrained(tmp_path)
    one = _Bench(str(tmp_path), "cpu")
    one.load()
    first, each = one.decode(2, 40, 2)
    assert first > 0 and each > 0
    assert (family == "mistral") == bool(lengths) and max(lengths, default=0) <= 8
