"""Frames run on no more threads than there are free cores, and torch has its own number back afterwards."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import neuroflow
import pytest
import torch
from interrupts import Interrupt, traced
from models import clip, exact, tiny
from neuroflow.engine import threads
from neuroflow.engine.threads import Cores, Meter, busy_seconds, on_free_cores

from neuroflow_kernels.cores import quota

CPU = torch.device("cpu")
BUSY = Cores(own=2, quota=math.inf, others=1.2)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.fixture
def busy(two_threads, monkeypatch):
    """Of two cores others use more than one, and keep this process waiting."""
    monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda: BUSY))
    monkeypatch.setattr(threads, "rivals", SimpleNamespace(known=lambda: True, waiting=True, forget=lambda: None))


def lowered(work, *args):
    return on_free_cores(lambda *_: None, CPU, work, *args)


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v1(quota, period=100_000):
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"},
            1.5,
        ),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../seen/by/nobody\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a\n", {"a/cpu.max": "few\n"}, math.inf),
        (
            "4:memory:/m\n3:cpu,cpuacct:/host/a\n0::/\n",
            {f"cpu/{name}": text for name, text in v1(250_000).items()},
            2.5,
        ),
        ("3:cpu:/a\n", {f"cpu/a/{name}": text for name, text in v1(40_000, 20_000).items()}, 2),
        ("3:cpu:/a\n", {f"cpu/a/{name}": text for name, text in v1(-1).items()}, math.inf),
        ("3:cpuset:/a\n", {f"cpu/a/{name}": text for name, text in v1(100_000).items()}, math.inf),
        ("", {"cpu.max": "100000 100000\n"}, math.inf),
    ],
)
def test_quota_is_the_least_of_all_cgroups_that_are_to_be_seen(tmp_path, cgroup, files, expected):
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert quota(tree(tmp_path, files | {"proc/self/cgroup": cgroup})) == expected


def test_what_cannot_be_read_bounds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "own_cores", lambda: frozenset({0, 5, 6}))
    monkeypatch.setattr(threads, "INTERVAL", 0)
    assert quota(tmp_path) == math.inf and busy_seconds({0}, tmp_path) is None
    assert Meter(tmp_path).read() == Cores(3, math.inf, 0)
    tree(tmp_path, {"proc/stat": "cpu  1 2 3 4\ncpu0 1 2 3 4\n"})
    assert busy_seconds({0}, tmp_path) is busy_seconds({5}, tmp_path) is None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(seconds, process, core=(user, idle)...) lets time pass; its `root` is what a meter reads.

    The process may use cores 0 and 2 of its three.
    """
    clock = {"monotonic": 1000.0, "process_time": 50.0}
    columns = {core: [7] * 10 for core in range(3)}
    monkeypatch.setattr(threads, "time", SimpleNamespace(**{name: lambda name=name: clock[name] for name in clock}))
    monkeypatch.setattr(threads, "own_cores", lambda: frozenset({0, 2}))
    monkeypatch.setattr(threads.os, "sysconf", {"SC_CLK_TCK": 100}.get)

    def passes(seconds, process, **used):
        """used: core0=(column, seconds), ..."""
        clock["monotonic"] += seconds
        clock["process_time"] += process
        for core, (column, more) in used.items():
            columns[int(core[-1])][column] += round(100 * more)
        lines = [f"cpu{core} " + " ".join(map(str, values)) for core, values in columns.items()]
        tree(tmp_path, {"proc/stat": "\n".join(["cpu  9 9 9 9 9 9 9 9 0 0", *lines, "intr 5 0 1", "btime 1"])})

    passes(0, 0)
    return SimpleNamespace(root=tmp_path, passes=passes)


