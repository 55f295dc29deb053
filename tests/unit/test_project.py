# SPDX-License-Identifier: Apache-2.0
"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import jax_bolt
from jax_bolt._src.jit import toolchain

ROOT = Path(__file__).parents[2]


def test_hooks_use_the_versions_of_the_dev_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(r.split("==") for r in project["optional-dependencies"]["dev"])
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r'"(ruff|clang-format)==([^"]+)"', hooks))
    assert found == {name: pinned[name] for name in ("ruff", "clang-format")}


def test_the_version_is_in_one_place():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tracked = (*ROOT.glob("*"), *ROOT.glob("jax_bolt/**/*.py"), *ROOT.glob("cc/**/*.h"))
    found = [
        path.name
        for path in tracked
        if path.is_file() and f'"{version}"' in path.read_text(errors="replace")
    ]
    assert found == ["pyproject.toml"]
    assert jax_bolt.__version__ in (version, "0+unknown")


def test_what_errors_advise_to_install_is_the_extra_cuda13():
    """From an index, where jax_bolt is not: its extra's packages, one by one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["cuda13"]
    assert shlex.split(toolchain.INSTALL)[:2] == ["pip", "install"]
    advised = shlex.split(toolchain.INSTALL)[2:]
    names = [re.split("[<>=]", requirement)[0] for requirement in extra]
    assert [re.split("[<>=]", requirement)[0] for requirement in advised] == names
    bounds = [re.findall("<[0-9]+", requirement) for requirement in extra]
    assert [re.findall("<[0-9]+", requirement) for requirement in advised] == bounds


def test_nothing_reaches_a_shell_or_an_interpreter():
    """Programs are run from lists of words, and no text is run as Python."""
    for path in (ROOT / "jax_bolt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "os.popen"), path
                assert "pickle" not in called, path
                assert "shell" not in [k.arg for k in node.keywords], path
