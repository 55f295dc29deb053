# SPDX-License-Identifier: Apache-2.0
"""The tuning worker: the real one on a driver that only counts, and bad ones."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh_python
import pytest
from fakes import Build

from jax_bolt._src import arch as arch_
from jax_bolt._src import ir, plan
from jax_bolt._src.jit import store
from jax_bolt._src.tune import isolate
from jax_bolt._src.tune.isolate import Failed, NoMemory, Timing, Unavailable, Worker

UUID = "".join(f"{16 * i + 1:02x}" for i in range(16))  # cuda.cc's
M = 20  # the fake kernel takes as many microseconds


def request(path: Path, name: str = "", **changes: Any) -> dict[str, Any]:
    """A launch of the fake kernel: f32, M by 8."""
    operand = ["f32", 256, 1.0, False]
    given = {
        "digest": name or path.name,
        "path": str(path),
        "kind": 0,
        "dims": [M, 8, 8, 1],
        "recipe": [],
        "repeats": 5,
        "verify": True,
        "operands": {
            "sets": 3,
            "ab": [operand, operand],
            "sides": [operand],
            "vectors": [["bf16", 16, 1.0, True], ["bool", 8, 1.0, False]],
            "output_bytes": [M * 8 * 4],
        },
    }
    return given | changes


@pytest.fixture
def kernel(build: Build) -> Path:
    return build("kernel.cc", "kernel.so")


@pytest.fixture
def start(build: Build, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """``start(...)``: a worker, which ends with the test."""
    driver = build("cuda.cc", "libcuda.so.1")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver.parent))
    workers: list[Worker] = []

    def make(uuid: str = UUID, ordinal: int = 0, program: Any = ()) -> Worker:
        workers.append(Worker(uuid, ordinal, program))
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()


@pytest.fixture
def bad(start: Callable, tmp_path: Path) -> Callable[[str], Worker]:
    """A worker that runs ``code`` once it has said that it is ready."""

    def make(code: str, ready: str = '{"ready": 0}') -> Worker:
        path = tmp_path / "bad.py"
        path.write_text(
            "import os, socket, sys, time\n"
            "line = socket.socket(fileno=int(sys.argv[1]))\n"
            f"line.sendall({(ready + chr(10)).encode()!r})\n"
            f"{code}\n"
        )
        return start(program=[str(path)])

    return make


def restarts() -> int:
    return store.stats()["restarts"]


def pid_of(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def test_times_and_stays(start: Callable, kernel: Path) -> None:
    worker = start()
    first = worker.time(request(kernel))
    process = pid_of(worker)
    assert (first.micros, first.spread) == pytest.approx((M, 0.0))
    assert worker.time(request(kernel, "again")).micros == pytest.approx(M)
    assert pid_of(worker) == process


def test_the_median_and_the_spread() -> None:
    five = Timing.of([4.0, 1.0, 2.0, 3.0, 50.0])
    assert (five.micros, five.spread) == pytest.approx((3.0, 25.5 / 3))
    assert Timing.of([2.0, 2.0, 3.0]) == Timing(2.0, 0.5)


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        ("std::abort()", r"crashed the worker \(signal 6\)"),
        ("raise(SIGSEGV)", r"crashed the worker \(signal 11\)"),
        ("for (;;) pause()", r"did not end within 1 s"),
    ],
)
def test_a_candidate_that_takes_the_worker_with_it(
    start: Callable, build: Build, kernel: Path, launch: str, reason: str
) -> None:
    worker, before = start(), restarts()
    name = f"{abs(hash(launch))}.so"
    fatal = build("kernel.cc", name, f"-DFAKE_LAUNCH={launch}", "-include", "csignal")
    worker.time(request(kernel))
    with pytest.raises(Failed, match=reason) as raised:
        worker.time(request(fatal), limit_s=1.0)
    assert raised.value.fatal
    assert restarts() == before
    assert worker.time(request(kernel)).micros == pytest.approx(M)
    assert restarts() == before + 1


def test_a_sticky_error_ends_the_worker(
    start: Callable, build: Build, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    broken = build(
        "kernel.cc",
        "sticky.so",
        '-DFAKE_LAUNCH=setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2", 1); return 700',
    )
    with pytest.raises(Failed, match="a fake CUDA error") as raised:
        worker.time(request(broken))
    assert raised.value.fatal
    assert worker.time(request(kernel)).micros == pytest.approx(M)


def test_an_error_that_leaves_the_worker_whole(
    start: Callable, build: Build, kernel: Path, tmp_path: Path
) -> None:
    worker = start()
    worker.time(request(kernel))
    process = pid_of(worker)
    refused = build("kernel.cc", "refused.so", "-DFAKE_LAUNCH=return 1")
    (tmp_path / "absent.so").write_text("no kernel")
    for path, changes, reason in (
        (refused, {}, "a fake CUDA error"),
        (tmp_path / "absent.so", {}, "absent.so"),
        (kernel, {"kind": 1, "dims": [1] * 15}, "not a gemm"),
        (build("kernel.cc", "lazy.so", "-DFAKE_LEAVES=3"), {}, "left elements unwr"),
    ):
        with pytest.raises(Failed, match=reason) as raised:
            worker.time(request(path, **changes))
        assert not raised.value.fatal
    assert pid_of(worker) == process


def test_every_output_is_written(start: Callable, build: Build, kernel: Path) -> None:
    worker = start()

    def two(path: Path) -> dict[str, Any]:
        made = request(path)
        made["operands"] |= {"output_bytes": [M * 8 * 4] * 2}
        return made

    assert worker.time(two(kernel)).micros == pytest.approx(M)
    lazy = build("kernel.cc", "lazy_too.so", "-DFAKE_LEAVES_AUXILIARY=1")
    with pytest.raises(Failed, match="left elements unwritten"):
        worker.time(two(lazy))


def test_base_programs_need_not_write_all(start: Callable, build: Build) -> None:
    lazy = build("kernel.cc", "lazy.so", "-DFAKE_LEAVES=3")
    assert start().time(request(lazy, verify=False)).micros == pytest.approx(M)


def test_too_little_memory_is_no_failure(
    start: Callable, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_MEMORY", "4000")
    worker = start()
    with pytest.raises(NoMemory):
        worker.time(request(kernel))
    few = request(kernel)
    few["operands"] |= {"sets": 1}
    process = pid_of(worker)
    assert worker.time(few).micros == pytest.approx(M)
    assert pid_of(worker) == process


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("line.recv(9999); line.sendall(b'no json\\n'); time.sleep(60)", "nonsense"),
        ("line.recv(9999); line.sendall(b'[1]\\n'); time.sleep(60)", "nonsense"),
        ("line.recv(9999); line.sendall(b'{}\\n'); time.sleep(60)", "nonsense"),
        ("line.recv(9999); line.sendall(b'{\"times\": [-1]}\\n')", "nonsense"),
        ("line.recv(9999); line.sendall(b'{\"times\": [NaN]}\\n')", "nonsense"),
        ("line.recv(9999)\nwhile 1: line.sendall(b'x' * 4096)", "nonsense"),
        ("line.recv(9999); line.close(); time.sleep(60)", "nonsense"),
        ("line.recv(9999); sys.exit(3)", r"ended \(exit status 3\)"),
        ("line.recv(9999); os.kill(os.getpid(), 9)", r"crashed .*\(signal 9\)"),
        ("time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_worker_that_misbehaves(
    bad: Callable, kernel: Path, monkeypatch: Any, code: str, reason: str
) -> None:
    monkeypatch.setattr(isolate, "_EXIT_S", 0.5)
    with pytest.raises(Failed, match=reason):
        bad(code).time(request(kernel), limit_s=1.0)


def test_a_worker_that_died_between_two_questions_is_replaced(
    start: Callable, kernel: Path
) -> None:
    worker = start()
    worker.time(request(kernel))
    os.kill(pid_of(worker), signal.SIGKILL)
    worker._process.wait()
    assert worker.time(request(kernel)).micros == pytest.approx(M)


@pytest.mark.parametrize("ready", ["garbage", '{"unavailable": "no such GPU"}', "{}"])
def test_a_worker_that_is_never_ready(bad: Callable, kernel: Path, ready: str) -> None:
    worker = bad("", ready)
    for _ in range(2):
        with pytest.raises(Unavailable, match="not tuned: the tuning worker"):
            worker.time(request(kernel))
    with pytest.raises(Unavailable):
        worker.start()


def test_no_process_can_be_started(start: Callable, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(Unavailable, match=r"cannot be started: .*No such file"):
        start().start()


@pytest.mark.parametrize("program", ["/bin/true", "", None])
def test_a_program_that_is_no_python_is_not_started(
    start: Callable, monkeypatch: Any, program: str | None
) -> None:
    """It may be the user's, frozen with its Python: it would run and tune again."""
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(Unavailable, match="needs a Python"):
        start().start()


