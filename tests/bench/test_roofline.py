"""Where the time of a frame goes: that nothing is lost or counted twice."""

import itertools
import time

import pytest
import torch
from neuroflow.adapters import describe
from neuroflow.engine.passes import Pass

import neuroflow_kernels
from bench import cases, roofline

CEILINGS = {"memory": 1e9, "float32": 2e9, "bfloat16": 4e9}


def test_time_is_of_the_innermost_part(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = roofline.Clock()
    inner = clock.within("inner", lambda: None)
    clock.within("outer", lambda: [inner(), inner()])()
    assert clock.spent == {"inner": 2, "outer": 3}
    with pytest.raises(ZeroDivisionError):
        clock.within("outer", lambda: 1 / 0)()
    assert not clock.parts


@pytest.mark.parametrize("name", ["E", "rounded-E"])
def test_every_part_of_a_frame_is_timed(model, name):
    rows = roofline.measure(model, name, 0.8, CEILINGS, seconds=0)
    assert [row["part"] for row in rows] == list(roofline.costs(model, name, 7))
    assert all(row["median_ms"] > 0 and row["frames"] == 5 and row["frame_ms"] > 0 for row in rows)
    for row in rows[:-1]:
        rate = CEILINGS["bfloat16" if name == "rounded-E" and row["part"] not in roofline.WHOLE else "float32"]
        least = 1e3 * max(row["bytes"] / 1e9, row["flops"] / rate)
        assert row["least_ms"] == pytest.approx(least) and row["share"] == pytest.approx(least / row["median_ms"])
        assert row["done"] == (row["share"] > 0.6)
    assert "share" not in rows[-1] and "| fc2 |" in roofline.text_of(rows)


def test_what_is_under_the_clock_is_as_without_it(model):
    with torch.inference_mode():
        systems = [cases.patched(model, "E", budget=7, floor=0, kernels="rows") for _ in range(2)]
        methods, scatter = dict(vars(Pass)), neuroflow_kernels.scatter_kv_
        plain, watched = cases.dense(systems[0]), roofline.under(roofline.Clock(), systems[1])
        for pixels in itertools.islice(cases.frames(model, 7), 3):
            assert torch.equal(plain(pixels), watched(pixels))
    assert dict(vars(Pass)) == methods and neuroflow_kernels.scatter_kv_ is scatter


@pytest.mark.parametrize("active", [7, 36])
def test_flops_are_those_of_the_registry(model, active):
    products = ("query, key, value", "attention", "attention's output", "fc1", "fc2")
    counted = roofline.costs(model, "E", active)
    assert sum(counted[part][1] for part in products) == cases.flops(model, "E", active)
    least = sum(counted[part][0] for part in products)
    weights = [p for layer in describe(model).layers for p in layer.parameters() if p.ndim == 2]
    assert least > sum(weight.nbytes for weight in weights)
    assert sum(roofline.costs(model, "rounded-E", active)[part][0] for part in products) < least


def test_a_system_that_is_wrong_has_no_rows(model, monkeypatch):
    monkeypatch.setattr(cases, "error_of", lambda *_: float("nan"))
    assert roofline.measure(model, "E", 0.8, CEILINGS, seconds=0) == []
