# SPDX-License-Identifier: Apache-2.0
"""Several processes agree on what runs: here they are threads and take turns.

tests/unit/test_processes.py has two real ones.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
import types
from typing import Any, cast

import jax
import numpy as np
import pytest
from fake_nvcc import FakeNvcc
from jax.errors import JaxRuntimeError
from test_errors import ARGS, TARGET, dense, gpu, lowered, nvcc, two_sites  # noqa: F401

import jax_bolt
from jax_bolt._src import agree, compat, options, program
from jax_bolt._src.agree import Choice, Disagreement, Group
from jax_bolt._src.jit import store
from jax_bolt._src.primitive import Family


class FakeClient:
    """JAX's client of the key-value store, without the network."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        if key not in self.values:
            raise JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.values[key]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            if self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                return self.values[key]
        raise JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out: {key}")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    monkeypatch.setattr(agree, "PATIENCE_S", 0.5)
    monkeypatch.setattr(agree, "BEAT_S", 0.02)
    monkeypatch.setattr(agree, "_POLL_S", 0.05)
    return FakeClient()


def describe(process: int, made: str | Exception) -> Choice:
    if isinstance(made, Exception):
        return Choice(outcome="error", process=process, reason=str(made))
    return Choice(outcome="kernel", process=process, config=made)


def ask(
    client: Any,
    process: int,
    choose: Any,
    *,
    family: Family | None = None,
    question: str = "q",
    leader: int = 0,
) -> Any:
    """What ``process`` runs; ``choose`` is its own choice, or a function."""
    return agree.agreed(
        Group(client, process, leader),
        question,
        "Net/Conv_0",
        family or Family(),
        choose if callable(choose) else lambda: choose,
        lambda made: describe(process, cast(Any, made)),
        lambda choice: (choice.process, choice.config or choice.reason),
    )


def never() -> str:
    raise AssertionError("it was not for this process to choose")


def test_the_leader_chooses_and_the_others_take_it(client):
    assert ask(client, 0, "a") == "a"
    assert ask(client, 1, never) == ask(client, 2, never) == (0, "a")
    assert ask(client, 1, never, family=Family(unled=True)) == (0, "a")


def test_a_choice_is_for_ever(client):
    assert ask(client, 0, "a") == "a"
    assert ask(client, 0, never) == (0, "a")


def test_every_question_has_its_answer(client):
    assert ask(client, 0, "a") == "a"
    assert ask(client, 0, "b", question="another") == "b"
    assert ask(client, 1, never, question="another") == (0, "b")
    assert all(key.startswith("jax_bolt/") for key in client.values)
    assert max(map(len, client.values)) < 64
    assert max(map(len, client.values.values())) < 100


def test_the_others_wait_while_the_leader_is_at_work(client):
    def slowly() -> str:
        working.set()
        time.sleep(2.5 * agree.PATIENCE_S)
        return "a"

    working = threading.Event()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ask, client, 0, slowly)
        assert working.wait(60)
        second = pool.submit(ask, client, 1, never)
        assert first.result() == "a" and second.result() == (0, "a")


def test_a_leader_that_never_comes_is_not_waited_for_long(client):
    family = Family()
    with pytest.warns(UserWarning, match=r"process 0 chose no kernel for Net/Conv_0"):
        assert ask(client, 1, "b", family=family) == "b"
    # The other sites of the program do not wait.
    start = time.monotonic()
    assert ask(client, 1, "c", family=family, question="another") == "c"
    assert time.monotonic() - start < agree.PATIENCE_S / 2
    # All take it, the leader too.
    assert ask(client, 0, never) == ask(client, 2, never) == (1, "b")


