# SPDX-License-Identifier: Apache-2.0
"""What a machine without a GPU can compile for one with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import prebuild
from jax_bolt._src import arch


def test_parts_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert prebuild.main(["--list", "--only", "library,results"]) == 0
    library, results, where = capsys.readouterr().out.splitlines()
    assert library.startswith("library: ") and results.startswith("results: ")
    assert int(library.split()[1]) > 300 and int(results.split()[1]) > 50
    assert where.startswith("in ")
    with pytest.raises(SystemExit):
        prebuild.main(["--only", "nothing"])
    assert "'nothing' is none of library, results," in capsys.readouterr().err


@pytest.mark.usefixtures("as_users_run_it")
def test_models_have_chains_of_three() -> None:
    sources = list(prebuild.of_models(arch.from_name("sm_90a")))
    assert sum("struct Shortcut" in source for source in sources) > 10
