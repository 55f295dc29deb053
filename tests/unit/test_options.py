# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jax_bolt._src import cast, chain, kernels, options, pool, sequence
from jax_bolt._src.match import AUXILIARY
from jax_bolt._src.options import Options


def test_defaults():
    assert options.from_environment({}) == Options()
    assert Options().on_miss == "tune"
    assert Options().on_error == "xla"
    assert Options().on_error == "xla"


def test_every_option_is_read_from_its_variable():
    environ = {
        "JAX_BOLT_CACHE_DIR": "/a/b",
        "JAX_BOLT_CUDA_HOME": "/cuda",
        "JAX_BOLT_ON_MISS": "xla",
        "JAX_BOLT_ON_ERROR": "raise",
        "JAX_BOLT_WARM": "load",
        "JAX_BOLT_BUDGET_S": "1.5",
        "JAX_BOLT_JOBS": "3",
        "JAX_BOLT_DISABLE": "gemm_sm80, conv_sm80,",
        "JAX_BOLT_DUMP_DIR": "~/dump",
    }
    assert set(environ) == {f"JAX_BOLT_{n.upper()}" for n in Options.__slots__}
    assert options.from_environment(environ) == Options(
        cache_dir=Path("/a/b"),
        cuda_home=Path("/cuda"),
        on_miss="xla",
        on_error="raise",
        warm="load",
        budget_s=1.5,
        jobs=3,
        disable=("gemm_sm80", "conv_sm80"),
        dump_dir=Path.home() / "dump",
    )


def test_an_empty_variable_is_an_unset_one():
    assert options.from_environment({"JAX_BOLT_ON_MISS": " "}) == Options()


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("ON_MISS", "never", "'tune', 'heuristic', 'xla', 'error'"),
        ("ON_ERROR", "Raise", "'xla', 'raise'"),
        ("JOBS", "0", "at least 1"),
        ("JOBS", "two", "whole number"),
        ("BUDGET_S", "-1", "seconds"),
        ("BUDGET_S", "nan", "seconds"),
        ("BUDGET_S", "soon", "seconds"),
        ("DISABLE", "gemm_sm80,gemm", "implicit_gemm_sm90, depthwise"),
    ],
)
def test_a_bad_variable_is_named_with_what_is_allowed(name, text, allowed):
    with pytest.raises(ValueError, match=f"JAX_BOLT_{name}") as caught:
        options.from_environment({f"JAX_BOLT_{name}": text})
    assert repr(text) in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [{"jobs": True}, {"jobs": 1.5}, {"on_miss": 1}, {"disable": 3}, {"cache_dir": 1}],
)
def test_a_bad_value_is_refused_in_the_context_manager_too(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name), options.options(**bad):
        pass


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="on_mis"), options.options(on_mis="xla"):
        pass


def test_unknown_variables_and_what_they_may_be():
    given = {"JAX_BOLT_ONMISS": "xla", "JAX_BOLT_JOBS": "2", "JAX_BOLT_COLOUR": "red"}
    found = options.unknown({**given, "JAX_BOLT_EMPTY": "", "JAX_BOLT_REQUIRE": "gpu"})
    assert list(found) == ["JAX_BOLT_COLOUR", "JAX_BOLT_ONMISS"]
    assert found["JAX_BOLT_ONMISS"].endswith("; did you mean JAX_BOLT_ON_MISS?")
    assert "no option; there are JAX_BOLT_CACHE_DIR, " in found["JAX_BOLT_COLOUR"]


def test_options_nest_and_are_put_back():
    before = options.current()
    with options.options(jobs=3) as outer:
        assert outer is options.current()
        with options.options(on_miss="xla", jobs=None):
            assert options.current().jobs == 3
            assert options.current().on_miss == "xla"
        assert options.current() is outer
    with pytest.raises(RuntimeError), options.options(jobs=4):
        raise RuntimeError
    assert options.current() is before


def test_what_can_be_disabled():
    made = (*kernels.TEMPLATES, *kernels.CHAIN_TEMPLATES)
    templates = [template.name for template in made]
    assert list(options.DISABLE[: len(templates)]) == templates
    assert options.DISABLE[len(templates) :] == (
        *(cast.NAME, sequence.NAME, AUXILIARY, chain.NAME, pool.NAME),
    )


def test_warm_counts_at_import_alone():
    with pytest.raises(TypeError, match="set JAX_BOLT_WARM"):
        with options.options(warm="off"):
            pass


def test_another_thread_is_not_affected():
    seen = []
    with options.options(jobs=7):
        thread = threading.Thread(target=lambda: seen.append(options.current().jobs))
        thread.start()
        thread.join()
    assert seen == [options.current().jobs]


def test_options_hash_and_paths_do_not_follow_a_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = Options(cache_dir="here", disable=["cast"])  # pyright: ignore
    assert chosen.cache_dir == tmp_path / "here"
    assert hash(chosen) == hash(Options(cache_dir=tmp_path / "here", disable=("cast",)))
