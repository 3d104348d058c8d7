"""Small models of transformers, each in a process of its own."""

import os
import signal

import neuroflow
import pytest

from bench.studies import zoo


def rows_of(names):
    """The rows of classes, each of the only mapping "all"."""
    found = dict(zoo.each_apart(zoo.attempt, [(name, (name, kind)) for name, kind in names.items()]))
    return [{"class": name, "types": [names[name]], "mappings": ["one"], **row} for name, row in found.items()]


def test_what_becomes_of_a_class(monkeypatch):
    def refuse(model, tower):
        if type(model).__name__ == "ViTModel":
            raise ValueError("a tower that\nno adapter knows")
        return enable(model, tower=tower)

    enable = neuroflow.enable_cache
    monkeypatch.setattr(neuroflow, "enable_cache", refuse)
    names = {"LlavaForConditionalGeneration": "llava", "ViTModel": "vit", "ResNetModel": "resnet", "Missing": "vit"}
    rows = {row["class"]: row | {"verdict": zoo.verdict(row)} for row in rows_of(names)}
    assert {name: rows[name]["verdict"] for name in names} == {
        "LlavaForConditionalGeneration": "accepted",
        "ViTModel": "refused",
        "ResNetModel": "no plain ViT",
        "Missing": "not built",
    }
    [tower] = rows["LlavaForConditionalGeneration"]["towers"]
    assert tower["family"] == "CLIP" and rows["LlavaForConditionalGeneration"]["kinds"] == ["clip_vision_model"]
    assert rows["ViTModel"]["reason"] == "ValueError: a tower that"
    text = zoo.text_of(list(rows.values()))
    assert "| one | 4 | 1 | 1 | 1 | 1 | 50.0 % |" in text
    assert "| ResNetModel | resnet | ResNet: convolutions |" in text


def crash():
    yield {"built": True}
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    yield {"built": True}
    signal.pause()


@pytest.mark.parametrize(("work", "reason"), [(crash, "ended with -9"), (hang, "took more than 1 seconds")])
def test_a_process_that_does_not_end_well(monkeypatch, work, reason):
    monkeypatch.setattr(zoo, "SECONDS", 1)
    [(_, row)] = zoo.each_apart(work, [("one", ())])
    assert row["built"] and reason in row["reason"]
