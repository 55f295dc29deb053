# SPDX-License-Identifier: Apache-2.0
"""A progress bar for long work, on a terminal only."""

from __future__ import annotations

import sys
from types import TracebackType

from . import db


class Progress:
    """Stages of counted steps; silent when stderr is not a terminal."""

    def __init__(self, show: bool = True) -> None:
        self._bar = None
        self._task = None
        self._best = 0.0
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, stage: str, total: int) -> None:
        if self._bar is not None and total:
            self._task = self._bar.add_task(f"jax_bolt: {stage}", total=total)

    def step(self, what: str, building: int) -> None:
        """One more; ``building`` kernels are being compiled for the next."""
        if self._bar is not None and self._task is not None:
            best = f", best {self._best:.2f}x" if self._best else ""
            kernels = f", building {building} kernels" if building else ""
            text = f"{what}{kernels}{best}"
            self._bar.update(self._task, advance=1, description=text)

    def result(self, entry: db.Entry) -> None:
        """Takes note of a tuned region's speed-up."""
        if entry.time_us and entry.xla_time_us:
            self._best = max(self._best, entry.xla_time_us / entry.time_us)