def test_the_time_that_a_container_is_paused_is_not_a_candidates(
    start: Callable, kernel: Path, monkeypatch: Any
) -> None:
    worker = start()
    worker.time(request(kernel))
    hours = itertools.count(time.monotonic(), 3600.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(hours))
    assert worker.time(request(kernel, "again")).micros == pytest.approx(M)


def test_it_finds_the_gpu_by_its_uuid(start: Callable, kernel: Path) -> None:
    """The variables that number GPUs may have changed since the parent read them."""
    assert start(ordinal=3).time(request(kernel)).micros == pytest.approx(M)
    with pytest.raises(Unavailable, match="no GPU has the uuid 0123"):
        start(uuid="0123").time(request(kernel))


def test_what_is_polled_may_interrupt(start: Callable, build: Build) -> None:
    class Enough(Exception):
        pass

    def poll() -> None:
        if time.monotonic() > end:
            raise Enough

    hangs = build("kernel.cc", "hangs.so", "-DFAKE_LAUNCH=for (;;) pause()")
    worker = start()
    end = time.monotonic() + 1
    with pytest.raises(Enough):
        worker.time(request(hangs), poll=poll)
    assert worker._process is None


def is_alive(process: int) -> bool:
    """Zombies, which nobody waited for, are dead."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


PARENT = """
import os, sys, time
from jax_bolt._src.tune.isolate import Worker
worker = Worker(sys.argv[1], 0)
request = eval(sys.argv[2])
request["verify"] = False
worker.start()
if len(sys.argv) > 3 and os.fork() == 0:  # it keeps the socket open
    time.sleep(120)
