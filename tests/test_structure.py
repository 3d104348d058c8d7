"""The house: who may import whom, what an import brings along, and what answers at once."""

import subprocess
import sys

import neuroflow
import pytest

from bench.studies import structure

# From the top floor down; every file of the engine imports those below it alone.
ENGINE = (
    *("engine", "graphs", "gate", "projection", "attention", "pooling", "linear"),
    *("crossover", "reuse", "passes", "kernels", "derived", "scores", "streams", "state", "turns", "threads"),
)
DOORS = {"patch", "interface", "saving", "distillation", "__init__", "objects", "cli/track"}
PURE = {"engine/scores"}  # functions of surprise, which everybody may use


@pytest.fixture(scope="module")
def imports():
    return {
        path.with_suffix("").as_posix(): {each.with_suffix("").as_posix() for each in found}
        for path, found in structure.imports().items()
    }


def test_no_files_import_each_other_in_a_circle():
    assert structure.circle() is None


def test_a_circle_is_found(monkeypatch):
    monkeypatch.setattr(structure, "imports", lambda: {"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert set(structure.circle()) == {"a", "b", "c"}


def test_the_engine_imports_down_the_list(imports):
    files = {name.removeprefix("engine/") for name in imports if name.startswith("engine/")}
    assert files - {"__init__"} == set(ENGINE)
    for number, name in enumerate(ENGINE):
        found = imports[f"engine/{name}"]
        assert found <= {f"engine/{below}" for below in ENGINE[number + 1 :]} | {"adapters/anatomy", "config"}, name


def test_adapters_know_nothing_of_the_engine(imports):
    for name, found in imports.items():
        if name.startswith("adapters/"):
            assert all(each.startswith("adapters/") for each in found), name


def test_few_doors_lead_into_the_engine(imports):
    inside = {name: {each for each in found if each.startswith("engine/")} for name, found in imports.items()}
    assert {name for name, found in inside.items() if found and not name.startswith("engine/")} == DOORS
    assert inside["objects"] <= PURE and inside["cli/track"] <= PURE


def test_no_command_imports_another(imports):
    modules = [*structure.neuroflow_cli.COMMANDS.values(), *structure.neuroflow_cli.EVALUATIONS.values()]
    commands = {module.removeprefix("neuroflow.").replace(".", "/") for module, _ in modules if module}
    assert commands <= imports.keys()
    for name in commands:
        assert not imports[name] & commands, name


def test_libraries_need_no_pyav():
    libraries = "neuroflow, neuroflow.laws, neuroflow.evaluation, neuroflow.distillation"
    code = f"import sys; sys.modules['av'] = None; import {libraries}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "listed"), [(["--help"], "calibrate"), (["eval", "--help"], "laws"), (["rum"], "calibrate")]
)
def test_the_commands_are_listed_without_loading_them(arguments, listed):
    code = f"""
import sys, neuroflow_cli
try:
    neuroflow_cli.main({arguments})
except SystemExit:
    assert not {{"torch", "transformers", "neuroflow"}} & sys.modules.keys()
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert listed in done.stdout + done.stderr


def test_everything_public_is_there():
    assert all(hasattr(neuroflow, name) for name in neuroflow.__all__)
