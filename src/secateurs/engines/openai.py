"""Any OpenAI-compatible server, or several: exact ids over HTTP, asked again until an answer is right. No torch."""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, Literal, NoReturn

import httpx

from secateurs.engines import Completion, Request, Sampling
from secateurs.prompts import chat_text, messages, rejoin

LONGEST_PAUSE = 30.0  # seconds between two attempts, unless a server asks for more
LONGEST_REQUEST = 600.0  # seconds a server may ask us to wait
PATIENCE = 1800.0  # seconds that servers may put us off in all while none of them answers
POOLED = 8  # connections a client, as httpx looks at all of a client, several times, for every request
BYTES_A_TOKEN = 64  # of an answer's JSON, generously; anything longer is no answer
ASK_IDS = {"return_token_ids": True, "return_tokens": True, "verbose": True}  # vLLM and SGLang; llama.cpp the others
ID_FIELDS = ("token_ids", "response_token_ids", "tokens")  # vLLM, SGLang, llama.cpp
NOTHING_ELSE = {  # servers have defaults of their own, the model's generation_config (vLLM) or min_p = 0.05 (llama.cpp)
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "samplers": ["temperature", "top_k", "top_p"],  # llama.cpp, which would otherwise apply the temperature last
}
LOST = 8, 0.25  # tokens and share of them that a text may lack of what the server counted
AGAIN = {408, 409, 425, 429}  # and every 5xx
LATER = {429, 503}  # and whatever comes with Retry-After
GO_ON = "What is stored stays; run the command again once the server answers."


class _Fault(Exception):
    """An answer that is worth asking for again."""


class _NotNow(_Fault):
    """No answer yet, which is no failed attempt: the server puts us off, maybe by `after` seconds, or is `gone`."""

    def __init__(self, what: str, after: float = 0.0, gone: bool = False) -> None:
        super().__init__(what)
        self.after, self.gone = after, gone


@dataclass(eq=False)
class _Server:
    """What one run of generate knows of a server. `freed`, which all share, wakes whoever waits for any of them."""

    url: str
    room: int  # requests it may have at once: half as many when it puts us off, one more with every answer
    freed: asyncio.Event
    clients: dict[httpx.AsyncClient, int] = field(default_factory=dict)  # and how many requests each has
    in_flight: int = 0
    resting: int = 0  # pauses that are not over
    gone: int = 0  # times in a row that it could not be reached
    put_off: float = 0.0  # seconds it put us off by since its last answer

    @contextmanager
    def client(self) -> Iterator[httpx.AsyncClient]:
        """The one with the fewest requests, for one more."""
        client = min(self.clients, key=lambda client: self.clients[client])
        self.clients[client] += 1
        try:
            yield client
        finally:
            self.clients[client] -= 1

    def free(self, in_flight: int = 0, resting: int = 0) -> None:
        self.in_flight -= in_flight
        self.resting -= resting
        self.freed.set()
        self.freed.clear()


