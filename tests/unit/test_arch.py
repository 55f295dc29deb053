# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest

from jax_bolt._src import arch, base
from jax_bolt._src.errors import UnsupportedError


def test_the_feature_suffix_follows_the_architecture():
    assert arch.known() == (
        *("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a"),
        *("sm_103a", "sm_110a", "sm_120a", "sm_121a"),
    )


@pytest.mark.parametrize("name", arch.known())
def test_every_known_name_has_a_board(name):
    found = arch.from_name(name)
    assert found.name == name
    assert found.gpu is None
    assert found.sm_count > 0
    # Between a T4 and a B200, in the units stated.
    assert found.peak_flops is None or 5e13 < found.peak_flops < 3e15
    assert found.gencode.endswith(f"code={name}")


@pytest.mark.parametrize("name", arch.known())
def test_what_has_kernels_has_a_library(name):
    found = arch.from_name(name)
    assert found.has_kernels == bool(base.sources(found))
    assert (name in arch.with_kernels()) == found.has_kernels


def test_messages_name_what_has_kernels():
    known = r"known: sm_80 \(A100 80GB, .*sm_90a \(H100 SXM, .*sm_121a \(GB10\)$"
    with pytest.raises(UnsupportedError, match=known):
        arch.from_name("hopper")
    with pytest.raises(UnsupportedError, match=r"has them for 8\.0, .*12\.1$"):
        arch.of_device("7.0", "Tesla V100")


@pytest.mark.parametrize("name", arch.known())
def test_boards_have_names(name):
    assert re.fullmatch(r"[A-Z][A-Za-z0-9 ]+", arch.from_name(name).board)


def test_the_board_of_a_device():
    assert arch.from_name("sm_90a").board == "H100 SXM"
    assert arch.of_device("9.0", "NVIDIA H200").board == "H200"
    assert arch.of_device("8.9", "NVIDIA L40").board == "L40S"
    assert arch.of_device("9.0", "NVIDIA X1").board == "H100 SXM"


def test_from_name_takes_shorter_forms():
    assert arch.from_name("90") == arch.from_name("sm_90") == arch.from_name("sm_90a")
    assert arch.from_name("80").gencode == "-gencode=arch=compute_80,code=sm_80"
    assert arch.from_name("90").gencode == "-gencode=arch=compute_90a,code=sm_90a"


@pytest.mark.parametrize(
    ("name", "architecture", "board"),
    [
        ("A100", "sm_80", "A100"),
        ("a10", "sm_86", "A10"),
        ("rtx3090", "sm_86", "RTX 3090"),
        ("L4", "sm_89", "L4"),
        ("L40", "sm_89", "L40S"),
        ("H100", "sm_90a", "H100 SXM"),
        ("H100-PCIe", "sm_90a", "H100 PCIe"),
        ("h200", "sm_90a", "H200"),
        ("GH200", "sm_90a", "GH200"),
        ("NVIDIA B200", "sm_100a", "B200"),
        ("T4", "sm_75", "T4"),
        *((board.label, None, board.label) for board in arch._BOARDS),
    ],
)
def test_from_name_takes_boards(name, architecture, board):
    found = arch.from_name(name)
    assert (found.board, found.gpu) == (board, None)
    assert found.name == architecture or architecture is None


@pytest.mark.parametrize("name", ["sm_70", "sm_80a", "sm_90f", "hopper", "", "sm_9.0"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UnsupportedError, match=repr(name).replace(".", r"\.")):
        arch.from_name(name)


@pytest.mark.parametrize(
    ("capability", "kind", "name", "sm_count", "bandwidth"),
    [
        ("7.5", "Tesla T4", "sm_75", 40, 320e9),
        ("8.0", "NVIDIA A100-SXM4-40GB", "sm_80", 108, 1555e9),
        ("8.0", "NVIDIA A100-SXM4-80GB", "sm_80", 108, 2039e9),
        ("8.6", "NVIDIA A10G", "sm_86", 72, 600e9),
        ("8.9", "NVIDIA L4", "sm_89", 58, 300e9),
        ("8.9", "NVIDIA L40S", "sm_89", 142, 864e9),
        ("9.0", "NVIDIA H100 80GB HBM3", "sm_90a", 132, 3350e9),
        ("9.0", "NVIDIA H100 PCIe", "sm_90a", 114, 2039e9),
        ("9.0", "NVIDIA H200", "sm_90a", 132, 4800e9),
        ("9.0", "NVIDIA H20", "sm_90a", 78, 4000e9),
        ("10.0", "NVIDIA B200", "sm_100a", 148, 8000e9),
        ("12.0", "NVIDIA GeForce RTX 5090", "sm_120a", 170, 1792e9),
    ],
)
def test_of_device(capability, kind, name, sm_count, bandwidth):
    found = arch.of_device(capability, kind)
    assert (found.name, found.gpu) == (name, kind)
    assert (found.sm_count, found.bandwidth) == (sm_count, bandwidth)


def test_a_devices_own_sm_count_counts():
    slice_of_it = arch.of_device("9.0", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16)
    assert slice_of_it.sm_count == 16
    assert slice_of_it.smem_per_block == 232448


def test_an_unknown_board_is_its_architectures_usual_one():
    unknown = arch.of_device("9.0", "NVIDIA X1")
    assert unknown.sm_count == arch.from_name("sm_90a").sm_count
    assert unknown.gpu == "NVIDIA X1"


@pytest.mark.parametrize("capability", ["7.0", "13.0", "9", "nine"])
def test_an_unknown_capability_is_refused(capability):
    with pytest.raises(UnsupportedError, match=rf"NVIDIA X1.*'{capability}'"):
        arch.of_device(capability, "NVIDIA X1")
