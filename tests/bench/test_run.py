"""The benchmark's registry, its checks, and what is made of its results, on tiny shapes and hand-made rows."""

import importlib
import itertools
import json
import subprocess
import types
from pathlib import Path

import pytest
import torch
from models import PATCH, tiny
from neuroflow.config import NeuroFlowConfig

from bench import cases, compare, plot, run, tables
from bench.baselines import Published
from neuroflow_kernels import BackendUnavailable, env, linear_rows, unavailable

CEILINGS = {"memory": 1e9, "float32": 2e9, "bfloat16": 4e9}
SHAPES = {3: (2, 40, 16), 4: (2, 9, 2, 8), 5: (2, 3, 9, 2, 8)}


def op_named(name):
    return next(op for op in cases.OPS if op.name == name)


def named(op, dtype=torch.float32):
    return cases.OpCase(op, SHAPES[len(op.shapes[0])], dtype)


def made_row(**changed):
    row = {"kind": "model", "case": "SigLIP base", "shape": [224, 224], "dtype": "float32", "skip": None, "noise": None}
    row |= {"system": "dense", "median_ms": 100.0, "p20_ms": 90.0, "p80_ms": 110.0, "rounds": 3, "flops": 10}
    return row | {"speedup": 1.0, "share_of_ceiling": 0.5} | changed


def made_run(*rows):
    machine = {"processor": "some", "threads": "1 of 2", "torch": "2", "transformers": "5", "commit": "abc"}
    return {"machine": machine, "device": "cpu", "ceilings": CEILINGS, "rows": list(rows)}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", cases.OPS, ids=lambda op: op.name)
def test_ops_are_checked_and_measured(op, dtype, capsys):
    if dtype not in op.dtypes:
        pytest.skip(f"{op.name} takes no {dtype}")
    rows = run.measure_op(named(op, dtype), CEILINGS, rounds=3)
    said = capsys.readouterr().out
    backends = [backend for backend in ("reference", "cpp") if unavailable(backend) is None]
    if op.name == "attend_versions":
        backends.remove("cpp")
        assert "cpp: not measured, backend 'cpp' cannot serve attend_versions on cpu: the C++ extension has no" in said
    assert [row["system"] for row in rows] == [*backends, *op.baselines], said
    for row in rows:
        assert row["rounds"] == 3 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["speedup"] > 0 and (row["speedup"] == 1 or row["system"] != "reference")
        least = max(row["bytes"] / 1e9, row["flops"] / CEILINGS[row["dtype"]])
        assert row["share_of_ceiling"] == pytest.approx(least / (row["median_ms"] / 1e3))


def test_cost_of_ops():
    def cost(name):
        case = named(op_named(name))
        return case.op.cost(*case.build())

    # Frames are [2, 40, 16] in float32, of which each stream has 4 active rows; linear_rows reads [2, 40] and [16, 40].
    frame, active = 2 * 40 * 16 * 4, 8 * 16 * 4
    assert cost("ema_surprise_")[0] == 3 * frame + 2 * 40 * 4
    assert cost("gather_rows") == (2 * active, 0) and cost("scatter_rows_") == (2 * active, 0)
    assert cost("ema_gate_")[0] == 3 * frame + 2 * 40 * 8 + active
    assert cost("linear_rows") == (4 * (2 * 40 + 16 * 40 + 16 + 2 * 16), 2 * 2 * 40 * 16)
    assert cost("attend_rows") == (4 * 16 * (2 + 2 + 9 + 9), 4 * 2 * 9 * 16)
    assert cost("attend_rows, streams") == (4 * 16 * (6 + 6 + 18 + 18), 4 * 6 * 9 * 16)
    assert cost("scatter_kv_") == (4 * active, 0)


def test_inputs_are_the_same_every_time_and_every_round_finds_as_many_active():
    case = named(op_named("ema_gate_"))
    h, ema, rows = case.build()
    assert torch.equal(h, case.build()[0]) and rows == 8
    for _ in range(300):
        packed = cases.eager_gate(h, ema, rows)[0]
    assert len(packed) == rows


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias: linear_rows(x, weight, bias) + 1e-3,
        lambda x, weight, bias: linear_rows(x, weight, bias) * torch.nan,
        lambda x, weight, bias: linear_rows(x, weight, bias).double(),
    ],
    ids=["shifted", "nan", "dtype"],
)
def test_a_wrong_op_is_not_measured(wrong, capsys):
    op = op_named("linear_rows")._replace(baselines={"right": torch.nn.functional.linear, "wrong": wrong})
    systems = [row["system"] for row in run.measure_op(named(op), CEILINGS, rounds=1)]
    assert "right" in systems and "wrong" not in systems
    assert "linear_rows 2x40x16 float32 wrong: not measured, it differs from the reference" in capsys.readouterr().out


