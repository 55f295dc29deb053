#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one call: builds and installs the package into the
# current Python, then the benchmarks of models (PyTorch's, too, where it is installed),
# kernels, chains and tuning, the second-process check, tests/gpu and, over the ragged
# cases, three tools of compute-sanitizer.
#
#   benchmarks/on_gpu.sh [--out DIR] [--skip STAGE[,STAGE]] [-- ARGS of bench_models.py]
#
# benchmarks/prebuild.py compiles ahead what this compiles, on a machine without a GPU.
# Stages: install, models, torch, kernels, chains, tuning, second, tests, memcheck,
# racecheck, synccheck. Each one's output is kept in DIR/<stage>.log; a stage that fails does not
# stop the later ones, except install. Uses no network: JAX with CUDA, flax, pytest, pybind11,
# scikit-build-core and nvidia-cutlass must be there. PYTHON names the interpreter
# (default: python3).
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="$root/benchmarks/results"
skip=""
usage() { sed -n '3,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
  case "$1" in
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --skip) skip="${2:?--skip needs stage names}"; shift 2 ;;
    --) shift; break ;;
    -h|--help) usage; exit 0 ;;
    *) echo "unknown argument: $1" >&2; usage >&2; exit 2 ;;
  esac
done
for stage in ${skip//,/ }; do
  case "$stage" in
    install|models|torch|kernels|chains|tuning|second|tests|memcheck|racecheck|synccheck) ;;
    *) echo "unknown stage: $stage" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 2
export PYTHONUNBUFFERED=1
failed=()

# run STAGE COMMAND...: the command's output goes to the terminal and to STAGE.log.
run() {
  local stage="$1" began=$SECONDS
  shift
  case ",$skip," in *",$stage,"*) echo "== $stage: skipped"; return 0 ;; esac
  echo "== $stage"
  if (cd "$root" && "$@") 2>&1 | tee "$out/$stage.log"; then
    echo "== $stage: ok, $((SECONDS - began)) s"
  else
    echo "== $stage: FAILED, $((SECONDS - began)) s"
    failed+=("$stage")
    return 1
  fi
}

run install "$python" -m pip install --no-index --no-build-isolation --no-deps \
  --force-reinstall . || exit 1
# The pytest program and scripts run by path leave the repository's root off sys.path,
# where the source tree would shadow the package just installed.
begun=$(mktemp)
run models "$python" benchmarks/bench_models.py --without chain --out "$out" "$@"
if "$python" -c "import torch" 2>/dev/null; then
  measured=$(find "$out" -name 'models-*.json' -newer "$begun" | head -1)
  run torch "$python" benchmarks/bench_torch.py --out "$out" ${measured:+--beside "$measured"}
fi
rm -f "$begun"
run kernels "$python" benchmarks/bench_kernels.py --out "$out"
run chains "$python" benchmarks/bench_chains.py --out "$out"
run tuning "$python" benchmarks/bench_tuning.py --space 12 --out "$out"
run second "$python" benchmarks/second_process.py --fill --out "$out/second_process.json"
run tests env JAX_BOLT_REQUIRE=gpu,nvcc "$python" -P -m pytest -ra tests/gpu
# The tests before this have built the kernels; the tools look at this process alone.
# An allocation of its own for every buffer, so that a read past one's end is seen.
for tool in memcheck racecheck synccheck; do
  run "$tool" env XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool "$tool" \
    --target-processes application-only --error-exitcode 1 "$python" -P tests/gpu/sanitize.py
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all stages passed; results in $out"
