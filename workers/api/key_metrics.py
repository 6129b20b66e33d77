"""What each API key has asked for, by the key's name. There are as many names as the keys have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from workers.api.access_log import RequestRecord

PREFIX = "vlm_key_"
TEXTS = {
    "requests": "Requests to the model, by the name of their API key",
    "refused_requests": "Those of them that ended with an error",
    "prompt_tokens": "Tokens of their prompts",
    "output_tokens": "Tokens of their answers",
}


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    refused_requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class KeyMetrics:
    """`names` of the keys; without any, nothing is counted. Requests without a valid key count under the
    empty name."""

    def __init__(self, names: Iterable[str]) -> None:
        found = dict.fromkeys(names)
        self._counts = {name: _Counts() for name in (*found, "")} if found else {}

    def count(self, record: RequestRecord) -> None:
        """A request to the model that has ended."""
        if (counts := self._counts.get(record.key_name)) is None:
            return
        counts.requests += 1
        counts.refused_requests += bool(record.failed_status)
        if record.answer is not None:
            usage = record.answer.usage
            counts.prompt_tokens += usage.num_prompt_tokens
            counts.output_tokens += usage.num_output_tokens

    def collector(self, may_see: Callable[[str], bool]) -> Collector:
        """Of the names that a reader may see."""
        return _KeyCollector({name: counts for name, counts in self._counts.items() if may_see(name)})


class _KeyCollector(Collector):
    def __init__(self, counts: Mapping[str, _Counts]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Family]:
        for metric, text in TEXTS.items() if self._counts else ():
            family = Family(PREFIX + metric, text, "unknown")  # the library renames what it calls a counter
            for name, counts in self._counts.items():
                family.add_sample(PREFIX + metric, {"key": name}, getattr(counts, metric))
            yield family
