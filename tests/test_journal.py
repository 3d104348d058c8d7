"""What a run has found survives a kill, and is continued by the same run only."""

import json

import pytest
from neuroflow.journal import Findings, Journal, JournalError

SETTINGS = {"model": "./my-vit", "sizes": (48, 80), "launch": "graph"}


def found(path, names, *, settings=SETTINGS, resume=False):
    """Findings that were left behind as they are, of `names` besides what was there."""
    findings = Findings(path, settings, resume=resume)
    for name in names:
        findings.append(name, {"of": name})
    return findings


def test_a_killed_run_is_continued_without_the_half_line_that_it_left(tmp_path):
    path = tmp_path / "result.json"
    found(path, "ab")  # never closed: what was appended must be on disk by itself
    with (tmp_path / "result.json.journal").open("ab") as journal:
        journal.write(b'["c",{"o')
    found(path, "c", resume=True)
    findings = found(path, "d", resume=True)
    assert findings.done == {name: {"of": name} for name in "abcd"}
    findings.finish(machine="a machine")
    content = json.loads(path.read_text())
    assert list(content) == ["settings", "machine", "found"] and content["settings"] == SETTINGS | {"sizes": [48, 80]}
    assert content["found"] == findings.done and [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_finished_file_is_added_to_and_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "result.json"
    found(path, "ab").finish()
    before = path.read_bytes()
    found(path, "c", resume=True)  # killed
    assert path.read_bytes() == before
    findings = found(path, "", resume=True)
    assert list(findings.done) == ["a", "b", "c"]
    findings.finish()
    assert list(json.loads(path.read_text())["found"]) == ["a", "b", "c"]


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    findings = found(None, "ab")
    findings.close()
    findings.finish()
    assert list(findings.done) == ["a", "b"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused(tmp_path, finished):
    path = tmp_path / "result.json"
    findings = found(path, "ab")
    findings.finish() if finished else findings.close()
    name = "result.json" if finished else "result.json.journal"
    with pytest.raises(JournalError, match=rf"{name}: was made with sizes \[48, 80\], not \[48\]; use that"):
        Findings(path, SETTINGS | {"sizes": [48]}, resume=True)
    with pytest.raises(JournalError, match=rf"{name}: was made with model ./my-vit, not None"):
        Findings(path, {key: value for key, value in SETTINGS.items() if key != "model"}, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        "[]\n",
        "null\n",
        "{}\n",
        '{"settings": null}\n',
        '{"settings": [1]}\n',
        '{"settings": {}}\n[1, 2, 3]\n',
        '{"settings": {}}\n[1, {}]\n',
        '{"settings": {}}\n["a", NaN]\n',
        '{"settings": {}}\n["a", {"of": 1}]\n',
        '{"settings": {}}\n{"of": \n',
        "[" * 100_000 + "\n",
        '{"settings": {}}\n' + "[" * 100_000 + "\n",
        b'{"settings": {}}\n\xff\n',
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_is_damaged_is_refused_and_stays(tmp_path, content, finished):
    path = tmp_path / ("result.json" if finished else "result.json.journal")
    content = content if isinstance(content, bytes) else content.encode()
    content = content.replace(b"{}}\n[", b'{}, "found": [[').replace(b"{}}\n", b"{}, ") if finished else content
    path.write_bytes(content)
    with pytest.raises(JournalError, match=rf"{path.name}: cannot be continued .*; remove it, or run without") as error:
        Findings(tmp_path / "result.json", {}, resume=True, read=lambda found: found["name"])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content


@pytest.mark.parametrize("content", ["", '{"settings": {"sizes"', "\0" * 99])
def test_an_empty_or_torn_journal_starts_over(tmp_path, content):
    (tmp_path / "result.json.journal").write_text(content)
    findings = found(tmp_path / "result.json", "a", resume=True)
    findings.finish()
    assert json.loads((tmp_path / "result.json").read_text())["found"] == {"a": {"of": "a"}}


def test_beside_an_empty_journal_a_finished_file_is_added_to(tmp_path):
    found(tmp_path / "result.json", "ab").finish()
    (tmp_path / "result.json.journal").touch()  # of a run that was killed before it found anything
    findings = found(tmp_path / "result.json", "", resume=True)
    assert list(findings.done) == ["a", "b"]
    findings.close()
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_nan_is_no_finding(tmp_path):
    findings = found(tmp_path / "result.json", "a")
    with pytest.raises(JournalError, match=r"result.json.journal: the result holds NaN or Inf"):
        findings.append("b", {"of": [float("nan")]})
    with pytest.raises(JournalError, match=r"result.json: the result holds NaN or Inf"):
        findings.finish(table=float("inf"))
    findings.close()
    continued = Findings(tmp_path / "result.json", SETTINGS, resume=True)
    assert list(continued.done) == ["a"] and not (tmp_path / "result.json").exists()


def test_an_unfinished_run_is_not_continued_unasked(tmp_path):
    path = tmp_path / "result.json"
    found(path, "ab")
    with pytest.warns(
        UserWarning, match="the unfinished .*result.json.journal is discarded, because --resume was not given"
    ):
        findings = found(path, "c")
    findings.finish()
    assert list(json.loads(path.read_text())["found"]) == ["c"]


def test_a_journal_of_before_the_names_changed_is_continued(tmp_path):
    """A field was called engine, and the package's own tower lay elsewhere."""
    settings = {"model": "/lib/neuroflow/models/street", "engine": "graph", "threshold": 0.1}
    lines = [json.dumps({"settings": settings}), json.dumps({"frame": 0})]
    (tmp_path / "result.jsonl.journal").write_text("\n".join([*lines, ""]))
    now, read = {"model": "/lib/neuroflow/street/weights", "launch": "graph", "threshold": 0.1}, []
    journal = Journal(tmp_path / "result.jsonl", now, read.append, resume=True)
    assert read == [{"frame": 0}]
    journal.append({"frame": 1})
    assert [json.loads(line) for line in journal.lines()] == [{"frame": 0}, {"frame": 1}]
    journal.remove()
    assert list(tmp_path.iterdir()) == []
