"""Compiled grammars: once for each content, in processes with limits that may be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.generation import GenerateRequest, RequestRefused
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tests.grammars import grammar_of, schema_of, vocabulary
from tests.workers.preprocess.test_preprocessor import make_rig
from workers.grammars.compiled import unpack
from workers.preprocess import grammars as grammars_module
from workers.preprocess.grammars import CompileLimits, Grammars
from workers.preprocess.threads import Work, on_behalf_of

REGEX = grammar_of(GrammarKind.REGEX, "[a-z]{3}")
MANY = schema_of({"properties": {f"p{number}": {"type": "string"} for number in range(800)}})
CHAIN = grammar_of(
    GrammarKind.EBNF,
    "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1}" for n in range(8000)), 'r8000 ::= "y"']),
)


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars(vocabulary(), CompileLimits(cpu_s=2.0, memory_mib=256))
    yield made
    await made.close()
    assert not made.all


async def refusal(grammars: Grammars, grammar: Grammar) -> RequestError:
    with pytest.raises(RequestError) as error:
        await grammars.compile(grammar)
    return error.value


async def test_equal_grammars_are_compiled_once(grammars: Grammars) -> None:
    first, *others = await asyncio.gather(*(grammars.compile(REGEX) for _ in range(20)))
    assert {*others} == {first}
    assert await grammars.compile(Grammar(REGEX.kind, REGEX.source, "another_field")) == first
    assert grammars.num_compiled == len(grammars.all) == 1
    assert unpack(first, vocabulary().tokenizer_info()).memory_size_bytes() > 0


async def test_who_gives_up_does_not_disturb_who_waits_for_the_same(grammars: Grammars) -> None:
    one, other = (asyncio.ensure_future(grammars.compile(REGEX)) for _ in range(2))
    await asyncio.sleep(0.01)
    one.cancel()
    assert await other


async def test_what_nobody_waits_for_is_not_compiled(grammars: Grammars) -> None:
    on_behalf_of.set(Work("asked", tenant="asker"))
    slow = [schema_of({"enum": [f"v{number}" for number in range(9000)], "title": title}) for title in "ab"]
    waiting = [grammar_of(GrammarKind.REGEX, f"[a-z]{{{number}}}") for number in range(1, 50)]
    begun, *asked = (asyncio.ensure_future(grammars.compile(grammar)) for grammar in (*slow, *waiting))
    twice = asyncio.ensure_future(grammars.compile(waiting[-1]))
    await until(lambda: grammars.all)
    for one in (begun, *asked):
        one.cancel()
    await asyncio.wait([begun, *asked])
    assert grammars.num_under_way <= 3, "what has begun, and what another one waits for"
    again = grammars.compile(waiting[0])
    assert all(await asyncio.gather(twice, again))
    assert grammars.num_compiled <= 4
    await until(lambda: not grammars.num_under_way)


async def test_what_is_kept_has_a_limit(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(await grammars.compile(REGEX))
    monkeypatch.setattr(grammars_module, "MAX_KEPT_BYTES", 3 * size)
    for number in range(1, 9):
        await grammars.compile(grammar_of(GrammarKind.REGEX, f"[a-z]{{{number}}}"))
        assert grammars.num_kept_bytes <= 3 * size


@pytest.mark.parametrize(("grammar", "part"), [(MANY, "of memory"), (CHAIN, "memory")])
async def test_a_grammar_that_grows_too_much_is_refused(
    grammars: Grammars, grammar: Grammar, part: str
) -> None:
    await grammars.compile(REGEX)
    error = await refusal(grammars, grammar)
    assert error.info.status == 400
    assert part in error.info.message
    assert error.info.field == "response_format"
    started_at = time.monotonic()
    assert (await refusal(grammars, grammar)).info == error.info
    assert time.monotonic() - started_at < 0.1, "it is remembered"
    assert await grammars.compile(schema_of({"type": "integer"})), "the next one is served"


async def test_a_grammar_that_takes_too_long_is_refused_while_others_go_on(grammars: Grammars) -> None:
    slow = schema_of({"properties": {"a" * 40 + "!": {}}, "patternProperties": {"^(a+)+$": {"type": "null"}}})
    on_behalf_of.set(Work("slow", tenant="slow"))
    asked = asyncio.ensure_future(refusal(grammars, slow))
    await asyncio.sleep(0.1)
    on_behalf_of.set(Work("quick", tenant="quick"))
    assert await grammars.compile(REGEX)
    assert not asked.done()
    error = await asked
    assert (error.info.status, error.info.message) == (
        400,
        "the grammar takes more than 2 s of processor time to compile",
    )


async def test_a_killed_process_is_replaced(grammars: Grammars) -> None:
    await grammars.compile(REGEX)
    (idle,) = grammars.all
    os.kill(idle.pid, signal.SIGKILL)
    assert await grammars.compile(grammar_of(GrammarKind.REGEX, "b"))
    asked = asyncio.ensure_future(grammars.compile(schema_of({"enum": [f"v{n}" for n in range(9000)]})))
    await asyncio.sleep(0.03)
    (busy,) = grammars.all
    os.kill(busy.pid, signal.SIGKILL)
    assert await asked


async def test_who_kills_each_process_gets_an_error(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MODULE", "this")  # prints, and ends
    error = await refusal(grammars, REGEX)
    assert error.info.status == 503
    monkeypatch.undo()
    assert await grammars.compile(REGEX), "that was no fault of the grammar"


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.005)


async def test_the_llm_gets_the_compiled_grammar_behind_its_request() -> None:
    async with make_rig(1) as rig:
        rig.submit("free")
        await until(lambda: rig.llm.sent)
        assert rig.llm.frames == [()]
        assert not rig.core.grammars.all, "without a grammar no process starts"
        rig.submit("ruled", sampling=SamplingParams(grammar=REGEX))
        assert rig.core.num_held_bytes > len(REGEX.source)
        await until(lambda: len(rig.llm.sent) == 2)
        (data,) = rig.llm.frames[1]
        assert data == await rig.core.grammars.compile(REGEX)
        for message in rig.llm.take(GenerateRequest):
            rig.end(message.request_id)
        rig.check_nothing_left()


async def test_who_has_no_grammar_does_not_wait_for_one() -> None:
    async with make_rig(1) as rig:
        rig.submit("slow", sampling=SamplingParams(grammar=MANY))
        await until(lambda: rig.core.grammars.all)
        rig.submit("free")
        await until(lambda: rig.llm.sent)
        assert rig.llm.sent[0].request_id == "free"
        refused = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "[a", "guided_regex"))
        rig.submit("refused", sampling=refused)
        await until(lambda: len(rig.llm.sent) == 2)
        refusal = rig.llm.sent[1]
        assert isinstance(refusal, RequestRefused)
        assert (refusal.error.status, refusal.error.field) == (400, "guided_regex")
        assert "position 3" in refusal.error.message
