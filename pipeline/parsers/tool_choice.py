"""Which functions a chat shows to the model, and what the model must do with them.

Pure: from the fields of a request to functions and a grammar.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from pipeline.parsers.base import Tool
from pipeline.parsers.forms import ChatForms, to_tool
from pipeline.parsers.grammar import behind_thought, format_of, optional_calls, required_calls, structural_tag
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.limits import MAX_TOOLS
from pipeline.wire.prompts import Chat
from pipeline.wire.sampling import Grammar

Json = dict[str, Any]


class Mode(enum.Enum):
    AUTO = "auto"  # the model may call functions
    REQUIRED = "required"  # it must
    NAMED = "named"  # it must call the one function that there is, once


class ToolChoice(NamedTuple):
    tools: Sequence[Json]  # shown to the model; none: it calls nothing
    mode: Mode
    is_parallel: bool  # several calls in one answer

    @property
    def data(self) -> bytes:
        return json.dumps(self.tools, ensure_ascii=False).encode() if self.tools else b""


def read_tools(data: bytes) -> list[dict[str, Any]]:
    """The functions of a chat. Raises RequestError, naming the field, for what is no list of functions."""
    try:
        tools = json.loads(data) if data else []
    except (ValueError, RecursionError):
        raise RequestError("tools are not valid JSON, or nested too deep", field="tools") from None
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS} functions", field="tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            what = f"a tool must be an object of type function, got {shown(tool)}"
            raise RequestError(what, field=f"tools[{index}]")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError("a function has a name", field=f"tools[{index}].function.name")
    return tools


def to_tool_choice(tools: Sequence[Any], choice: Any, is_parallel: bool) -> ToolChoice:
    """Raises RequestError, naming the field, for no functions, or for a choice of none that is there."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"there are {len(tools)} tools, the limit is {MAX_TOOLS}", field="tools")
    checked = [_checked(tool, index) for index, tool in enumerate(tools)]
    match choice:
        case None | "auto":
            return ToolChoice(checked, Mode.AUTO, is_parallel)
        case "none":
            return ToolChoice((), Mode.AUTO, is_parallel)
        case "required":
            return ToolChoice(_some(checked, "required"), Mode.REQUIRED, is_parallel)
        case {"type": "function"}:
            return ToolChoice(_named([choice], checked), Mode.NAMED, False)
        case {"type": "allowed_tools"}:
            return _allowed(choice, checked, is_parallel)
    known = "auto, none, required, a function or allowed_tools"
    raise RequestError(f"tool_choice must be {known}, got {shown(choice)}", field="tool_choice")


def _checked(tool: Any, index: int) -> Json:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        what = f"a tool must be a function, got {shown(tool)}"
        raise RequestError(what, field=f"tools[{index}].type")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError("a function must have a name", field=f"tools[{index}].function.name")
    if parameters is not None and not isinstance(parameters, dict):
        what = f"parameters must be a JSON schema, got {shown(parameters)}"
        raise RequestError(what, field=f"tools[{index}].function.parameters")
    return {**tool, "type": "function"}


def _some(tools: Sequence[Json], choice: str) -> Sequence[Json]:
    if not tools:
        raise RequestError(f"tool_choice {choice} needs tools", field="tool_choice")
    return tools


def _named(choices: Sequence[Any], tools: Sequence[Json]) -> list[Json]:
    by_name = {tool["function"]["name"]: tool for tool in tools}
    found = []
    for choice in choices:
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in by_name:
            what = f"tool_choice names the function {shown(name)}, which is not among the tools"
            raise RequestError(what, field="tool_choice")
        found.append(by_name[name])
    return found


def _allowed(choice: Mapping[str, Any], tools: Sequence[Json], is_parallel: bool) -> ToolChoice:
    allowed = choice.get("allowed_tools")
    allowed = choice if allowed is None else allowed  # some clients write its keys beside the type
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(allowed, dict) or not isinstance(listed, list):
        raise RequestError("allowed_tools must have a mode and tools", field="tool_choice.allowed_tools")
    mode = allowed.get("mode", "auto")
    if mode not in (Mode.AUTO.value, Mode.REQUIRED.value):
        what = f"the mode of allowed_tools must be auto or required, got {shown(mode)}"
        raise RequestError(what, field="tool_choice.allowed_tools.mode")
    found = _named(listed, tools)
    return ToolChoice(_some(found, mode) if mode == Mode.REQUIRED.value else found, Mode(mode), is_parallel)


def to_chat_grammar(
    choice: ToolChoice, chat: Chat, forms: ChatForms, structure: Grammar | None
) -> Grammar | None:
    """What the answer must follow: calls that are required, strict functions, and the answer's own form, each
    behind the thought. Raises RequestError for calls of a model that makes none."""
    inner, field = _calls(choice, forms, structure), "tools"
    start = forms.start(chat)
    if inner is None:
        if structure is None:
            return None
        inner, field = format_of(structure), structure.field
        if behind_thought(inner, forms.thoughts, start) is inner:
            return structure
    return structural_tag(behind_thought(inner, forms.thoughts, start), field)


def _calls(choice: ToolChoice, forms: ChatForms, structure: Grammar | None) -> Json | None:
    """The format of calls, where there is something to force; or of calls in place of a structured answer."""
    tools = [_strict(tool["function"]) for tool in choice.tools]
    if not tools:
        return None
    if forms.calls is None:
        if choice.mode is Mode.AUTO:
            return None
        raise RequestError("this model calls no functions: --tool-call-parser", field="tool_choice")
    if choice.mode is not Mode.AUTO:
        return required_calls(forms.calls, tools, choice.is_parallel)
    if structure is not None:
        calls = required_calls(forms.calls, tools, choice.is_parallel)
        return {"type": "or", "elements": [calls, format_of(structure)]}
    own = [to_tool(tool["function"]) for tool in choice.tools]
    if choice.is_parallel and not any(tool.is_strict for tool in own):
        return None
    return optional_calls(forms.calls, own, choice.is_parallel)


def _strict(function: Mapping[str, Any]) -> Tool:
    """A call that is forced follows the function's schema."""
    return msgspec.structs.replace(to_tool(function), is_strict=True)
