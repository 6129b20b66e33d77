"""Writes docs/wire.md: what goes over the wire, read off the structs.

python -m tools.wire_page            # a test says whether the page is up to date
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import msgspec

from pipeline.transport.ends import MAX_FRAMES
from pipeline.transport.sockets import UNIONS
from pipeline.wire.clients import PROTOCOL_VERSION, IngestMessage, OutputsMessage, SubmitRequest
from pipeline.wire.control import ControlMessage
from pipeline.wire.prompts import Chat, ChatMessage
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import EDGES, Pattern

PAGE = Path(__file__).parents[1] / "docs" / "wire.md"
CLIENT_UNIONS = {"ingest": IngestMessage, "outputs": OutputsMessage, "control": ControlMessage}
EXAMPLE = SubmitRequest(
    client_id=bytes(range(16)), request_id="r1", attempt=1, prompt=Chat((ChatMessage("user", "Hello"),)),
    sampling=SamplingParams(temperature=0.0, seed=7, max_tokens=2),
)  # fmt: skip
FORMS = r"""## Forms of answers, functions and thoughts

The pipeline forces a form, but neither splits nor parses an answer: its tokens are what the model wrote.

- `sampling.grammar` is the form of each choice: `kind` and `source`, a text. A `json_schema` is the schema's
  JSON, a `choice` a JSON list of texts, a `structural_tag` xgrammar's JSON; all kinds are in
  [structured-output.md](structured-output.md). `RequestFailed` names what cannot be served by the grammar's
  `field`.
- `tools` of a chat are functions as OpenAI's clients write them: a list in JSON, as bytes. The model's own
  template shows them, and says how a call is written ([tools.md](tools.md)).
- A function that must be called is a grammar, too; the tools are then only those that may be called. One call
  of one function, written as JSON in tags, is this `structural_tag` (for several functions, and for XML:
  `pipeline/parsers/`):

```json
{"type": "structural_tag", "format": {"type": "tag",
  "begin": "<tool_call>\n{\"name\": \"NAME\", \"arguments\": ",
  "content": {"type": "json_schema", "json_schema": PARAMETERS},
  "end": "}\n</tool_call>"}}
```

- Where the model thinks first, a grammar begins behind the thought: a `sequence` of a `tag` whose content is
  `any_text` and whose end is `</think>`, and of the form. `thinking_budget` needs `thinking_end`, the tokens
  of `</think>`.
- Tags of calls and thoughts may be special tokens: do not leave them out of the text.
- `sampling.truncate_prompt_tokens` keeps only the prompt's last tokens. `trace` is the caller's place in its
  trace ([tracing.md](tracing.md)); without one the field is left out.
"""
INTRODUCTION = f"""# The wire

Version {PROTOCOL_VERSION}. Written by `tools/wire_page.py` from the structs in `pipeline/wire/`: change
those, not this page. `tests/js/client.mjs` is a client that was written from it.

## How to submit a request

All sockets are in the run directory, as `ipc://RUN_DIR/NAME`. A message is MessagePack: a map whose `type`
names the struct. Fields that have a default may be left out; unknown fields are refused. `bytes` are
MessagePack's binary type; token ids, and logprobs as float32, are packed little-endian in them. A message
that cannot be decoded is dropped and counted (`refused_messages` in `/metrics`): there is nobody to answer.

1. **control**: SUB, connect to `control`, subscribe to the empty topic. Frames: topic, message.
   `PipelineState` comes at once and then every second. It names each worker (a pair of role and rank) with
   its *epoch*, and in `leads` the LLM ranks that lead a group.
2. **outputs**: draw a client id of 16 random bytes. For each lead L of epoch E: SUB, connect to
   `outputs.L.E`, subscribe to the client id. Frames: topic, message. No other topic is served.
3. **ingest**: PUSH, connect to `ingest.E`, E the epoch of `preprocess.0`. Send `Hello` every 0.1 s until each
   lead has answered `Welcome`. Its `protocol` must be the one that you speak: requests of a client that said
   another are refused. It names the folder with the tokenizer's files and the limits.
4. Send `SubmitRequest` with an id of your own, unique for as long as anybody remembers, and `attempt` 1.
   Media ride as further frames of the message, named by their index (`frame`), at most {MAX_FRAMES - 1}.
   A prompt of `tokens` may have media, too: its placeholders of pictures and videos must be theirs, one for
   each item or exactly as many as the item becomes; any other such token id is refused.
   Without a `seed` the request's id gives it one: an id that is used again draws the same tokens again.
5. `Accepted` comes, then `TokenOutputs`, which may hold outputs of several of your requests. `index`
   names the choice, of the `n` that the sampling asks for; `offset` counts the choice's tokens before. Where
   a gap shows, send `QueryRequest`, with how many tokens of each choice you have: it never starts anything.
   The output with a `finish_reason` is the last of its choice, and the request is over with the last choice.
   `RequestFailed` ends all choices.
6. `AbortRequest` ends a request, or with an `index` one choice. Repeat it until the terminal message is
   there.

{FORMS}
## When workers die

