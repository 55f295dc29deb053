# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The benchmark's models in PyTorch, eager and compiled, beside what jax_bolt took.

Run by path, after bench_models.py and on the same machine:

    python benchmarks/bench_torch.py --beside models-nvidia-h200-2026-11-28.json

bfloat16 and channels_last, inference mode. "compiled" is ``torch.compile`` with its
parameters frozen, so that BatchNorm is folded into the convs (``--mode``, default
max-autotune). ``queued_ms``, ``wall_ms`` and ``back_to_back_ms`` are as in
bench_models.py. Writes ``torch-<device>-<date>.json`` after every model, and prints
how the frozen jax_bolt of ``--beside`` compares. Exits with 1 where a model failed or
is far from float32, with 2 without PyTorch and a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_models, environment

EAGER, COMPILED = "eager", "compiled"
FROZEN = bench_models.FROZEN
# Of bfloat16 through 54 layers; a wrong model is off by far more.
MAX_ERROR = 0.05


def bench_model(
    name: str, batch: int, image: int, runs: int, mode: str, device: str
) -> dict[str, Any]:
    """Times and errors of both variants, as JSON data."""
    import torch

    from benchmarks.models import pytorch

    torch.compiler.reset()  # of the model before, whose memory is in the way
    with torch.inference_mode(), torch.random.fork_rng():
        model = pytorch.build(name, image).to(device)
        x = torch.randn(batch, 3, image, image, device=device)
        x = x.to(memory_format=torch.channels_last)
        expected = _in_float32(model, x)
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
        variants = {EAGER: model, COMPILED: torch.compile(model, mode=mode)}
        result: dict[str, Any] = {}
        for variant, fun in variants.items():
            start = time.perf_counter()
            logits = fun(x).float().cpu()
            first_call_s = time.perf_counter() - start
            error = torch.linalg.norm(logits - expected) / torch.linalg.norm(expected)
            result[variant] = {
                "first_call_s": first_call_s,
                "relative_l2": float(error),
                **_times(lambda fun=fun: fun(x), runs, device),
            }
    return result


def _in_float32(model: Any, x: Any) -> Any:
    """Of a few images, which take the memory there is; without TF32."""
    import torch

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return torch.cat([model(part).cpu() for part in x.split(8)])
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _times(call: Callable[[], Any], runs: int, device: str) -> dict[str, float]:
    """Medians of three rounds, ms."""
    import torch

    for _ in range(5):
        call()
    wall, among, queued = [], [], []
    for _ in range(3):
        each = []
        begin = time.perf_counter()
        for _ in range(runs):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        among.append((time.perf_counter() - begin) / runs * 1e3)
        for _ in range(runs):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            each.append(time.perf_counter() - start)
        wall.append(statistics.median(each) * 1e3)
        if device == "cuda":
            queued.append(_queued(call, runs))
    found = {"wall_ms": statistics.median(wall)}
    found["back_to_back_ms"] = statistics.median(among)
    return found | ({"queued_ms": statistics.median(queued)} if queued else {})


def _queued(call: Callable[[], Any], runs: int) -> float:
    """ms of device time per call, behind a wait in which the host gets ahead."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = min(runs, 16)
    for cycles in (10**7, 10**8, 10**9):
        torch.cuda.synchronize()
        # Of one thread: products at full power would lower the clock of what follows.
        torch.cuda._sleep(cycles)
        begin.record()
        for _ in range(count):
            call()
        end.record()
        ahead = not begin.query()  # all was asked for before the first call began
        torch.cuda.synchronize()
        if ahead:
            break
    return begin.elapsed_time(end) / count


def beside(results: dict[str, Any], document: dict[str, Any], device: str) -> str:
    """A table of ms, and of compiled PyTorch over frozen jax_bolt.

    ``document`` is of bench_models.py. Raises ValueError where it is of another device.
    """
    measured_on = document["environment"]["device"]
    if measured_on != device:
        raise ValueError(f"measured on {measured_on}, and this is {device}")
    rows = [f"{'model':22}{'eager':>9}{'compiled':>10}{'jax_bolt':>10}{'ratio':>8}"]
    ratios = []
    for name, result in results.items():
        known = document["models"].get(name, {}).get("variants", {}).get(FROZEN, {})
        ours = known.get("queued_ms")
        row = f"{name:22}" + "".join(
            f"{result.get(variant, {}).get('queued_ms', float('nan')):{width}.3f}"
            for variant, width in ((EAGER, 9), (COMPILED, 10))
        )
        compiled = result.get(COMPILED, {}).get("queued_ms")
        if ours and compiled:
            ratios.append(compiled / ours)
            row += f"{ours:10.3f}{ratios[-1]:8.2f}"
        rows.append(row)
    if ratios:
        mean = statistics.geometric_mean(ratios)
        rows.append(
            f"geometric mean, compiled PyTorch over frozen jax_bolt: {mean:.2f}"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.beside is not None and not args.beside.is_file():
        print(f"--beside: there is no file {args.beside}", file=sys.stderr)
        return 2
    try:
        import torch
        import torch._inductor.config as inductor
    except ImportError as error:
        print(f"bench_torch.py needs PyTorch: {error}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_torch.py needs a GPU that PyTorch sees", file=sys.stderr)
        return 2
    inductor.freezing = True
    torch.backends.cudnn.benchmark = True
    on_gpu = args.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    described = {
        "date": date,
        "device": device,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__},
    }
    path = args.out / f"torch-{environment.slug(device)}-{date[:10]}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    failed = False
    for name in args.models:
        print(f"{name} ...", flush=True)
        sizes = args.batch, args.image, args.runs
        try:
            results[name] = bench_model(name, *sizes, args.mode, args.device)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        variants = [v for v in results[name].values() if isinstance(v, dict)]
        if not variants or any(not v["relative_l2"] <= MAX_ERROR for v in variants):
            failed = True
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        settings = {"batch": args.batch, "image": args.image, "mode": args.mode}
        document = {"environment": described, "settings": settings, "models": results}
        path.write_text(json.dumps(document, indent=1) + "\n")
    if args.beside is not None:
        print(beside(results, json.loads(args.beside.read_text()), device))
    print(f"written: {path}")
    return int(failed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ("resnet50", "resnet18", "vgg16", "repvgg_a0", "repvgg_a0_hard_swish")
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--beside", type=Path, help="a result of bench_models.py")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
