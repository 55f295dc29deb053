# SPDX-License-Identifier: Apache-2.0
"""The timer: what counts as a kernel in a trace, and the sums made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import timing

GPU = "/device:GPU:0"
KERNEL = {"kernel_details": "regs:32 static_shared:0 grid:1,1,1 block:128,1,1"}

# A trace as XLA's CUPTI collector writes one: two runs of a conv and an add, a copy,
# and the lines the profiler derives from them. Offsets and durations in ps.
XSPACE = """
planes {
  name: "/device:GPU:0"
  stat_metadata { key: 1 value { id: 1 name: "kernel_details" } }
  stat_metadata { key: 2 value { id: 2 name: "memcpy_details" } }
  stat_metadata { key: 3 value { id: 3 name: "hlo_op" } }
  event_metadata { key: 1 value { id: 1 name: "conv_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  event_metadata { key: 4 value { id: 4 name: "jit_step" } }
  lines {
    id: 13 name: "Stream #13(Compute,MemcpyD2D)" timestamp_ns: 1000
    events {
      metadata_id: 1 offset_ps: 0 duration_ps: 5000000
      stats { metadata_id: 1 str_value: "regs:32" }
      stats { metadata_id: 3 str_value: "conv.1" }
    }
    events {
      metadata_id: 2 offset_ps: 4000000 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "regs:16" }
    }
    events {
      metadata_id: 3 offset_ps: 7000000 duration_ps: 1000000
      stats { metadata_id: 2 str_value: "size:4096" }
    }
  }
  lines {
    id: 14 name: "CUPTI overhead" timestamp_ns: 1000
    events {
      metadata_id: 1 offset_ps: 20000000 duration_ps: 5000000
      stats { metadata_id: 1 str_value: "regs:32" }
    }
    events {
      metadata_id: 2 offset_ps: 26000000 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "regs:16" }
    }
  }
  lines {
    id: 100 name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 4 offset_ps: 0 duration_ps: 8000000 }
  }
  lines {
    id: 101 name: "XLA Ops" timestamp_ns: 1000
    events {
      metadata_id: 1 offset_ps: 0 duration_ps: 5000000
      stats { metadata_id: 1 str_value: "regs:32" }
    }
  }
}
planes {
  name: "/host:CPU"
  stat_metadata { key: 1 value { id: 1 name: "kernel_details" } }
  event_metadata { key: 1 value { id: 1 name: "cuLaunchKernel" } }
  lines {
    id: 1 name: "Stream #1" timestamp_ns: 1000
    events {
      metadata_id: 1 offset_ps: 0 duration_ps: 9000000
      stats { metadata_id: 1 str_value: "" }
    }
  }
}
"""


def test_trace_is_read_and_added_up() -> None:
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(XSPACE)
    data = jax.profiler.ProfileData.from_serialized_xspace(serialized)
    found = timing.summarize(timing.lines(data), runs=2)
    assert found.count == 2
    assert found.us == pytest.approx(7)
    # The add of the first run starts a µs before its conv ends.
    assert found.busy_us == pytest.approx(6.5)
    assert found.memcpy_us == pytest.approx(0.5)
    assert found.memset_us == 0
    assert [(k.name, k.count) for k in found.table] == [
        ("conv_kernel", 1),
        ("loop_add_fusion", 1),
    ]
    assert [k.us for k in found.table] == pytest.approx([5, 2])


@pytest.mark.parametrize(
    ("plane", "line", "expected"),
    [
        (GPU, "Stream #13(Compute)", True),
        (GPU, "Stream #7", True),
        (GPU, "CUPTI overhead", True),
        ("/device:GPU:12", "Stream #7(MemcpyH2D)", True),
        (GPU, "XLA Ops", False),
        (GPU, "XLA Modules", False),
        (GPU, "Steps", False),
        (GPU, "XLA TraceMe", False),
        ("/host:CPU", "Stream #7", False),
        ("/device:TPU:0", "Stream #7", False),
    ],
)
def test_stream_lines(plane: str, line: str, expected: bool) -> None:
    assert timing.is_stream(plane, line) is expected


@pytest.mark.parametrize(
    ("name", "stats", "kind"),
    [
        ("sm90_gemm", KERNEL, "kernel"),
        # The name of a user's kernel says nothing about what it is.
        ("memcpy_like_kernel", KERNEL, "kernel"),
        ("MemcpyH2D", {"memcpy_details": "size:8"}, "memcpy"),
        ("MemcpyH2D", {}, "memcpy"),
        ("Memset", {"memset_details": "num_bytes:8"}, "memset"),
        ("Memset", {}, "memset"),
        ("cuGraphLaunch", {"cuda_graph_exec_id": 3}, "graph"),
        ("node", KERNEL | {"cuda_graph_id": 3, "cuda_graph_node_id": 4}, "kernel"),
        ("MemoryAllocation", {"memalloc_details": "num_bytes:8"}, None),
        ("Activity buffer", {}, None),
    ],
)
def test_kinds(name: str, stats: dict[str, object], kind: str | None) -> None:
    assert timing.classify(timing.Event(name, 0, 1, stats)) == kind


def test_no_gpu_in_the_trace() -> None:
    with pytest.raises(timing.NoKernels, match="/host:CPU / python"):
        timing.summarize([("/host:CPU", "python", ())], runs=1)


def test_graphs_traced_whole_are_refused() -> None:
    event = timing.Event("graph", 0, 9, {"cuda_graph_exec_id": 1})
    with pytest.raises(timing.NoKernels, match="1 CUDA graphs"):
        timing.summarize([(GPU, "Stream #1", [event])], runs=1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without")
def test_a_real_trace_without_a_gpu_says_so() -> None:
    with pytest.raises(timing.NoKernels, match="no GPU kernels"):
        timing.kernels(jax.jit(jnp.sin), jnp.ones(8), runs=2)


def test_wall_calls_as_often_as_asked() -> None:
    calls = []
    wall = timing.wall(calls.append, 1, runs=7, warmup=2)
    assert (len(calls), wall.runs) == (9, 7)
    assert 0 <= wall.lowest <= wall.median


def test_wall_stops_at_its_budget_but_times_thrice() -> None:
    calls = []
    wall = timing.wall(calls.append, 1, runs=50, warmup=0, budget_s=0)
    assert (len(calls), wall.runs) == (3, 3)
