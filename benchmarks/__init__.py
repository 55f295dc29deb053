# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ``bench_models.py`` measures whole models, ``bench_kernels.py`` each of
their convs and products, ``on_gpu.sh`` runs all."""
