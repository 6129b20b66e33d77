"""xgrammar's formats of what a model must write: calls of functions, and an answer behind a thought.

Pure functions on the formats' dicts; a form of calls says what one of its calls looks like.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.parsers.base import Json, ThoughtForm, ThoughtStart, Tool, ToolForm
from pipeline.wire.sampling import Grammar, GrammarKind

ANY_TEXT: Json = {"type": "any_text"}
ANY_OBJECT: Json = {"type": "object", "additionalProperties": True}


def required_calls(form: ToolForm, tools: Sequence[Tool], is_parallel: bool) -> Json:
    """One call of any of the functions; more behind it if `is_parallel`; and nothing else."""
    tags = [form.call_tag(tool) for tool in tools]
    if len(tags) == 1 and not is_parallel:
        return tags[0]
    if not is_parallel:
        return {"type": "or", "elements": tags}
    return {"type": "tags_with_separator", "tags": tags, "separator": form.separator, "at_least_one": True}


def optional_calls(form: ToolForm, tools: Sequence[Tool], is_parallel: bool) -> Json:
    """Text with calls in it. Arguments of functions that are not strict are any object."""
    given = [tool if tool.is_strict else Tool(tool.name, ANY_OBJECT) for tool in tools]
    return {
        "type": "triggered_tags",
        "triggers": [form.begin],
        "tags": [form.call_tag(tool) for tool in given],
        "stop_after_first": not is_parallel,
    }


def format_of(grammar: Grammar) -> Json:
    """A grammar as a part of a structural tag. Raises RequestError for a source that is not what its kind
    says."""
    try:
        return _format_of(grammar)
    except (ValueError, RecursionError):
        raise grammar.error(f"the grammar of the kind {grammar.kind} is not JSON") from None
    except (KeyError, TypeError):
        raise grammar.error("a structural tag must be an object with a format") from None


def _format_of(grammar: Grammar) -> Json:
    source = grammar.source
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return {"type": "json_schema", "json_schema": ANY_OBJECT}
        case GrammarKind.JSON_SCHEMA:
            return {"type": "json_schema", "json_schema": json.loads(source)}
        case GrammarKind.REGEX:
            return {"type": "regex", "pattern": source}
        case GrammarKind.EBNF:
            return {"type": "grammar", "grammar": source}
        case GrammarKind.CHOICE:
            choices = [{"type": "const_string", "value": choice} for choice in json.loads(source)]
            return {"type": "or", "elements": choices}
        case GrammarKind.STRUCTURAL_TAG:
            return dict(json.loads(source)["format"])


def behind_thought(inner: Json, form: ThoughtForm | None, start: ThoughtStart) -> Json:
    """The grammar begins behind the thought, where the model thinks."""
    if form is None or start in (ThoughtStart.CONTENT, ThoughtStart.EITHER):
        return inner
    begin = form.begin if start is ThoughtStart.EXPECTED else ""
    thought = {"type": "tag", "begin": begin, "content": ANY_TEXT, "end": form.end}
    blanks = {"type": "optional", "content": {"type": "const_string", "value": "\n\n"}}
    return {"type": "sequence", "elements": [thought, blanks, inner]}


def structural_tag(inner: Json, field: str = "tools") -> Grammar:
    """`field`: what a client gave it by, for errors."""
    source = json.dumps({"type": "structural_tag", "format": inner}, ensure_ascii=False)
    return Grammar(GrammarKind.STRUCTURAL_TAG, source, field)
