"""Which engine gains from a pruned model: what each does with zeros, and with a smaller dense model, late in 2026."""

from secateurs.cuts import Cut, Depth, FewerExperts, Hidden, Width
from secateurs.packed import GROUP, HALF_FROM, KEPT
from secateurs.patterns import NM, Pattern

NOTHING = "loads it; no faster and no smaller than dense"
NOT_QWEN2 = "; not a Qwen2, whose heads it takes to be as wide as the stream"
DENSE = "loads it as a dense model; "
GONE = {
    "vLLM": f"{DENSE}its 2:4 kernels were removed in 2026",
    "SGLang": f"{DENSE}its 2:4 path has not worked since 2025",
    "TensorRT-LLM": f"{DENSE}its 2:4 path was part of the backend that was removed in 2026",
}


def gains(pattern: Pattern | Cut, rounded: bool = False) -> list[tuple[str, str]]:
    """(engine, what it gains) for the output of a pattern, maybe of int4 numbers. What is not measured by `secateurs
    bench` is no promise."""
    if rounded:
        stored = "its linear layers exactly, in 4.25 bits a weight, zeros too"
        served = "the same, for int4 kernels (experts are refused); a smaller model is faster still, zeros are not"
        ways = [("secateurs pack --weights int4 (CPU)", stored), ("vLLM, SGLang, by its --format", served)]
        return [*gains(pattern), *ways]
    if isinstance(pattern, Cut):
        cache = pattern.attention == "kv_heads" if isinstance(pattern, Width) else not isinstance(pattern, Hidden)
        said = f"about 1 / (1 - {pattern.sparsity:g}) in its blocks" + (", and a smaller KV cache" if cache else "")
        if isinstance(pattern, FewerExperts):
            said = (
                f"{100 * pattern.sparsity:g} % of the experts' memory; a token goes to as many, so time only in batches"
            )
        if isinstance(pattern, Depth):
            said += "; reasoners that were tried lost most of their answers"
        reshaped = isinstance(pattern, Hidden) or (isinstance(pattern, Width) and pattern.attention != "none")
        return [
            (engine, said + NOT_QWEN2 if reshaped and engine in ("vLLM", "SGLang", "llama.cpp") else said)
            for engine in ("transformers", "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp", "OpenVINO")
        ]
    halves = isinstance(pattern, NM) and GROUP % pattern.m == 0 and HALF_FROM < pattern.n / pattern.m <= KEPT / GROUP
    twice = "matrices up to twice, tokens 1.3 to 1.7 times as fast as dense bfloat16"
    packed = twice if halves else "less memory, time with AVX-512 only; 4:8 is faster"
    return [
        ("transformers", NOTHING),
        *((engine, gone if isinstance(pattern, NM) else NOTHING) for engine, gone in GONE.items()),
        ("llama.cpp", NOTHING),
        ("secateurs pack (CPU)", f"one row at a time, with AVX-512 a few: {packed}; measure it with `bench`"),
    ]