An epoch that grows says that a worker died and was reaped. Close the connection to the old address and
connect to the new one. Then submit again, with the next `attempt`, the same fields and, in `choices`, for
each index the tokens that you have and whether that choice is over:

- `preprocess.0` died: every request that is not accepted.
- a lead died: every request of its group (`sender` of `Accepted`), and those not accepted; but say `Hello`
  first, and wait for its `Welcome`.
- `Interrupted` came: that request.

If `reload.generation` of the state has grown since a request's first token came, its weights are gone: do not
submit it again.

Outputs of an earlier attempt are to be dropped. After 10 s of silence, say `Hello` and query: what was ended
because you did not read, or were away, answers with `Interrupted`. A request that was executing in a worker
that died (`died` in `Interrupted`; or the first 8 bytes of BLAKE2b, made for that length, of its id are among
the `executed` of the successor's state), with no new token in that attempt, should be given up after
`max_attempts` such deaths of one role in a row. For ten minutes, or until it has yielded a new token, the
pipeline runs it alone in that role (`quarantined` in `PipelineState`), whatever its client says.

## From another machine

With `--direct-port P` a gateway serves the same three edges over tcp: control at port P, ingest at P + 1,
outputs of all leads at P + 2, whatever the epochs. All sockets use CURVE, with the keys that `python -m
tools.keys` has made. The first 8 bytes of the client id are those of BLAKE2b, made for that length, of the
client's public key in its text form (Z85); only who holds the key can say or read anything under such an id.
When the epoch of `gateway.0` grows, connections are as good as new: say `Hello`, and when each lead has
answered submit everything again, with the next `attempt`.

"""


def page() -> str:
    parts = [INTRODUCTION, _edges()]
    for name, union in CLIENT_UNIONS.items():
        parts.append(f"## Messages on {name}\n\n" + "\n".join(_messages(union)))
    parts.append(_example())
    parts.append(
        "## JSON schema\n\nOf the messages on ingest, outputs and control; `bytes` are shown as base64 "
        "strings there.\n\n```json\n" + _schema() + "\n```\n"
    )
    return "\n".join(parts)


def _edges() -> str:
    rows = ["## Edges\n", "| edge | binds | connect | messages |", "| --- | --- | --- | --- |"]
    for edge in EDGES:
        binds = f"{edge.binder} ({'PULL' if edge.pattern is Pattern.PUSH_PULL else 'XPUB'})"
        names = ", ".join(f"`{struct.__name__}`" for struct in _structs(UNIONS[edge]))
        rows.append(f"| {edge.name} | {binds} | {', '.join(dict.fromkeys(edge.peers))} | {names} |")
    return "\n".join(rows) + "\n"


def _structs(union: Any) -> tuple[type, ...]:
    return typing.get_args(union) or (union,)


def _messages(union: Any) -> list[str]:
    lines = []
    for struct in _structs(union):
        lines.append(f"**{struct.__name__}**: {inspect.cleandoc(struct.__doc__ or '')}\n")
        lines.append("| field | type | default |\n| --- | --- | --- |")
        for field in msgspec.structs.fields(struct):
            default = (
                ""
                if field.required
                else repr(field.default_factory() if field.default is msgspec.NODEFAULT else field.default)
            )
            lines.append(
                f"| `{field.encode_name}` | {_type_name(field.type)} | {f'`{default}`' if default else ''} |"
            )
        lines.append("")
    return lines


def _type_name(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    name = re.sub(r"\b(pipeline\.wire\.\w+|typing)\.", "", name)
    return f"`{name}`".replace("|", "or")  # a bar would end the cell


def _example() -> str:
    data = msgspec.msgpack.encode(EXAMPLE)
    dump = "\n".join(f"{start:04x}  {data[start : start + 16].hex(' ')}" for start in range(0, len(data), 16))
    shown = json.dumps(
        msgspec.to_builtins(EXAMPLE, builtin_types=(bytes,)),
        default=lambda value: f"bytes {value.hex()}",
        indent=1,
    )
    size = f"one frame of {len(data)} bytes (a client may leave out what has a default)"
    return (
        f"## An example\n\nThis `SubmitRequest`\n\n```json\n{shown}\n```\n\nis {size}:\n\n```\n{dump}\n```\n"
    )


def _schema() -> str:
    structs = [struct for union in CLIENT_UNIONS.values() for struct in _structs(union)]
    _, components = msgspec.json.schema_components(structs, ref_template="#/$defs/{name}")
    for component in components.values():
        _same_everywhere(component)
    return json.dumps({"$defs": components}, indent=1, sort_keys=True)


def _same_everywhere(schema: dict[str, Any]) -> None:
    """Takes out what depends on the installation: the page is the same whoever writes it."""
    # Python 3.13 strips the indentation of docstrings, the versions before keep it.
    if "description" in schema:
        schema["description"] = inspect.cleandoc(schema["description"])
    for field in schema.get("properties", {}).values():
        # msgspec says this from 0.23 on.
        field.pop("propertyNames", None)


if __name__ == "__main__":
    PAGE.write_text(page())
