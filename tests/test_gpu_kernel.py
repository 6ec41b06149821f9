"""The Triton kernels: by its interpreter where there is no GPU, and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from secateurs.layer import Gram, LayerProblem, relative_error
from secateurs.packed import PackedMatrix
from secateurs.packing import pack
from secateurs.patterns import NM, Unstructured
from secateurs.runtime import load_packed
from secateurs.solvers.sparsegpt import SparseGPT, _columns
from test_packed import pruned, sparse

gpu = pytest.importorskip("secateurs.kernels.gpu", reason="triton is not installed", exc_type=ImportError)
from secateurs.kernels.gram import add_gram  # noqa: E402
from secateurs.kernels.sweep import sweep  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there, as surroundings.py says


def product(matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    name = matrix.format
    moved = matrix.to(torch.device(DEVICE))
    return gpu.multiply(name, moved._weights, x.to(DEVICE), matrix.rows).cpu()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (9, 65), (4, 256), (6, 577)], ids=str)
def test_products_are_right_and_the_same_packed_or_dense_whatever_the_batch(shape, weights):
    weight = sparse(*shape)
    packed, dense = (PackedMatrix.of(weight, weights, layout) for layout in ("packed", "dense"))
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    found = product(packed, x)
    wanted = x.double() @ packed.dense().double().T
    bound = 1e-5 * (x.abs().double() @ packed.dense().abs().double().T) + 1e-12
    assert bool(((found.double() - wanted).abs() <= bound).all())
    assert torch.equal(found, product(dense, x))
    assert torch.equal(found[:1], product(packed, x[:1]))


def test_activations_of_a_gpu_stay_in_their_type():
    matrix = PackedMatrix.of(sparse(6, 200), "bf16", "packed")
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = product(matrix, x)
    assert found.dtype == torch.bfloat16
    rounding = 2**-7 if DEVICE == "cpu" else 2**-8  # the interpreter cuts bits off where a GPU rounds
    torch.testing.assert_close(found.float(), x.float() @ matrix.dense().T, rtol=rounding, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="the next test does it there")
def test_a_packed_model_runs_on_it(tmp_path, monkeypatch):
    dense = pruned("qwen3", tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    monkeypatch.setattr("secateurs.runtime.has_kernels", lambda device: True)
    monkeypatch.setattr(PackedMatrix, "multiply", lambda self, x: product(self, x))
    model = load_packed(tmp_path / "packed", expand=False)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [None, 8])
def test_a_packed_model_on_a_gpu(groups, tmp_path):
    dense = pruned("qwen3", tmp_path / "dense", groups).to("cuda", torch.bfloat16)
    pack(str(tmp_path / "dense"), tmp_path / "packed")
    model = load_packed(tmp_path / "packed", "cuda", expand=False)
    for length in (5, 40):
        ids = torch.arange(3, 3 + length, device="cuda")[None]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0.1, atol=0.05)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateurs.kernels import gram, sweep
from secateurs.kernels.gpu import PIECES, ROWS, _product

types = {"values": "*bf16", "bits": "*u8", "starts": "*i64", "scale": "*fp32", "x": "*bf16", "y": "*bf16"}
types |= {name: "i32" for name in ("batch", "rows", "d_in", "pieces")}
for values, packed, batch in (("*bf16", True, 1), ("*i8", True, 16), ("*i8", False, 1)):
    constants = {"PACKED": packed, "SCALED": values == "*i8", "B": batch, "R": ROWS, "P": PIECES}
    signature = types | {"values": values} | dict.fromkeys(constants, "constexpr")
    for capability in (80, 90):
        made = triton.compile(
            ASTSource(_product, signature, constants), target=GPUTarget("cuda", capability, 32),
            options={"num_warps": ROWS},
        )
        assert made.asm["cubin"]

sizes = "tokens d_in stride tiles count width d_out row_stride column_stride"
whole = dict.fromkeys(sizes.split(), "i32")
tiles = {"TILE": gram.TILE, "TOKENS": gram.TOKENS, "CHUNK": gram.CHUNK, "BESIDE": gram.BESIDE}
columns = {name: "*fp32" for name in ("w", "strength", "u", "errors")} | {"pruned": "*u8"}
for kernel, types, constants, warps in (
    (gram._add, {"x": "*bf16", "out": "*fp32"}, tiles, gram.WARPS),
    (sweep._sweep, columns, {"R": sweep.ROWS, "C": 64}, 1),
):
    signature = {name: (types | whole).get(name, "constexpr") for name in kernel.arg_names}
    for capability in (80, 90):
        made = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        assert made.asm["cubin"]
print("compiled")
"""


def test_it_compiles_for_gpus(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


@pytest.mark.parametrize(("tokens", "d_in"), [(1, 1), (5, 7), (100, 130), (2100, 40)], ids=str)
def test_grams_are_summed_exactly_symmetric_and_right(tokens, d_in):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 2 * d_in, generator=generator).half().to(DEVICE)[:, :d_in]  # rows apart in memory
    before = torch.randn(d_in, d_in, generator=generator)
    found = (before + before.T).to(DEVICE)
    wanted = found.double() + x.double().T @ x.double()
    add_gram(found, x)
    assert torch.equal(found, found.T)
    assert float((found.double() - wanted).abs().max()) < 1e-5 * max(tokens, 4)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (5, 5), (9, 4), (64, 64), (70, 64)], ids=str)
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_columns_are_swept_in_one_launch_as_one_after_the_other(width, count, by):
    generator = torch.Generator().manual_seed(0)
    w, u = torch.randn(width, 40, generator=generator), torch.randn(80, 80, generator=generator) / 8
    u = (u if by == "rows" else u.T)[3 : 3 + count, 5 : 5 + width]
    pruned, strength = torch.rand(count, 40, generator=generator) < 0.5, torch.rand(count, generator=generator) + 0.5
    results = []
    for columns in (_columns, sweep):
        solved, errors = w.clone().to(DEVICE), torch.empty(count, 40, device=DEVICE)
        columns(solved, pruned.to(DEVICE), strength.to(DEVICE), u.to(DEVICE), errors)
        results.append((solved, errors))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="257 columns"):
        sweep(torch.empty(257, 1), pruned, strength, u, torch.empty(count, 1))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_a_gpu_prunes_as_a_cpu_does(pattern):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(384, 512, generator=generator), torch.randn(4096, 512, generator=generator)
    solved = []
    for device in ("cpu", "cuda"):
        gram = Gram.zeros(512, device)
        gram.update(x.to(device))
        problem = LayerProblem(name="one", weight=weight.to(device), gram=gram, pattern=pattern)
        solution = SparseGPT().solve(problem)
        assert int((~solution.mask).sum()) == weight.numel() // 2
        assert not bool(solution.weight[~solution.mask].any())
        solved.append((solution.mask.cpu(), relative_error(solution.weight.cpu(), weight, Gram(gram.xtx.cpu()))))
    assert float((solved[0][0] != solved[1][0]).float().mean()) < 0.01  # rounding decides between near equals
    assert abs(solved[0][1] - solved[1][1]) < 1e-3 * solved[0][1]
