"""Many streams at once: what the endpoint costs a token, whether every stream ends in order, and whether
`/health` answers meanwhile.

    python -m tools.bench_streams --parts cost                   # 256 streams, by HTTP and straight by ZeroMQ
    python -m tools.bench_streams --parts order --streams 1000   # the embedded model
    python -m tools.bench_streams --model FOLDER --streams 256   # other options go to the launcher

cost: the same streams are asked for by HTTP, and by bare sockets as docs/wire.md says, with nothing done to
the messages but counting their tokens. Both loads come from a process that does as little as it can. The
time of a token runs from the first stream's to the last stream's end. CPU seconds are the endpoint's alone.

order: the text of each stream is that of the same chat asked for alone, as far as the rounding of a batch
lets it; each stream has all its tokens, ends with its usage and with `[DONE]`, and nothing comes behind that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import numpy as np
import zmq

from pipeline.wire.clients import (
    PROTOCOL_VERSION,
    Hello,
    OutputsMessage,
    RequestFailed,
    SubmitRequest,
    TokenOutputs,
    Welcome,
)
from pipeline.wire.control import ControlMessage, PipelineState
from pipeline.wire.prompts import Chat, ChatMessage
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role
from tools.processes import workers_of
from tools.soak import Served, pipeline

NUM_CHATS = 32  # different ones
POLL_S = 0.02  # between two questions for /health
MAX_HEALTH_MS = 50.0  # P99


class Measured(NamedTuple):
    seconds: float  # from the submission to the end of the last stream
    num_tokens: int
    endpoint_s: float = 0.0  # CPU time of the endpoint

    @property
    def per_token(self) -> float:
        return self.seconds / self.num_tokens


def sampling_of(num_output: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


# Straight over ZeroMQ.


class BareClient:
    """Sockets and nothing else: docs/wire.md, without the parts about deaths."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._client_id = run_dir, os.urandom(16)
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(OutputsMessage)

    def __enter__(self) -> BareClient:
        state = self._state()
        epochs = {(one.worker.role, one.worker.rank): one.epoch for one in state.workers}
        self._outputs = self._context.socket(zmq.SUB)
        self._outputs.set_hwm(0)
        for lead in state.leads:
            self._outputs.connect(self._address(f"outputs.{lead}.{epochs[Role.LLM, lead]}"))
        self._outputs.subscribe(self._client_id)
        self._ingest = self._context.socket(zmq.PUSH)
        self._ingest.connect(self._address(f"ingest.{epochs[Role.PREPROCESS, 0]}"))
        welcomed: set[int] = set()
        while len(welcomed) < len(state.leads):
            self._send(Hello(client_id=self._client_id, protocol=PROTOCOL_VERSION))
            while self._outputs.poll(100):
                message = self._decoder.decode(self._outputs.recv_multipart()[1])
                if isinstance(message, Welcome):
                    welcomed.add(message.sender.rank)
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def _address(self, name: str) -> str:
        return f"ipc://{self._run_dir / name}"

    def _state(self) -> PipelineState:
        control = self._context.socket(zmq.SUB)
        control.connect(self._address("control"))
        control.subscribe(b"")
        return msgspec.msgpack.decode(control.recv_multipart()[1], type=ControlMessage)

    def _send(self, message: Hello | SubmitRequest) -> None:
        self._ingest.send(self._encoder.encode(message))

    def measure(self, num_streams: int, num_output: int) -> Measured:
        start = time.perf_counter()
        prefix = uuid.uuid4().hex
        for number in range(num_streams):
            chat = Chat((ChatMessage("user", question(number)),))
            self._send(
                SubmitRequest(
                    client_id=self._client_id, request_id=f"{prefix}-{number}", attempt=1, prompt=chat,
                    sampling=sampling_of(num_output),
                )
            )  # fmt: skip
        num_open, num_bytes = num_streams, 0
        while num_open:
            message = self._decoder.decode(self._outputs.recv_multipart()[1])
            match message:
                case TokenOutputs(outputs=outputs):
                    num_bytes += sum(len(output.new_token_ids) for output in outputs)
                    num_open -= sum(output.finish_reason is not None for output in outputs)
                case RequestFailed(error=error):
                    raise RuntimeError(error.message)
        return Measured(time.perf_counter() - start, num_bytes // 4)


# By HTTP.


class HttpStream(asyncio.Protocol):
    """Sends one request and keeps what comes, with the time of each part."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.parts: list[bytes] = []
        self.arrivals: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.arrivals.append(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    @property
    def events(self) -> list[str]:
        """Of the stream, without `data: `. Raises RuntimeError for another answer."""
        head, _, body = b"".join(self.parts).partition(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError((head + body).decode())
        return [line[6:] for line in unchunked(body).decode().split("\n\n") if line]


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body."""
    content, place = [], 0
    while (size := int(body[place : (end := body.index(b"\r\n", place))], 16)) > 0:
        content.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2
    return b"".join(content)


def question(number: int) -> str:
    return f"Tell me a story about {number % NUM_CHATS} ships."


def request_of(number: int, num_output: int, host: str) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": question(number)}], "max_tokens": num_output,
            "ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class HttpLoad:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80

    async def streams(self, numbers: Sequence[int], num_output: int) -> list[HttpStream]:
        """All at once, to their end."""
        loop = asyncio.get_running_loop()
        streams = []
        for number in numbers:
            request = request_of(number, num_output, f"{self._host}:{self._port}")
            made = partial(HttpStream, request)
            streams.append((await loop.create_connection(made, self._host, self._port))[1])
        for stream in streams:
            await stream.over
        return streams

    def measure(self, num_streams: int, num_output: int, endpoint: int) -> Measured:
        start, cpu = time.perf_counter(), cpu_seconds(endpoint)
        streams = asyncio.run(self.streams(range(num_streams), num_output))
        seconds, cpu = time.perf_counter() - start, cpu_seconds(endpoint) - cpu
        num_tokens = sum(json.loads(stream.events[-2])["usage"]["completion_tokens"] for stream in streams)
        return Measured(seconds, num_tokens, cpu)

    async def text(self, number: int, num_output: int) -> str:
        (stream,) = await self.streams([number], num_output)
        return check(stream, num_output)

    async def health(self, is_over: asyncio.Event) -> list[float]:
        """Seconds of each question for /health, on a connection of its own."""
        seconds = []
        request = f"GET /health HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n\r\n"
        while not is_over.is_set():
            start = time.perf_counter()
            reader, writer = await asyncio.open_connection(self._host, self._port)
            writer.write(request.encode())
            answer = await reader.read()
            seconds.append(time.perf_counter() - start)
            writer.close()
            if b" 200 " not in answer[:20]:
                raise RuntimeError(answer.decode())
            await asyncio.sleep(POLL_S)
        return seconds


def check(stream: HttpStream, num_output: int) -> str:
    """The text of a stream. Raises AssertionError if it is not whole, or not in order."""
    *events, last = stream.events
    assert last == "[DONE]", last
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    *chunks, usage = chunks
    assert usage["usage"]["completion_tokens"] == num_output, usage
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def put_load(url: str, num_streams: int, num_output: int) -> None:
    """A process of its own, whose CPU time is nothing but the load's. Prints the seconds of a step, from the
    first token of the last stream to its end, and its own CPU seconds in each."""
    cpu = time.process_time()
    streams = asyncio.run(HttpLoad(url).streams(range(num_streams), num_output))
    cpu = time.process_time() - cpu
    for stream in streams:
        check(stream, num_output)
    last = max((stream.arrivals for stream in streams), key=lambda arrivals: arrivals[0])
    # By number, not by events: a token may bring no text.
    print(json.dumps({"seconds": (last[-1] - last[0]) / (num_output - 1), "cpu": cpu / num_output}))


def poll_health(url: str) -> None:
    """A process of its own: its figures must not wait for the load's own work. Ends with its input."""

    async def poll() -> list[float]:
        is_over = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin, is_over.set)
        return await HttpLoad(url).health(is_over)

    print(json.dumps(asyncio.run(poll())))


