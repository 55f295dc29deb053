# SPDX-License-Identifier: Apache-2.0
"""Tuning results: saved, merged, and never a reason to fail."""

import dataclasses
import json
import threading

import pytest

from jax_bolt._src import arch, ir
from jax_bolt._src.tune import db

ARCH = arch.from_name("sm_90a")
ENTRY = db.Entry(choice="kernel", form="direct", template="t", config="c", time_us=2.0)


def region(n):
    problem = ir.GemmProblem(m=8, n=n, k=8, dtype="bf16")
    ops = (ir.Op("acc"),)
    epilogue = ir.Epilogue(ops=ops, result=0, out_dtype="bf16")
    return ir.Region(problem=problem, epilogue=epilogue)


def test_a_second_database_reads_what_the_first_wrote(tmp_path):
    db.Database(tmp_path).put(ARCH, {region(8): ENTRY})
    again = db.Database(tmp_path)
    assert again.get(ARCH, region(8)) == ENTRY
    assert again.get(ARCH, region(16)) is None
    assert not list(tmp_path.glob("*.tmp"))


def test_another_device_has_its_own_results(tmp_path):
    database = db.Database(tmp_path)
    database.put(ARCH, {region(8): ENTRY})
    assert database.get(dataclasses.replace(ARCH, sm_count=114), region(8)) is None


def test_writers_merge(tmp_path):
    first, second = db.Database(tmp_path), db.Database(tmp_path)
    threads = [
        threading.Thread(target=database.put, args=(ARCH, {region(n): ENTRY}))
        for n, database in enumerate([first, second] * 8, start=1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(first.get(ARCH, region(n)) for n in range(1, 17))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "entries": {}}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path, text):
    database = db.Database(tmp_path)
    database.path(ARCH).write_text(text)
    assert database.get(ARCH, region(8)) is None
    database.put(ARCH, {region(8): ENTRY})
    assert db.Database(tmp_path).get(ARCH, region(8)) == ENTRY


def test_a_damaged_entry_is_passed_over(tmp_path):
    database = db.Database(tmp_path)
    key = region(8).text
    entries = {
        key: {"choice": "kernel", "time_us": "fast"},
        "x": 3,
        "y": {"choice": "?"},
    }
    document = {"schema": db.SCHEMA, "entries": entries}
    database.path(ARCH).write_text(json.dumps(document))
    assert database.get(ARCH, region(8)) is None


def test_results_that_cannot_be_saved_last_for_the_process(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    database = db.Database(blocked / "tuned")
    with pytest.warns(UserWarning, match="JAX_BOLT_CACHE_DIR"):
        database.put(ARCH, {region(8): ENTRY})
    assert database.get(ARCH, region(8)) == ENTRY