@pytest.mark.parametrize("column", range(10))
def test_others_use_what_is_busy_and_not_this_process(machine, column):
    meter = Meter(machine.root)
    machine.passes(2, 0.5, core0=(column, 1.0), core1=(0, 2.0), core2=(0, 1.5))
    counted = column in (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal
    assert meter.read() == Cores(2, math.inf, pytest.approx((counted + 1.5 - 0.5) / 2))


def test_a_meter_reads_once_in_an_interval(machine):
    meter = Meter(machine.root)
    machine.passes(0.2, 0, core0=(0, 0.2))
    assert meter.read().others == 0
    machine.passes(0.2, 0, core0=(0, 0.2))
    assert meter.read().others == pytest.approx(1)
    machine.passes(0.2, 0)
    assert meter.read().others == pytest.approx(1)
    machine.passes(0.3, 0)
    assert meter.read().others == 0
    machine.passes(1, 1, core0=(0, 0.9))  # ticks are coarser than the process's own clock
    assert meter.read().others == 0
    machine.passes(1, -40, core0=(0, 1))  # as in a process that was forked
    assert meter.read().others == pytest.approx(1)


@pytest.mark.parametrize(
    ("cores", "free", "why"),
    [
        (Cores(2, math.inf, 0.4), 2, "it may use 2 core"),
        (Cores(2, math.inf, 0.6), 1, r"other processes use 0\.6 of its 2 core"),
        (Cores(2, math.inf, 2.0), 1, "other processes use 2.0"),
        (Cores(16, 4, 8.0), 4, r"its cgroup's quota is 4 of 16 core"),
        (Cores(16, 4, 13.2), 3, "other processes use 13.2"),
        (Cores(16, 0.25, 0.0), 1, "its cgroup's quota is 0.25"),
    ],
)
def test_as_many_threads_as_cores_are_free(busy, monkeypatch, cores, free, why):
    assert cores.free == free
    monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda: cores))
    torch.set_num_threads(20)
    said = []
    found = on_free_cores(lambda *message: said.append(message), CPU, torch.get_num_threads)
    assert found == free and torch.get_num_threads() == 20
    [(message, _)] = said
    assert re.match(
        rf"frames run on {free} thread\(s\) instead of torch's 20 while {why}.* OMP_NUM_THREADS={free} ", message
    )


def test_nothing_is_set_where_there_are_cores_enough_or_a_gpu_computes(busy, monkeypatch):
    monkeypatch.setattr(threads, "torch", SimpleNamespace(get_num_threads=torch.get_num_threads))
    assert on_free_cores(pytest.fail, torch.device("cuda"), torch.get_num_threads) == 2
    monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda: Cores(2, math.inf, 0.1)))
    assert on_free_cores(pytest.fail, CPU, torch.get_num_threads) == 2


def test_nothing_is_set_where_something_else_sees_to_the_threads(busy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: pytest.fail("it was set"))  # as vLLM replaces it
        assert on_free_cores(pytest.fail, CPU, torch.get_num_threads) == 2


def test_a_call_on_all_threads_shows_whether_others_are_in_the_way(machine, two_threads, monkeypatch):
    """They may use cores while no frame is encoded; a call that had to wait is not repeated soon."""
    cores = SimpleNamespace(now=BUSY)
    monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda: cores.now))
    monkeypatch.setattr(threads, "rivals", threads.Rivals(machine.root))
    waited = {"1": 5.0, "2": 7.0}

    def work(wait):
        machine.passes(2, 0)
        waited["2"] += wait
        tree(
            machine.root, {f"proc/self/task/{task}/schedstat": f"1 {each * 1e9:.0f} 3" for task, each in waited.items()}
        )
        return torch.get_num_threads()

    work(0)
    found = [lowered(work, 0.5) for _ in range(2)]  # a quarter of the time
    assert found == [2, 2]
    assert [lowered(work, 1.0)] + [lowered(work, 0) for _ in range(3)] == [2, 1, 1, 1]  # 5 s later
    assert [lowered(work, 1.0)] + [lowered(work, 0) for _ in range(5)] == [2, 1, 1, 1, 1, 1]
    assert lowered(work, 0) == 2 == lowered(work, 0)
    assert [lowered(work, 1.0)] + [lowered(work, 0) for _ in range(3)] == [2, 1, 1, 1]  # not 10 s any more
    cores.now = BUSY._replace(others=0.0)
    assert lowered(work, 1.0) == 2
    cores.now = BUSY
    assert lowered(work, 0) == 2  # which forgot the rest


