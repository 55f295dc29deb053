# SPDX-License-Identifier: Apache-2.0
"""Tuning results: saved, merged, and never a reason to fail."""

import dataclasses
import datetime
import json
import logging
import random
import threading

import jax
import pytest

from jax_bolt._src import arch, ir
from jax_bolt._src.errors import CacheError
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


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 100_000, '{"schema": 99, "entries": {}}'),
        *('{"schema": 1, "entries": []}', '{"schema": 1, "device": 3, "entries": {}}'),
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path, text):
    database = db.Database(tmp_path)
    database.path(ARCH).write_text(text)
    assert database.get(ARCH, region(8)) is None
    database.put(ARCH, {region(8): ENTRY})
    assert db.Database(tmp_path).get(ARCH, region(8)) == ENTRY


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"choice": "?"},
        {"choice": "kernel", "time_us": "fast"},
        {"choice": "kernel", "time_us": True},
        {"choice": "kernel", "time_us": -1.0},
        {"choice": "kernel", "time_us": float("nan")},
        {"choice": "kernel", "time_us": float("inf")},
        {"choice": "kernel", "time_us": 10**400},
        {"choice": "kernel", "config": 3},
        {"choice": "kernel", "candidates": 1.5},
    ],
)
def test_a_damaged_entry_is_passed_over(tmp_path, entry):
    database = db.Database(tmp_path)
    database.put(ARCH, {region(16): ENTRY})
    document = json.loads(database.path(ARCH).read_text())
    document["entries"][region(8).text] = entry
    database.path(ARCH).write_text(json.dumps(document))
    assert database.get(ARCH, region(8)) is None
    assert database.get(ARCH, region(16)) == ENTRY


def test_no_damage_to_a_file_is_an_error(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    database = db.Database(tmp_path)
    database.put(ARCH, {region(n): ENTRY for n in (8, 16)})
    content = database.path(ARCH).read_bytes()
    rng = random.Random(0)
    lost = 0
    for _ in range(500):
        harmed = bytearray(content)
        if rng.random() < 0.3:
            del harmed[rng.randrange(len(harmed)) :]
        else:
            harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
        database.path(ARCH).write_bytes(harmed)
        lost += db.Database(tmp_path).get(ARCH, region(8)) is None
    assert lost > 100


def test_a_file_says_by_what_and_when_it_was_written(tmp_path):
    database = db.Database(tmp_path)
    database.put(ARCH, {region(8): ENTRY})
    (results,) = database.all()
    assert results.device == db.device_key(ARCH)
    assert f"jax {jax.__version__}" in results.versions
    assert "jax_bolt " in results.versions and "jaxlib " in results.versions
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        results.date
    )
    assert abs(age.total_seconds()) < 60


def test_a_file_of_before_has_no_such_labels(tmp_path):
    path = db.Database(tmp_path).path(ARCH)
    entries = {region(8).text: dataclasses.asdict(ENTRY)}
    device = db.device_key(ARCH)
    document = {"schema": 1, "device": device, "entries": entries}
    path.write_text(json.dumps(document))
    assert db.Database(tmp_path).get(ARCH, region(8)) == ENTRY
    (results,) = db.Database(tmp_path).all()
    assert (results.versions, results.date) == ("", "")


def test_a_file_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch):
    database = db.Database(tmp_path)
    database.put(ARCH, {region(8): ENTRY})
    content = database.path(ARCH).read_bytes()
    real = type(tmp_path).open

    def refuse(path, mode="r", *args, **kwargs):
        if path.suffix == ".json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)

    other = db.Database(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "open", refuse)
        with pytest.warns(UserWarning, match="Permission denied"):
            other.put(ARCH, {region(16): ENTRY})
    assert database.path(ARCH).read_bytes() == content
    assert other.get(ARCH, region(16)) == ENTRY


# --- Results from elsewhere


KERNEL = dataclasses.replace(
    ENTRY, xla_time_us=3.0, error=1e-3, xla_error=1e-3, sources="s", compiler="c"
)
XLA = dataclasses.replace(KERNEL, choice="xla", time_us=4.0)


