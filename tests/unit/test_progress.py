# SPDX-License-Identifier: Apache-2.0
"""The progress bar: what it says, where it is silent, and that it never fails."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest
import rich
from rich.console import Console
from rich.live import Live

from jax_bolt._src.tune import db
from jax_bolt._src.tune.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console() -> Console:
    return Console(file=Terminal(), force_terminal=True, width=100, color_system=None)


def shown(used: Console) -> str:
    assert isinstance(used.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", used.file.getvalue())


def test_what_is_done_how_much_is_left_and_the_best(monkeypatch):
    used = console()
    with Progress(console=used) as progress:
        progress.start("tuning", 3)
        progress.step("Net/Conv_0 conv3x3[red]", building=4)
        progress.result(db.Entry(choice="kernel", time_us=2.0, xla_time_us=5.0))
        progress.result(db.Entry(choice="xla", time_us=3.0, xla_time_us=2.0))
        progress.step("Net/Conv_1")
        progress._bar.refresh()
    text = shown(used)
    assert "jax_bolt: tuning Net/Conv_1, best 2.50x" in text
    assert "2/3" in text
    progress = Progress(console=used)
    with progress:
        progress.start("tuning", 3)
        progress.step("Net/Conv_0 conv3x3[red]", building=4)
        progress._bar.refresh()
    assert "Net/Conv_0 conv3x3[red], building 4 kernels" in shown(used)


def test_a_new_stage_takes_the_place_of_the_last():
    used = console()
    with Progress(console=used) as progress:
        progress.start("compiling", 1)
        progress.step()
        progress.start("tuning", 2)
        (task,) = progress._bar.tasks
    assert (task.description, task.completed) == ("jax_bolt: tuning", 0)


def test_it_is_gone_when_it_is_done():
    used = console()
    with Progress(console=used) as progress:
        progress.start("tuning", 1)
        progress.step()
    assert isinstance(used.file, io.StringIO)
    assert used.file.getvalue().endswith("\x1b[1A\x1b[2K")


def be_on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Both are one. Not a fixture: pytest captures a test's output after those."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "xterm")
    return made


def use() -> None:
    with Progress() as progress:
        progress.start("tuning", 2)
        progress.step("x")


def test_a_terminal_has_a_bar(monkeypatch):
    """Else the silence below would show nothing."""
    terminal = be_on_terminal(monkeypatch)
    use()
    assert "jax_bolt: tuning" in terminal.getvalue()


def test_no_terminal_no_bar(monkeypatch):
    terminal = be_on_terminal(monkeypatch)
    for other in (io.StringIO(), types.SimpleNamespace(isatty=lambda: False)):
        monkeypatch.setattr(sys, "stderr", other)
        use()
    with Progress(show=False) as progress:
        progress.start("tuning", 2)
        progress.step("x")
    assert terminal.getvalue() == ""


def test_silent_while_the_program_shows_its_own(monkeypatch):
    terminal = be_on_terminal(monkeypatch)
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO()))
    with Live("mine", console=rich.get_console(), auto_refresh=False):
        use()
        assert terminal.getvalue() == ""
    bars = types.SimpleNamespace(tqdm=types.SimpleNamespace(_instances={"mine"}))
    monkeypatch.setitem(sys.modules, "tqdm", bars)
    use()
    assert terminal.getvalue() == ""
    bars.tqdm._instances.clear()
    use()
    assert terminal.getvalue() != ""


def test_what_the_program_prints_to_a_file_goes_there(monkeypatch):
    terminal = be_on_terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Progress() as progress:
        progress.start("tuning", 2)
        print("mine")
        progress.step("x")
    assert file.getvalue() == "mine\n"
    assert "mine" not in terminal.getvalue()


def test_what_the_program_prints_is_not_drawn_over(monkeypatch):
    terminal = be_on_terminal(monkeypatch)
    with Progress() as progress:
        progress.start("tuning", 2)
        print("mine")
        assert sys.stdout is not terminal
    assert "mine\n" in terminal.getvalue()
    assert sys.stdout is sys.stderr is terminal


@pytest.mark.parametrize("method", ["start", "stop", "add_task", "update"])
def test_no_fault_of_a_bar_is_an_error(method, monkeypatch):
    from rich.progress import Progress as Bar

    terminal = be_on_terminal(monkeypatch)

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("the terminal went away")

    monkeypatch.setattr(Bar, method, broken)
    with Progress() as progress:
        progress.start("compiling", 1)
        progress.step("x")
        progress.start("tuning", 1)
        progress.step("x")
    # What was drawn until then is ended, or it would catch what the program prints.
    assert method == "stop" or sys.stdout is terminal
    monkeypatch.undo()
