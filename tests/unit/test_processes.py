# SPDX-License-Identifier: Apache-2.0
"""Two processes of one program lower it to the same text, whatever each has tuned."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import environ

TARGET = "jax_bolt.launch"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of the two processes would run, by the situation."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("one_of_two.py")
    logs = [folder / f"{process}.log" for process in range(2)]
    running = []
    try:
        for process, log in enumerate(logs):
            command = [sys.executable, "-P", program, str(process), str(port), folder]
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command,
                        env=environ(JAX_PLATFORMS="cpu", XLA_FLAGS=""),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def test_left_alone_they_differ(texts):
    """Else the other tests show nothing."""
    first, second = (each["each for itself"] for each in texts)
    assert TARGET in first and TARGET in second
    assert first != second


def test_they_run_what_process_0_chose(texts):
    first, second = (each["agreed"] for each in texts)
    assert first == second == texts[0]["each for itself"]


def test_they_stay_with_it(texts):
    assert {each["agreed before"] for each in texts} == {texts[0]["agreed"]}


def test_a_program_of_both(texts):
    first, second = (each["shard_map"] for each in texts)
    assert first == second and TARGET in first


def test_when_process_0_comes_late_they_agree_too(texts):
    first, second = (each["late"] for each in texts)
    assert first == second and TARGET in first
    assert texts[0]["warnings"] == ""
    assert "process 0 chose no kernel for" in texts[1]["warnings"]
    # Once, not for every site.
    assert texts[1]["warnings"].count("jax_bolt:") == 1
