# SPDX-License-Identifier: Apache-2.0
"""Every example runs on a CPU, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import environ

pytest.importorskip("flax")

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "container/model.py": ["(8, 64) on "],
    "export.py": ["model.jax: ", "the same (64, 64) results, bit by bit"],
    "nnx_cnn.py": ["(2, 64) logits", "8 of 8 roots fused, 8 on kernels", "sm_90a"],
    "repvgg.py": [
        "branches   4 sites",
        "folded     2 sites, the first conv3x3+bias+relu",
    ],
    "resnet50.py": [
        "On a CPU these times say nothing",
        "54 of 54 roots fused, 54 on kernels, planned for sm_90a",
        "  16 x conv3x3+bn+relu ",
    ],
    "serving.py": ["jax.jit ", "frozen ", "a new checkpoint: "],
}


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environ(JAX_PLATFORMS="cpu", JAX_BOLT_WARM="off"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_example_is_run():
    found = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")}
    assert found == set(SAID)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(name in listed for name in SAID)


@pytest.mark.parametrize("name", SAID)
def test_an_example(name, tmp_path):
    if name == "export.py":
        pytest.importorskip("flatbuffers")
    printed = run(str(EXAMPLES / name), folder=tmp_path)
    for text in SAID[name]:
        assert text in printed, printed
    # Folding, and another order of the same operations, change roundings alone.
    for distance in re.findall(r"(?:result by |logits, )([\d.e+-]+\d)", printed):
        assert float(distance) < 2e-2


def test_the_sites_of_the_demos_model(tmp_path):
    model = f"{EXAMPLES / 'resnet50.py'}:predict"
    command = ("-m", "jax_bolt", "explain", model, "--arch", "sm_90a")
    assert "54 of 54 roots fused" in run(*command, folder=tmp_path)


def test_the_containers_model_can_be_explained(tmp_path):
    model = f"{EXAMPLES / 'container' / 'model.py'}:predict"
    command = ("-m", "jax_bolt", "explain", model, "--arch", "sm_90a")
    assert "3 of 3 roots fused" in run(*command, folder=tmp_path)
