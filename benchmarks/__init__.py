# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``bench_models.py`` measures whole models, ``bench_kernels.py`` each of
their convs and products, ``codesign.py`` what other layers would cost RepVGG;
``on_gpu.sh`` runs the first two, and the GPU's tests."""
