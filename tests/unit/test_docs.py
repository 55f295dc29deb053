# SPDX-License-Identifier: Apache-2.0
"""README and docs: every code block runs, every command exists, every link leads on."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import jax_bolt
from jax_bolt._src import cli, options

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
]
# What a page's code needs beside jax_bolt.
NEEDS = {"README.md": ["flax"], "models.md": ["flax", "haiku", "equinox"]}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; ``after`` is the text between the one before and this one."""

    language: str
    text: str
    line: int
    after: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    before: list[str] = []
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    for number, line in lines:
        opening = re.fullmatch(r"```(\w*)", line.strip())
        if opening is None:
            before.append(line)
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner)
        else:
            raise AssertionError(f"{page.name}:{number}: the block does not end")
        found.append(Block(opening[1], "\n".join(body), number, "\n".join(before)))
        before = []
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def as_users_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's default promotion, which Flax's BatchNorm needs, in a directory apart."""
    monkeypatch.chdir(tmp_path)
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        options.options(cache_dir=tmp_path / "cache"),
    ):
        yield


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_runs_and_prints_what_the_page_says(page, as_users_run_it):
    """Blocks of a page share their names, as they would in a notebook.

    A text block right after a Python block is part of what that prints, and so is C++,
    whatever stands between them.
    """
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for block in blocks(page):
        if block.language == "python":
            # So that an error, and a site's name, has the page's line in it.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, names)
            printed = stdout.getvalue()
        elif block.language == "cpp" or (block.language == "text" and not block.after):
            if printed is not None:
                lines = [line.rstrip() for line in printed.splitlines()]
                assert block.text in "\n".join(lines), f"{page}:{block.line}: {printed}"
        if block.language not in ("python", "text"):
            printed = None


def test_there_is_code_to_run():
    found = [b.language for page in PAGES for b in blocks(page)]
    assert found.count("python") > 15 and found.count("text") > 5
    assert set(found) <= {"python", "text", "bash", "dockerfile", "cpp"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    for block in blocks(page):
        if block.language in ("bash", "dockerfile"):
            for command in commands(block):
                check(command, f"{page.name}:{block.line}: {shlex.join(command)}")


def test_commands_of_the_dockerfile_exist():
    file = ROOT / "examples" / "container" / "Dockerfile"
    text = file.read_text()
    found = [*commands(Block("dockerfile", text, 1, ""))]
    assert sum(words[:3] == ["python", "-m", "jax_bolt"] for words in found) == 3
    for words in found:
        check(words, f"{file.name}: {shlex.join(words)}")
    for source in re.findall(r"^COPY (\S+\.py) ", text, re.M):
        assert (ROOT / source).is_file()


def commands(block: Block) -> Iterator[list[str]]:
    """What a block runs, without comments, prompts and variables set in front."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        if block.language == "dockerfile":
            if not line.startswith("RUN "):
                continue
            line = re.sub(r"^RUN (--\S+ +)*", "", line)
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def check(words: list[str], where: str) -> None:
    """Fails unless the command is one that this project has, given as it wants it."""
    match words:
        case ["python", "-m", "jax_bolt", *arguments]:
            if "--help" not in arguments:
                with contextlib.redirect_stderr(io.StringIO()) as stderr:
                    try:
                        cli.make_parser().parse_args(arguments)
                    except SystemExit:
                        pytest.fail(f"{where}: {stderr.getvalue()}")
        case ["make", *targets]:
            known = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.M)
            assert {t for t in targets if "=" not in t} <= set(known), where
        case ["pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
                "optional-dependencies"
            ]
            for package in packages:
                if parts := re.fullmatch(r"(?:\.|jax_bolt)\[(.+)\]", package):
                    assert set(parts[1].split(",")) <= set(extras), where
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), where
        case [".venv/bin/python", "-P", "-m", "pytest", *arguments]:
            for argument in arguments:
                if argument.startswith("tests"):
                    assert (ROOT / argument).exists(), where
        case [program, *_]:
            assert program in ("apt-get", "docker", "nvidia-smi", "useradd"), where


# --- Links


def links(page: Path) -> Iterator[str]:
    text = page.read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", page.read_text(), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        found.add(slug.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            assert re.fullmatch(r"https://[\w.-]+(/[\w./~%#-]*)?", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_reached():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r":\s+(\S+\.md)$", config, re.M))
    assert listed == {p.name for p in (ROOT / "docs").glob("*.md")}


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: jax_bolt\.(\w+)$", page, re.M))
    public = {n for n in vars(jax_bolt) if not n.startswith("_")}
    assert documented == public - {"Path"}


def test_the_readme_names_what_jit_has_and_optimize_has_not():
    text = (ROOT / "README.md").read_text()
    ours = inspect.signature(jax_bolt.optimize).parameters
    for name in inspect.signature(jax.jit).parameters.keys() - ours.keys():
        assert f"`{name}`" in text, name
    jitted = {n for n in dir(jax.jit(abs)) if not n.startswith("_")}
    for name in jitted - set(dir(jax_bolt.optimize(abs))) - {"fun"}:
        assert f"`{name}`" in text, name


def test_the_options_table_has_every_option():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `JAX_BOLT_(\w+)` \|", text, re.M)
    assert [row.lower() for row in rows] == [*options._PARSERS]
