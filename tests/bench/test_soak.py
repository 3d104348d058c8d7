"""Streams at random, for moments."""

import pytest

from bench import soak


@pytest.mark.filterwarnings("ignore:neuroflow")
def test_a_short_soak(one_thread, capsys):
    rows = soak.soak(0.05)
    assert len(rows) == soak.SAMPLES
    assert rows[-1]["replayed"] and rows[-1]["loaded"]
    assert len(capsys.readouterr().out.splitlines()) == soak.SAMPLES


@pytest.mark.filterwarnings("ignore:neuroflow")
def test_a_stream_that_is_not_its_fresh_run_ends_it(one_thread, monkeypatch):
    shown = soak.Worker.show

    def wrong(worker, frames, names):
        shown(worker, frames, names)
        worker.last[names[0]] = worker.last[names[0]] + 1

    monkeypatch.setattr(soak.Worker, "show", wrong)
    with pytest.raises(RuntimeError, match="from a fresh run"):
        soak.soak(1)


@pytest.mark.parametrize("name", ["memory", "handles", "threads"])
def test_what_grows_is_a_fault(name):
    row = {"memory": 400.0, "handles": 6, "threads": 4, "replayed": 9}
    assert list(soak.faults([row] * 10)) == []
    [fault] = soak.faults([row] * 9 + [row | {name: 2 * row[name]}])
    assert fault.startswith(f"{name} grew from")
