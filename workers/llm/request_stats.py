"""What rank 0 counts and measures of its requests, under the names that vLLM has for the same.

Of a request with several choices each choice counts. A time begins when preprocess took in the request's
first attempt, or when rank 0 did; all are of the monotonic clock, which all processes of a machine share.

    on_added → on_admitted → on_tokens … → on_ended
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.process.metrics import STAGE_SECONDS, Metrics
from pipeline.wire.sampling import FinishReason
from workers.llm.request import Request

# The bounds are vLLM's, so that a dashboard shows both servers alike.
TTFT_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
ERROR = "error"  # among the reasons for which requests finish
COUNTED = {
    "prompt_tokens": "Tokens of the prompts of accepted requests",
    "prefix_cache_queries": "Tokens that were looked up in the prefix cache",
    "prefix_cache_hits": "Tokens that the prefix cache had",
    "interrupted": "Requests interrupted by a worker's death, to be submitted again",
}


class RequestStats:
    """`clock` is the monotonic clock, in seconds."""

    def __init__(self, metrics: Metrics, max_model_len: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.counters = dict.fromkeys(COUNTED, 0)
        self._ended = dict.fromkeys((*map(str, FinishReason), ERROR), 0)
        metrics.gauge("max_model_len", "Tokens of the longest prompt and answer", lambda: max_model_len)
        metrics.counters(COUNTED, lambda: self.counters)
        metrics.labelled(
            "request_success", "Finished requests, by the reason", "finished_reason", lambda: self._ended
        )
        histogram, tokens = metrics.histogram, token_bounds(max_model_len)
        self._ttft = histogram(
            "time_to_first_token_seconds", "From the arrival to the first token", TTFT_SECONDS
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "Between two steps that gave a request tokens", ITL_SECONDS
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "A request's mean time between tokens", ITL_SECONDS
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From the arrival to the last token", REQUEST_SECONDS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "In rank 0, until the first step takes the request", REQUEST_SECONDS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token", REQUEST_SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last", REQUEST_SECONDS
        )
        self._inference = histogram(
            "request_inference_time_seconds", "From the first step to the last token", REQUEST_SECONDS
        )
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt", tokens)
        self._generation = histogram("request_generation_tokens", "Tokens of a request's answer", tokens)
        self._max_tokens = histogram("request_params_max_tokens", "The parameter max_tokens", tokens)
        self._longest = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of a request's answers", tokens
        )
        self._n = histogram("request_params_n", "The parameter n", CHOICES)
        self._hand_off = histogram(
            "stage_hand_off_seconds",
            "From a ViT's message that embeddings are there until rank 0 may read them",
            STAGE_SECONDS,
        )

    def on_embeddings(self, sent_at: float) -> None:
        """A ViT's message has reached the request that waits for it."""
        if sent_at:
            self._hand_off.observe(max(0.0, self._clock() - sent_at))

    def on_added(self, request: Request) -> None:
        request.queued_at = self._clock()
        request.arrived_at = request.arrived_at or request.queued_at

    def on_admitted(self, request: Request) -> None:
        """Only the first admission counts: a request that was preempted has not come again."""
        if request.started_at:
            return
        request.started_at = self._clock()
        self._queue.observe(request.started_at - request.queued_at)
        self.counters["prefix_cache_queries"] += len(request.prompt_token_ids)
        self.counters["prefix_cache_hits"] += request.num_cached_tokens

    @property
    def now(self) -> float:
        return self._clock()

    def on_tokens(self, request: Request, now: float) -> None:
        """A step has given the request one or several tokens; `now` is read once for all of its requests."""
        if request.first_token_at:
            self._itl.observe(now - request.last_token_at)
        else:
            request.first_token_at = now
            self._prefill.observe(now - request.started_at)
            if not request.num_earlier_tokens:  # else the first one came in an earlier attempt
                self._ttft.observe(now - request.arrived_at)
        request.last_token_at = now

    def on_failed(self) -> None:
        self._ended[ERROR] += 1

    def on_ended(self, request: Request) -> None:
        """The choice has its finish reason."""
        assert request.finish_reason is not None
        self._ended[request.finish_reason] += 1
        num_tokens = len(request.output_token_ids)
        self._e2e.observe(self._clock() - request.arrived_at)
        self._prompt.observe(len(request.prompt_token_ids))
        self._generation.observe(num_tokens)
        if request.sampling.max_tokens is not None:
            self._max_tokens.observe(request.sampling.max_tokens)
        if not request.first_token_at:
            return
        seconds = request.last_token_at - request.first_token_at
        self._decode.observe(seconds)
        self._inference.observe(request.last_token_at - request.started_at)
        if (num_new := num_tokens - request.num_earlier_tokens) > 1:
            self._tpot.observe(seconds / (num_new - 1))

    def on_all_ended(self, requests: list[Request]) -> None:
        """All choices of one request have ended in order."""
        self._n.observe(requests[0].sampling.n)
        self._longest.observe(max(len(request.output_token_ids) for request in requests))


def token_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `max_model_len`."""
    powers = (10**exponent for exponent in range(len(str(max_model_len))))
    return tuple(
        bound for power in powers for bound in (power, 2 * power, 5 * power) if bound <= max_model_len
    )
