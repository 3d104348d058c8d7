"""The registry's ops under pytest-benchmark: `pytest bench`. Nothing is timed that does not agree with the reference.

Inputs stay in the processor's cache here if they fit; `python -m bench.run ops` reads them from memory.
"""

import functools

import pytest

from bench.cases import OP_CASES, check, copied
from bench.run import line, measure_ceilings, measure_op
from bench.tables import machine
from neuroflow_kernels import unavailable, use_backend

GATES = [case for case in OP_CASES if case.op.baselines and case.shape == case.op.shapes[-1]]


@pytest.fixture(scope="module", autouse=True)
def ceilings(request):
    found = measure_ceilings("cpu")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "  ".join(f"{name} {value}" for name, value in machine().items()))
    return found


@pytest.mark.parametrize("case", GATES, ids=str)
def test_gate_ratios(case, ceilings, capsys):
    rows = {row["system"]: row for row in measure_op(case, ceilings, rounds=40)}
    median = {system: row["median_ms"] for system, row in rows.items()}
    with capsys.disabled():
        print("", *map(line, rows.values()), sep="\n")
        print(f"  eager / ema_gate_      {median['eager'] / median['cpp']:6.2f}")
        print(f"  ema_gate_ / streaming  {median['cpp'] / median['streaming']:6.2f}")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_op(benchmark, case, backend):
    reason = unavailable(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    benchmark.group = str(case)
    inputs = case.build()
    with use_backend("reference"):
        expected = case.op.call(*copied(inputs))
    with use_backend(backend):
        check(case.op, case.op.call(*copied(inputs)), expected)
        benchmark.pedantic(functools.partial(case.op.call, *inputs), rounds=20, warmup_rounds=2)
