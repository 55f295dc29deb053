# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models: ``bench_models.py`` measures, ``on_gpu.sh`` runs all."""
