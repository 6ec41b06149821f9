"""What checking, retrying and yielding cost: the `openai` engine against a bare loop of the same requests.

    python tests/completions_server.py 0.05 &      # or any server that returns token ids
    python benchmarks/engine.py http://127.0.0.1:PORT/v1 [--model NAME] [--requests 2000] [--concurrency 64]

Both send the same bodies over as many connections; the bare loop reads the JSON and nothing more. They take turns,
three times each. The figure is requests a second of the engine over those of the loop, which has one client of httpx.
"""

import argparse
import asyncio
import random
import time
from types import SimpleNamespace

import httpx

from secateurs.engines import Request, Sampling
from secateurs.engines.openai import OpenAI


async def bare(url: str, bodies: list[dict], concurrency: int) -> None:
    """Post every body, `concurrency` at a time."""
    turn = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(limits=limits, timeout=600) as client:

        async def post(body: dict) -> None:
            async with turn:
                (await client.post(f"{url}/completions", json=body)).json()

        await asyncio.gather(*(post(body) for body in bodies))


def main() -> None:
    """Print a row a round and the ratio of the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="m")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    sampling = Sampling(temperature=0.6, top_p=0.95, max_new_tokens=options.max_new_tokens)
    engine = OpenAI(
        servers=(options.url,),
        model=options.model,
        tokenizer=SimpleNamespace(eos_token_id=0),
        vocab_size=2**31,
        concurrency=options.concurrency,
    )
    prompts = random.Random(0)
    requests = [
        Request(question_id=str(i), sample=0, prompt_ids=tuple(prompts.choices(range(100), k=200)), seed=i)
        for i in range(options.requests)
    ]
    bodies = [engine._body(request, sampling) for request in requests]
    seconds: dict[str, list[float]] = {"bare loop": [], "engine": []}
    for _ in range(3):
        clock = time.perf_counter()
        asyncio.run(bare(options.url, bodies, options.concurrency))
        seconds["bare loop"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        assert sum(1 for _ in engine.generate(requests, sampling)) == options.requests
        seconds["engine"].append(time.perf_counter() - clock)
    print("| | requests a second, best of 3 | all |\n| --- | --- | --- |")
    for name, found in seconds.items():
        rates = [options.requests / one for one in found]
        print(f"| {name} | {max(rates):.0f} | {', '.join(f'{rate:.0f}' for rate in rates)} |")
    print(f"\nthroughput of the engine over the bare loop: {min(seconds['bare loop']) / min(seconds['engine']):.2f}")


if __name__ == "__main__":
    main()
