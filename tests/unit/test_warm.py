# SPDX-License-Identifier: Apache-2.0
"""What ``import jax_bolt`` starts: builds once, below everything else, and ends.

Each test has processes of its own, on a machine that looks as if it had a GPU, with a
compiler that only pretends.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_nvcc import FakeNvcc, wait_for
from fresh_python import environ

from jax_bolt._src import arch, base, options
from jax_bolt._src.jit import codegen, compiler, store, toolchain
from jax_bolt._src.warm import background, gpus, start, usage

A100 = arch.of_device("8.0", "NVIDIA A100-SXM4-40GB")
SOURCES = len(base.sources(A100)) + 2  # and the casts


# A program of the user's; the GPU is a matter of what files there are.
PROGRAM = """
import os, sys
real = os.path.exists
os.path.exists = lambda path: path == "/dev/nvidiactl" or real(path)
import jax
{before}
import jax_bolt
{after}
"""
# On a busy machine what runs at the lowest priority does not run at all for minutes.
# Read by every Python at its start.
HURRY = """
import os, pathlib
os.nice = lambda increment: 0
write = pathlib.Path.write_text
pathlib.Path.write_text = lambda path, text: (
    None if path.name == "autogroup" else write(path, text)
)
"""
STAY = "print('here', flush=True); sys.stdin.read()"


@dataclasses.dataclass
class Machine:
    """A home directory with a cache, a compiler, and programs that run there."""

    folder: Path
    fake: FakeNvcc
    libraries: Path
    hurry: bool = True
    running: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "kernels"

    @property
    def notes(self) -> Path:
        return self.cache / start.FOLDER

    @property
    def log(self) -> str:
        file = self.notes / start.LOG
        return file.read_text() if file.exists() else ""

    def environ(self, **changes: str) -> dict[str, str]:
        made = environ(
            **{
                "JAX_BOLT_CACHE_DIR": str(self.folder / "cache"),
                "JAX_BOLT_CUDA_HOME": str(self.fake.home),
                "LD_LIBRARY_PATH": str(self.libraries),
                "JAX_BOLT_WARM": "build",
                "JAX_BOLT_JOBS": "2",
                "JAX_PLATFORMS": "",
                **changes,
            }
        )
        if self.hurry:
            made["PYTHONPATH"] = f"{self.folder / 'hurry'}:{made['PYTHONPATH']}"
        return made

    def program(self, after: str = STAY, before: str = "", **changes: str) -> Any:
        code = PROGRAM.format(before=before, after=after)
        made = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=self.environ(**changes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running.append(made)
        return made

    def stay(self, **changes: str) -> Any:
        """A program that has imported jax_bolt and waits."""
        made = self.program(**changes)
        assert made.stdout.readline() == "here\n"
        return made

    def run(self, after: str = "", **changes: str) -> str:
        made = self.program(after, **changes)
        printed, _ = made.communicate(timeout=60)
        assert made.returncode == 0, printed
        return printed

    @property
    def builders(self) -> list[int]:
        """The process ids of what was started in the background here."""
        return processes(self.notes)

    @property
    def checked(self) -> list[Path]:
        return list(self.notes.glob("checked-*"))

    @property
    def kernels(self) -> store.Store:
        return store.Store(self.cache)


def processes(word: object) -> list[int]:
    """Those with ``word`` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(word).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def compilers(machine: Machine) -> list[int]:
    return [p for p in machine.fake.calls if Path(f"/proc/{p}").exists()]


@pytest.fixture
def machine(tmp_path: Path, fake: FakeNvcc, build: Any) -> Iterator[Machine]:
    library = build("nvml.cc", "libnvidia-ml.so.1")
    (tmp_path / "hurry").mkdir()
    (tmp_path / "hurry" / "sitecustomize.py").write_text(HURRY)
    made = Machine(tmp_path, fake, library.parent)
    yield made
    for process in made.running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
    for process in made.builders:
        os.kill(process, signal.SIGKILL)


