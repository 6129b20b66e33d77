"""A compiled grammar on its way from preprocess to rank 0: xgrammar's JSON, compressed."""

from __future__ import annotations

import zlib
from typing import Any

from pipeline.wire.errors import PipelineError, RequestError
from workers.grammars.binding import load_binding

LEVEL = 1  # a quarter of the size, at 150 MB/s; higher levels are slower and save little
MAX_JSON_BYTES = 128 << 20  # rank 0 keeps a part of it in memory, and reads it in a second


def pack(compiled: Any) -> bytes:
    """Raises RequestError, without a field, for a grammar that takes too much memory."""
    text = str(compiled.serialize_json()).encode()
    if len(text) > MAX_JSON_BYTES:
        size = f"{len(text) >> 20} MiB, the limit is {MAX_JSON_BYTES >> 20} MiB"
        raise RequestError(f"the compiled grammar has {size}")
    return zlib.compress(text, LEVEL)


def unpack(data: bytes | memoryview, tokenizer_info: Any) -> Any:
    """xgrammar's `CompiledGrammar`. Takes 0.2 s for a large one, most of it without Python's lock."""
    inflating = zlib.decompressobj()
    text = inflating.decompress(data, MAX_JSON_BYTES)
    if not inflating.eof:
        raise PipelineError(f"a compiled grammar is not complete, or has more than {MAX_JSON_BYTES} bytes")
    return load_binding().CompiledGrammar.deserialize_json(text.decode(), tokenizer_info)
