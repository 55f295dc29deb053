# SPDX-License-Identifier: Apache-2.0
"""One of the two processes of test_processes.py; each has its GPU on paper.

    python one_of_two.py PROCESS PORT FOLDER

Writes the programs it would run to FOLDER/PROCESS.json. The tuning results of the two
contradict each other.
"""

from __future__ import annotations

import json
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from fake_nvcc import FakeNvcc

import jax_bolt
from jax_bolt._src import agree, compat, options, paths, plan, program, resolve
from jax_bolt._src.jit import loader
from jax_bolt._src.tune import db

GPU = types.SimpleNamespace(
    compute_capability="9.0", device_kind="NVIDIA H200", local_hardware_id=0
)
NATIVE = types.SimpleNamespace(
    device_info=lambda ordinal: {"sm_count": 132},
    is_loaded=lambda digest: False,
    load=lambda digest, path: None,
    check=lambda digest, kind, dims, recipe: None,
    workspace_bytes=lambda *args: 0,
)


def model(x: Any, w: Any) -> Any:
    """Two sites, of which each process leaves another one to XLA."""
    return jnp.tanh(jax.nn.relu(x @ w) @ w)


def arguments(size: int) -> tuple[Any, Any]:
    like = (jax.ShapeDtypeStruct((n, size), jnp.bfloat16) for n in (16, size))
    return cast(Any, tuple(like))


def tell(size: int, taste: int) -> None:
    """Records tuning results: a kernel for every second site, and which one."""
    active = options.current()
    target = resolve.target_for(GPU, active)
    traced, _ = program.trace(model, (), arguments(size), {}, active)
    entries = {}
    for number, site in enumerate(traced.family.sites):
        candidate = plan.candidates(site.region, target.arch)[0][taste]
        entries[site.region] = db.Entry(
            choice="kernel" if number != taste % 2 else "xla",
            form=candidate.form.name,
            template=candidate.template.name,
            config=candidate.config.text,
            sources=target.origin.sources,
            compiler=target.origin.compiler or "",
        )
    target.results.put(target.arch, entries)


def text(size: int) -> str:
    fun = jax.jit(jax_bolt.optimize(lambda *args: model(*args)))
    traced = fun.trace(*arguments(size))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def sharded_text(size: int) -> str:
    """Of a program over the devices of both processes."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("i",))
    spec = jax.sharding.PartitionSpec
    fun = jax.shard_map(
        jax_bolt.optimize(lambda *args: model(*args)),
        mesh=mesh,
        in_specs=(spec("i"), spec()),
        out_specs=spec("i"),
        check_vma=False,  # else a pcast comes into the regions
    )
    places = (spec("i"), spec())
    args = [
        jax.ShapeDtypeStruct(
            (like.shape[0] * (2 if place else 1), *like.shape[1:]),
            like.dtype,
            sharding=jax.sharding.NamedSharding(mesh, place),
        )
        for like, place in zip(arguments(size), places, strict=True)
    ]
    return jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def main(process: int, port: str, folder: Path) -> None:
    header = folder / f"cutlass{process}" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    parts = ("MAJOR", "MINOR", "PATCH")
    header.write_text("".join(f"#define CUTLASS_{part} 4\n" for part in parts))
    paths.cutlass_root = lambda: header.parents[2]
    compat.cuda_device = lambda: GPU
    cast(Any, loader).native = lambda: NATIVE
    cast(Any, loader).ffi_target = lambda: "jax_bolt.launch"
    agree.PATIENCE_S = 30.0

    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=process,
        initialization_timeout=60,
        coordinator_bind_address=f"127.0.0.1:{port}",
    )
    connected = compat.distributed_client
    assert jax.process_index() == process and connected() is not None

    texts = {}
    nvcc = FakeNvcc(folder / f"cuda{process}")
    cache = folder / f"cache{process}"
    with options.options(cuda_home=nvcc.home, cache_dir=cache, on_miss="error"):
        tell(64, taste=process)
        compat.distributed_client = lambda: None
        texts["each for itself"] = text(64)
        compat.distributed_client = connected
        texts["agreed"] = text(64)
        tell(64, taste=process + 2)
        texts["agreed before"] = text(64)

        tell(192, taste=process)
        groups = []
        group = agree.group
        agree.group = lambda processes=(): groups.append(processes) or group(processes)
        texts["shard_map"] = sharded_text(192)
        assert set(groups) == {frozenset({0, 1})}

        # Process 0 comes to this one only after process 1 no longer waited.
        tell(128, taste=process)
        done = folder / "done"
        if process == 1:
            agree.PATIENCE_S = 0.5
        while process == 0 and not done.exists():
            time.sleep(0.05)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            texts["late"] = text(128)
        texts["warnings"] = "\n".join(str(warning.message) for warning in caught)
        done.touch()
    (folder / f"{process}.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
