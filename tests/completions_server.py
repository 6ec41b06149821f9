"""A completions and chat server in a thread, with the dialect of vLLM, SGLang or llama.cpp, that misbehaves as asked.

Its "model" is a function of the request, `answer_to` the prompt if nothing else is given, so a right answer can be told
from a wrong one. With the dialect "text" it takes and gives text; with "bare" it takes ids and still gives text.

Turns in a chat become a prompt by the chat template of `tokenizer`. `parser` cuts the thinking out of a message as
vLLM's does ("reasoning", white space kept) or as SGLang's and DeepSeek's do ("reasoning_content", it is stripped).
`python tests/completions_server.py SECONDS` serves by itself, each answer after so long.
"""

import asyncio
import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable

FAULTS = (
    "status 500", "status 429", "no answer", "half an answer", "half an end", "torn JSON", "no JSON", "NaN",
    "no choices", "two choices", "wrong count", "wrong ids", "no ids", "another prompt", "slow", "endless",
)  # fmt: skip


def answer_to(prompt: list[int], size: int) -> list[int]:
    """1 to 40 ids below `size`, by the prompt alone."""
    digest = hashlib.sha256(repr(prompt).encode()).digest()
    return [(digest[i % 32] * 31 + i) % size for i in range(1 + digest[0] % 40)]


class CompletionsServer:
    """`fault(prompt, attempt)` names what goes wrong or "" for a right answer.

    It is one of FAULTS, any "status NUMBER" (`words` are its body, 429 and 503 say `retry_after`) or "sent twice",
    which is a right answer and, on the same connection, the same again.
    """

    retry_after = "0.05"
    words = json.dumps({"error": "as asked"})

    def __init__(
        self,
        size: int,
        dialect: str = "vllm",
        fault: Callable[[list[int], int], str] = lambda prompt, attempt: "",
        delay: float = 0.0,
        answer: Callable[[dict], list[int]] | None = None,
        tokenizer=None,
        parser: str = "",
    ) -> None:
        self.size, self.dialect, self.fault, self.delay, self.tokenizer = size, dialect, fault, delay, tokenizer
        self.parser = parser
        self.answer = answer or (lambda body: answer_to(body["prompt"], size)[: body["max_tokens"]])
        self.attempts: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.paths: set[str] = set()
        self.keys: set[str] = set()
        self.connections = self.in_flight = self.most_in_flight = 0
        self.broken = 0  # requests that were in flight when the server was restarted
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._port = 0
        self._run(self._open())
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        await self._close()
        handlers = asyncio.all_tasks() - {asyncio.current_task()}
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    def restart(self, seconds: float) -> None:
        """Break every connection, refuse new ones for a while, come back at the same address."""

        async def away() -> None:
            self.broken += self.in_flight
            await self._close()
            await asyncio.sleep(seconds)
            await self._open()

        asyncio.run_coroutine_threadsafe(away(), self._loop)

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def __enter__(self) -> "CompletionsServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
                body = json.loads(await reader.readexactly(length))
                self.paths.add(head.split()[1].decode())
                self.keys |= {h[15:].decode() for h in head.split(b"\r\n") if h.startswith(b"Authorization: ")}
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self._reply(body, reader, writer):
                        return
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _reply(self, body: dict, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection lives on."""
        self.bodies.append(body)
        if "messages" in body:
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            body = body | {"prompt": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
        prompt = body["prompt"]
        self.attempts[repr(prompt)] += 1
        fault = self.fault(prompt, self.attempts[repr(prompt)])
        await asyncio.sleep(self.delay)
        if fault == "no answer":
            return False
        status = fault.removeprefix("status ") if fault.startswith("status ") else "200"
        content = (json.dumps(self._answer(body, fault)) if status == "200" else self.words).encode()
        if fault == "torn JSON":
            content = content[: len(content) // 2]
        if fault == "no JSON":
            content = b"<html>a proxy speaking</html>"
        if fault == "NaN":
            content = content[:-1] + b', "logprobs": [NaN]}'
        retry = f"Retry-After: {self.retry_after}\r\n" if status in ("429", "503") and self.retry_after else ""
        length = 10**9 if fault in ("endless", "slow") else len(content)
        top = f"HTTP/1.1 {status} Said\r\n{retry}Content-Length: {length}\r\n\r\n".encode()
        writer.write(top)
        if fault in ("half an answer", "half an end"):
            writer.write(content[: len(content) // 2])
            await writer.drain()
            if fault == "half an end":  # what we send is over, but the connection is not
                writer.write_eof()
                await reader.read()
            return False
        while fault == "slow":
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)
        while fault == "endless":
            writer.write(b" " * 2**16)
            await writer.drain()
        writer.write(content + (top + content if fault == "sent twice" else b""))
        await writer.drain()
        return True

    def _answer(self, body: dict, fault: str) -> dict:
        prompt, chat = body["prompt"], "messages" in body
        if self.dialect == "text" and not chat:
            prompt = self.tokenizer(prompt)["input_ids"]  # with whatever it adds by itself
        asked = [*prompt, 1] if fault == "another prompt" else prompt
        ids = self.answer(body | {"prompt": asked})
        choice: dict = {"index": 0, "finish_reason": "length" if len(ids) == body["max_tokens"] else "stop"}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids) + (fault == "wrong count")}
        if fault == "no ids":
            ids = []
        if fault == "wrong ids":
            ids = [self.size, *ids[1:]]
        text = self.tokenizer.decode(ids) if self.dialect in ("text", "bare") else ""
        choice |= {"message": self._message(text, prompt)} if chat else {"text": text}
        answer: dict = {"usage": usage}
        if self.dialect == "llama.cpp" and body.get("verbose") and body.get("return_tokens"):
            answer["__verbose"] = {"tokens": ids, "prompt": self.tokenizer.decode(asked) if self.tokenizer else ""}
        elif self.dialect == "sglang":
            choice |= {"response_token_ids": ids, "prompt_token_ids": asked}
        elif self.dialect == "vllm":
            choice["token_ids"] = ids
            (answer if chat else choice)["prompt_token_ids"] = asked
        answer["choices"] = {"no choices": [], "two choices": [choice, choice]}.get(fault, [choice])
        return answer

    def _message(self, text: str, prompt: list[int]) -> dict:
        """A reply, its thinking cut out of it by the parser, if there is one."""
        text = text.removesuffix(self.tokenizer.eos_token)
        thought = "<think>" in text or self.tokenizer.decode(prompt).rstrip().endswith("<think>")
        if not (self.parser and thought):
            return {"role": "assistant", "content": text}
        reasoning, _, content = text.removeprefix("<think>").partition("</think>")
        if self.parser == "reasoning_content":
            reasoning, content = reasoning.strip(), content.strip()
        return {"role": "assistant", self.parser: reasoning, "content": content or None}


if __name__ == "__main__":
    server = CompletionsServer(50_000, delay=float(sys.argv[1]))
    print(server.url, flush=True)
    threading.Event().wait()
