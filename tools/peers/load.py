"""What is asked of each server, and the figure that is taken from its answers.

The client is that of `tools.bench_serving`. Requests are made before anything is timed; all are different,
and the same for each server in a round.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.families import read_model_info
from pipeline.families.base import ImageSize
from tools.bench_serving import WORDS, Result, Workload, open_session, send
from tools.peers.adapters import Peer

SIDE = 448  # of a picture, in pixels
NUM_STREAMS = 8
PROMPT_TOKENS = 512
SHORT = 8  # words of a chat that is asked for its answer only
NUM_CHECKED = 4  # pictures whose first token is compared between servers
MAX_DIFFERENCE = 4  # tokens: templates differ in marks and line ends
Content = list[dict[str, Any]]


class Texts:
    """Contents of a user's turn, for the tokenizer of a checkpoint."""

    def __init__(self, checkpoint: Path, rng: random.Random) -> None:
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._words = [word for word in WORDS if len(tokenizer.encode(f" {word}").ids) == 1]
        vision = read_model_info(checkpoint).vision
        # With the two marks around it.
        self.tokens_of_picture = vision.num_tokens(vision.grid_of(ImageSize(SIDE, SIDE))) + 2
        self._rng = rng

    def text(self, num_tokens: int) -> Content:
        return [{"type": "text", "text": " ".join(self._rng.choices(self._words, k=num_tokens))}]

    def picture(self) -> Content:
        """A picture of noise, and a short text."""
        workload = Workload(num_words=0, num_images=1, sizes=((SIDE, SIDE),))
        ((content,),) = workload.chats(1, self._rng)
        return [content[0], *self.text(SHORT)]


class Client:
    """Asks one server. Raises RuntimeError for an answer that is not whole."""

    def __init__(self, peer: Peer, model: Path, url: str) -> None:
        self._peer, self._model, self._url = peer, model, url

    def body(self, content: Content, num_output: int) -> bytes:
        messages = [{"role": "user", "content": content}]
        body = Workload(num_output=num_output).body(messages)
        return json.dumps(self._peer.adapt(body, self._model)).encode()

    def ask(self, bodies: Sequence[bytes], num_output: int) -> list[Result]:
        """All at once."""

        async def run() -> list[Result]:
            async with open_session() as session:
                return await asyncio.gather(*(send(session, self._url, body) for body in bodies))

        results = asyncio.run(run())
        for result in results:
            if result.error:
                raise RuntimeError(result.error[:1000])
            if not result.arrivals or result.num_output_tokens != num_output:
                got = f"{len(result.arrivals)} events of {result.num_output_tokens} tokens"
                raise RuntimeError(f"asked for {num_output} tokens, got {got}")
        return results


def decode_rate(results: Sequence[Result]) -> float:
    """Tokens/s of all streams together, from the first token of the last one to the end of the first one;
    where a server answers one stream after the other, from the first token of all to the last.

    Each event counts for its share of the stream's tokens.
    """
    start = max(result.arrivals[0] for result in results)
    end = min(result.arrivals[-1] for result in results)
    if start >= end:
        start = min(result.arrivals[0] for result in results)
        end = max(result.arrivals[-1] for result in results)
    tokens = 0.0
    for result in results:
        share = (result.num_output_tokens - 1) / max(1, len(result.arrivals) - 1)
        tokens += share * sum(start < at <= end for at in result.arrivals)
    return tokens / (end - start)


def check_same_length(seen: Result, read: Result) -> None:
    """Raises RuntimeError where a server made the picture smaller or larger than it is."""
    if abs(seen.num_prompt_tokens - read.num_prompt_tokens) > MAX_DIFFERENCE:
        what = f"{seen.num_prompt_tokens} tokens with a picture"
        raise RuntimeError(f"{what}, {read.num_prompt_tokens} of as long a text")


class Load:
    """The parts by name, each a figure of one server."""

    def __init__(self, client: Client, texts: Texts, num_output: int, num_repeats: int) -> None:
        self._client, self._texts, self._num_output = client, texts, num_output
        self._repeats = range(num_repeats)  # of all parts but `together`
        self._overhead = 0  # tokens of a prompt that are not its text
        self.parts: Mapping[str, Any] = {
            "prefill": self.prefill,
            "decode1": partial(self.decode, 1),
            "decode8": partial(self.decode, NUM_STREAMS),
            "picture": self.picture,
            "together": self.together,
        }

    def first_answer(self) -> None:
        (result,) = self._client.ask([self._client.body(self._texts.text(SHORT), 1)], 1)
        self._overhead = result.num_prompt_tokens - SHORT

    def warm_up(self) -> None:
        """What is measured later, at once: so many pictures and so many streams."""
        bodies = [self._client.body(self._texts.picture(), SHORT) for _ in range(NUM_STREAMS)]
        self._client.ask(bodies, SHORT)
        self._client.ask([self._client.body(self._texts.text(PROMPT_TOKENS), SHORT)], SHORT)

    def first_tokens(self) -> tuple[str, ...]:
        """About pictures that no other part has taken from the texts before."""
        bodies = [self._client.body(self._texts.picture(), 1) for _ in range(NUM_CHECKED)]
        return tuple(self._client.ask([body], 1)[0].text for body in bodies)

    def prefill(self) -> float:
        """Tokens/s of a prompt until its first token; the median of some."""
        length = PROMPT_TOKENS - self._overhead
        bodies = [self._client.body(self._texts.text(length), 1) for _ in self._repeats]
        results = [self._client.ask([body], 1)[0] for body in bodies]
        return statistics.median(result.num_prompt_tokens / result.ttft for result in results)

    def decode(self, num_streams: int) -> float:
        rates = []
        for _ in self._repeats:
            texts = [self._texts.text(SHORT) for _ in range(num_streams)]
            bodies = [self._client.body(text, self._num_output) for text in texts]
            rates.append(decode_rate(self._client.ask(bodies, self._num_output)))
        return statistics.median(rates)

    def picture(self) -> float:
        """Seconds until the first token, less those of a text of as many tokens; the median of some."""
        differences = []
        for _ in self._repeats:
            bodies = [
                self._client.body(content, 1)
                for content in (
                    self._texts.picture(),
                    self._texts.text(SHORT + self._texts.tokens_of_picture),
                )
            ]
            seen, read = (self._client.ask([body], 1)[0] for body in bodies)
            check_same_length(seen, read)
            differences.append(seen.ttft - read.ttft)
        return statistics.median(differences)

    def together(self) -> float:
        """Seconds for as many chats with a picture as there are streams."""
        bodies = [self._client.body(self._texts.picture(), self._num_output) for _ in range(NUM_STREAMS)]
        start = time.perf_counter()
        self._client.ask(bodies, self._num_output)
        return time.perf_counter() - start