print(worker._process.pid, flush=True)
try:
    worker.time(request)
except BaseException as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(
    build: Build, start: Callable, how: signal.Signals, forked: bool
) -> None:
    """Also when the parent is killed while a candidate never ends."""
    hangs = build("kernel.cc", "hangs.so", "-DFAKE_LAUNCH=for (;;) pause()")
    arguments = [UUID, repr(request(hangs)), *(["fork"] if forked else [])]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        env=fresh_python.environ(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        try:
            time.sleep(1.0)
            assert is_alive(process)
            parent.send_signal(how)
            parent.wait(10)
            end = time.monotonic() + 10
            while is_alive(process) and time.monotonic() < end:
                time.sleep(0.05)
            assert not is_alive(process)
        finally:
            os.killpg(parent.pid, signal.SIGKILL) if forked else None


def test_a_request_says_what_the_kernel_reads() -> None:
    """Sizes in bytes, of the form that the kernel takes."""
    epilogue = ir.Epilogue(
        (ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("add", (0, 1))),
        2,
        "f32",
        vectors=(ir.Vector("f32"), ir.Vector("bf16", scalar=True)),
        sides=("f16",),
    )
    problem = ir.GemmProblem(m=24, n=16, k=64, dtype="bf16")
    region = ir.Region(problem=problem, epilogue=epilogue)
    found, _ = plan.candidates(region, arch_.from_name("sm_90a"))
    made = isolate.request_for(found[0], "d", Path("/p"), 2, 7, verify=True)
    assert made["operands"] == {
        "sets": 2,
        "ab": [["bf16", 24 * 64 * 2, 1.0, False], ["bf16", 16 * 64 * 2, 0.125, False]],
        "sides": [["f16", 24 * 16 * 2, 1.0, False]],
        "vectors": [["f32", 64, 1.0, True], ["bf16", 2, 1.0, True]],
        "output_bytes": [24 * 16 * 4],
    }
    assert json.loads(json.dumps(made)) == made
    assert made["dims"] == [24, 16, 64, 1]
    assert tuple(made["recipe"]) == found[0].recipe


def test_the_worker_is_not_the_users_python(
    start: Callable, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in the user's directories, which may be gone."""
    for name in ("json", "random", "sitecustomize", "usercustomize", "jax"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(tmp_path)
    assert start().time(request(kernel)).micros == pytest.approx(M)
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert start().time(request(kernel)).micros == pytest.approx(M)


def test_nothing_of_it_is_on_the_users_terminal(build: Build, kernel: Path) -> None:
    """Nor does it need the program to be importable: this one is a string."""
    driver = build("cuda.cc", "libcuda.so.1")
    loud = build(
        *("kernel.cc", "loud.so", "-include", "cstdio"),
        '-DFAKE_LAUNCH=puts("stdout");fputs("stderr",stderr);fflush(stdout);abort()',
    )
    code = (
        "import sys\n"
        "from jax_bolt._src.tune.isolate import Failed, Worker\n"
        "with Worker(sys.argv[1], 0) as worker:\n"
        "    try: worker.time(eval(sys.argv[2]))\n"
        "    except Failed as error: print(error)\n"
    )
    places = str(driver.parent)
    printed = fresh_python.run(code, UUID, repr(request(loud)), LD_LIBRARY_PATH=places)
    assert printed == "crashed the worker (signal 6)\n"
