import math

import pytest
import torch
from rows import definition

from neuroflow_kernels import compact
from neuroflow_kernels.reference.compact import compact as reference


def assert_selects(result, selections, slots):
    index, cu_seqlens = result
    packed = [row for rows in selections for row in rows]
    assert index.dtype == cu_seqlens.dtype == torch.int32
    assert index.tolist() == packed + [-1] * (slots - len(packed))
    assert cu_seqlens.tolist() == [sum(map(len, selections[:stream])) for stream in range(len(selections) + 1)]


def draw(generator, streams, tokens):
    """Surprises on a coarse grid, so that many are equal, with some NaN, Inf and both zeros."""
    surprise = torch.randint(-2, 8, (streams, tokens), generator=generator) / 4
    chance = torch.rand(streams, tokens, generator=generator)
    surprise[chance < 0.08] = torch.nan
    surprise[chance > 0.92] = torch.inf
    surprise[(chance > 0.45) & (chance < 0.5)] = -0.0
    return surprise


SHAPES = [(1, 1), (1, 7), (3, 5), (4, 33), (2, 130), (0, 5), (3, 0)]


@pytest.mark.parametrize("floor", [0, 4, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threshold(backend, generator, shape, floor):
    surprise = draw(generator, *shape)
    threshold = torch.tensor([0.0, 0.25, 1.5, math.inf])[: shape[0]]
    expected = definition(surprise, threshold=threshold.tolist(), floor=floor)
    assert_selects(compact(surprise, threshold=threshold, floor=floor), expected, surprise.numel())


@pytest.mark.parametrize("floor", [0, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget(backend, generator, shape, floor):
    surprise = draw(generator, *shape)
    budget = torch.tensor([3, 0, 1000, 17])[: shape[0]]
    expected = definition(surprise, budget=budget.tolist(), floor=floor)
    assert_selects(compact(surprise, budget=budget, floor=floor), expected, surprise.numel())


@pytest.mark.parametrize("budget", [1, 5, 32, 63, 64])
def test_every_budget_of_distinct_surprises(backend, generator, budget):
    surprise = torch.randperm(64, generator=generator)[None] / 64
    expected = definition(surprise, budget=[budget], floor=0)
    assert_selects(compact(surprise, budget=budget, floor=0), expected, 64)


def test_one_number_serves_every_stream(backend, generator):
    surprise = draw(generator, 3, 20)
    each = compact(surprise, threshold=torch.full((3,), 0.5))
    for one, other in zip(compact(surprise, threshold=0.5), each, strict=True):
        assert torch.equal(one, other)
    each = compact(surprise, budget=torch.full((3,), 6))
    for one, other in zip(compact(surprise, budget=6), each, strict=True):
        assert torch.equal(one, other)


def test_threshold_is_strict(backend):
    threshold = torch.tensor([0.1])
    surprise = torch.stack([threshold, threshold.nextafter(torch.ones(1)), threshold.nextafter(torch.zeros(1))], dim=1)
    assert_selects(compact(surprise, threshold=threshold, floor=0), [[1]], 3)


def test_ties_go_to_the_lower_token(backend):
    surprise = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert_selects(compact(surprise, budget=3, floor=0), [[0, 1, 3], [5, 6, 7]], 10)


def test_nan_counts_as_infinity(backend):
    surprise = torch.tensor([[torch.inf, torch.nan, 3.0, torch.nan]])
    assert_selects(compact(surprise, budget=2, floor=0), [[0, 1]], 4)
    assert_selects(compact(surprise, threshold=5.0, floor=0), [[0, 1, 3]], 4)


def test_surprise_need_not_be_contiguous(backend, generator):
    surprise = draw(generator, 9, 4).T
    expected = definition(surprise, threshold=[0.5] * 4)
    assert_selects(compact(surprise, threshold=0.5), expected, 36)


def filled(surprise, selections, ladder):
    """As `definition`, with the most surprising of all the others, up to a number of the ladder."""
    streams, tokens = surprise.shape
    values = surprise.nan_to_num(math.inf, math.inf).flatten().tolist()
    chosen = {row for selection in selections for row in selection}
    enough = next((rung for rung in ladder if rung >= len(chosen)), len(values))
    others = sorted(set(range(len(values))) - chosen, key=lambda row: (-values[row], row))
    chosen.update(others[: max(enough - len(chosen), 0)])
    return [sorted(row for row in chosen if row // tokens == stream) for stream in range(streams)]


@pytest.mark.parametrize("rule", [{"threshold": 0.7}, {"budget": 2}, {"threshold": 0.0}], ids=str)
@pytest.mark.parametrize("ladder", [[1], [8, 16, 24], (5, 1000)], ids=str)
@pytest.mark.parametrize("shape", [(1, 30), (3, 11), (2, 1)], ids=str)
def test_ladder(backend, generator, shape, ladder, rule):
    surprise = draw(generator, *shape)
    surprise[-1, -1] = torch.nan
    plain = {name: [value] * shape[0] for name, value in rule.items()}
    expected = filled(surprise, definition(surprise, **plain, floor=2), ladder)
    assert_selects(compact(surprise, **rule, floor=2, ladder=ladder), expected, surprise.numel())
    held = torch.tensor(ladder, dtype=torch.int32)
    assert_selects(compact(surprise, **rule, floor=2, ladder=held), expected, surprise.numel())


def test_a_ladder_never_drops_an_active_token(backend):
    """Not for one of another stream that is as surprising, or NaN."""
    surprise = torch.tensor([[torch.nan, torch.inf, torch.nan, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert_selects(compact(surprise, budget=1, floor=0, ladder=[3]), [[0, 1], [7]], 8)


def test_large(generator):
    """Enough streams and tokens for several threads."""
    surprise = torch.rand(6, 12000, generator=generator)
    threshold = torch.tensor([0.1, 0.9, 0.99, 2.0, 0.5, 0.0])
    for actual, expected in zip(compact(surprise, threshold), reference(surprise, threshold, None, 4), strict=True):
        assert torch.equal(actual, expected)
    budget = torch.tensor([0, 10, 1000, 11999, 12000, 20000], dtype=torch.int32)
    for actual, expected in zip(compact(surprise, None, budget), reference(surprise, None, budget, 4), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rule", [(torch.tensor([0.5, 0.0]), None), (None, torch.tensor([3, 1], dtype=torch.int32))])
def test_opcheck(generator, rule):
    torch.library.opcheck(torch.ops.neuroflow.compact.default, (torch.rand(2, 9, generator=generator), *rule, 2))


def test_compile(generator):
    surprise = torch.rand(2, 9, generator=generator)
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    for rule in ({"threshold": 0.5}, {"budget": 3}, {"threshold": 0.5, "ladder": (4, 8, 12)}):
        for actual, expected in zip(compiled(surprise, **rule), compact(surprise, **rule), strict=True):
            assert torch.equal(actual, expected)


def test_numbers_beyond_32_bits(backend):
    """A budget, floor or rung above N means N, and a threshold above all numbers leaves what is infinite."""
    surprise = torch.tensor([[0.5, torch.inf, 2.0]])
    for rule in ({"budget": 10**12}, {"threshold": 1.0, "floor": 2**62}, {"budget": 1, "ladder": [10**12, 10**13]}):
        assert compact(surprise, **rule)[0].tolist() == [0, 1, 2]
    for threshold, active in ((1e39, [1, -1, -1]), (torch.inf, [-1, -1, -1])):
        assert compact(surprise, threshold, floor=0)[0].tolist() == active


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("surprise", {"surprise": torch.zeros(4), "threshold": 0.1}),
        ("surprise", {"surprise": torch.zeros(2, 4).double(), "threshold": 0.1}),
        ("threshold", {}),
        ("threshold", {"threshold": 0.1, "budget": 2}),
        ("threshold", {"threshold": -0.1}),
        ("threshold", {"threshold": torch.zeros(3)}),
        ("budget", {"budget": -1}),
        ("budget", {"budget": torch.zeros(2, 1)}),
        ("floor", {"threshold": 0.1, "floor": -1}),
        ("floor", {"threshold": 0.1, "floor": 1.5}),
        ("floor", {"threshold": 0.1, "floor": 10**30}),
        ("ladder", {"threshold": 0.1, "ladder": []}),
        ("ladder", {"threshold": 0.1, "ladder": [2, 2]}),
        ("ladder", {"threshold": 0.1, "ladder": [0, 2]}),
        ("ladder", {"threshold": 0.1, "ladder": [1.5]}),
        ("ladder", {"threshold": 0.1, "ladder": torch.zeros(2)}),
    ],
)
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        compact(**{"surprise": torch.zeros(2, 4)} | arguments)