def test_a_leader_that_is_interrupted_stops_saying_that_it_works(client):
    def interrupted() -> str:
        time.sleep(0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(client, 0, interrupted)
    with pytest.warns(UserWarning, match="process 0 chose no kernel"):
        assert ask(client, 1, "b") == "b"


def test_the_first_to_write_has_chosen(client):
    def late() -> str:
        assert ask(client, 1, "b", family=Family(unled=True)) == "b"
        return "a"

    assert ask(client, 0, late) == (1, "b")


def test_an_error_is_agreed_on_too(client):
    def failing() -> str:
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        ask(client, 0, failing)
    assert ask(client, 1, never) == ask(client, 0, never) == (0, "no compiler")


def test_another_leader(client):
    assert ask(client, 2, "a", leader=2) == "a"
    assert ask(client, 0, never, leader=2) == (2, "a")


class Unreachable(FakeClient):
    def key_value_try_get(self, key: str) -> str:
        raise JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")


def test_a_store_that_cannot_be_reached(client):
    for process in range(2):
        with pytest.raises(Disagreement, match=r"process . cannot ask.*UNAVAILABLE"):
            ask(Unreachable(), process, never)


@pytest.mark.parametrize("text", ["?", "[]", '{"outcome": "kernel", "colour": 1}'])
def test_a_choice_of_another_version(client, text):
    client.values[f"{agree._key('q')}/choice"] = text
    with pytest.raises(Disagreement, match="the same version of jax_bolt"):
        ask(client, 1, never)


def test_a_choice_survives_the_store():
    choice = Choice(outcome="xla", process=3, reason="it was timed faster: 1 µs")
    assert agree._parse(choice.text) == choice
    assert "digest" not in choice.text


# --- Who agrees


def test_one_process_asks_nobody(monkeypatch):
    assert compat.distributed_client() is None
    assert agree.group() is None
    state = types.SimpleNamespace(client=object(), num_processes=1)
    monkeypatch.setattr(compat._distributed, "global_state", state)
    assert agree.group() is None
    state.num_processes = 2
    made = agree.group()
    assert made is not None and made.client is state.client


@pytest.mark.parametrize(
    ("processes", "leader"), [((), 0), ((3,), 0), ((0, 1), 0), ((2, 3), 2)]
)
def test_the_first_process_of_the_program_leads(monkeypatch, processes, leader):
    monkeypatch.setattr(compat, "distributed_client", object)
    made = agree.group(frozenset(processes))
    assert made is not None and (made.process, made.leader) == (0, leader)


def test_the_processes_of_a_program():
    devices = [types.SimpleNamespace(process_index=i) for i in (2, 2, 3)]

    def processes(axis_context: Any) -> set[int]:
        module = types.SimpleNamespace(axis_context=axis_context)
        ctx: Any = types.SimpleNamespace(module_context=module)
        return set(compat.program_processes(ctx))

    sharding = compat.ShardingContext
    assert processes(sharding(3, tuple(devices))) == {2, 3}  # pyright: ignore
    assert processes(sharding(0)) == set()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("i",))
    assert processes(compat.SPMDAxisContext(mesh)) == {0}
    abstract: Any = jax.sharding.AbstractMesh((2,), ("i",))
    assert processes(compat.SPMDAxisContext(abstract)) == set()


# --- What is agreed on, down to the program's text


@dataclasses.dataclass
class World:
    """Processes that take turns: who asks, with a cache of his own."""

    monkeypatch: pytest.MonkeyPatch
    folder: Any

    def text(self, process: int, *, fun: Any = dense, **changes: Any) -> str:
        """The program that ``process`` would run."""
        self.monkeypatch.setattr(jax, "process_index", lambda: process)
        cache = {"cache_dir": self.folder / str(process)}
        with options.options(**{**cache, **changes}):
            return lowered(jax_bolt.optimize(lambda *args: fun(*args)))


@pytest.fixture
def world(client, gpu, nvcc, monkeypatch, tmp_path) -> World:  # noqa: F811
    monkeypatch.setattr(compat, "distributed_client", lambda: client)
    return World(monkeypatch, tmp_path)


def test_one_text(world, nvcc):  # noqa: F811
    first = world.text(0)
    assert TARGET in first
    assert world.text(1) == first
    # Each built it for itself, and whatever it is told later it stays.
    assert len(nvcc.calls) == 2
    other = options.options(disable=("gemm_sm80", "implicit_gemm_sm90"))
    with other:
        assert world.text(0) == world.text(1) == first


