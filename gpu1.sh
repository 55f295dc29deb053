set -x
export PYTHONUNBUFFERED=1 JAX_BOLT_CACHE_DIR=$PWD/.cache/jb
mkdir -p $JAX_BOLT_CACHE_DIR; chmod -R go-w .cache
nvidia-smi -L; nvcc --version | tail -1
python3 -m pip install -q --no-index --no-deps .whl/*.whl
python3 -m pip install -q --no-index --no-build-isolation --no-deps . || exit 1
export JAX_BOLT_REQUIRE=gpu,nvcc XLA_PYTHON_CLIENT_MEM_FRACTION=0.5
python3 -P -c "
import sys; sys.path.insert(0,'tests')
import time; t=time.time()
import faulthandler; faulthandler.enable()
" 
timeout 330 python3 -P -m pytest -ra -q tests/gpu/test_kernels.py --durations=5 2>&1 | tee $OUT/kernels.log | tail -80
timeout 150 python3 -P -m pytest -ra -q tests/gpu/test_optimize.py --durations=5 2>&1 | tee $OUT/optimize.log | tail -60
