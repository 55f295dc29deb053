# SPDX-License-Identifier: Apache-2.0
"""The README's table says what a results file says."""

import copy

import pytest

from benchmarks import readme_table

DOCUMENT = {
    "environment": {
        "device": "NVIDIA H200",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"jax": "0.11.2"},
    },
    "settings": {"batch": 32, "image": 224, "dtype": "bfloat16"},
    "models": {
        "m": {
            "title": "Model",
            "floor_ms": 0.5,
            "variants": {
                "jit": {"queued_ms": 2.0},
                "jit_conv_fusion": {"queued_ms": 1.75},
                "jax_bolt": {"queued_ms": 1.0},
            },
            "ratios": {
                "jit_over_bolt_queued_ms": 2.0,
                "best_xla_over_bolt_queued_ms": 1.75,
                "error": 0.9,
            },
        }
    },
}


def test_a_row_per_model_and_where_it_was_measured():
    lines = readme_table.text(DOCUMENT).splitlines()
    row = "| Model | 2.000 | 1.750 | **1.000** | 2.00 | 1.75 | 0.500 | 0.90 |"
    assert lines[2] == row
    assert lines[0].count("|") == lines[1].count("|") == row.count("|")
    assert "NVIDIA H200, jax 0.11.2, 2026-01-02" in lines[-1]


def test_files_measured_alike_make_one_table():
    other = copy.deepcopy(DOCUMENT)
    other["models"] = {"n": other["models"]["m"] | {"title": "Other"}}
    text = readme_table.text(readme_table.merged([DOCUMENT, other]))
    assert "| Model |" in text and "| Other |" in text
    other["environment"]["device"] = "NVIDIA A100"
    with pytest.raises(ValueError, match="A100"):
        readme_table.merged([DOCUMENT, other])
