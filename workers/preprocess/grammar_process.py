"""Compiles grammars in a process of its own, with limits on memory and time: a hostile grammar may grow
without end, or crash the compiler.

    python -m workers.preprocess.grammar_process <model's folder> <vocabulary> <end tokens> <MiB of memory>

Jobs come on stdin, answers go to stdout, see `job_child.py`. SIGPROF ends this process when a job exceeds its
processor time.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_never

import msgspec
import numpy as np

from pipeline.process.parent import end_with_parent
from pipeline.transport.memory import create_memory_file
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import Grammar, GrammarKind
from workers.grammars.binding import load_binding
from workers.grammars.compiled import pack, unpack
from workers.grammars.vocabulary import MASK_BITS, GrammarVocabulary
from workers.preprocess.child_limits import limit_memory, resident_bytes
from workers.preprocess.json_schemas import served
from workers.preprocess.shortages import NO_ROOM, is_shortage

MAX_NESTING = 200  # of brackets: parsers of nested things use the stack
MAX_WHITESPACE = 8  # characters between two tokens of JSON, or a model could write blanks for ever
LARGEST_KEPT = 1 << 29  # bytes; a process that does not shrink to this after a job ends itself
ANY_OBJECT = {"type": "object"}
_WARNING = re.compile(r"^\[[^\]]*\] \S+:\d+: Warning: (.*)$", re.MULTILINE)
_PLACE = re.compile(r"^(\[[^\]]*\] )?(\S+:\d+: )?(Check failed: \(.*?\) is false: )?")


class GrammarJob(msgspec.Struct, frozen=True):
    grammar: Grammar
    cpu_s: float


class Compiled(msgspec.Struct, frozen=True, tag=True):
    data: bytes  # see `workers/grammars/compiled.py`


class GrammarRefused(msgspec.Struct, frozen=True, tag=True):
    """`reason` is for clients."""

    reason: str
    status: int = 400


GrammarAnswer = Compiled | GrammarRefused


class Compiler:
    def __init__(self, vocabulary: GrammarVocabulary, memory_mib: int) -> None:
        self._size, self._memory_mib = vocabulary.size, memory_mib
        self._tokens = vocabulary.tokenizer_info()
        # One thread; no cache, which preprocess has; nothing is left to be compiled later.
        self._compiler = load_binding().GrammarCompiler(self._tokens, 1, False, -1, False)
        self._log = create_memory_file("log", 0)

    def handle(self, grammar: Grammar) -> GrammarAnswer:
        try:
            return Compiled(self._compile(grammar))
        except RequestError as refusal:
            return GrammarRefused(refusal.info.message)
        except RecursionError:
            return GrammarRefused(f"the {_name(grammar)} is nested too deeply")
        except Exception as error:  # noqa: BLE001  the compiler raises whatever its library does
            if isinstance(error, MemoryError) or "bad_alloc" in str(error):
                limit = f"the {self._memory_mib} MiB of memory that this server gives to one"
                return GrammarRefused(f"the {_name(grammar)} takes more than {limit}")
            if is_shortage(error):
                return GrammarRefused(NO_ROOM, 503)
            return GrammarRefused(f"the {_name(grammar)} cannot be compiled: {_sentence(error)}")

    def _compile(self, grammar: Grammar) -> bytes:
        if _nesting(grammar.source) > MAX_NESTING:
            raise RequestError(f"the {_name(grammar)} is nested more than {MAX_NESTING} deep")
        with self._logged() as log:
            compiled = self._compile_any(grammar)
        for text in _WARNING.findall(log()):  # xgrammar goes on without what it does not know
            raise RequestError(f"the {_name(grammar)} cannot be served in full: {text}")
        self._check_start(grammar, compiled)
        data = pack(compiled)
        if grammar.kind in (GrammarKind.EBNF, GrammarKind.STRUCTURAL_TAG):
            unpack(data, self._tokens)  # rank 0 does this without limits: what it would die of ends this one
        return data

    def _compile_any(self, grammar: Grammar) -> Any:
        match grammar.kind:
            case GrammarKind.JSON_OBJECT:
                return self._compile_schema(ANY_OBJECT)
            case GrammarKind.JSON_SCHEMA:
                return self._compile_schema(_json_of(grammar))
            case GrammarKind.REGEX:
                return self._compiler.compile_regex(grammar.source)
            case GrammarKind.CHOICE:
                rule = " | ".join(map(_literal, grammar.choices()))
                return self._compiler.compile_grammar_from_strings(f"root ::= {rule}", "root")
            case GrammarKind.EBNF:
                return self._compiler.compile_grammar_from_strings(grammar.source, "root")
            case GrammarKind.STRUCTURAL_TAG:
                tag = msgspec.json.encode(_served_tag(_json_of(grammar))).decode()
                return self._compiler.compile_structural_tag(tag)
            case _:
                assert_never(grammar.kind)

    def _compile_schema(self, schema: Any) -> Any:
        text = msgspec.json.encode(served(schema)).decode()
        # Any whitespace, but little; no properties or items that the schema does not name; in its order.
        return self._compiler.compile_json_schema(text, True, None, None, True, MAX_WHITESPACE, False)

    def _check_start(self, grammar: Grammar, compiled: Any) -> None:
        matcher = load_binding().GrammarMatcher(compiled, None, False, -1, None)
        mask = np.zeros((1, -(-self._size // MASK_BITS)), dtype=np.int32)
        if matcher.fill_next_token_bitmask(mask, 0, False) and not mask.any():
            raise RequestError(f"the {_name(grammar)} allows no answer")

    @contextlib.contextmanager
    def _logged(self) -> Iterator[Any]:
        """Yields a function that returns what was written to stderr so far."""
        os.ftruncate(self._log, 0)
        os.lseek(self._log, 0, os.SEEK_SET)
        kept = os.dup(2)
        os.dup2(self._log, 2)
        try:
            yield lambda: os.pread(self._log, 1 << 16, 0).decode(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _name(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
            return "JSON schema"
        case GrammarKind.REGEX:
            return "regular expression"
        case GrammarKind.CHOICE:
            return "list of choices"
        case GrammarKind.EBNF:
            return "grammar in EBNF"
        case GrammarKind.STRUCTURAL_TAG:
            return "structural tag"
        case _:
            assert_never(grammar.kind)


def _json_of(grammar: Grammar) -> Any:
    try:
        return msgspec.json.decode(grammar.source)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RequestError(f"the {_name(grammar)} is not JSON: {error}") from None


def _literal(text: str) -> str:
    """A string in EBNF: everything but letters and digits by its number."""
    plain = (char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}" for char in text)
    return '"' + "".join(plain) + '"'


def _served_tag(tag: Any) -> Any:
    """A structural tag with each of its JSON schemas rewritten, and OpenAI's older form in today's."""
    if isinstance(tag, dict) and "structures" in tag and "format" not in tag:
        tags = [
            {
                "type": "tag",
                "begin": one["begin"],
                "content": {"type": "json_schema", "json_schema": one["schema"]},
                "end": one["end"],
            }
            for one in msgspec.convert(tag["structures"], list[dict[str, Any]])
        ]
        tag = {"format": {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}}
        tag["type"] = "structural_tag"
    return _with_served_schemas(tag)


def _with_served_schemas(part: Any) -> Any:
    if isinstance(part, list):
        return [_with_served_schemas(one) for one in part]
    if not isinstance(part, dict):
        return part
    written = {name: _with_served_schemas(value) for name, value in part.items() if name != "json_schema"}
    if "json_schema" in part:
        is_json = part.get("style", "json") == "json"
        written["json_schema"] = served(part["json_schema"], is_json)
        if part.get("type") == "json_schema" and is_json:
            written.setdefault("max_whitespace_cnt", MAX_WHITESPACE)
    return written


def _nesting(source: str) -> int:
    """How deep brackets nest at most; those in strings count too."""
    depth = deepest = 0
    for char in source:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _sentence(error: Exception) -> str:
    """What an error of the compiler says, without its place in the compiler's files."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return _PLACE.sub("", str(error).strip().rsplit("\n", 1)[-1])


def main() -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; preprocess ends this process
    sys.modules["torch"] = None  # type: ignore[assignment]  # else the binding would import it: 190 MB
    folder, size, ends, memory_mib = sys.argv[1:5]
    vocabulary = GrammarVocabulary(Path(folder), int(size), tuple(map(int, ends.split(","))))
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    compiler = Compiler(vocabulary, int(memory_mib))
    limit_memory(int(memory_mib))
    while len(head := jobs.read(4)) == 4:
        job = msgspec.msgpack.decode(jobs.read(*struct.unpack("<I", head)), type=GrammarJob)
        signal.setitimer(signal.ITIMER_PROF, job.cpu_s)
        answer = msgspec.msgpack.encode(compiler.handle(job.grammar))
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            answers.write(struct.pack("<I", len(answer)) + answer)
            answers.flush()
        except BrokenPipeError:
            return  # preprocess has died, and the signal of `end_with_parent` is still to come
        if resident_bytes() > LARGEST_KEPT:
            return


if __name__ == "__main__":
    main()
