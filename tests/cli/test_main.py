"""The command before any of its parts: what is there at once, and what is said where something is missing."""

import subprocess
import sys

import neuroflow_cli
import pytest


def python(code):
    """What a Python of its own prints, and its exit code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["eval"], ["evaluate"]])
def test_what_needs_no_model_is_said_at_once(arguments):
    code = f"""import sys, neuroflow_cli
try:
    neuroflow_cli.main({arguments})
finally:
    print(sorted({{"torch", "transformers", "numpy", "neuroflow"}} & sys.modules.keys()))"""
    said, _, returned = python(code)
    assert said.splitlines()[-1] == "[]" and returned == (0 if "--help" in arguments else 2)


def test_every_command_has_its_help(neuroflow):
    code, text, _ = neuroflow("--help")
    assert code == 0 and all(f"    {name} " in text for name in neuroflow_cli.COMMANDS)
    code, text, _ = neuroflow("eval", "--help")
    assert code == 0 and "Measure what reuse costs." in text
    assert all(f"    {name} " in text for name in neuroflow_cli.EVALUATIONS)
    commands = [[name] for name, (module, _) in neuroflow_cli.COMMANDS.items() if module is not None]
    for command in [*commands, *(["eval", name] for name in neuroflow_cli.EVALUATIONS)]:
        code, text, _ = neuroflow(*command, "--help")
        assert code == 0 and text.startswith(f"usage: neuroflow {' '.join(command)} [-h] ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], f"neuroflow: error: the following arguments are required: {{{','.join(neuroflow_cli.COMMANDS)}}}; see"),
        (["eval"], "neuroflow eval: error: the following arguments are required: {video,laws,llm}; see neuroflow eval"),
        (["walk"], "invalid choice: 'walk'"),
        (["run"], "neuroflow run: error: the following arguments are required: SOURCE; see neuroflow run --help"),
        (["run", "clip.mp4", "--stride", "x"], "argument --stride: invalid count value: 'x'; see neuroflow run --help"),
    ],
)
def test_a_mistake_is_one_line(neuroflow, arguments, said):
    code, text, message = neuroflow(*arguments)
    assert code == 2 and text == "" and said in message and message.count("\n") == 1


def test_a_missing_library_of_the_video_extra_is_one_line():
    """The first of those that are missing; then it is there, and another is the first."""
    libraries = ["PIL", "av", "scipy"]
    code = f"""import contextlib, io, sys, neuroflow_cli
missing = set({libraries})
sys.modules.update(dict.fromkeys(missing))
while missing:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        returned = neuroflow_cli.main(["track", "x"])
    print(returned, said.getvalue(), end="")
    name = said.getvalue().split()[2]
    missing.remove(name)
    del sys.modules[name]"""
    said, message, returned = python(code)
    expected = "2 neuroflow: error: {} is missing; install the video extra: neuroflow[video]"
    assert sorted(said.splitlines()) == [expected.format(name) for name in libraries]
    assert message == "" and returned == 0


def test_another_missing_library_is_no_matter_of_an_extra():
    command = "import sys; sys.modules['tqdm'] = None; import neuroflow_cli; neuroflow_cli.main(['track', 'x'])"
    assert "ModuleNotFoundError: import of tqdm halted" in python(command)[1]


def test_what_needs_no_video_needs_no_library_for_it():
    modules = "classes, evaluation, journal, laws, llm_evaluation, street"
    assert python(f"import sys; sys.modules['av'] = None; from neuroflow import {modules}")[1:] == ("", 0)
