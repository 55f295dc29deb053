# SPDX-License-Identifier: Apache-2.0
"""The benchmarked models, written as users write them: plain Flax linen modules."""
