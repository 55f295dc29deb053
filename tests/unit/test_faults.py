# SPDX-License-Identifier: Apache-2.0
"""Killed processes, a full disk, a read-only cache: nothing damaged is ever used.

Each runs in a process of its own; tests/faults.py has what happens there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fresh_python import environ

PROGRAM = Path(__file__).parents[1] / "faults.py"
NOBODY = 65534


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-P", PROGRAM, name, *map(str, arguments)],
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["killed_builders", "killed_writers"])
def test_a_process_killed_anywhere_leaves_nothing_damaged(name, tmp_path):
    words = run(name, tmp_path).split()
    assert int(words[0]) >= 150, "most of the 240 rounds are to end early"


def test_processes_that_write_to_one_tuning_file_lose_nothing(tmp_path):
    run("merging_writers", tmp_path)


@pytest.mark.parametrize(
    "name", ["full_disk_build", "full_disk_everywhere", "full_disk_put"]
)
def test_a_full_disk_damages_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run(name, tmp_path)


def test_a_read_only_cache_is_read_and_new_kernels_live_in_the_process(monkeypatch):
    # Where another user can look: the tests' own directories are private.
    place = Path(tempfile.mkdtemp(prefix="jax_bolt-tests-"))
    monkeypatch.setenv("TMPDIR", str(place))
    try:
        place.chmod(0o755)
        run("read_only", place, *([NOBODY] if os.geteuid() == 0 else []))
    finally:
        shutil.rmtree(place)
