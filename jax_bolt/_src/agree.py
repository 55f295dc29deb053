# SPDX-License-Identifier: Apache-2.0
"""Several processes, one program: what the first one chooses, all of them run.

JAX needs every process of a program to compile the same one. Left alone, two processes
whose tuning results differ would choose different kernels. So a choice is a key of
JAX's distributed key-value store, which is written once and never changed: whoever
writes it has chosen, and everybody else, now and later, takes what it says.

The program's first process (the *leader*) chooses. The others wait for it: as long as
it says that it is at work, and otherwise for ``PATIENCE_S``. After that they choose for
themselves, and of several the first one to write wins. Nobody waits for ever, and
nobody runs what the others do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import jax

from . import compat
from .errors import CompileError
from .primitive import Family

logger = logging.getLogger(__name__)

# Nothing is lost but work when it is too short: two processes then tune the same.
PATIENCE_S = 60.0
BEAT_S = 5.0
_POLL_S = 1.0  # an interrupt of a waiting process takes this long

Outcome: TypeAlias = Literal["kernel", "xla", "missing", "error"]
T = TypeVar("T")


class Disagreement(CompileError):
    """This process cannot do what all processes of the program have agreed on.

    Raised whatever ``on_error`` says: XLA's path in this process alone would be
    another program than the others', which then wait for each other for ever.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What ``process`` chose for one site, or for the casts of a dtype.

    ``reason`` is why no kernel runs. ``digest`` is the kernel's artifact, and ``call``
    a digest of everything that a program's text says of it. By what each was measured
    to save chains are chosen among those that share a site.
    """

    outcome: Outcome
    process: int
    reason: str = ""
    form: str = ""
    template: str = ""
    config: str = ""
    digest: str = ""
    call: str = ""
    provenance: str = ""
    saved_us: float = 0.0

    @property
    def text(self) -> str:
        """What the key-value store holds."""
        fields = dataclasses.asdict(self).items()
        return json.dumps(
            {k: v for k, v in fields if v not in ("", 0.0) or k == "process"},
            sort_keys=True,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The processes that have to agree, as one of them sees them."""

    client: Any  # JAX's jaxlib.DistributedRuntimeClient
    process: int
    leader: int


def group(processes: Collection[int] = ()) -> Group | None:
    """None where this process is the only one.

    ``processes`` are those whose devices run the program, where that is known. A
    program of one process is led by process 0 too: the others are likely to run
    the same on devices of their own.
    """
    client = compat.distributed_client()
    if client is None:
        return None
    leader = min(processes) if len(processes) > 1 else 0
    return Group(client, jax.process_index(), leader)


def agreed(
    group: Group,
    question: str,
    name: str,
    family: Family,
    choose: Callable[[], T],
    describe: Callable[[T | Exception], Choice],
    follow: Callable[[Choice], T],
) -> T:
    """What all processes of ``group`` run for ``question``.

    ``choose`` is called where it is up to this process, and ``describe`` says what came
    of it, an error included; ``follow`` gets what another process chose. ``name`` is
    the site's, for messages. Once the leader of a family was waited for in vain, its
    other sites do not wait.

    Raises:
      Disagreement: the store cannot be reached or read.
      Exception: as ``choose`` and ``follow`` do.
    """
    key = _key(question)
    text = _get(group, f"{key}/choice")
    if text is None and group.process != group.leader and not family.unled:
        text = _wait(group, key, name)
        family.unled = text is None
    if text is not None:
        return follow(_parse(text))
    made: T | Exception
    with _beating(group, f"{key}/busy"):
        try:
            made = choose()
        except Exception as error:  # is agreed on too: the others do not try
            made = error
    text = describe(made).text
    if not _put(group, f"{key}/choice", text):
        # Somebody was faster, or we are late.
        earlier = _get(group, f"{key}/choice")
        assert earlier is not None
        return follow(_parse(earlier))
    if isinstance(made, Exception):
        raise made
    return made


def known(group: Group, question: str) -> Choice | None:
    """What was chosen so far; waits for nobody."""
    text = _get(group, f"{_key(question)}/choice")
    return None if text is None else _parse(text)


def _key(question: str) -> str:
    return f"jax_bolt/{hashlib.sha256(question.encode()).hexdigest()[:32]}"


def _parse(text: str) -> Choice:
    try:
        return Choice(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise Disagreement(
            f"another process chose {text!r}, which this one does not understand: "
            "all processes need the same version of jax_bolt"
        ) from error


def _wait(group: Group, key: str, name: str) -> str | None:
    """The choice, or None (with a warning) when nobody was at it for too long."""
    seen, last = None, time.monotonic()
    while time.monotonic() - last < PATIENCE_S:
        wait_ms = round(1000 * min(_POLL_S, PATIENCE_S))
        with _tolerating(group, "DEADLINE_EXCEEDED"):
            return group.client.blocking_key_value_get(f"{key}/choice", wait_ms)
        beat = _get(group, f"{key}/busy")
        if beat != seen:
            if seen is None:
                logger.info("%s: another process is choosing its kernel", name)
            seen, last = beat, time.monotonic()
    warnings.warn(
        f"jax_bolt: process {group.leader} chose no kernel for {name} within "
        f"{PATIENCE_S:g} s, so process {group.process} does, for all processes. It "
        "may not run this function, or come to it later.",
        stacklevel=2,
    )
    return None


@contextlib.contextmanager
def _beating(group: Group, key: str) -> Iterator[None]:
    """Tells those who wait, every few seconds, that this process is at work."""
    done = threading.Event()

    def beat() -> None:
        count = 0
        # Where it fails, writing the choice fails too and says so.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while True:
                value = f"{group.process} {count}"
                group.client.key_value_set(key, value, allow_overwrite=True)
                count += 1
                if done.wait(BEAT_S):
                    return

    threading.Thread(target=beat, name="jax_bolt-agree", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _get(group: Group, key: str) -> str | None:
    with _tolerating(group, "NOT_FOUND"):
        return group.client.key_value_try_get(key)
    return None


def _put(group: Group, key: str, text: str) -> bool:
    """Whether the key was free."""
    with _tolerating(group, "ALREADY_EXISTS"):
        group.client.key_value_set(key, text)
        return True
    return False


@contextlib.contextmanager
def _tolerating(group: Group, status: str) -> Iterator[None]:
    """Passes over errors of that status; others mean that agreeing is impossible."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(status):
            raise Disagreement(
                f"process {group.process} cannot ask what the others run: {error}"
            ) from error
