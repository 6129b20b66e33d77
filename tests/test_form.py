"""The form of the code, from its syntax trees: short functions, all annotated; one name for one class."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("pipeline", "workers", "launcher", "tools") for path in (ROOT / folder).rglob("*.py")
)
MAX_LINES = 60  # of a function, from `def` to its end
# A kernel's arguments are pointers and numbers of the device, and its body is one piece for the compiler.
KERNEL_DECORATORS = ("triton.jit", "jit")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    """Without those that a compiler for GPUs reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function) and not _is_kernel(node):
            yield node


def _is_kernel(function: Function) -> bool:
    decorators = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
    return bool(decorators & set(KERNEL_DECORATORS))


def num_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def is_annotated(function: Function) -> bool:
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    given = [argument for argument in every if argument is not None and argument.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation is not None for argument in given)


def place(path: Path, function: Function) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def report_lengths_of_files(record_property: Callable[[str, object], None]) -> None:
    """Shown with the results: no limit holds for them."""
    lengths = [len(path.read_text().splitlines()) for path in FILES if path.name != "__init__.py"]
    p90 = statistics.quantiles(lengths, n=10)[-1]
    shown = f"median {statistics.median(lengths):.0f}, p90 {p90:.0f}, most {max(lengths)}"
    record_property(f"lines of {len(lengths)} files", shown)


def test_functions_are_short(record_property: Callable[[str, object], None]) -> None:
    report_lengths_of_files(record_property)
    long = {
        place(path, function): num_lines(function)
        for path in FILES
        for function in functions(path)
        if num_lines(function) > MAX_LINES
    }
    assert long == {}


def test_functions_are_annotated() -> None:
    bare = [
        place(path, function) for path in FILES for function in functions(path) if not is_annotated(function)
    ]
    assert bare == []


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "tools":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
