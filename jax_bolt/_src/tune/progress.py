# SPDX-License-Identifier: Apache-2.0
"""A progress bar for long work, on a terminal only.

Silent in a notebook and in a log, and while the user's program shows a bar of its own:
two that are drawn over each other can both not be read.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from types import TracebackType
from typing import Any

from . import db

logger = logging.getLogger(__name__)


class Progress:
    """Stages of counted steps: what is at work, how many are left, the best so far.

    No fault of the terminal's or of rich's is ever raised.
    """

    def __init__(self, show: bool = True, console: Any = None) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._best = 0.0
        if show:
            self._bar = self._try(_bar, console)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._try(self._bar.start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._try(self._bar.stop)

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of ``total`` steps; the one before it is done."""
        if self._bar is None or not total:
            return
        if self._task is not None:
            self._try(self._bar.remove_task, self._task)
        self._stage = stage
        self._task = self._try(self._bar.add_task, self._text(), total=total)

    def step(self, what: str = "", building: int = 0) -> None:
        """One step, of ``what``, is done; ``building`` kernels are being compiled."""
        if self._bar is not None and self._task is not None:
            text = self._text(what, building)
            self._try(self._bar.update, self._task, advance=1, description=text)

    def result(self, entry: db.Entry) -> None:
        """Takes note of a tuned region's speed-up."""
        if entry.time_us and entry.xla_time_us:
            self._best = max(self._best, entry.xla_time_us / entry.time_us)

    def _text(self, what: str = "", building: int = 0) -> str:
        text = f"jax_bolt: {self._stage}"
        text += f" {what}" if what else ""
        text += f", building {building} kernels" if building else ""
        return text + (f", best {self._best:.2f}x" if self._best else "")

    def _try(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            logger.debug("no progress is shown: %s", error, exc_info=True)
            bar, self._bar = self._bar, None
            # Else it would go on drawing, and catch what the program prints.
            with contextlib.suppress(Exception):
                bar.stop()
            return None


def _bar(console: Any) -> Any:
    """A bar on stderr (or ``console``), or None where none is to be shown."""
    if console is None and not sys.stderr.isatty():
        return None
    from rich import progress
    from rich.console import Console

    if _others():
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=console or Console(stderr=True),
        transient=True,
        # What the program prints meanwhile goes above the bar; but where its output is
        # a file or a pipe, that is where it goes.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def _others() -> bool:
    """Whether the program shows a bar, as far as that can be known."""
    import rich

    console = rich.get_console()
    if getattr(console, "_live", None) or getattr(console, "_live_stack", None):
        return True
    tqdm = sys.modules.get("tqdm")
    return bool(getattr(getattr(tqdm, "tqdm", None), "_instances", None))