def test_a_backend_that_declines_says_why(capsys):
    def declining(*_):
        raise BackendUnavailable("it has no kernel")

    op = op_named("linear_rows")._replace(baselines={"declining": declining})
    assert "declining" not in [row["system"] for row in run.measure_op(named(op), CEILINGS, rounds=1)]
    assert "linear_rows 2x40x16 float32 declining: not measured, it has no kernel" in capsys.readouterr().out


def test_whole_numbers_are_compared_exactly():
    index = torch.tensor([1000, 100000], dtype=torch.int32)
    with pytest.raises(AssertionError):
        cases.check(op_named("compact"), index + 1, index)


def test_frames_change_in_the_same_patches(model):
    first, second, third = itertools.islice(cases.frames(model, 6), 3)
    changed = [
        (one != other).any(1)[0].unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
        for one, other in ((first, second), (second, third))
    ]
    counts = [patches.float().mean((2, 3)) for patches in changed]
    assert torch.equal(counts[0] > 0, counts[1] > 0) and (counts[0] > 0.99).sum() == 6 and (counts[0] > 0).sum() == 6
    noisy, other = itertools.islice(cases.frames(model, 6, noise=True), 2)
    assert 0.9 * cases.NOISE < (noisy - first).std() < 1.1 * cases.NOISE
    assert ((other - noisy).abs().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).mean((1, 4, 5)) > 0.3).sum() == 6
    assert (other != noisy).float().mean() > 0.99
    assert first.shape == (1, 3, 48, 48) and -1 <= first.min() < -0.9 and 0.9 < first.max() <= 1


def test_flops_are_those_that_the_published_system_counts(model):
    projection = 2 * 36 * (3 * 8 * 8) * 64
    for arch in ("B", "C"):
        system = Published(model, cases.SHARP, arch)
        counted = []
        for pixels in itertools.islice(cases.frames(model, 6), 3):
            before = system.flops
            system(pixels)
            counted.append(system.flops - before - projection)
        few = cases.flops(model, f"published-{arch}", 6)
        assert counted == [cases.flops(model, "dense", 36), few, few] and cases.flops(model, arch, 6) == few
    everything = [cases.flops(model, name, 36) for name in ("dense", "compiled", *"ABCDE")]
    assert len(set(everything)) == 1
    attention = 4 * (36 - 6) * 6 * 64  # of 6 queries to the keys that C leaves out
    assert cases.flops(model, "E", 6) == few + 4 * attention


def test_models_are_checked_and_measured(model, capsys):
    systems = ["published-B", "published-C", *"ABCDE", "rounded-C", "rounded-E"]
    clips = [(0.8, True), (0.8, False), (0.0, False)]
    rows = run.measure_model(model, systems, clips, CEILINGS, seconds=0, groups=2)
    found = {(row["system"], (row["skip"], row["noise"])): row for row in rows}
    nothing, noisy, still, moving = (None, None), *clips
    assert set(found) == {("dense", nothing), *itertools.product(systems, clips)}, capsys.readouterr().out
    assert found["E", still]["rounds"] == found["E", noisy]["rounds"] == 2 * 3 and found["E", moving]["rounds"] == 2
    assert found["dense", nothing]["rounds"] == 2 * 3 and found["dense", nothing]["speedup"] == 1
    for row in rows:
        assert row["shape"] == [48, 48] and row["dtype"] == "float32" and row["case"] == "SigLIP base"
        rate = CEILINGS["bfloat16" if row["system"].startswith("rounded") else "float32"]
        assert row["share_of_ceiling"] == pytest.approx(row["flops"] / rate / (row["median_ms"] / 1e3))
    assert 0 < found["C", still]["outside_blocks"] < 1
    assert (
        found["E", still]["state_bytes"] > found["rounded-E", still]["state_bytes"] > found["C", still]["state_bytes"]
    )


def test_only_models_in_float32_are_rounded(model):
    rows = run.measure_model(model.bfloat16(), ["C", "rounded-C"], [(0.8, False)], CEILINGS, seconds=0, groups=1)
    assert [row["system"] for row in rows] == ["dense", "C"]


