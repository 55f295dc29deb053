# SPDX-License-Identifier: Apache-2.0
"""The README's table and plot say what a results file says."""

import copy
import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks import readme_plot, readme_table

DOCUMENT = {
    "environment": {
        "device": "NVIDIA H200",
        "date": "2026-01-02T03:04:05+00:00",
        "driver": "580.1",
        "cuda": "13.0",
        "versions": {"jax": "0.11.2", "jax_bolt": "0.1.0"},
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
    assert lines[2] == (
        "| Model | 2.000 | 1.750 | **1.000** | - | 1.75 | - | 0.500 | 0.90 |"
    )
    model = copy.deepcopy(DOCUMENT["models"]["m"])
    model["variants"]["jax_bolt+freeze"] = {"queued_ms": 0.5}
    model["ratios"]["best_xla_over_frozen_queued_ms"] = 3.5
    lines = readme_table.text(DOCUMENT | {"models": {"m": model}}).splitlines()
    assert "| **1.000** | 0.500 | 1.75 | 3.50 |" in lines[2]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "NVIDIA H200, jax 0.11.2, 2026-01-02" in lines[-1]


def test_files_measured_alike_make_one_table():
    other = copy.deepcopy(DOCUMENT)
    other["models"] = {"n": other["models"]["m"] | {"title": "Other"}}
    text = readme_table.text(readme_table.merged([DOCUMENT, other]))
    assert "| Model |" in text and "| Other |" in text
    other["environment"]["device"] = "NVIDIA A100"
    with pytest.raises(ValueError, match="A100"):
        readme_table.merged([DOCUMENT, other])


# --- What is committed


def test_the_readme_is_what_its_results_make():
    """`python benchmarks/readme_table.py` with the files it names makes it so."""
    readme = readme_table.README.read_text()
    names = readme_table.names_in(readme)
    assert names
    document = readme_table.read(names)
    assert readme_table.written(readme, names, document) == readme
    assert readme_table.PLOT.read_text() == readme_plot.svg(document)
    assert "](docs/speedups.svg)" in readme


def test_one_command_writes_both(tmp_path, monkeypatch):
    readme = "before <!-- results: old.json --> old <!-- /results --> after"
    (tmp_path / "README.md").write_text(readme)
    for name, path in (("README", "README.md"), ("PLOT", "plot.svg")):
        monkeypatch.setattr(readme_table, name, tmp_path / path)
    names = readme_table.names_in(readme_table._ROOT.joinpath("README.md").read_text())
    readme_table.main(names)
    made = (tmp_path / "README.md").read_text()
    assert readme_table.names_in(made) == names
    assert made.startswith("before <!--") and made.endswith("<!-- /results --> after")
    assert "old" not in made and "| ResNet-50 |" in made
    assert (tmp_path / "plot.svg").read_text() == readme_table.PLOT.read_text()
    with pytest.raises(ValueError, match="no <!-- results"):
        readme_table.written("without a place", names, DOCUMENT)


# --- The plot

SVG = "{http://www.w3.org/2000/svg}"


def drawn(document):
    """The bars as (class, width), and the texts, of a plot."""
    root = ET.fromstring(readme_plot.svg(document))
    bars = [
        (r.attrib["class"], float(r.attrib["width"])) for r in root.iter(f"{SVG}rect")
    ]
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    for element in root.iter():
        for key in ("x", "x1", "x2"):
            assert 0 <= float(element.get(key, 0)) <= float(root.attrib["width"])
        for key in ("y", "y1", "y2"):
            assert 0 <= float(element.get(key, 0)) <= float(root.attrib["height"])
    return bars, texts


def test_bars_are_as_long_as_the_speed_ups():
    bars, texts = drawn(DOCUMENT)
    (pale, jit), (solid, best) = bars
    assert (pale, solid) == ("jit", "best")
    assert jit / best == pytest.approx(2.0 / 1.75, rel=1e-2)
    assert "1.75x" in texts and "2.00 → 1.00 ms" in texts and "Model" in texts
    text = " ".join(texts)
    for fact in ("NVIDIA H200", "driver 580.1", "CUDA 13.0", "jax 0.11.2"):
        assert fact in text
    assert "jax_bolt 0.1.0" in text and "2026-01-02" in text and "224x224" in text


def test_frozen_parameters_have_a_bar_of_their_own():
    document = copy.deepcopy(DOCUMENT)
    model = document["models"]["m"]
    model["title"] = "A <b> & c"
    model["variants"]["jax_bolt+freeze"] = {"queued_ms": 0.5}
    model["ratios"] |= {
        "jit_over_frozen_queued_ms": 4.0,
        "best_xla_over_frozen_queued_ms": 4.0,
    }
    document["models"]["n"] = copy.deepcopy(DOCUMENT["models"]["m"])
    bars, texts = drawn(document)
    kinds = [kind for kind, _ in bars]
    assert kinds == ["jit", "best", "frozen best", "jit", "best"]
    assert "A <b> & c" in texts and "4.00x" in texts and "2.00 → 0.50 ms" in texts
    assert any("blue" in text for text in texts)
    assert not any("blue" in text for text in drawn(DOCUMENT)[1])


def test_the_plot_has_colours_for_both_themes_and_asks_for_nothing():
    text = readme_plot.svg(DOCUMENT)
    for theme in ("light", "dark"):
        assert f"prefers-color-scheme: {theme}" in text
    assert re.findall(r"https?://[^\s\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "Model: 1.75 (jax_bolt)" in text  # for those who do not see it
