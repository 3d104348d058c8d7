import pytest
from models import tiny

from bench import run


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setattr(run, "OUTSIDE_CACHE", 2**12)


@pytest.fixture
def model():
    return tiny("siglip")
