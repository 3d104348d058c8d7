import pytest
import torch
import torch.nn.functional as F
from rows import GATE_DTYPES, assert_moved, definition, frame

from neuroflow_kernels import compact, ema_gate_, ema_surprise_, gather_rows, use_backend
from neuroflow_kernels.reference.ema_gate import ema_gate_ as reference

SHAPES = [(1, 1, 1), (1, 9, 7), (3, 6, 33), (2, 30, 96), (0, 4, 8), (2, 0, 8)]
RULES = [{"threshold": 0.1}, {"threshold": 0.0}, {"budget": 3}, {"threshold": 5.0}, {"threshold": 5.0, "floor": 0}]


def assert_gates(result, h, surprise, rule):
    """Values against the float64 surprise; the decision, exactly, against the float32 surprise it was made from."""
    measured, index, cu_seqlens, packed = result
    torch.testing.assert_close(measured, surprise, rtol=0, atol=1e-6)
    per_stream = {name: [value] * h.shape[0] for name, value in rule.items() if name != "floor"}
    if "threshold" in per_stream:
        per_stream["threshold"] = torch.tensor(per_stream["threshold"]).tolist()
    selections = definition(measured, **per_stream, floor=rule.get("floor", 4))
    rows = [row for selection in selections for row in selection]
    assert index.tolist() == rows + [-1] * (h.shape[0] * h.shape[1] - len(rows))
    assert cu_seqlens.diff().tolist() == list(map(len, selections))
    assert torch.equal(packed[: len(rows)], h.reshape(-1, h.shape[2])[rows])
    assert not packed[len(rows) :].any()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, generator, shape, rule):
    h, ema = frame(generator, shape)
    moved = ema.double()
    surprise = reference(h.double(), moved, 0.1, torch.ones(shape[0]), None, 0, None)[0]
    result = ema_gate_(h, ema, decay=0.1, **rule)
    assert_gates(result, h, surprise, rule)
    assert_moved(ema, moved)


@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids=str)
def test_dtypes(backend, generator, dtypes):
    h, ema = frame(generator, (2, 12, 37), *dtypes)
    moved = ema.to(torch.float64, copy=True)
    surprise = reference(h.double(), moved, 0.1, torch.ones(2), None, 0, None)[0]
    result = ema_gate_(h, ema, decay=0.1, threshold=0.1)
    assert result[0].dtype == torch.float32
    assert result[3].dtype == h.dtype
    assert_gates(result, h, surprise, {"threshold": 0.1})
    assert_moved(ema, moved)


@pytest.mark.parametrize("rows", [0, 2, 40])
def test_rows(backend, generator, rows):
    h, ema = frame(generator, (2, 10, 5))
    exact = ema_gate_(h, ema.clone(), decay=0.1, budget=4)[3]
    packed = ema_gate_(h, ema, decay=0.1, budget=4, rows=rows)[3]
    assert packed.shape == (rows, 5)
    assert torch.equal(packed[:8], exact[:rows])
    assert not packed[8:].any()


def test_is_the_three_ops(backend, generator):
    h, ema = frame(generator, (3, 11, 20))
    separate = ema.clone()
    threshold = torch.tensor([0.05, 0.1, 0.2])
    surprise, index, cu_seqlens, packed = ema_gate_(h, ema, decay=0.1, threshold=threshold)
    assert torch.equal(surprise, ema_surprise_(h, separate, 0.1))
    assert torch.equal(ema, separate)
    for actual, expected in zip((index, cu_seqlens), compact(surprise, threshold), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(packed, gather_rows(h, index, cu_seqlens))


def test_is_the_eager_gate(backend, generator):
    """The lines it replaces, at a threshold away from any surprise."""
    h, ema = frame(generator, (1, 50, 64))
    surprise = 1 - F.cosine_similarity(h, ema, dim=-1)
    values = surprise[0].sort().values
    threshold = ((values[29] + values[30]) / 2).item()
    active = (surprise > threshold)[0].nonzero()[:, 0]
    moved = 0.9 * ema + 0.1 * h
    measured, index, _, packed = ema_gate_(h, ema, decay=0.1, threshold=threshold)
    torch.testing.assert_close(measured, surprise, rtol=0, atol=1e-6)
    assert index[:20].tolist() == active.tolist()
    assert torch.equal(packed, h[0].index_select(0, active))
    torch.testing.assert_close(ema, moved)


def test_faulty_rows_are_active_and_leave_their_reference(backend, generator):
    h, ema = frame(generator, (2, 8, 6))
    h[0, 5, 2] = torch.nan
    h[1, 1, 0] = torch.inf
    before = ema.clone()
    surprise, index, cu_seqlens, packed = ema_gate_(h, ema, decay=0.5, threshold=2.5, floor=0)
    assert surprise.isinf().nonzero().tolist() == [[0, 5], [1, 1]]
    assert index[:2].tolist() == [5, 9]
    assert cu_seqlens.tolist() == [0, 1, 2]
    assert torch.equal(packed.view(torch.int32), torch.stack([h[0, 5], h[1, 1]]).view(torch.int32))
    assert torch.equal(ema[0, 5], before[0, 5])
    assert torch.equal(ema[1, 1], before[1, 1])


def test_many_rows_on_many_threads(generator):
    h, ema = frame(generator, (3, 500, 96))
    moved = ema.double()
    surprise = reference(h.double(), moved, 0.1, torch.ones(3), None, 0, None)[0]
    with use_backend("cpp"):
        result = ema_gate_(h, ema, decay=0.1, threshold=0.1)
    assert_gates(result, h, surprise, {"threshold": 0.1})
    assert_moved(ema, moved)


@pytest.mark.parametrize("rows", [None, 0, 9])
@pytest.mark.parametrize("rule", [(torch.tensor([0.1, 0.0]), None), (None, torch.tensor([3, 1], dtype=torch.int32))])
def test_opcheck(generator, rule, rows):
    h, ema = frame(generator, (2, 6, 5))
    torch.library.opcheck(torch.ops.neuroflow.ema_gate_.default, (h, ema, 0.1, *rule, 2, rows))


@pytest.mark.parametrize("rows", [None, 9])
def test_compile(generator, rows):
    h, ema = frame(generator, (2, 6, 5))
    compiled_ema = ema.clone()
    expected = ema_gate_(h, ema, decay=0.1, threshold=0.1, rows=rows)
    compiled = torch.compile(ema_gate_, fullgraph=True, backend="aot_eager")
    for actual, value in zip(compiled(h, compiled_ema, decay=0.1, threshold=0.1, rows=rows), expected, strict=True):
        assert torch.equal(actual, value)
    assert torch.equal(compiled_ema, ema)


@pytest.mark.parametrize(
    "name, change",
    [
        ("h", {"h": torch.zeros(3, 4)}),
        ("ema", {"ema": torch.zeros(2, 3, 5)}),
        ("decay", {"decay": 2}),
        ("threshold", {"threshold": None}),
        ("budget", {"threshold": None, "budget": torch.zeros(3)}),
        ("floor", {"floor": -1}),
        ("rows", {"rows": -1}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"h": torch.zeros(2, 3, 4), "ema": torch.zeros(2, 3, 4), "decay": 0.1, "threshold": 0.1}
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        ema_gate_(**arguments | change)
