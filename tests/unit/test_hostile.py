# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged input of every kind: refused with a reason, or harmless.

Random, and the same every time. Nothing may crash, write outside of the cache, or raise
what its caller does not expect.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fake_nvcc import SM90, FakeNvcc

import jax_bolt
from jax_bolt._src import (
    arch,
    archive,
    cli,
    ir,
    kernels,
    options,
    paths,
    plan,
    region_text,
)
from jax_bolt._src.jit import codegen, manifest
from jax_bolt._src.jit.store import Store
from jax_bolt._src.tune import db

H200 = arch.of_device("9.0", "NVIDIA H200", 132)
TEXTS = (
    *("", " ", "\0", "\n", "../../etc/passwd", "/etc/passwd", "~nobody-here/x", "~"),
    *("$(touch hacked)", "`touch hacked`", "; touch hacked", "| touch hacked", "&&"),
    *("'", '"', "\\", "%s%n", "{0}", "${HOME}", "*/ #include <x>", "<script>", "*"),
    *("\u202e", "\ud800", "é", "٣", "\x1b[31m", "nan", "inf", "-inf", "1e999", "-1"),
    *("0", "1", "0x1p99999", "9" * 400, "9" * 5000, "a" * 5000, "null", "[]", "sm_90a"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, -(2**200), 10**400, 0.5, -0.0),
    *(math.nan, math.inf, -math.inf, 1e308, 5e-324, [], {}, [[]], [None], {"a": 1}),
    *TEXTS,
)


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with something in it replaced, lost, added or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        copy, key = dict(value), rng.choice(sorted(value))
        match rng.randrange(8):
            case 0:
                del copy[key]
            case 1:
                copy[rng.choice(TEXTS)] = copy.pop(key)
            case 2:
                copy[rng.choice(TEXTS)] = rng.choice(VALUES)
            case _:
                copy[key] = mutated(copy[key], rng)
        return copy
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(2) :]
    if rng.random() < 0.05:
        nested: Any = rng.choice(VALUES)
        for _ in range(rng.choice((3, 5000))):
            nested = [nested]
        return nested
    return rng.choice(VALUES)


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, lost or added."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 20))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(4):
            case 0:
                made[at : at + 1] = rng.randbytes(1)
            case 1:
                del made[at : at + rng.choice((1, 4, 100))]
            case 2:
                made[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
            case 3 if rng.random() < 0.2:
                del made[at:]
    return bytes(made)


@pytest.fixture
def nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """Fails where anything beside the cache was made or changed."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("as it was")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))

    def check() -> None:
        assert [p.name for p in home.rglob("*")] == ["precious"]
        assert (home / "precious").read_text() == "as it was"
        names = {p.name for p in tmp_path.iterdir()}
        assert names <= {"home", "cache", "cuda", "bundle.zip"}, names

    yield check
    check()


# --- Options


@pytest.mark.parametrize("seed", range(8))
def test_options(seed):
    """From the environment and from a call: ValueError, or options that can be used."""
    rng = random.Random(seed)
    names = [field.name for field in dataclasses.fields(options.Options)]
    for _ in range(60):
        name, text, value = rng.choice(names), rng.choice(TEXTS), rng.choice(VALUES)
        for make in (
            lambda n=name, t=text: options.from_environment(
                {f"JAX_BOLT_{n.upper()}": t}
            ),
            lambda n=name, v=value: options.Options(**{n: v}),
        ):
            try:
                made = make()
            except ValueError as error:
                assert name in str(error).lower()
                continue
            assert hash(made) == hash(dataclasses.replace(made))
            for root in (paths.kernel_root(made), paths.tuning_root(made)):
                assert root.is_absolute()
                assert not root.exists() or root.is_dir()


# --- Tuning files

X = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)
W = jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ w)


def tuning_file() -> dict[str, Any]:
    (site,) = jax_bolt.explain(layer, X, W, arch="sm_90a").sites
    assert site.region is not None
    found, _ = plan.candidates(site.region, H200)
    entry = db.Entry(
        choice="kernel",
        form=found[0].form.name,
        template=found[0].template.name,
        config=found[0].config.text,
        digest="ab" * 32,
        sources="headers",
        compiler="13.0",
        time_us=2.0,
        xla_time_us=3.0,
        error=1e-3,
        xla_error=1e-3,
        candidates=4,
    )
    device = db.device_key(H200)
    return json.loads(db.text(device, {site.region.text: entry}))


@pytest.mark.parametrize("seed", range(6))
def test_tuning_files(seed, cache_dir, capsys, nothing_outside):
    """Read, listed and planned from, whatever is in them."""
    rng = random.Random(seed)
    good = tuning_file()
    ((text, _),) = good["entries"].items()
    region = region_text.parse(text)
    results = db.Database(paths.tuning_root(options.current()))
    results.root.mkdir(parents=True)
    path = results.path(H200)
    origin = plan.Origin("headers", "13.0")
    used = 0
    for _ in range(50):
        content = as_json(mutated(good, rng))
        if rng.random() < 0.3:
            content = damaged(as_json(good), rng)
        path.write_bytes(content)
        entry = results.get(H200, region)
        if entry is not None:
            made = plan.tuned(region, H200, entry, origin)
            used += isinstance(made, plan.Plan)
        assert cli.main(["cache", "ls"]) == 0
        assert cli.main(["cache", "size"]) == 0
        printed = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in printed)
        for found in results.all():
            try:
                db.arch_of(found.device)
            except ValueError:  # and UnsupportedError, which is one
                pass
            for key in found.entries:
                _parsed(key)
    assert 0 < used < 50
    nothing_outside()


# --- Regions' texts


def _parsed(text: str) -> ir.Work | None:
    try:
        return region_text.parse(text)
    except ValueError:
        return None


IDENTIFIERS = {
    *"struct Epilogue using Output static constexpr int Vectors Sides Types".split(),
    *"Column".split(),
    *"Scalar cutlass bfloat16_t half_t float bool JAX_BOLT_HOST_DEVICE void".split(),
    *"columns apply const jax_bolt math return kVectors kColumns kSides".split(),
    *"v c s acc nan inf".split(),
    *ir.ARITHMETIC,
    *(f"{name}_" for name in ("and", "or", "xor", "not")),
}
TOKEN = re.compile(
    r"(?P<number>0x[0-9a-f.]+p[+-]\d+f|\d+\.\d+f|-?\d+)|(?P<name>[A-Za-z_]\w*)"
    r"|[-{}()\[\]<>;:,=&?!*+|]|\s"
)


def assert_only_printed(functor: str) -> None:
    """Every token is one that the printer has: no other identifier, no directive."""
    position = 0
    while position < len(functor):
        token = TOKEN.match(functor, position)
        assert token is not None, functor[position : position + 40]
        name = token["name"]
        assert name is None or name in IDENTIFIERS or re.fullmatch(r"x\d+", name), name
        position = token.end()


@pytest.mark.parametrize("seed", range(8))
def test_texts_of_regions(seed):
    """Refused, or a region of exactly this text, which can be planned and printed."""
    rng = random.Random(seed)
    texts = [*tuning_file()["entries"], _conv_text()]
    parsed = 0
    for _ in range(100):
        text = rng.choice(texts)
        for _ in range(rng.choice((1, 1, 3))):
            number = re.search(r"\d+", text[rng.randrange(len(text)) :])
            if number and rng.random() < 0.5:
                new = rng.choice(["0", "1", "-1", "7", "99999999999", "2", "64"])
                text = text.replace(number[0], new, 1)
            else:
                at = rng.randrange(len(text))
                junk = rng.choice([*TEXTS, "%0", ";", "()", "[]", "x", "n", "acc"])
                text = text[:at] + junk + text[at + rng.randrange(3) :]
        region = _parsed(text)
        if region is None:
            continue
        parsed += 1
        assert region.text == text
        if isinstance(region, ir.Chain):
            region = region.regions[0]
        try:
            functor = codegen.functor(region.epilogue)
        except ValueError:
            continue
        assert_only_printed(functor)
        for template in kernels.TEMPLATES:
            reason = template.supports(region, H200)
            assert reason is None or reason
    assert parsed


def _conv_text() -> str:
    problem = ir.ConvProblem(n=2, h=8, w=8, c=16, k=32, r=3, s=3, dtype="bf16")
    ops = (ir.Op("acc"), ir.Op("const", attr=0.1), ir.Op("mul", (0, 1)))
    epilogue = ir.Epilogue(ops, 2, out_dtype="bf16")
    return ir.Region(problem=problem, epilogue=epilogue).text


# --- The kernel store


@pytest.mark.parametrize("seed", range(4))
def test_manifests(seed, fake: FakeNvcc, cache_dir, nothing_outside, capsys):
    """Nothing but the entry's own, whole binary is ever found."""
    rng = random.Random(seed)
    store = Store(paths.kernel_root(options.current()))
    binary = fake.build(store)
    digest, file = binary.parent.name, binary.parent / manifest.MANIFEST
    good = json.loads(file.read_text())
    sound = 0
    for _ in range(50):
        file.write_bytes(as_json(mutated(good, rng)))
        found = store.find(digest)
        assert found in (None, binary)
        sound += found is not None
        arch_name, kernel = manifest.describe(file.parent)
        assert isinstance(arch_name, str) and isinstance(kernel, str)
        assert store.find(rng.choice(TEXTS)) is None
    assert cli.main(["cache", "ls"]) == 0
    assert sound < 50
    nothing_outside()


# --- Bundles


@pytest.mark.parametrize("seed", range(6))
def test_bundles(seed, fake: FakeNvcc, cache_dir, tmp_path, nothing_outside, capsys):
    """Imported whole or refused with a sentence; nothing outside of the cache."""
    rng = random.Random(seed)
    source = Store(tmp_path / "cache" / "other")
    fake.build(source)
    device = db.Results(
        device=db.device_key(H200), entries={"r": db.Entry(choice="xla")}
    )
    bundle = tmp_path / "bundle.zip"
    archive.write(bundle, [device], source.entries())
    good = bundle.read_bytes()
    taken = 0
    for _ in range(40):
        content = damaged(good, rng) if rng.random() < 0.5 else _repacked(good, rng)
        bundle.write_bytes(content)
        status = cli.main(["cache", "import", str(bundle)])
        said = capsys.readouterr().err
        assert status in (0, 1) and (status == 0 or "error:" in said)
        taken += status == 0
        nothing_outside()
    assert taken < 40


def _repacked(good: bytes, rng: random.Random) -> bytes:
    """A sound zip file with another name or content in it, and a header to match."""
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(sorted(members))
    if rng.random() < 0.4:
        other = rng.choice(TEXTS).encode(errors="replace").decode()[:200]
        prefix = rng.choice(["", "tuned/", "kernels/", f"kernels/{'0' * 64}/"])
        members[prefix + other or "x"] = members.pop(name)
    elif name.endswith(".json"):
        members[name] = as_json(mutated(json.loads(members[name]), rng))
    else:
        members[name] = damaged(members[name], rng)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for member, content in members.items():
            file.writestr(zipfile.ZipInfo(member or "x"), content)
    return made.getvalue()


# --- Names


# JAX itself takes no name that is not UTF-8.
@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() and t != "\ud800"])
def test_names_reach_no_code(text):
    """A function and a scope may be called anything; the TU does not change."""

    def fun(x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope(text):
            return jax.nn.relu(x @ w)

    fun.__name__ = fun.__qualname__ = text
    (plain,) = jax_bolt.explain(layer, X, W, arch="sm_90a").sites
    report = jax_bolt.explain(fun, X, W, arch="sm_90a")
    (named,) = report.sites
    assert named.region is not None
    assert plain.region == named.region and plain.kernel == named.kernel
    (found, *_), _ = plan.candidates(named.region, SM90)
    assert_only_printed(codegen.functor(named.region.epilogue))
    assert found.source.count("#") == 1  # its one include
    printed = str(report)
    assert all(c.isprintable() or c == "\n" for c in printed)