def test_where_nobody_says_how_long_threads_wait_they_do(tmp_path, busy, monkeypatch):
    monkeypatch.setattr(threads, "rivals", threads.Rivals(tmp_path))
    assert [lowered(torch.get_num_threads) for _ in range(2)] == [2, 1]
    tree(tmp_path, {"proc/self/task/1/schedstat": "0 0 0", "proc/self/task/2/schedstat": "?"})
    assert threads.waited_seconds(tmp_path) is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_torch_has_its_number_back_after_an_error(busy, error):
    def fail():
        assert torch.get_num_threads() == 1
        raise error

    with pytest.raises(error):
        lowered(fail)
    assert torch.get_num_threads() == 2


def test_torch_has_its_number_back_after_an_interrupt_anywhere(busy):
    for at in range(1, 1 + traced(lambda: lowered(int))):
        with pytest.raises(Interrupt):
            traced(lambda: lowered(int), at)
        assert torch.get_num_threads() == 2


def test_what_is_set_within_a_call_stays(busy):
    lowered(torch.set_num_threads, 3)
    assert torch.get_num_threads() == 3
    lowered(lowered, torch.set_num_threads, 4)
    assert torch.get_num_threads() == 4


def test_threads_in_calls_at_once_have_their_numbers_back(busy):
    """The second has never used torch, and would begin with what the first has set; either may leave first."""
    for first_leaves in (True, False):
        inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

        def work(number, inside=inside, leave=leave):
            inside[number].set()
            assert leave[number].wait(20)
            return torch.get_num_threads()

        def thread(number, work=work):
            return lowered(work, number), torch.get_num_threads()

        torch.set_num_threads(2)
        with ThreadPoolExecutor(2) as pool:
            found = []
            for number in range(2):
                found.append(pool.submit(thread, number))
                assert inside[number].wait(20)
            for number in (0, 1) if first_leaves else (1, 0):
                leave[number].set()
                assert found[number].result(20) == (1, 2)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result(20) == 2


def test_what_another_thread_sets_meanwhile_stays(busy):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result(20) == 2

        def work():
            pool.submit(torch.set_num_threads, 3).result(20)
            return torch.get_num_threads()

        assert lowered(work) == 1 and torch.get_num_threads() == 2
        assert pool.submit(lowered, torch.get_num_threads).result(20) == 1
        assert pool.submit(torch.get_num_threads).result(20) == 3


@pytest.mark.parametrize("batch", ["clip", "dense"])
def test_frames_run_on_free_cores(busy, on_cpu, monkeypatch, recwarn, batch):
    model, frames = tiny("vit").double(), clip(frames=6, changed=5).double()
    found = {}
    for cores in (Cores(2, math.inf, 0.0), BUSY):
        monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda cores=cores: cores))
        neuroflow.enable_cache(model, exact(threshold=1e-4, batch=batch))
        counts = []
        hook = model.layernorm.register_forward_hook(lambda *_, counts=counts: counts.append(torch.get_num_threads()))
        with torch.inference_mode():
            outputs = [model(pixel_values=frame, interpolate_pos_encoding=True) for frame in frames.split(2)]
        found[cores] = torch.cat([output.last_hidden_state for output in outputs])
        hook.remove()
        neuroflow.disable_cache(model)
        assert set(counts) == {cores.free} and torch.get_num_threads() == 2
    quiet, busy = found.values()
    torch.testing.assert_close(busy, quiet, rtol=0, atol=1e-10)


def test_fewer_threads_are_said_once(busy, on_cpu, monkeypatch, recwarn):
    model, frames = tiny("vit"), clip(frames=4)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    for number, frame in enumerate(frames):
        cores = BUSY._replace(others=1 + number / 8)
        monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda cores=cores: cores))
        with torch.inference_mode():
            model(pixel_values=frame[None], interpolate_pos_encoding=True)
    assert [str(one.message).partition(",")[0] for one in recwarn if "thread(s)" in str(one.message)] == [
        "neuroflow: frames run on 1 thread(s) instead of torch's 2 while other processes use 1.0 of its 2 core(s)"
    ]
