"""Starts matchers in a thread: to read a compiled grammar takes longer than a step.

begin(request) → the thread starts its matchers → take_done() → the request may be admitted
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np

from pipeline.wire.errors import ErrorInfo, RequestError
from workers.llm.request import Request
from workers.llm.sampling.matching import HostRule, Matcher
from workers.llm.sampling.tokens import TokensSoFar


class Inline(Executor):
    """Runs work at once: for tests."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


class Started(NamedTuple):
    request: Request
    outcome: tuple[Matcher, ...] | ErrorInfo | BaseException  # the last: a bug, or a broken grammar


class MatcherStarts:
    """`executor` has one thread, since rules are for one at a time; `wake` is called from it."""

    def __init__(
        self,
        rules: Sequence[HostRule],
        executor: Executor | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._rules, self._executor, self._wake = rules, executor or Inline(), wake or (lambda: None)
        self._done: queue.SimpleQueue[Started] = queue.SimpleQueue()
        self._waiting: set[Request] = set()

    @property
    def waiting(self) -> Collection[Request]:
        """The requests whose matchers are being started."""
        return self._waiting

    def begin(self, requests: Sequence[Request], compiled: bytes | memoryview) -> None:
        """Starts the matchers of a request's choices, if it uses a rule."""
        rules = [rule for rule in self._rules if requests and rule.is_asked(requests[0].sampling)]
        for request in requests if rules else ():
            request.waits_for_matchers = True
            self._waiting.add(request)
            self._executor.submit(self._start, rules, request, compiled)

    def _start(self, rules: Sequence[HostRule], request: Request, compiled: bytes | memoryview) -> None:
        """In the thread. The request's tokens do not change before it is admitted."""
        try:
            prompt, output = (
                np.array(ids, dtype=np.int32) for ids in (request.prompt_token_ids, request.output_token_ids)
            )
            tokens = TokensSoFar(prompt, output)
            matchers = tuple(rule.start(request.sampling, tokens, compiled) for rule in rules)
            self._done.put(Started(request, matchers))
        except RequestError as error:
            self._done.put(Started(request, error.info))
        except Exception as error:  # noqa: BLE001  handed to rank 0's loop
            self._done.put(Started(request, error))
        self._wake()

    def take_done(self) -> list[tuple[Request, ErrorInfo]]:
        """Lets the requests go on whose matchers have started; returns those that cannot, and why not.

        Raises what a rule raised beside RequestError.
        """
        failed: list[tuple[Request, ErrorInfo]] = []
        while self._waiting:
            try:
                request, outcome = self._done.get_nowait()
            except queue.Empty:
                break
            self._waiting.discard(request)
            request.waits_for_matchers = False
            if isinstance(outcome, BaseException):
                raise outcome
            if isinstance(outcome, ErrorInfo):
                failed.append((request, outcome))
            else:
                request.matchers = outcome
        return failed