def hold(fake: FakeNvcc) -> None:
    """Every compile takes until ``release``."""
    script = fake.nvcc.read_text()
    fake.nvcc.write_text(script.replace("if grep -q WAIT source.cu", "if true"))


def test_importing_builds_the_library(machine):
    program = machine.stay()
    wait_for(lambda: machine.checked)
    assert len(machine.fake.calls) == len(machine.kernels.entries()) == SOURCES
    assert f"{SOURCES} kernels" in machine.log
    assert "Error" not in machine.log, machine.log
    printed, _ = program.communicate()
    assert printed == ""
    # What the program would ask for is there.
    with options.options(cuda_home=machine.fake.home):
        tools = toolchain.find(options.current())
    for source in (*base.sources(A100), codegen.cast_source("bfloat16")):
        assert machine.kernels.find(store.digest(tools, source, A100))


def test_a_second_import_starts_nothing(machine, monkeypatch):
    machine.stay()
    wait_for(lambda: machine.checked and not machine.builders)
    (machine.notes / start.LOG).unlink()
    machine.run()
    assert not (machine.notes / start.LOG).exists()
    # Later there is another look round, which finds all that is wanted.
    os.utime(machine.checked[0], (0, 0))
    machine.stay()
    wait_for(lambda: machine.checked[0].stat().st_mtime)
    assert machine.log == ""
    assert len(machine.fake.calls) == SOURCES


def test_processes_that_import_at_once_build_each_kernel_once(machine):
    together = [machine.program() for _ in range(8)]
    for program in together:
        assert program.stdout.readline() == "here\n"
    assert len(machine.builders) <= 1
    wait_for(lambda: machine.checked)
    sources = collections.Counter(
        (entry.path / "source.cu").read_text() for entry in machine.kernels.entries()
    )
    assert len(sources) == SOURCES
    assert len(machine.fake.calls) == SOURCES


def test_it_ends_with_the_last_of_its_users(machine):
    hold(machine.fake)
    first, second = machine.stay(), machine.stay()
    wait_for(lambda: compilers(machine))
    first.communicate()
    time.sleep(3 * background._POLL_S)
    (builder,) = machine.builders  # another one still lives
    os.kill(builder, signal.SIGSTOP)
    printed, _ = second.communicate(timeout=60)  # does not wait for it
    assert (printed, second.returncode) == ("", 0)
    os.kill(builder, signal.SIGCONT)
    wait_for(lambda: not machine.builders and not compilers(machine))
    # Nothing is left of what was not finished, and nothing is said to be.
    left = [path.name for path in machine.cache.iterdir() if path.is_dir()]
    assert left == [start.FOLDER]
    assert not machine.checked and not list(machine.notes.glob("complete-*"))
    machine.fake.release()
    machine.stay()
    wait_for(lambda: machine.checked)
    assert len(machine.kernels.entries()) == SOURCES


def test_it_ends_when_its_user_is_killed(machine):
    hold(machine.fake)
    program = machine.stay()
    wait_for(lambda: compilers(machine))
    program.kill()
    wait_for(lambda: not machine.builders and not compilers(machine))
    assert machine.kernels.entries() == []


def test_it_ends_with_its_users_on_a_networks_disk_too(tmp_path, monkeypatch):
    """NFS locks a file for one alone only where it is open for writing."""

    class Ended(Exception):
        pass

    def flock(file: Any, how: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")

    def exit(status: int) -> None:
        raise Ended

    def wait(seconds: float) -> None:
        raise AssertionError("it has no users")

    (tmp_path / start.USERS).touch()
    locks = types.SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=4)
    monkeypatch.setattr(background, "fcntl", locks)
    monkeypatch.setattr(background, "_ending", threading.Event())
    monkeypatch.setattr(background.compiler, "end_all", lambda: None)
    monkeypatch.setattr(os, "_exit", exit)
    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(Ended):
        background._end_with_users(tmp_path)


