"""Interrupts in front of any line of the package."""

import ast
import functools
import sys
from pathlib import Path

import neuroflow

PACKAGE = str(Path(neuroflow.__file__).parent)


class Interrupt(BaseException):
    """What code that deals with errors does not expect."""


@functools.cache
def uninterruptible(path):
    """The lines of a file right behind `finally:`; Python looks for signals once their first call is over."""
    tries = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Try)]
    return {node.finalbody[0].lineno for node in tries if node.finalbody}


def traced(call, at=None):
    """How many lines of the package `call` goes through; it raises Interrupt in front of number `at`."""
    count = 0

    def in_frame(frame, event, _):
        nonlocal count
        path = frame.f_code.co_filename
        if event == "line" and frame.f_lineno not in uninterruptible(path):
            count += 1
            if count == at:
                raise Interrupt(f"{path}:{frame.f_lineno}")
        return in_frame

    sys.settrace(lambda frame, *_: in_frame if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        call()
    finally:
        sys.settrace(None)
    return count