def test_what_was_chosen_for_a_program_is_compiled_together(world, monkeypatch):
    first = world.text(0, fun=two_sites)
    batches = []
    build = store.Store.build

    def recorded(self: Any, tools: Any, sources: Any, *rest: Any) -> Any:
        batches.append(len(set(sources)))
        return build(self, tools, sources, *rest)

    monkeypatch.setattr(store.Store, "build", recorded)
    assert world.text(1, fun=two_sites) == first
    assert batches == [2]


@pytest.mark.parametrize("first", ["xla", "heuristic"])
def test_the_options_of_the_one_who_chooses_count(world, first):
    (second,) = {"xla", "heuristic"} - {first}
    text = world.text(0, on_miss=first)
    assert (TARGET in text) == (first == "heuristic")
    assert world.text(1, on_miss=second) == text


def test_on_miss_error_is_every_process_error(world):
    for process in range(2):
        with pytest.raises(jax_bolt.UnsupportedError, match=r"run jax_bolt\.tune"):
            world.text(process, on_miss="error" if process == 0 else "heuristic")


def test_a_compiler_that_fails_where_it_is_chosen(world, nvcc):  # noqa: F811
    script = nvcc.nvcc.read_text()
    nvcc.nvcc.write_text(script.replace("grep -q FAIL source.cu", "true"))
    with pytest.warns(UserWarning, match="on XLA: .* does not compile"):
        first = world.text(0)
    nvcc.nvcc.write_text(script)
    with pytest.warns(UserWarning, match="on XLA: process 0: .* does not compile"):
        assert world.text(1) == first
    assert TARGET not in first


def test_no_compiler_in_one_of_the_others(world, tmp_path):
    world.text(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        jax_bolt.CompileError, match=r"test_errors.*process 0 chose.*cannot run it"
    ):
        world.text(1, cuda_home=tmp_path / "empty")
    # A shared cache has what it lacks.
    shared = world.text(1, cuda_home=tmp_path / "empty", cache_dir=tmp_path / "0")
    assert shared == world.text(0)


def test_another_compiler_in_one_of_the_others(world, tmp_path):
    world.text(0)
    other = FakeNvcc(tmp_path / "other", "12.9.86")
    with pytest.raises(Disagreement, match=r"nvcc 12\.9\.86 makes another binary"):
        world.text(1, cuda_home=other.home)


def test_a_kernel_that_another_version_does_not_know(world, client):
    world.text(0)
    (key,) = (key for key in client.values if key.endswith("/choice"))
    client.values[key] = client.values[key].replace('"template": "', '"template": "x')
    with pytest.raises(Disagreement, match=r"there is no x.* here"):
        world.text(1)


def test_a_kernel_that_would_be_launched_otherwise(world, monkeypatch):
    world.text(0)
    native = program.resolve.loader.native()
    monkeypatch.setattr(native, "workspace_bytes", lambda *args: 1024)
    with pytest.raises(Disagreement, match="launched in another way"):
        world.text(1)


def test_casts(world, tmp_path):
    def model(x: Any, w: Any, v: Any) -> Any:
        return dense(dense(x, w.astype(x.dtype)), v.astype(x.dtype))

    w = jax.ShapeDtypeStruct((64, 64), "float32")
    args = (ARGS[0], w, w)
    world.monkeypatch.setattr("test_errors.ARGS", args)
    first = world.text(0, fun=model)
    assert "kind = 2" in first
    assert world.text(1, fun=model) == first


def test_explain_says_what_was_agreed_on(world, tmp_path):
    def kernels(process: int) -> list[tuple[str, str]]:
        world.monkeypatch.setattr(jax, "process_index", lambda: process)
        with options.options(cache_dir=tmp_path / str(process)):
            sites = jax_bolt.explain(dense, *ARGS).sites
        return [(site.kernel, site.reason) for site in sites]

    before = kernels(1)
    assert before[0][0] != "xla"
    world.text(0, on_miss="xla")
    assert kernels(1) == [("xla", 'no tuning result, and on_miss="xla"')]