def test_what_is_killed_itself_is_replaced(machine):
    hold(machine.fake)
    machine.stay()
    wait_for(lambda: compilers(machine))
    (builder,) = machine.builders
    os.kill(builder, signal.SIGKILL)
    wait_for(lambda: not machine.builders)
    assert machine.kernels.entries() == []
    machine.fake.release()
    # Its compilers hold no lock that would keep others from it.
    machine.stay()
    wait_for(lambda: machine.checked)
    assert len(machine.kernels.entries()) == SOURCES


def test_a_fork_is_a_user_too(machine):
    hold(machine.fake)
    fork = "import warnings; warnings.simplefilter('ignore')\n"
    fork += "if os.fork(): os._exit(0)\n" + STAY
    program = machine.program(fork)
    assert program.stdout.readline() == "here\n"
    wait_for(lambda: compilers(machine))
    time.sleep(3 * background._POLL_S)
    assert machine.builders
    program.stdin.close()
    wait_for(lambda: not machine.builders)


def test_compilers_come_after_everything_else(machine):
    hold(machine.fake)
    machine.hurry = False
    program = machine.stay()
    wait_for(lambda: compilers(machine), 300)
    for process in compilers(machine):
        proc = Path(f"/proc/{process}")
        nice = (proc / "stat").read_text().rpartition(")")[2].split()[16]
        assert nice == "19"
        assert (proc / "oom_score_adj").read_text().strip() == "1000"
        ionice = background.ctypes.CDLL(None).syscall(252, 1, process)
        assert ionice >> 13 == 3, "idle"
        group = proc / "autogroup"
        assert not group.exists() or group.read_text().endswith("nice 19\n")
        # Nor is what is typed at the user's terminal for it.
        assert os.getsid(process) != os.getsid(program.pid)
    own = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[16]
    assert own == str(os.nice(0))


def test_it_is_nobodys_child(machine):
    hold(machine.fake)
    wait = "try: os.wait()\nexcept ChildProcessError: print('none', flush=True)\n"
    program = machine.program(wait + STAY)
    assert program.stdout.readline() == "none\n"
    wait_for(lambda: machine.builders)


@pytest.mark.parametrize(
    "changes",
    [
        {"JAX_BOLT_WARM": "off"},
        {"JAX_PLATFORMS": "cpu"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"JAX_BOLT_CACHE_DIR": "/dev/null/cache"},
    ],
)
def test_where_nothing_is_started(machine, changes):
    assert machine.run(**changes) == ""
    assert not machine.cache.exists()


@pytest.mark.parametrize("name, text", [("WARM", "sometimes"), ("JOBS", "many")])
def test_a_bad_variable_is_a_warning_at_import(machine, name, text):
    said = machine.run(**{f"JAX_BOLT_{name}": text})
    assert said.count("UserWarning") == 1
    assert f"jax_bolt: JAX_BOLT_{name}={text!r} must be" in said
    # Where warnings are errors the import still goes on.
    said = machine.run(
        **{f"JAX_BOLT_{name}": text, "PYTHONWARNINGS": "error::UserWarning"}
    )
    assert said == "" and not machine.cache.exists()


def test_an_unknown_variable_is_a_warning_at_import(machine):
    said = machine.run(JAX_BOLT_ONMISS="xla", JAX_BOLT_WARM="off")
    assert said.count("UserWarning") == 1
    assert "JAX_BOLT_ONMISS is no option; did you mean JAX_BOLT_ON_MISS?" in said


def test_nor_is_it_where_others_can_write(machine):
    machine.cache.mkdir(parents=True)
    machine.cache.chmod(0o777)
    assert machine.run() == ""
    assert list(machine.cache.iterdir()) == []


