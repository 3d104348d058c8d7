"""What is kept of weights until they change, whichever way they change."""

import pytest
import torch
from neuroflow.engine.derived import Derived
from torch import nn
from torch.nn.utils import parametrize


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def trained(model):
    model[0].weight.mul_(2)


def moved(model):
    model.double()


def another_tensor(model):
    model[0].weight = nn.Parameter(torch.ones(4, 4))


def another_part(model):
    model[0] = nn.Linear(4, 4)


def part_of_a_leaf(model):
    model[0].adapter = nn.Linear(4, 4)


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", Doubled())


def buffer_added(model):
    model[1].register_buffer("scale", torch.ones(1))


CHANGES = [trained, moved, another_tensor, another_part, part_of_a_leaf, parametrized, buffer_added]


def counted(model, derived, calls):
    return derived(model, "key", lambda: calls.append(1) or len(calls))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_it_is_computed_once_until_weights_change(change):
    model, derived, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Derived(), []
    assert [counted(model, derived, calls) for _ in range(3)] == [1, 1, 1]
    change(model)
    assert [counted(model, derived, calls) for _ in range(3)] == [2, 2, 2]
    derived.clear()
    assert counted(model, derived, calls) == 3


def test_what_gradients_go_through_is_computed_each_time():
    model, derived, calls = nn.Linear(4, 4), Derived(), []
    assert [counted(model, derived, calls) for _ in range(2)] == [1, 2]
    with torch.no_grad():
        assert [counted(model, derived, calls) for _ in range(2)] == [3, 3]


def test_so_is_what_is_of_weights_that_do_not_count_their_changes():
    with torch.inference_mode():
        model, derived, calls = nn.Linear(4, 4), Derived(), []
        assert [counted(model, derived, calls) for _ in range(2)] == [1, 2]