def holds(entry):
    return (entry.sources, entry.compiler) == ("s", "c")


def changed(entry, **changes):
    return dataclasses.replace(entry, **changes)


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        # Faster, slower, as fast; the time is that of what was chosen.
        (KERNEL, changed(KERNEL, time_us=1.9), True),
        (KERNEL, changed(KERNEL, time_us=2.1), False),
        (KERNEL, changed(KERNEL, config="other"), False),
        (KERNEL, XLA, False),
        (XLA, KERNEL, True),
        (XLA, changed(KERNEL, time_us=3.5), False),
        (XLA, changed(XLA, xla_time_us=2.9), True),
        (XLA, changed(XLA, time_us=0.1), False),
        # Made from other headers, or by another compiler, than what is here.
        (KERNEL, changed(KERNEL, time_us=1.0, sources="other"), False),
        (KERNEL, changed(KERNEL, time_us=1.0, compiler="other"), False),
        (changed(KERNEL, sources="other"), changed(KERNEL, time_us=9.0), True),
        (changed(KERNEL, compiler="other"), changed(XLA, xla_time_us=9.0), True),
        (
            changed(KERNEL, sources="a"),
            changed(KERNEL, sources="b", time_us=1.0),
            False,
        ),
        (None, changed(KERNEL, sources="other"), True),
        (None, XLA, True),
        # No kernel that is not known to be accurate.
        (None, changed(KERNEL, error=None), False),
        (None, changed(KERNEL, xla_error=None), False),
        (None, changed(KERNEL, time_us=None), False),
        (None, changed(KERNEL, error=1.3e-3), False),
        (None, changed(KERNEL, error=1.2e-3), True),
        (None, changed(KERNEL, error=1.0, xla_error=1.0), False),
        (changed(KERNEL, sources="other"), changed(KERNEL, error=None), False),
        (KERNEL, changed(KERNEL, time_us=1.0, error=0.5), False),
    ],
)
def test_of_two_results_the_better_one_is_kept(tmp_path, old, new, taken):
    database = db.Database(tmp_path)
    if old is not None:
        database.put(ARCH, {region(8): old})
    results = db.Results(device=db.device_key(ARCH), entries={region(8).text: new})
    merged = database.merge(results, holds)
    assert database.get(ARCH, region(8)) == (new if taken else old)
    counts = (merged.added, merged.replaced, merged.kept, merged.unverified)
    assert sum(counts) == 1
    assert counts[:2] == (taken and old is None, taken and old is not None)
    assert merged.unverified == (not db.is_verified(new))
    again = database.merge(results, holds)
    assert not again.added and not again.replaced, "a second time changes nothing"


def test_merging_where_nothing_can_be_saved_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    results = db.Results(device="GPU", entries={"r": KERNEL})
    with pytest.raises(CacheError, match=r"cannot be saved in .*JAX_BOLT_CACHE_DIR"):
        db.Database(tmp_path / "file" / "tuned").merge(results, holds)


def test_only_accurate_kernels_are_verified():
    for xla, sane in ((1e-5, True), (2.9e-2, True), (3.1e-2, False)):
        for ratio, close in ((0.5, True), (1.24, True), (1.3, False)):
            entry = changed(KERNEL, error=ratio * xla, xla_error=xla)
            tiny = xla == 1e-5  # an absolute error of 1e-6 is let pass
            assert db.is_verified(entry) == (sane and (close or tiny)), entry


def test_results_that_cannot_be_saved_last_for_the_process(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    database = db.Database(blocked / "tuned")
    with pytest.warns(UserWarning, match="JAX_BOLT_CACHE_DIR"):
        database.put(ARCH, {region(8): ENTRY})
    assert database.get(ARCH, region(8)) == ENTRY


def test_a_device_key_names_its_architecture():
    for gpu, dotted, count in (("NVIDIA H200", "9.0", 132), ("Odd 7 SMs", "12.0", 7)):
        found = arch.of_device(dotted, gpu, count)
        assert db.arch_of(db.device_key(found)) == found
    with pytest.raises(ValueError, match="no kind of GPU"):
        db.arch_of("an H200")
