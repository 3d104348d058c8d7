"""Public names say what they take, give and raise, and their examples run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from types import ModuleType

import neuroflow
import pytest
import torch

import neuroflow_kernels
from neuroflow_kernels import env

PUBLIC = {neuroflow: neuroflow.__all__, neuroflow_kernels: neuroflow_kernels.__all__, env: ["describe"]}
HEADING = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Source): *", re.MULTILINE)
ENTRY = re.compile(r"^    \*{0,2}(\w+): ", re.MULTILINE)
DEPTH = 2  # of calls in which an error is looked for
NAMES = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module, public in PUBLIC.items()
    for name in public
    if not isinstance(getattr(module, name), ModuleType)
]


def parts(pattern, text):
    """What follows each match of a pattern, by its first group."""
    matches = list(pattern.finditer(text))
    starts = [*(match.start() for match in matches), len(text)]
    return {match[1]: text[match.end() : end] for match, end in zip(matches, starts[1:], strict=True)}


def code(thing):
    """The function that a public name runs, or None."""
    if inspect.isclass(thing):
        thing = vars(thing).get("__post_init__") or vars(thing).get("__init__")
    return thing if inspect.isfunction(thing) and thing.__code__.co_filename != "<string>" else None


def errors(function, depth):
    """Names of the errors that a function raises, itself or in functions of its package that it calls."""
    function = inspect.unwrap(function)
    package = function.__module__.partition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.add(ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc).rpartition(".")[2])
        elif isinstance(node, ast.Call) and depth > 0:
            called = function.__globals__
            for name in ast.unparse(node.func).split("."):
                called = called.get(name) if isinstance(called, dict) else getattr(called, name, None)
            if inspect.isfunction(called) and called.__module__.partition(".")[0] == package:
                found |= errors(called, depth - 1)
    return found


def missing(thing):
    """What the docstring of a public name lacks."""
    text = inspect.getdoc(thing) or ""
    summary, _, rest = text.partition("\n")
    if not summary.endswith(".") or rest.partition("\n")[0]:
        yield "a first line that is a sentence, and a blank one behind it"
    found = parts(HEADING, text)
    if ">>> " not in found.get("Example", ""):
        yield "an example"
    function, taken = code(thing), parts(ENTRY, found.get("Args", ""))
    is_error = isinstance(thing, type) and issubclass(thing, BaseException)
    if not is_error and (function or dataclasses.is_dataclass(thing)):
        for name, parameter in inspect.signature(thing).parameters.items():
            if name not in taken:
                yield f"an argument of its own for {name}"
            elif "Tensor" in str(parameter.annotation) and not re.search(r"\[.*\]", taken[name], re.DOTALL):
                yield f"the shape of {name}"
    if function:
        told = parts(ENTRY, found.get("Raises", ""))
        yield from (f"when it raises {error}" for error in sorted(errors(function, 0) - told.keys()))
        if errors(function, DEPTH) and not told:
            yield "what it raises"


def given(package):
    """What an example may use without saying what it is. Those of the ops stand alone."""
    return {} if package == "neuroflow_kernels" else importlib.import_module("docstring_names").docstring_names()


@pytest.mark.parametrize("thing", NAMES)
def test_docstring_is_complete(thing):
    assert list(missing(thing)) == []


@pytest.mark.parametrize("thing", NAMES)
def test_examples_run(thing, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neuroflow.adapters._registered", {})
    said = []
    for example in doctest.DocTestFinder().find(thing, thing.__name__):
        example.globs = given(thing.__module__.partition(".")[0])
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(example, out=said.append, clear_globs=False)
    assert not said, "".join(said)


def check(value):
    if value is None:
        raise TypeError("value is None")


def complete(x: torch.Tensor, y: int) -> torch.Tensor:
    """Adds.

    Args:
        x: [N] float32.
        y: a number.

    Raises:
        ValueError: y is 0.

    Example:
        >>> 1 + 1
        2
    """
    check(x)
    if y == 0:
        raise ValueError("y is 0")
    return x + y


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("Adds.", "a first line that is a sentence, and a blank one behind it"),
        ("    y: a number.\n", "an argument of its own for y"),
        ("[N]", "the shape of x"),
        ("    ValueError: y is 0.\n", "when it raises ValueError"),
        (">>> 1 + 1", "an example"),
    ],
)
def test_what_is_left_out_is_found(monkeypatch, left_out, told):
    assert list(missing(complete)) == []
    text = inspect.getdoc(complete)
    assert left_out in text
    monkeypatch.setattr(complete, "__doc__", text.replace(left_out, ""))
    assert told in missing(complete)


def test_errors_of_what_is_called_are_found():
    assert errors(complete, 0) == {"ValueError"} and errors(complete, 1) == {"ValueError", "TypeError"}