async def measure_order(served: Served, num_streams: int, num_output: int) -> bool:
    load = HttpLoad(served.url)
    alone = [await load.text(number, num_output) for number in range(NUM_CHATS)]
    command = [sys.executable, "-m", "tools.bench_streams", "--poll-health", served.url]
    pipe = asyncio.subprocess.PIPE
    poller = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    start = time.perf_counter()
    streams = await load.streams(range(num_streams), num_output)
    seconds = time.perf_counter() - start
    told, _ = await poller.communicate(b"")
    milliseconds = 1000 * np.array(json.loads(told))
    median, p99 = np.percentile(milliseconds, [50, 99])
    texts = [check(stream, num_output) for stream in streams]
    others = sum(text != alone[number % NUM_CHATS] for number, text in enumerate(texts))
    print(
        f"{num_streams} streams of {num_output} tokens in {seconds:.1f} s: all whole and in order; "
        f"{others} with another text than alone\n/health, {len(milliseconds)} times meanwhile: "
        f"median {median:.1f} ms, P99 {p99:.1f} ms, longest {milliseconds.max():.1f} ms"
    )
    return bool(p99 <= MAX_HEALTH_MS)


def measure_cost(served: Served, num_streams: int, num_output: int, rounds: int) -> None:
    load, endpoint = HttpLoad(served.url), workers_of(served.process.pid)["api.0"]
    found: list[tuple[Measured, Measured]] = []
    with BareClient(served.run_dir) as bare:
        for number in range(rounds + 1):
            pair = bare.measure(num_streams, num_output), load.measure(num_streams, num_output, endpoint)
            assert pair[0].num_tokens == pair[1].num_tokens == num_streams * num_output
            if number:  # the first one fills caches
                found.append(pair)
    ratio = statistics.median(by_http.per_token / direct.per_token for direct, by_http in found)
    direct_us, http_us, endpoint_us = (
        1e6 * statistics.median(values)
        for values in (
            [direct.per_token for direct, _ in found],
            [by_http.per_token for _, by_http in found],
            [by_http.endpoint_s / by_http.num_tokens for _, by_http in found],
        )
    )
    print(
        f"{num_streams} streams of {num_output} tokens, {rounds} rounds: {http_us:.1f} us a token by HTTP, "
        f"{direct_us:.1f} us straight by ZeroMQ: {ratio:.2f}. "
        f"CPU of the endpoint: {endpoint_us:.1f} us a token"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("cost", "order"), default=["cost", "order"])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--poll-health", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--put-load", metavar="URL", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.poll_health:
        poll_health(args.poll_health)
        return 0
    if args.put_load:
        put_load(args.put_load, args.streams, args.output_tokens)
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    is_good = True
    with pipeline(["--dtype", "float32", "--max-num-seqs", "256", *options]) as served:
        if "cost" in args.parts:
            measure_cost(served, args.streams, args.output_tokens, args.rounds)
        if "order" in args.parts:
            is_good = asyncio.run(measure_order(served, args.streams, args.output_tokens))
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