@pytest.mark.parametrize("noise", [False, True])
def test_noise_is_in_every_patch_of_a_clip(model, noise):
    first, second = itertools.islice(run.System(model, "E", 0.8, noise).clip, 2)
    assert ((first == second).float().mean() < 0.5) == noise


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_a_wrong_system_is_not_measured(model, monkeypatch, capsys, error):
    monkeypatch.setattr(cases, "error_of", lambda model, name, *_: error if name == "C" else 0)
    rows = run.measure_model(model, ["C", "E"], [(0.8, False)], CEILINGS, seconds=0, groups=1)
    assert [row["system"] for row in rows] == ["dense", "E"]
    assert "C 48 px float32: not measured, it is wrong by" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["threshold", "budget"])
@pytest.mark.parametrize("arch", ["B", "C", "E"])
def test_errors_are_found_in_whole_frames_and_in_parts(model, monkeypatch, arch, rule):
    pixels = list(itertools.islice(cases.frames(model, 36), 2))
    with torch.inference_mode():
        expected = cases.dense(model)(pixels[1])
        assert cases.error_of(model, arch, pixels, expected) < 1e-5
        right = cases.patched

        def faulty(model, arch, **settings):
            system = right(model, arch, **settings)
            shift = 0.1 * (rule in settings)
            return lambda pixel_values: types.SimpleNamespace(pooler_output=cases.dense(system)(pixel_values) + shift)

        monkeypatch.setattr(cases, "patched", faulty)
        assert cases.error_of(model, arch, pixels, expected) > 0.01


def test_a_system_that_encodes_more_than_changed_is_not_measured(model, monkeypatch, capsys):
    monkeypatch.setattr(cases, "SHARP", -1.0)
    rows = run.measure_model(model, ["published-C"], [(0.8, False)], CEILINGS, seconds=0, groups=1)
    assert [row["system"] for row in rows] == ["dense"]
    assert "published-C, 80% skipped: not measured" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["raises", "wrong", None])
def test_compiled_is_measured_where_it_works(model, monkeypatch, capsys, fault):
    def compiled(model):
        def system(pixels):
            if fault == "raises":
                raise RuntimeError("no compiler\nat all")
            return cases.dense(model)(pixels) + (fault == "wrong")

        return system

    monkeypatch.setattr(cases, "compiled", compiled)
    rows = run.measure_model(model, ["E"], [(0.8, False)], CEILINGS, compiled=True, seconds=0, groups=1)
    assert [row["system"] for row in rows] == ["dense", *["compiled"] * (fault is None), "E"]
    assert rows[-2]["skip"] is None and rows[-1]["skip"] == 0.8
    says = {"raises": "not measured, RuntimeError: no compiler\n", "wrong": "not measured, it is wrong", None: "in 0 s"}
    assert says[fault] in capsys.readouterr().out


def test_figures_of_times():
    figures = run.figures([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], [10.0, 7.0, 8.0, 18.0, 20.0, 200.0])
    assert figures["median_ms"] == 3.5 and figures["rounds"] == 6
    assert figures["speedup"] == 4.5  # the median of 2, 7, 4, 6, 5 and 2
    assert figures["p20_ms"] == pytest.approx(2) and figures["p80_ms"] == pytest.approx(5)
    same = run.figures([0.01234567] * 3, [1.0] * 3)
    assert same["p20_ms"] == same["median_ms"] == same["p80_ms"]


def test_key_frames_count_in_what_is_sustained():
    # A key frame of 1 and 127 frames of 1 / 20 take 7.35 in place of 128.
    assert NeuroFlowConfig().max_age == 128
    assert run.sustained({"speedup": 20}) == pytest.approx(128 / 7.35)


