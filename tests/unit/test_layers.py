# SPDX-License-Identifier: Apache-2.0
"""BUILD says what imports what; here its statements are compared with the imports.

Bazel itself is not needed: BUILD is read as the Python it nearly is.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jax_bolt"
SOURCE = PACKAGE / "_src"
NATIVE = ROOT / "cc" / "native"


@dataclasses.dataclass(frozen=True)
class Target:
    rule: str
    name: str
    srcs: tuple[str, ...]
    hdrs: tuple[str, ...]
    deps: frozenset[str]
    tags: tuple[str, ...]

    @property
    def layer(self) -> float:
        (tag,) = (t for t in self.tags if t.startswith("layer="))
        return float(tag.removeprefix("layer="))

    @property
    def internal(self) -> frozenset[str]:
        """Names of the targets of this file that it depends on."""
        return frozenset(d[1:] for d in self.deps if d.startswith(":"))


def read_build() -> dict[str, Target]:
    targets: dict[str, Target] = {}
    for statement in ast.parse((ROOT / "BUILD").read_text()).body:
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        given = {k.arg: k.value for k in call.keywords}
        if "deps" not in given and "srcs" not in given:
            continue

        def read(key: str, given: dict = given) -> tuple[str, ...]:
            return tuple(ast.literal_eval(given[key])) if key in given else ()

        name = ast.literal_eval(given["name"])
        assert name not in targets, f"BUILD has two targets {name}"
        targets[name] = Target(
            rule=call.func.id,
            name=name,
            srcs=read("srcs") if call.func.id != "filegroup" else (),
            hdrs=read("hdrs") if name != "kernel_headers" else (),
            deps=frozenset(read("deps")),
            tags=read("tags"),
        )
    return targets


TARGETS = read_build()
MODULES = {n: t for n, t in TARGETS.items() if t.rule == "py_library"}
LIBRARIES = {n: t for n, t in TARGETS.items() if n not in MODULES and t.srcs}


def module_files() -> list[Path]:
    """Every module with code in it."""
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.read_text().strip()]


def target_name(path: Path) -> str:
    """``_src/jit/store.py`` -> ``jit/store``; a package's ``__init__`` -> its name."""
    if path.parent == PACKAGE:
        return "jax_bolt" if path.stem == "__init__" else path.stem
    path = path.relative_to(SOURCE)
    return str(path.parent if path.stem == "__init__" else path.with_suffix(""))


def find_module(parts: tuple[str, ...]) -> Path | None:
    """The file of the module that ``parts`` name, from the root of the checkout."""
    base = ROOT.joinpath(*parts)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imports(path: Path) -> set[str]:
    """The dependencies that a module's import statements amount to."""
    package = path.relative_to(ROOT).parts[:-1]
    deps: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            deps.update(external(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            deps.add(external(node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base += tuple((node.module or "").split(".")) if node.module else ()
            deps.update(internal((*base, a.name), base) for a in node.names)
    return deps - {""}


def external(module: str) -> str:
    top = module.partition(".")[0]
    assert top != "jax_bolt", "modules import each other relatively"
    return "" if top in sys.stdlib_module_names else f"@pypi//{top}"


def internal(module: tuple[str, ...], parent: tuple[str, ...]) -> str:
    # `from .jit import store` names a module, `from .errors import CompileError` not.
    path = find_module(module) or find_module(parent)
    if module == ("jax_bolt", "_native"):
        return ":_native"
    assert path is not None, f"no module {'.'.join(module)}"
    return f":{target_name(path)}"


@pytest.mark.parametrize("path", module_files(), ids=target_name)
def test_build_states_the_imports(path: Path) -> None:
    name = target_name(path)
    assert name in MODULES, f"BUILD lacks a py_library for {name}"
    target = MODULES[name]
    assert target.srcs == (str(path.relative_to(ROOT)),)
    assert set(target.deps) == imports(path), f"imports {sorted(imports(path))}"


def test_build_has_no_other_modules() -> None:
    assert set(MODULES) == {target_name(p) for p in module_files()}


@pytest.mark.parametrize("name", MODULES)
def test_layers_go_down(name: str) -> None:
    target = MODULES[name]
    for dep in target.internal - {"_native"}:
        # errors imports nothing, so that layer 0 can raise it too.
        if dep == "errors":
            continue
        assert MODULES[dep].layer < target.layer, f"{name} imports {dep}"


def test_errors_imports_nothing() -> None:
    assert MODULES["errors"].deps == set()


def closure(name: str) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        new = MODULES[todo.pop()].internal - seen - {"_native"}
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("name", ["match", "rewrite", "primitive"])
def test_the_front_end_sees_no_architecture(name: str) -> None:
    tops = {n.partition("/")[0] for n in closure(name)}
    assert not tops & {"arch", "kernels", "jit", "tune", "plan"}


def test_plan_sees_no_jaxprs() -> None:
    assert not closure("plan") & {"compat", "canonicalize", "match", "primitive"}


def test_only_compat_reaches_into_jax() -> None:
    for path in module_files():
        if path != SOURCE / "compat.py":
            assert not re.search(r"^\s*(from|import) jax\._src", path.read_text(), re.M)


# --- cc/native


def owner(header: str) -> str:
    path = f"cc/native/{header}"
    (name,) = (n for n, t in LIBRARIES.items() if path in t.hdrs)
    return name


def includes(target: Target) -> set[str]:
    found: set[str] = set()
    for file in target.srcs + target.hdrs:
        text = (ROOT / file).read_text()
        found.update(re.findall(r'^#include "([^"]+)"', text, re.M))
    return found


@pytest.mark.parametrize("name", LIBRARIES)
def test_build_states_the_includes(name: str) -> None:
    want: set[str] = set()
    for header in includes(LIBRARIES[name]):
        if header.startswith("xla/"):
            want.add("@xla//xla/ffi/api:ffi")
        elif header.startswith("jax_bolt/"):
            want.add(":kernel_headers")
        elif owner(header) != name:
            want.add(f":{owner(header)}")
    assert LIBRARIES[name].deps == want


def test_build_has_every_native_file() -> None:
    files = [f for t in LIBRARIES.values() for f in t.srcs + t.hdrs]
    on_disk = [str(p.relative_to(ROOT)) for p in sorted(NATIVE.iterdir())]
    assert sorted(files) == on_disk