@dataclass(frozen=True, kw_only=True)
class OpenAI:
    """Completions of exact prompt ids by vLLM, SGLang, llama.cpp or what speaks like them, many at once.

    A prompt goes out as ids, so that the chat template is ours and no second BOS appears, and ids come back
    (`return_token_ids`). An answer counts only if its ids are as many as the server says it made, belong to the
    vocabulary and answer the prompt that was sent. With `allow_retokenised` text goes out and text comes back, for
    servers without ids: retokenised text differs from what was sampled, so such traces are nearly on-policy, not
    exactly. With the endpoint `chat` a prompt goes out as the turns it was made of, and counts only if the server's
    chat template makes the same of them as ours.

    Anything that may pass (a lost connection, 5xx, an answer that is wrong) is asked again, after a pause that doubles
    and is jittered, up to `attempts` times and by another server where there is one. A server that says "later" (429,
    503, Retry-After) or cannot be reached is left alone for a while, and what it did not take counts as no attempt:
    that ends when each was not to be reached `attempts` times in a row or has put us off for PATIENCE seconds without
    an answer. generate raises ValueError then, and for what will not pass, with the server's own words.
    """

    servers: tuple[str, ...]
    """Base URLs, as in http://localhost:8000/v1."""
    model: str
    """The name the servers know the model by."""
    tokenizer: Any
    vocab_size: int
    endpoint: Literal["completions", "chat"] = "completions"
    concurrency: int = 64
    """Requests in flight a server."""
    timeout: float = 1800.0
    """Seconds for one whole answer."""
    attempts: int = 10
    pause: float = 0.5
    """Seconds after the first failure."""
    allow_retokenised: bool = False
    api_key_env: str = ""
    """The environment variable that holds the key, for servers that want one."""
    _random: random.Random = field(default_factory=random.Random, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.servers:
            raise ValueError('servers is empty: name at least one, as in servers = ["http://localhost:8000/v1"]')
        for url in self.servers:
            if not _is_http(url):
                raise ValueError(f"server {url!r} is no URL; it should look like http://localhost:8000/v1")
        for name in ("concurrency", "timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be above 0")
        if self.api_key_env and not self._key:
            raise ValueError(f"api_key_env names {self.api_key_env}, but no such environment variable is set to a key")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the key in {self.api_key_env} holds what no header may hold, such as a line break")

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish; at most `concurrency` times servers requests are drawn ahead.

        The event loop runs only while the caller waits here; answers on their way meanwhile stay in the sockets.
        """

        async def following() -> Completion | None:
            return await anext(stream, None)

        with asyncio.Runner() as runner:
            stream = self._stream(requests, sampling)  # which the runner closes at its end
            while True:
                clock = time.perf_counter()
                completion = runner.run(following())
                if completion is None:
                    return
                yield replace(completion, seconds=time.perf_counter() - clock)

    async def _stream(self, requests: Iterable[Request], sampling: Sampling) -> AsyncGenerator[Completion]:
        """Completions as they finish. When one request fails for good, those that finished with it come out first."""
        queue = iter(requests)
        limit = self.concurrency * len(self.servers)
        freed = asyncio.Event()
        servers = [_Server(url.rstrip("/"), self.concurrency, freed) for url in self.servers]
        pending: set[asyncio.Task[Completion]] = set()
        options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {self._key}"} if self._key else None,
            "limits": httpx.Limits(max_connections=POOLED, max_keepalive_connections=POOLED),
            "timeout": httpx.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            "verify": httpx.create_ssl_context(),
        }
        async with AsyncExitStack() as stack:
            for server in servers:
                for _ in range(-(-self.concurrency // POOLED)):
                    server.clients[await stack.enter_async_context(httpx.AsyncClient(**options))] = 0
            try:
                while True:
                    for request in islice(queue, limit - len(pending)):
                        pending.add(asyncio.create_task(self._until_right(servers, request, sampling)))
                    if not pending:
                        return
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        yield task.result()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def _until_right(self, servers: list[_Server], request: Request, sampling: Sampling) -> Completion:
        """The answer of whichever server is to be had, asked again and again."""
        failed, tried = 0, None
        while True:
            server = await self._free(servers, tried)
            server.in_flight += 1
            try:
                async with asyncio.timeout(self.timeout):
                    with server.client() as client:
                        completion = await self._ask(client, server.url, request, sampling)
                server.gone, server.put_off, server.room = 0, 0.0, min(server.room + 1, self.concurrency)
                return completion
            except TimeoutError:
                fault = _Fault(f"no whole answer within {self.timeout:g} s")
            except _NotNow as later:
                self._leave_alone(server, later, servers)
                continue
            except _Fault as error:
                fault = error
            finally:
                server.free(in_flight=1)
            failed, tried = failed + 1, server
            if failed == self.attempts:
                raise ValueError(
                    f"{server.url}: question {request.question_id!r} sample {request.sample} failed {failed} times, "
                    f"at last with: {fault}. {GO_ON}"
                )
            await asyncio.sleep(self._doubled(failed) * self._random.uniform(0.5, 1.0))

    async def _free(self, servers: list[_Server], tried: _Server | None) -> _Server:
        """The least busy server that may be asked, waited for; not the one that was `tried` if another is there."""
        while True:
            others = [s for s in servers if tried and s is not tried and not (s.resting or s.gone)] or servers
            if free := [s for s in others if not s.resting and s.in_flight < (1 if s.gone else s.room)]:
                return min(free, key=lambda s: s.in_flight)
            await servers[0].freed.wait()

    def _leave_alone(self, server: _Server, fault: _NotNow, servers: list[_Server]) -> None:
        """Let a server rest for as long as it asks, or for a pause that doubles: one for all that were in flight."""
        pause = fault.after
        if not server.resting and fault.gone:
            server.gone += 1
            pause = self._doubled(server.gone)
        elif not server.resting:
            pause = pause or min(max(self.pause, server.put_off), LONGEST_PAUSE)
            server.gone, server.put_off, server.room = 0, server.put_off + pause, max(server.room // 2, 1)
        if all(s.gone >= self.attempts or s.put_off >= PATIENCE for s in servers):
            raise ValueError(f"{server.url}: {fault}, again and again, and no server answers. {GO_ON}") from None
        if pause:
            server.resting += 1
            asyncio.get_running_loop().call_later(pause * self._random.uniform(1.0, 1.2), server.free, 0, 1)

    def _doubled(self, failures: int) -> float:
        return min(self.pause * 2 ** min(failures - 1, 50), LONGEST_PAUSE)

    async def _ask(self, client: httpx.AsyncClient, url: str, request: Request, sampling: Sampling) -> Completion:
        most = 2**20 + BYTES_A_TOKEN * (sampling.max_new_tokens + len(request.prompt_ids))
        place = f"{url}/chat/completions" if self.endpoint == "chat" else f"{url}/completions"
        try:
            async with client.stream("POST", place, json=self._body(request, sampling)) as response:
                content = bytearray()
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > most:
                        raise _Fault(f"an answer of more than {most:,} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NotNow(f"no connection ({error})", gone=True) from None
        except httpx.HTTPError as error:
            raise _Fault(f"the connection broke ({type(error).__name__}: {error})") from None
        status, after = response.status_code, _retry_after(response)
        if status in AGAIN or status >= 500:
            raise _NotNow(f"status {status}", after) if after or status in LATER else _Fault(f"status {status}")
        if status != 200:
            words = content.decode(errors="replace").replace(self._key or "\0", "(the key)").strip()[:500]
            unknown = status in (400, 422) and any(name in words for name in ("top_k", *NOTHING_ELSE, *ASK_IDS))
            if unknown and not self.allow_retokenised:
                words += ". A server that knows no ids needs traces.engine.allow_retokenised"
            raise ValueError(f"{place}: status {status}, which asking again will not mend: {words}")
        return self._completion(request, sampling, content, url)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % 2**31,  # some servers hold it in 32 bits
        }
        if not self.allow_retokenised:
            body |= {"top_k": sampling.top_k or -1} | NOTHING_ELSE | ASK_IDS
        elif sampling.top_k:
            body["top_k"] = sampling.top_k  # and no more: servers without ids refuse words they do not know
        if self.endpoint == "chat":
            return body | {"messages": self._messages(request)}
        return body | {"prompt": self._text(request) if self.allow_retokenised else list(request.prompt_ids)}

    def _messages(self, request: Request) -> list[dict[str, str]]:
        """The prompt's turns, if they are all of it."""
        text = chat_text(self.tokenizer, request.turns) if self.tokenizer.chat_template else ""
        if tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) != request.prompt_ids:
            end = self.tokenizer.decode(request.prompt_ids[-8:])
            raise ValueError(
                f"question {request.question_id!r}: its prompt, which ends in {end!r}, is not what the model's chat "
                "template makes of its turns, and a prefill cannot be sent by chat: leave `prefill` out, or use "
                'traces.engine.endpoint = "completions"'
            )
        return messages(request.turns)

    def _text(self, request: Request) -> str:
        """The prompt in words that the model's own tokenizer turns into these ids, with the BOS that it may write."""
        for ids in (request.prompt_ids, request.prompt_ids[1:]):
            text = self.tokenizer.decode(ids)
            if tuple(self.tokenizer(text)["input_ids"]) == request.prompt_ids:
                return text
        raise ValueError(
            f"question {request.question_id!r}: no text is tokenised to its prompt ids, so it can only be sent as ids"
        )

    def _completion(self, request: Request, sampling: Sampling, content: bytes | bytearray, url: str) -> Completion:
        """The answer, if it is one; _Fault if not."""
        try:
            answer = json.loads(content, parse_constant=_refuse)
            (choice,) = answer["choices"]
            reason = choice["finish_reason"]
            usage = answer["usage"]
            counted, prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Fault(f"not the JSON of one completion ({type(error).__name__}: {error})") from None
        if reason not in ("stop", "length"):
            raise _Fault(f"finish_reason {reason!r}")
        if prompt_tokens != len(request.prompt_ids):
            wrong = f"the server counts {prompt_tokens!r} prompt tokens, we sent {len(request.prompt_ids)}"
            if self.endpoint == "chat":
                self._another_template(url, wrong)
            if self.allow_retokenised:
                raise ValueError(f"{url}: {wrong}: its tokenizer is another one, or a BOS is written twice or never")
            raise _Fault(wrong)
        if self.allow_retokenised:
            ids, reason = self._retokenised(self._said(choice, request), reason, counted, sampling, url)
        else:
            ids = self._sampled(answer, choice, request, url)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise _Fault(f"token ids that are not numbers from 0 to {self.vocab_size - 1}")
        if not self.allow_retokenised and counted != len(ids):
            raise _Fault(f"{len(ids)} token ids, where the server counts {counted!r}")
        if not 1 <= len(ids) <= sampling.max_new_tokens:
            raise _Fault(f"{len(ids)} tokens, where 1 to {sampling.max_new_tokens} were asked for")
        finish: Literal["eos", "length"] = "eos" if reason == "stop" else "length"
        return Completion(request=request, ids=tuple(ids), finish=finish, seconds=0.0, source=url)

    def _sampled(self, answer: dict[str, Any], choice: dict[str, Any], request: Request, url: str) -> Any:
        """The ids that the server says it sampled, in whatever shape they came, after the right prompt."""
        verbose = answer.get("__verbose")
        llama = verbose if isinstance(verbose, dict) else {}
        ids = _first(found.get(name) for found in (choice, llama) for name in ID_FIELDS)
        if ids is None:
            raise ValueError(
                f"{url}: the answer holds no token ids, so the trace would have to be tokenised again and differ "
                "from what was sampled. Use vLLM >= 0.10.2, SGLang or a llama.cpp of 2026, or accept it: "
                "traces.engine.allow_retokenised"
            )
        echo = _first(found.get("prompt_token_ids") for found in (choice, answer))
        if echo is None and isinstance(text := llama.get("prompt"), str) and text:
            ours = self.tokenizer.decode(request.prompt_ids, clean_up_tokenization_spaces=False)
            same = self.endpoint != "chat" and self._bare(text) == self._bare(ours)
            echo = list(request.prompt_ids) if same else self._ids(text)
        if self.endpoint == "chat":
            if echo is None:
                raise ValueError(
                    f"{url}: the answer does not hold the prompt's ids, so nobody knows whether its chat template is "
                    'ours: use traces.engine.endpoint = "completions"'
                )
            if echo != list(request.prompt_ids):
                self._another_template(url, "the server's prompt has other ids than ours")
        elif echo is not None and echo != list(request.prompt_ids):
            raise _Fault("an answer to another prompt")
        return ids

    def _ids(self, text: str) -> list[int]:
        """The ids of what a server says; _Fault if that is no text."""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _Fault("half a character")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _bare(self, text: str) -> str:
        """A prompt without what decoding may add to its start or leave out there: white space and a BOS."""
        return text.lstrip().removeprefix(self.tokenizer.bos_token or "").lstrip()

    def _another_template(self, url: str, wrong: str) -> NoReturn:
        raise ValueError(
            f"{url}: {wrong}: its chat template is another one, or a BOS is written twice or never. Serve it with the "
            'template of the model to be pruned, or use traces.engine.endpoint = "completions"'
        )

    def _said(self, choice: dict[str, Any], request: Request) -> tuple[str, ...]:
        """What the text of an answer, its thinking included, may have been; _Fault if there is none."""
        if self.endpoint == "completions":
            texts: tuple[Any, ...] = (choice.get("text"),)
        else:
            message = choice.get("message")
            if not isinstance(message, dict):
                raise _Fault("no message")
            parts = message.get("reasoning") or message.get("reasoning_content") or "", message.get("content") or ""
            if not all(isinstance(part, str) for part in parts):
                raise _Fault("a message that is no text")
            texts = rejoin(self.tokenizer, request.prompt_ids, *parts)
        if not isinstance(texts[0], str):
            raise _Fault("no text")
        return texts

    def _retokenised(
        self, texts: Iterable[str], reason: str, counted: object, sampling: Sampling, url: str
    ) -> tuple[list[int], str]:
        """The ids of a text, with the end marker that it lost, and why it ended.

        Of several texts that may be meant it is the one whose ids are nearest in number to those the server counted. A
        text may have fewer, as what a model samples is not always the shortest way to write it, but not far fewer.
        """
        if type(counted) is not int:
            raise _Fault(f"a count of {counted!r} tokens")
        if counted > 1 and "" in texts:
            raise _Fault(f"no text, where the server counts {counted} tokens")
        possible = [self._ids(text) for text in texts]
        for ids in possible:
            if reason == "stop" and ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
        ids = min(possible, key=lambda ids: abs(len(ids) - counted))
        if reason == "stop" and counted - len(ids) > max(LOST[0], LOST[1] * counted):
            raise ValueError(
                f"{url}: the server counts {counted} tokens in an answer whose text has {len(ids)}, so it keeps a part "
                "to itself: set it up to return the thinking and special tokens too"
            )
        if len(ids) > sampling.max_new_tokens:
            return ids[: sampling.max_new_tokens], "length"
        return ids, reason


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _is_http(url: str) -> bool:
    try:
        return httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _retry_after(response: httpx.Response) -> float:
    """The seconds a server asks for, or those until the date it names, within reason; 0 if it asks for none."""
    words = response.headers.get("Retry-After", "0")
    try:
        seconds = parsedate_to_datetime(words).timestamp() - time.time() if ":" in words else float(words)
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_REQUEST)
