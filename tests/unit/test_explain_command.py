# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt explain``, ``tune`` and ``advise``, and users' mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fresh_python import environ

import jax_bolt
from jax_bolt._src import api, cli, explain_command

MODEL = """\
import jax
import jax.numpy as jnp

import jax_bolt

print("the module was imported")


def predict(x, w):
    return jax.nn.relu(x @ w)


def example_args():
    x = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)
    return x, jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)


def larger():
    x = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    return x, jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)


class net:
    apply = jax_bolt.optimize(predict)


frozen = jax_bolt.freeze(lambda w, x: predict(x, w), jnp.ones((64, 48), jnp.bfloat16))


def one():
    return (jnp.ones((32, 64), jnp.bfloat16),)


def an_array():
    return one()[0]


def a_list():
    return [1]


def raises():
    raise RuntimeError("no\\ndata")


def leaves():
    raise SystemExit("left")


def wrong(x, w):
    return x @ w.T


number = 7


class layers:
    init = predict
    apply = predict


def choose(x, how):
    return getattr(jax.nn, how)(x @ x)


chosen = jax_bolt.optimize(choose, static_argnums=1)


def with_a_name():
    return jnp.ones((64, 64), jnp.bfloat16), "relu"


def branch(x, flag):
    return x @ x if flag else x


def with_a_flag():
    return with_a_name()[0], True
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file with functions, in the current directory."""
    (tmp_path / "a_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    explain_command._module.cache_clear()
    yield "a_model.py"
    for name in ("a_model", "a_package", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a command that is to end with ``status``; what it printed, what it said."""

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            found = cli.main(arguments)
        except SystemExit as exit:
            found = exit.code
        printed, said = capsys.readouterr()
        assert found == status, said
        assert "Traceback" not in said
        return printed, said

    return run


@pytest.mark.parametrize("name", ["a_model.py", "a_model", "./a_model.py"])
def test_a_function_of_a_file_or_module(model, run, name):
    printed, said = run("explain", f"{name}:predict", "--arch", "sm_90a")
    assert "1 of 1 roots fused" in printed and "m32n48k64" in printed
    assert "the module was imported" in said
    assert "the module was imported" not in printed


def test_arguments_from_another_function(model, run):
    for name in ("larger", "a_model:larger", "a_model.py:larger"):
        printed, _ = run("explain", f"{model}:predict", "--args", name)
        assert "m512n48k64" in printed


@pytest.mark.parametrize(
    "name, arguments", [("net.apply", "example_args"), ("frozen", "one")]
)
def test_optimized_and_frozen_functions(model, run, name, arguments):
    printed, _ = run("explain", f"{model}:{name}", "--args", arguments)
    assert "1 of 1 roots fused" in printed


def test_a_static_argument(model, run):
    printed, _ = run("explain", f"{model}:chosen", "--args", "with_a_name")
    assert "1 of 1 roots fused" in printed and "dot+relu" in printed


def test_json_and_html(model, run, tmp_path):
    printed, said = run(
        *("explain", f"{model}:predict", "--arch", "90a", "--json", "--html", "r.html")
    )
    assert json.loads(printed)["coverage"] == 1.0
    assert "r.html is written" in said
    assert "dot+relu" in (tmp_path / "r.html").read_text()


def test_a_file_whose_name_is_taken_is_still_that_file(model, run, tmp_path):
    (tmp_path / "jax.py").write_text("raise ValueError('the wrong file')")
    (tmp_path / "json.py").write_text(MODEL)
    printed, _ = run("explain", "json.py:predict")
    assert "1 of 1 roots fused" in printed
    assert sys.modules["json"] is json


def test_an_architecture_without_kernels(model, run):
    printed, _ = run("explain", "a_model:predict", "--arch", "sm_75", "--json")
    document = json.loads(printed)
    (site,) = document["sites"]
    assert document["board"] == "T4" and site["kernel"] == "xla"
    assert site["reason"].count(";") == 1 and "sm_80 or later" in site["reason"]
    printed, said = run("advise", "a_model:predict", "--arch", "sm_75", status=1)
    assert printed == "" and said.count("\n") == 1
    assert "no kernels for sm_75; it has them for sm_80, " in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["predict"],
            "'predict' is not of the form MODULE:FUNCTION, such as model.py:predict",
        ),
        (["a_model.py"], "is not of the form MODULE:FUNCTION, such as a_model.py:pre"),
        ([":predict"], "is not of the form"),
        (["a_model:"], "is not of the form"),
        (["missing.py:f"], "there is no file missing.py"),
        (["missing:f"], "there is no module 'missing' here"),
        (["a_model.inner:f"], "there is no module"),
        (["..:f"], "is no name of a module"),
        ([".a:f"], "is no name of a module"),
        (["a_model:nothing"], "a_model has no 'nothing'"),
        (["a_model:net.nothing"], "a_model has no 'net.nothing'"),
        (["a_model:layers"], "is a module: did you mean a_model:layers.apply?"),
        (["a_model:number"], "int 7, which is no function"),
        (["a_model:predict", "--args", "number"], "int 7, which is no function"),
        (["a_model:predict", "--args", "nothing"], "a_model has no 'nothing'"),
        (
            ["a_model:predict", "--args", "a_list"],
            "list [1]; it is to return the arguments as a tuple",
        ),
        (
            ["a_model:predict", "--args", "an_array"],
            "a_model:an_array returned an array, bfloat16[32, 64]; it is to return the "
            "arguments as a tuple, a single one as (x,)",
        ),
        (["a_model:predict", "--args", "gone:f"], "there is no module 'gone'"),
        (["a_model:predict", "--html", "no/r.html"], "there is no directory"),
        (["math:sqrt"], "math has no function example_args: add one"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "tune", "advise"])
def test_mistakes_in_naming(model, run, command, arguments, message):
    if command == "advise" and "--html" in arguments:
        message = "unrecognized arguments: --html"
    printed, said = run(command, *arguments, status=2)
    assert message in said and said.count("error:") == 1
    assert printed == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a_model:wrong"], "tracing a_model:wrong failed: TypeError: "),
        (["a_model:predict", "--args", "one"], "tracing a_model:predict failed: "),
        (
            ["a_model:predict", "--args", "raises"],
            "calling a_model:raises failed: RuntimeError: no data",
        ),
        (["a_model:predict", "--args", "leaves"], "SystemExit: left"),
        (["broken.py:f"], "importing broken.py failed: SyntaxError: "),
        (["a_package:f"], "No module named 'its_own_need'"),
        (
            ["a_model:choose", "--args", "with_a_name"],
            "argument 1 is 'relu' of type str, not an array; pass an array, or make it "
            "static: static_argnums=1",
        ),
        (
            ["a_model:branch", "--args", "with_a_flag"],
            "jax_bolt: argument 1 is True, which is traced as an array",
        ),
    ],
)
def test_errors_of_the_users_code_say_where(model, run, tmp_path, arguments, message):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "a_package.py").write_text("import its_own_need\n")
    _, said = run("explain", *arguments, status=1)
    assert message in said
    if "broken" in message:
        assert f"({tmp_path}/broken.py:1)" in said
    elif not {"one", "with_a_name"} & {
        *arguments
    }:  # there, no line of theirs was reached
        assert f"({tmp_path}/a_" in said


def test_other_mistakes(model, run):
    _, said = run("explain", "a_model:predict", "--arch", "sm_1", status=2)
    assert "unknown architecture 'sm_1'" in said
    assert "the module was imported" not in said
    _, said = run("tune", "a_model:predict", "--arch", "sm_90a", status=2)
    assert "it measures, on the GPU itself" in said and "the module was" not in said
    assert "`explain a_model:predict --arch sm_90a`" in said
    for value in ("soon", "-1", "nan", "inf"):
        _, said = run("tune", "a_model:predict", "--budget", value, status=2)
        assert "is no number of seconds" in said


def test_an_unknown_variable_is_told(model, run, monkeypatch):
    monkeypatch.setenv("JAX_BOLT_ONMISS", "xla")
    _, said = run("explain", f"{model}:predict")
    assert "note: JAX_BOLT_ONMISS is no option; did you mean JAX_BOLT_ON_MISS?" in said


def test_a_board_names_an_architecture(model, run):
    printed, _ = run("explain", f"{model}:predict", "--arch", "h200")
    assert "planned for sm_90a (H200)" in printed


def test_without_a_gpu_it_says_how_to_plan(model, run):
    hint = "add --arch sm_90a"
    if jax.default_backend() != "gpu":
        printed, said = run("explain", f"{model}:predict")
        assert "no GPU to plan for" in printed and hint in said
        printed, said = run("explain", f"{model}:predict", "--json")
        assert json.loads(printed)["arch"] == "" and hint in said
    _, said = run("explain", f"{model}:predict", "--arch", "sm_80")
    assert hint not in said


def test_tuning_without_a_gpu(model, run):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    _, said = run("tune", f"{model}:predict", status=1)
    assert "tuning needs a CUDA device" in said


def test_tuning_gets_its_budget(model, run, monkeypatch):
    asked = []

    def tune(fun, *args, budget_s):
        asked.append((fun.__name__, [a.shape for a in args], budget_s))
        return jax_bolt.Report((), "sm_90a", {})

    monkeypatch.setattr(api, "tune", tune)
    run("tune", f"{model}:predict", "--budget", "2.5")
    run("tune", f"{model}:predict")
    shapes = [(32, 64), (64, 48)]
    assert asked == [("predict", shapes, 2.5), ("predict", shapes, None)]


def test_advice(model, run):
    command = ("advise", f"{model}:predict", "--arch", "sm_90a")
    printed, said = run(*command)
    assert printed.startswith("Estimates (~) of the rank model for sm_90a")
    assert "dot+relu" in printed and "hard_swish" in printed
    assert "the module was imported" in said
    printed, _ = run(*command, "--activations", "relu,elu", "--json")
    (site,) = json.loads(printed)["sites"]
    assert list(site["activations"]) == ["relu", "elu"]
    assert site["channels"][0]["to"] == 64


def test_one_activation_is_a_name_too():
    shape = jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)
    given = {"arch": "sm_90a", "progress": False}

    def fun(x):
        return jax.nn.relu(x @ x)

    advice = jax_bolt.advise(fun, shape, activations="silu", **given)
    assert advice.activations == ("silu",)
    advice = jax_bolt.advise(fun, shape, activations="silu, elu", **given)
    assert advice.activations == ("silu", "elu")
    mistakes: list[tuple[Any, str]] = [
        ([jax.nn.relu], r"not relu of type \w+; write 'relu'$"),
        (jax.nn.silu, r"not silu of type \w+; write 'silu'$"),
        (["relu", 3], "not 3 of type int$"),
    ]
    for bad, said in mistakes:
        with pytest.raises(TypeError, match=f"names of functions of jax.nn.* {said}"):
            jax_bolt.advise(fun, shape, activations=bad, **given)
    with pytest.raises(ValueError, match="'nothing' is no activation"):
        jax_bolt.advise(fun, shape, activations="nothing", **given)


def test_a_function_without_convs_and_products(model, run, tmp_path):
    (tmp_path / model).write_text(MODEL.replace("relu(x @ w)", "relu(x)"))
    printed, _ = run("explain", f"{model}:predict", "--arch", "sm_90a")
    assert printed.startswith("no conv or product here")
    _, said = run("advise", f"{model}:predict", "--arch", "sm_90a")
    assert not any("no conv or product here" in line for line in said.splitlines())
    printed, _ = run("advise", f"{model}:predict", "--arch", "sm_90a")
    assert "no conv or product here: what is in a callback" in " ".join(printed.split())
    printed, said = run("advise", f"{model}:predict", "--arch", "sm_90a", "--json")
    assert json.loads(printed)["sites"] == [] and "docs/troubleshooting.md" in said
    (tmp_path / model).write_text(MODEL.replace("bfloat16", "int8"))
    explain_command._module.cache_clear()
    said = "".join(run("advise", f"{model}:predict", "--arch", "sm_90a"))
    assert "no conv or product here" not in said


@pytest.mark.parametrize(
    "command", [("explain", "a.py:b"), ("cache", "ls"), ("doctor",), ("warm",)]
)
def test_an_unknown_option_prints_its_commands_usage(run, command):
    printed, said = run(*command, "--colour", "red", status=2)
    words = [word for word in command if ":" not in word]
    prefix = " ".join(("python -m jax_bolt", *words))
    assert said.startswith(f"usage: {prefix} [-h]") and not printed
    assert f"{prefix}: error: unrecognized arguments: --colour red" in said


def test_mistakes_in_asking_for_advice(model, run):
    command = ("advise", f"{model}:predict")
    _, said = run(*command, "--activations", "relu,softmax", status=2)
    assert "'softmax' is no activation: name functions of jax.nn" in said
    assert "the module was imported" not in said
    _, said = run(*command, "--arch", "sm_1", status=2)
    assert "unknown architecture 'sm_1'" in said
    _, said = run(*command, "--budget-s", "soon", status=2)
    assert "is no number of seconds" in said


def test_advice_gets_what_it_is_given(model, run, monkeypatch):
    asked = []

    def advise(fun, *args, **given):
        asked.append(given)
        return jax_bolt.Advice((), (), "sm_90a")

    monkeypatch.setattr(api, "advise", advise)
    run("advise", f"{model}:predict", "--budget-s", "2.5", "--activations", "relu")
    run("advise", f"{model}:predict", "--budget", "3", "--arch", "sm_80")
    assert asked == [
        {"arch": None, "activations": ("relu",), "budget_s": 2.5},
        {"arch": "sm_80", "activations": None, "budget_s": 3.0},
    ]


def test_as_a_user_runs_it(tmp_path):
    (tmp_path / "a_model.py").write_text(MODEL)
    done = subprocess.run(
        [sys.executable, "-m", "jax_bolt", "explain", "a_model:predict", "--json"],
        cwd=tmp_path,
        env=environ(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["sites"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [(), *((name,) for name in "doctor explain tune advise warm cache".split())],
)
def test_help_has_examples(run, arguments):
    printed, _ = run(*arguments, "--help")
    assert "example" in printed
    assert f"python -m jax_bolt {' '.join(arguments)}".strip() in printed


def test_the_example_in_the_help_works():
    """What ``explain --help`` shows of ``example_args``, on a model of its kind."""
    nn = pytest.importorskip("flax.linen")
    net = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)
    text = explain_command._NAMING.partition("ShapeDtypeStruct:\n")[2]
    lines = [line.removeprefix("  ") for line in text.splitlines()]
    names = {"jax": jax, "jnp": jnp, "net": net}
    exec("\n".join(lines), names)
    variables, images = names["example_args"]()
    assert images.shape == (32, 224, 224, 3)
    assert jax_bolt.explain(net.apply, variables, images).coverage == 1.0


def test_version(run):
    printed, _ = run("--version")
    assert f"jax {jax.__version__}" in printed