def test_a_run_is_printed_and_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "run.json"
    monkeypatch.setattr(cases, "OP_CASES", [named(op_named("linear_rows"), dtype) for dtype in cases.DTYPES])
    monkeypatch.setattr(cases, "tower", lambda size, dtype, device: tiny("siglip", size).to(dtype))
    monkeypatch.setattr(run, "measure_ceilings", lambda device: CEILINGS)
    arguments = ["--dtype", "float32", "--size", "48", "--skip", "0.8", "--system", "E", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", ["run", *arguments, "--out", str(out)])
    run.main()
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    kinds = [(row["kind"], row["system"]) for row in written["rows"]]
    assert kinds[-3:] == [("model", "dense"), ("model", "E"), ("model", "E")] and ("op", "reference") in kinds[:-3]
    assert [row["noise"] for row in written["rows"][-3:]] == [None, True, False]
    assert all(run.line(row) in printed for row in written["rows"])
    assert all(row["dtype"] == "float32" for row in written["rows"]) and written["ceilings"] == CEILINGS
    assert {"processor", "threads", "torch", "transformers", "commit"} <= set(written["machine"])
    assert "triton: not measured, it serves cuda tensors only" in printed and "memory 1.0 GB/s" in printed


def test_compare(tmp_path):
    sparse = {"system": "E", "skip": 0.97, "noise": False}
    first = made_run(
        made_row(),
        made_row(**sparse, median_ms=10.0, p20_ms=9.0, p80_ms=11.0, speedup=10.0),
        made_row(**sparse, dtype="bfloat16", speedup=10.0),
        made_row(system="C", skip=0.97, noise=True),
    )
    second = made_run(
        made_row(median_ms=120.0, p20_ms=105.0, p80_ms=130.0),
        made_row(**sparse, median_ms=20.0, p20_ms=11.5, p80_ms=21.0, speedup=6.0),
        made_row(**sparse, dtype="bfloat16", speedup=11.9),
    )
    for name, made in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    lines = list(compare.compare(*(compare.load(tmp_path / f"{name}.json") for name in "ab")))
    assert lines[0] == "A: device cpu, processor some, threads 1 of 2, torch 2, transformers 5, commit abc"
    assert [" ".join(line.split()) for line in lines[3:6]] == [
        "SigLIP base 224x224 float32 dense 100.000 120.000 1.20 1.00x 1.00x 1.00",
        "SigLIP base 224x224 float32 97% skipped E 10.000 20.000 2.00* 10.00x 6.00x 0.60",
        "SigLIP base 224x224 bfloat16 97% skipped E 100.000 100.000 1.00 10.00x 11.90x 1.19",
    ]
    assert lines[6:] == [
        "only in A: SigLIP base 224x224 float32 97% skipped, noisy C",
        "speed-ups within 20% of each other: 1 of 2",
    ]


def test_one_run_is_compared_with_what_is_recorded_for_its_machine(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made_run(made_row())))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["compare", str(path)])
    compare.main()
    assert "--out bench/results/run-cpu-some.json" in capsys.readouterr().out
    (tmp_path / "run-cpu-some.json").write_text(json.dumps(made_run(made_row(median_ms=200.0))))
    compare.main()
    assert "dense 200.000 100.000 0.50" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("AMD EPYC, AVX512", "epyc"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, AVX512", "xeon"),
        ("aarch64, DEFAULT", "aarch64"),
        ("NVIDIA H100 80GB HBM3, compute capability 9.0", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_short_names(device, name):
    assert tables.short_name(device) == name


@pytest.mark.parametrize(
    ("cpuinfo", "sets"),
    [
        ("flags\t\t: fpu avx avx2 avx512f amx_int8 avx512_vnni\n", "avx2, avx512f, avx512_vnni, amx_int8"),
        ("Features\t: fp asimd sve bf16 svebf16\n", "asimd, sve, bf16"),
        ("", "unknown"),
    ],
)
def test_instruction_sets(tmp_path, monkeypatch, cpuinfo, sets):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\n{cpuinfo}\nmodel name\t: Other\n")
    monkeypatch.setattr(env, "Path", lambda _: tmp_path / "cpuinfo")
    facts = env.describe()
    assert facts["processor"].startswith("Some CPU, ") and facts["instruction sets"] == sets


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A project with one commit of code.py and bench/results/old.json."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for file in (tmp_path / "code.py", results / "old.json"):
        file.write_text("{}")
    author = ["-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
    return tmp_path


def test_results_are_of_a_commit(checkout):
    for name in ("old.json", "new.json"):
        (tables.RESULTS / name).write_text("[]")  # another result, which is not what is measured
    facts = tables.begin("some")
    assert {"processor", "instruction sets", "threads", "torch", "transformers"} <= set(facts)
    assert facts["commit"] == tables.git("rev-parse", "--short", "HEAD")
    (checkout / "code.py").write_text("[]")
    for stem in ("some", str(tables.RESULTS / "some.json")):
        with pytest.raises(SystemExit, match=r"these differ from it: code\.py; commit or stash"):
            tables.begin(stem)
    assert tables.begin(str(checkout / "some"))["commit"] == f"{facts['commit']}-dirty"


def test_results_need_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "bench" / "results")
    with pytest.raises(SystemExit, match="is not a git checkout"):
        tables.begin("some")
    assert tables.begin(str(tmp_path / "some"))["commit"] == "unknown"


def writers():
    """Every program of bench that writes a result, by its name within the package."""
    package = Path(run.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.name != "tables.py" and "    write(" in path.read_text() and "def main" in path.read_text():
            yield ".".join(path.relative_to(package).with_suffix("").parts)


@pytest.mark.parametrize("name", [*writers(), "run"])
def test_nothing_is_measured_of_a_changed_tree(name, monkeypatch):
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(tables, "changed", lambda: ["code.py"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for kind, method in ((torch.nn.Module, "__call__"), (Path, "open")):  # what would be next
        monkeypatch.setattr(kind, method, lambda *_, **__: pytest.fail("something is measured"))
    given = {"studies.fidelity": ["clips"], "run": ["--out", str(tables.RESULTS / "run-cpu-some.json")]}
    monkeypatch.setattr("sys.argv", [name, *given.get(name, [])])
    with pytest.raises(SystemExit, match=r"differ from it: code\.py"):
        module.main()


@pytest.fixture
def drawn():
    """A run of two sizes and two ops."""
    rows = []
    for size, dense, sparse in ((224, 100.0, 25.0), (448, 400.0, 21.0)):
        rows.append(made_row(shape=[size, size], median_ms=dense))
        times = {"median_ms": sparse, "speedup": dense / sparse}
        rows.append(made_row(shape=[size, size], system="E", skip=0.97, noise=False, **times))
        rows.append(made_row(shape=[size, size], system="E", skip=0.97, noise=True, median_ms=50.0, speedup=2.0))
    for case, flops in (("gather_rows", 0), ("linear_rows", 640)):
        op = {"kind": "op", "case": case, "bytes": 64, "flops": flops}
        rows.append(made_row(**op, shape=[1, 2, 3], system="cpp"))
        rows.append(made_row(**op, shape=[4, 5, 6], system="reference"))
        rows.append(made_row(**op, shape=[4, 5, 6], system="cpp", median_ms=0.5, speedup=1.75))
    return made_run(*rows)


def test_tables(drawn):
    lines = plot.tables_of(drawn).splitlines()
    assert lines[0] == "processor some, threads 1 of 2, torch 2, transformers 5, commit abc:"
    assert lines[2:8] == [
        "| input | dtype | skipped | dense | E | E with its key frames |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 224 px | float32 | 97% | 100 ms | 25 ms, 4.0x | 3.9x |",
        "| 224 px | float32 | 97%, noisy | 100 ms | 50 ms, 2.0x | 1.98x |",
        "| 448 px | float32 | 97% | 400 ms | 21 ms, 19.0x | 16.7x |",
        "| 448 px | float32 | 97%, noisy | 400 ms | 50 ms, 2.0x | 1.98x |",
    ]
    assert lines[9:] == [
        "| op | shape | dtype | backend | median | over the reference | of the ceiling |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `gather_rows` | 4x5x6 | float32 | cpp | 0.5 ms | 1.75x | 50% |",
        "| `linear_rows` | 4x5x6 | float32 | cpp | 0.5 ms | 1.75x | 50% |",
    ]


def test_plot_writes_a_picture_and_every_row(drawn, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(drawn))
    monkeypatch.setattr("sys.argv", ["plot", str(path)])
    plot.main()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "run.md").read_text()
    assert written.count("\n| ") == 2 + len(drawn["rows"]) and "| gather_rows 4x5x6 float32 | cpp | 0.5 ms |" in written
    assert capsys.readouterr().out.strip() == plot.tables_of(drawn)


def test_readme_holds_the_tables_in_their_blocks(drawn, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    block = "<!-- {}: by python -m bench.plot --readme -->\n\n{}\n\n<!-- end -->".format
    readme.write_text(f"before\n\n{block('other', 'old')}\n\nbetween\n\n{block('runs', 'old')}\n\nafter\n")
    (tmp_path / "run-cpu.json").write_text(json.dumps(drawn))
    monkeypatch.setattr(plot, "README", readme)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(plot, "TABLES", {"other": lambda: "new"})
    monkeypatch.setattr("sys.argv", ["plot", "--readme"])
    written = f"before\n\n{block('other', 'new')}\n\nbetween\n\n{block('runs', plot.tables_of(drawn))}\n\nafter\n"
    for _ in range(2):
        plot.main()
        assert readme.read_text() == written
    for text in (block("runs", "").removesuffix("<!-- end -->"), block("runs", "") * 2, block("other", "")):
        with pytest.raises(ValueError, match=r"README\.md needs the blocks runs, once each"):
            plot.with_tables(text, {"runs": "text"})


def test_readme_shows_what_was_recorded():
    text = plot.README.read_text()
    assert plot.with_tables(text, plot.readme_tables()) == text