def test_nor_by_the_command_line(machine):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jax_bolt", "cache", "size"],
        env=machine.environ(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not machine.cache.exists()
    seen = "import os.path\nprint(jax_bolt._warm._is_command())"
    assert machine.run(seen) == "False\n"


def test_importing_still_starts_no_backend_and_no_thread(machine):
    hold(machine.fake)
    after = "import json, threading; print(json.dumps([threading.active_count(), "
    after += "sorted(set(sys.modules) - modules)])); "
    after += "jax.config.update('jax_num_cpu_devices', 3); "
    after += "jax.config.update('jax_platforms', 'cpu'); print(jax.device_count())"
    before = "import threading; print(threading.active_count()); "
    before += "modules = set(sys.modules)"
    threads, seen, devices = machine.run(after, before=before).splitlines()
    count, modules = json.loads(seen)
    assert count == int(threads) and devices == "3"
    assert not {"rich", "filelock", "jax_bolt._src.warm.background"} & set(modules)


def test_without_a_compiler_it_says_so_in_its_log(machine):
    machine.fake.nvcc.unlink()
    machine.stay()
    wait_for(lambda: machine.checked)
    assert "there is no such file" in machine.log


def test_load_reads_ahead_what_was_chosen_and_builds_nothing(machine):
    winner = machine.fake.build(machine.kernels, "int winner;").parent
    machine.fake.build(machine.kernels, "int other;")
    tuned = machine.folder / "cache" / "tuned" / "h200.json"
    tuned.parent.mkdir()
    entries = {"a region": {"choice": "kernel", "digest": winner.name}}
    tuned.write_text(json.dumps({"schema": 1, "device": "A100", "entries": entries}))
    calls = len(machine.fake.calls)
    machine.stay(JAX_BOLT_WARM="load")
    wait_for(lambda: machine.checked)
    assert len(machine.fake.calls) == calls and machine.log == ""

    read: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            background.os,
            "posix_fadvise",
            lambda fd, *rest: read.append(Path(f"/proc/self/fd/{fd}").readlink()),
        )
        with options.options(cache_dir=machine.folder / "cache") as active:
            background.read_ahead(active)
    assert {path.parent for path in read} == {winner}
    assert {path.name for path in read} == {"manifest.json", "kernel.so"}


def test_reading_ahead_needs_no_jax(machine):
    code = "import sys, types\npackage = types.ModuleType('jax_bolt')\n"
    code += f"package.__path__ = [{str(Path(start.__file__).parents[2])!r}]\n"
    code += "sys.modules['jax_bolt'] = package\n"
    code += "from jax_bolt._src.warm import background\nprint('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environ(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr


def test_the_architectures_of_this_machine(machine):
    code = "from jax_bolt._src.warm import gpus\nprint(gpus.architectures())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=machine.environ(JAX_BOLT_WARM="off"),
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"[{A100}]\n", done.stderr
    with pytest.raises(OSError, match="libnvidia-ml"):
        gpus.architectures()


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "350000 100000\n"}, 3.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_half_of_the_cpus(tmp_path, monkeypatch, files, cpus):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compiler, "_GROUP", tmp_path)
    monkeypatch.setattr(compiler.os, "sched_getaffinity", lambda pid: range(64))
    assert compiler.cpus() == cpus
    assert background.default_jobs() == max(1, int(cpus / 2))


def test_clearing_the_cache_forgets_what_was_complete(machine):
    machine.notes.mkdir(parents=True)
    for name in ("complete-1", "checked-2", start.USERS):
        (machine.notes / name).touch()
    machine.kernels.clear()
    assert [path.name for path in machine.notes.iterdir()] == [start.USERS]


def test_the_lock_is_held_by_one(machine):
    """Else the tests above would show nothing."""
    hold(machine.fake)
    machine.stay()
    wait_for(lambda: compilers(machine))
    with (machine.notes / start.BUILDER).open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (machine.notes / start.USERS).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_what_a_library_depends_on(fake, monkeypatch, cache_dir):
    def version(**changes: Any) -> str:
        return usage.complete(
            arch.from_name(changes.pop("arch", "sm_90a")),
            options.current(),
            dataclasses.replace(fake.toolchain(), **changes),
        ).name

    assert version() == version()
    seen = {version(), version(arch="sm_80"), version(version="13.1.1")}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-O1")
    seen.add(version())
    monkeypatch.setattr(toolchain, "sources", lambda: "other headers")
    seen.add(version())
    assert len(seen) == 5
