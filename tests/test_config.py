import dataclasses
import re

import neuroflow
import pytest


def test_letters_are_aliases():
    named = [neuroflow.NeuroFlowConfig(arch=letter).arch for letter in "ABCDE"]
    assert named == ["mlp", "active", "dual", "midlayer", "context"]
    assert neuroflow.NeuroFlowConfig() == neuroflow.NeuroFlowConfig(arch="E", threshold=0.1)


def test_a_budget_takes_the_place_of_the_threshold():
    assert neuroflow.NeuroFlowConfig(budget=0.16).threshold is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", "F"),
        ("threshold", -0.1),
        ("threshold", float("nan")),
        ("budget", 0),
        ("budget", 2.5),
        ("ema_decay", 1.1),
        ("floor", -1),
        ("floor", 2.0),
        ("signal", "pixels"),
        ("reference", "last"),
        ("max_age", 0),
        ("mid_layer", -1),
        ("dense_above", -0.1),
        ("dense_above", 1.1),
        ("precision", "float16"),
        ("ladder", ()),
        ("ladder", (8, 8)),
        ("ladder", (0, 8)),
        ("ladder", "123"),
        ("ladder", 8),
        ("threshold", 1e39),
        ("threshold", 10**39),
        ("threshold", "0.1"),
        ("budget", 3_000_000_000),
        ("budget", "4"),
        ("budget", float("nan")),
        *((name, 2**31) for name in ("floor", "dilation", "max_age", "mid_layer", "pass_patches")),
        ("ladder", (8, 2**31)),
        ("max_age", 1.5),
        ("cut_share", 0),
        ("cut_surprise", 2.1),
        ("cut_light", 0),
        ("blend", 0),
    ],
)
def test_values_outside_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}; accepted is "):
        neuroflow.NeuroFlowConfig(**{name: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(neuroflow.NeuroFlowConfig)])
def test_no_field_takes_another_type(field, tmp_path):
    """None, where nothing is meant by it; texts and numbers for True and False, and the other way around."""
    config = neuroflow.NeuroFlowConfig()
    own, optional = getattr(config, field), ("threshold", "budget", "ladder", "mid_layer", "dense_above")
    others = [[0.5], {"a": 1}, float("nan"), float("inf"), "no", *([] if isinstance(own, bool) else [True])]
    others += (
        [] if own is None or field in ("threshold", "max_age", "cut_share", "cut_surprise", "cut_light") else [None]
    )
    others += [0, 1] if isinstance(own, bool | str) else []
    for value in others:
        with pytest.raises(ValueError, match=rf"^{field} is .*; accepted is ") as error:
            neuroflow.NeuroFlowConfig(**{field: value})
        assert "\n" not in str(error.value)
    for value in (None,) * (field in optional):
        assert getattr(neuroflow.NeuroFlowConfig(**{field: value}), field) == own


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "cannot be read .it is nested too deeply"),
        ('{"threshold": NaN}', "cannot be read .NaN is not JSON"),
        ('{"threshold": 1e999}', "threshold is inf"),
        ('{"max_age": ' + "9" * 30 + "}", "max_age is 9{30}; accepted"),
        ('{"normalise_motion": "no"}', "normalise_motion is 'no'; accepted is True or False"),
        ("[]", "holds a list; accepted is a JSON object"),
        ("null", "holds a NoneType"),
        (b"\xff\xfe{}", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_files_that_hold_no_configuration(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"config .*config\.json: {words}") as error:
        neuroflow.NeuroFlowConfig.load(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"config.json: cannot be written \(No such file"):
        neuroflow.NeuroFlowConfig().save(tmp_path / "no" / "config.json")


def test_threshold_and_budget_exclude_each_other():
    with pytest.raises(ValueError, match="budget is 5; accepted is None beside a threshold"):
        neuroflow.NeuroFlowConfig(threshold=0.1, budget=5)


def test_a_ladder_excludes_dilation_and_survives_a_file(tmp_path):
    with pytest.raises(ValueError, match="None beside a dilation"):
        neuroflow.NeuroFlowConfig(ladder=(8, 16), dilation=1)
    config = neuroflow.NeuroFlowConfig(ladder=[8, 16])
    config.save(tmp_path / "config.json")
    assert neuroflow.NeuroFlowConfig.load(tmp_path / "config.json") == config


def test_precision_needs_frames_that_are_packed_as_a_whole():
    with pytest.raises(ValueError, match="precision is 'bfloat16'; accepted is 'model' for arch 'mlp'"):
        neuroflow.NeuroFlowConfig(arch="A", precision="bfloat16")


def test_configurations_are_values():
    config = neuroflow.NeuroFlowConfig(arch="C")
    assert dataclasses.replace(config, threshold=0.2).threshold == 0.2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.arch = "E"


def test_the_published_gate():
    published = neuroflow.NeuroFlowConfig.published()
    assert (published.arch, published.signal, published.reference) == ("dual", "embedding", "ema")
    assert (published.score, published.threshold) == ("surprise", 0.02)
    assert (
        published.max_age is published.cut_share is published.cut_surprise is published.cut_light is None
        and published.dense_above == 1
    )
    other = neuroflow.NeuroFlowConfig.published("B", threshold=0.1, signal="patch")
    assert (other.arch, other.threshold, other.signal, other.reference) == ("active", 0.1, "patch", "ema")


def test_files_of_earlier_versions_load(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"arch": "dual", "engine": "eager"}')
    assert neuroflow.NeuroFlowConfig.load(path) == neuroflow.NeuroFlowConfig(arch="C", launch="eager")
    path.write_text('{"arch": "dual", "engines": "eager"}')
    with pytest.raises(ValueError, match=r"config .*config\.json: has no field 'engines'; accepted are those of"):
        neuroflow.NeuroFlowConfig.load(path)
    path.write_text('{"engine": "auto"}')
    with pytest.raises(ValueError, match="launch is 'auto'; accepted is one of 'graph', 'eager'"):
        neuroflow.NeuroFlowConfig.load(path)
