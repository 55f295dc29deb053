// SPDX-License-Identifier: Apache-2.0
#include "kernel.h"

namespace jax_bolt::native {

const char* MakeProblem(int64_t kind, const int64_t* dims, size_t num_dims, Problem* problem) {
  size_t expected;
  switch (kind) {
    case JAX_BOLT_GEMM:
      expected = JAX_BOLT_GEMM_DIMS;
      break;
    case JAX_BOLT_CONV_FPROP:
      expected = JAX_BOLT_CONV_DIMS;
      break;
    default:
      return "unknown problem kind";
  }
  if (num_dims != expected) return "wrong number of dims for the problem kind";
  problem->sizes = {};
  problem->sizes.kind = static_cast<int32_t>(kind);
  problem->sizes.num_dims = static_cast<int32_t>(num_dims);
  for (size_t i = 0; i < num_dims; ++i) problem->sizes.dims[i] = dims[i];
  return nullptr;
}

}  // namespace jax_bolt::native
