"""What NeuroFlow says about releases that are newer than those it was tested with."""

import importlib.metadata
import re
import warnings
from pathlib import Path

import neuroflow
import pytest
import test_llm
from models import tiny
from neuroflow import releases
from neuroflow.llm import BypassConfig, enable_bypass

TESTED = dict(releases.TESTED)
LOCK = Path(__file__).parents[1] / ".ci" / "constraints.txt"


@pytest.fixture
def with_tested(monkeypatch):
    """with_tested(**versions): those are the newest tested ones, and nothing was said yet."""

    def use(**versions):
        monkeypatch.setattr(releases, "TESTED", versions)
        releases.warn_of_newer.cache_clear()

    yield use
    releases.warn_of_newer.cache_clear()


def patch_everything():
    neuroflow.enable_cache(tiny("siglip"))
    enable_bypass(test_llm.tiny("llama"), BypassConfig(1, (2,), 0.5))


def test_a_newer_release_is_named_once_beside_the_tested_one(with_tested):
    with_tested(torch="2.9.1", transformers="4.57.6")
    with pytest.warns(RuntimeWarning) as said:
        patch_everything()
        patch_everything()
    for (library, tested), warning in zip((("torch", "2.9.1"), ("transformers", "4.57.6")), said, strict=True):
        installed = re.escape(importlib.metadata.version(library))
        assert re.search(f"{library} {installed} is newer than {tested}, the newest that", str(warning.message))


def test_tested_and_older_releases_are_not_spoken_of(with_tested):
    with_tested(torch=importlib.metadata.version("torch"), transformers="99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_everything()


@pytest.mark.parametrize(
    ("installed", "newer"),
    [("5.24.0", False), ("5.9.1", False), ("5.24.0.dev0", False), ("5.24.1", True), ("6.0", True)],
)
def test_versions_are_numbers(with_tested, monkeypatch, installed, newer):
    with_tested(transformers="5.24.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda library: installed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        releases.warn_of_newer("transformers")
    assert bool(said) == newer


def test_what_was_tested_is_what_everybody_tests_with():
    locked = dict(line.split("==") for line in LOCK.read_text().splitlines() if "==" in line)
    assert locked.items() >= TESTED.items()
