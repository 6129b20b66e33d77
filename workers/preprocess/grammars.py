"""Compiled grammars, by content: each is compiled once, in a process of its own (`grammar_process.py`).

A grammar that takes too much processor time or memory, or kills its process, ends in a RequestError for its
requests, and the next one gets a fresh process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import Grammar
from workers.grammars.vocabulary import GrammarVocabulary
from workers.preprocess.grammar_process import Compiled, GrammarAnswer, GrammarJob, GrammarRefused
from workers.preprocess.job_child import JobChild, start_process
from workers.preprocess.places import Places
from workers.preprocess.shortages import is_shortage, no_room
from workers.preprocess.threads import on_behalf_of

logger = logging.getLogger(__name__)
MODULE = "workers.preprocess.grammar_process"
NUM_PROCESSES = 3  # a tenant leaves one to others
MAX_KEPT_BYTES = 128 << 20
REFUSAL_BYTES = 1 << 10  # that a kept refusal counts as
# Of a process that dies of the job itself; any other death may be an accident.
FATAL_SIGNALS = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


class CompileLimits(NamedTuple):
    """Of one grammar."""

    cpu_s: float = 20.0
    memory_mib: int = 2048
    stall_s: float = 30.0  # without processor time


class _Died(Exception):
    def __init__(self, status: int | None) -> None:
        super().__init__(f"status {status}")
        self.status = status


@dataclass(slots=True, eq=False)
class _Compilation:
    task: asyncio.Task[GrammarAnswer]
    num_waiting: int = 0  # requests
    has_begun: bool = False  # in a process: it ends, and is kept, even if nobody waits any more


class Grammars:
    """Use within one event loop. No process runs before the first grammar."""

    def __init__(self, vocabulary: GrammarVocabulary, limits: CompileLimits | None = None) -> None:
        self._vocabulary, self._limits = vocabulary, limits or CompileLimits()
        self._kept: OrderedDict[bytes, GrammarAnswer] = OrderedDict()  # the least recently used first
        self._under_way: dict[bytes, _Compilation] = {}
        self._idle: list[JobChild] = []
        self.all: set[JobChild] = set()
        self._places = Places(NUM_PROCESSES)
        self.num_kept_bytes = self.num_compiled = 0

    async def compile(self, grammar: Grammar) -> bytes:
        """The compiled grammar, see `workers/grammars/compiled.py`.

        Raises RequestError for one that cannot be served. Whoever asks for the same grammar meanwhile waits
        for the same process. One that has not begun is dropped when the last who waits for it is cancelled.
        """
        digest = grammar.digest
        answer = self._kept.get(digest)
        if answer is not None:
            self._kept.move_to_end(digest)
        else:
            answer = await self._wait_for(digest, grammar)
        if isinstance(answer, GrammarRefused):
            raise RequestError(answer.reason, field=grammar.field, status=answer.status)
        return answer.data

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    async def _wait_for(self, digest: bytes, grammar: Grammar) -> GrammarAnswer:
        compilation = self._under_way.get(digest)
        if compilation is None:
            task = asyncio.create_task(self._compile(digest, grammar))
            compilation = self._under_way[digest] = _Compilation(task)
        compilation.num_waiting += 1
        try:
            return await asyncio.shield(compilation.task)  # others may wait for it
        finally:
            compilation.num_waiting -= 1
            # Else who submits and aborts without end fills the memory with what waits for a place.
            if not compilation.num_waiting and not compilation.has_begun and not compilation.task.done():
                compilation.task.cancel()
                if self._under_way.get(digest) is compilation:  # who asks from now on begins anew
                    del self._under_way[digest]

    async def _compile(self, digest: bytes, grammar: Grammar) -> GrammarAnswer:
        compilation = self._under_way[digest]
        try:
            async with self._places.take(on_behalf_of.get().asker):
                compilation.has_begun = True
                answer = await self._answer(GrammarJob(grammar, self._limits.cpu_s))
        finally:
            if self._under_way.get(digest) is compilation:
                del self._under_way[digest]
        self.num_compiled += 1
        if not isinstance(answer, GrammarRefused) or answer.status == 400:  # a shortage passes
            self._keep(digest, answer)
        return answer

    async def _answer(self, job: GrammarJob) -> GrammarAnswer:
        try:
            for is_last in (False, True):
                try:
                    return await self._try(self._idle.pop() if self._idle else await self._start(), job)
                except _Died as death:
                    # Who was idle may have ended by itself.
                    if is_last or (death.status is not None and -death.status in FATAL_SIGNALS):
                        return self._refusal(death)
        except TimeoutError:
            return GrammarRefused(
                f"the grammar could not be compiled: it stood still for {self._limits.stall_s:g} s"
            )
        except OSError as error:  # no process could be started
            info = no_room(error, "").info
            return GrammarRefused(info.message, info.status)
        raise AssertionError("the last try returns")

    def _refusal(self, death: _Died) -> GrammarRefused:
        if death.status == -signal.SIGPROF:
            limit = f"more than {self._limits.cpu_s:g} s of processor time"
            return GrammarRefused(f"the grammar takes {limit} to compile")
        if death.status is not None and -death.status in FATAL_SIGNALS:
            return GrammarRefused("the grammar cannot be compiled: it is too large or nested too deeply")
        return GrammarRefused("the grammar could not be compiled: its process was ended", 503)

    async def _try(self, child: JobChild, job: GrammarJob) -> GrammarAnswer:
        """Raises _Died, and TimeoutError for a hung child. The child is reaped first."""
        try:
            data = await child.exchange(msgspec.msgpack.encode(job), self._limits.stall_s)
        # RuntimeError: uvloop raises it for the pipe to a process that has died.
        except (asyncio.IncompleteReadError, OSError, RuntimeError) as error:
            await self._kill(child)
            if isinstance(error, TimeoutError) or is_shortage(error):
                raise
            logger.warning("a compiler of grammars ended with status %s", child.returncode)
            raise _Died(child.returncode) from None
        except BaseException:
            await self._kill(child)
            raise
        self._idle.append(child)
        answer: GrammarAnswer = msgspec.msgpack.decode(data, type=GrammarAnswer)
        return answer

    async def _start(self) -> JobChild:
        """Raises OSError for a shortage on this machine."""
        vocabulary = self._vocabulary
        ends = ",".join(map(str, vocabulary.eos_token_ids))
        process = await start_process(
            MODULE, str(vocabulary.folder), vocabulary.size, ends, self._limits.memory_mib
        )
        child = JobChild(process)
        self.all.add(child)
        return child

    async def _kill(self, child: JobChild) -> None:
        await child.kill()
        self.all.discard(child)

    def _keep(self, digest: bytes, answer: GrammarAnswer) -> None:
        self._kept[digest] = answer
        self.num_kept_bytes += _size(answer)
        while self.num_kept_bytes > MAX_KEPT_BYTES:
            self.num_kept_bytes -= _size(self._kept.popitem(last=False)[1])

    async def close(self) -> None:
        tasks = [compilation.task for compilation in self._under_way.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        while self._idle:
            await self._kill(self._idle.pop())


def _size(answer: GrammarAnswer) -> int:
    return len(answer.data) if isinstance(answer, Compiled) else REFUSAL_BYTES
