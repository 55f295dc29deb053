# SPDX-License-Identifier: Apache-2.0
# make demo   a Flax ResNet-50 through jax_bolt, beside plain JAX
# make test   the CPU suite, and the GPU suite where an NVIDIA GPU is visible
# make lint   what CI checks besides
# make package   sdist, wheel from it, and a clean environment with that, in build/package
# make docs   the docs as a site, in build/site
#
# Each makes $(VENV) first, from a bare Python and a C++ compiler. PYTHON chooses the
# interpreter it is made with; VENV may name an environment that exists already.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

python := $(VENV)/bin/python
pip := $(python) -m pip install --quiet --disable-pip-version-check
gpu := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu)
comma := ,
extras := flax,test$(if $(gpu),$(comma)cuda13)

# The entries of a list in pyproject.toml that contain a word, for a shell: versions
# stand there alone.
listed = $$($(python) -c "import tomllib; \
  print(*(r for r in tomllib.load(open('pyproject.toml', 'rb'))$(1) if '$(2)' in r))")

version = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
native := CMakeLists.txt pyproject.toml $(wildcard cc/native/*) cc/include/jax_bolt/abi.h \
  cc/include/jax_bolt/cast/table.hpp
sources := $(shell find cc tests -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \
  -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl')

.PHONY: demo test package docs lint lint-ruff lint-format lint-clang lint-types format venv clean
.DELETE_ON_ERROR:

demo: venv
	$(python) examples/resnet50.py

# One process per GPU: JAX takes most of the card's memory.
test: venv
	JAX_PLATFORMS=cpu $(python) -P -m pytest -n $(JOBS) tests/unit tests/compile
ifdef gpu
	JAX_BOLT_REQUIRE=gpu,nvcc $(python) -P -m pytest tests/gpu
endif

# The wheel is made from the sdist, so that nothing is missing there, and installed with
# what it says it needs. Build requirements come from $(VENV): no second download.
package: venv
	rm -rf build/package
	$(python) -c "from scikit_build_core import build; build.build_sdist('build/package')"
	$(python) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation \
	  --no-deps --wheel-dir build/package build/package/*.tar.gz
	$(python) -m venv build/package/venv
	build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  build/package/*.whl
	cd build/package && JAX_PLATFORMS=cpu JAX_BOLT_WARM=off JAX_BOLT_CACHE_DIR=cache \
	  venv/bin/python -P ../../tests/installed.py $(version)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

lint: lint-ruff lint-format lint-clang lint-types

lint-ruff: $(VENV)/.tools
	$(VENV)/bin/ruff check .

lint-format: $(VENV)/.tools
	$(VENV)/bin/ruff format --check .

lint-clang: $(VENV)/.tools
	$(VENV)/bin/clang-format --dry-run --Werror $(sources)

lint-types: venv $(VENV)/.tools
	$(VENV)/bin/pyright --pythonpath $(python)

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(sources)

venv: $(VENV)/.installed

clean:
	rm -rf $(VENV) build

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "jax_bolt needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# Without build isolation, so that the native module is built for the JAX it runs with,
# and nvidia-cutlass, of which only the headers are used, comes without its many
# requirements. Editable: the tests and the demo run this checkout.
$(VENV)/.installed: $(native) | $(python)
	$(pip) 'jax$(if $(gpu),[cuda13])>=0.10' cmake ninja \
	  $(call listed,['build-system']['requires'],scikit-build-core) \
	  $(call listed,['build-system']['requires'],pybind11)
	$(pip) --no-deps $(call listed,['build-system']['requires'],nvidia-cutlass)
	$(pip) --no-build-isolation --editable '.[$(extras)]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(python)
	$(pip) $(call listed,['project']['optional-dependencies']['docs'],mkdocs)
	@touch $@

$(VENV)/.tools: pyproject.toml | $(python)
	$(pip) $(call listed,['project']['optional-dependencies']['dev'],=)
	@touch $@
