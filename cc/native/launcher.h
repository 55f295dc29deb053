// SPDX-License-Identifier: Apache-2.0
// The one XLA FFI custom call, "jax_bolt.launch".
//
// Operands: a, b, side_0.., vector_0..; results: d and, where the kernel needs one, workspace
// u8[n]. Attributes: digest (string), kind (i64, JaxBoltProblemKind), dims (i64 array), sides (i64:
// how many operands are side inputs) and, optionally, recipe (i64 array: how to launch a cubin, see
// recipe.h; empty for a module) and site (string: the source site, for error messages).
//
// With kind kCastKind, which is no problem's, it casts any number of f32 operands to as many
// results of a 16-bit type (cast.h); digest is then the only other attribute. With kSequenceKind it
// launches several kernels (sequence_launcher.h).
#ifndef JAX_BOLT_NATIVE_LAUNCHER_H_
#define JAX_BOLT_NATIVE_LAUNCHER_H_

#include <cstdint>

#include "xla/ffi/api/c_api.h"

namespace jax_bolt::native {

inline constexpr int64_t kCastKind = 2;
inline constexpr int64_t kSequenceKind = 3;

// Stage handlers. Instantiate makes sure the kernel is loaded and fits the problem; execute checks
// the buffers and enqueues the launches: no device memory, synchronisation, file or Python.
extern XLA_FFI_Handler* const kInstantiateHandler;
extern XLA_FFI_Handler* const kExecuteHandler;

// Execute without a stream or a device (null; ordinal 0 with one SM), for modules of host code:
// XLA's CPU client can then run everything but the driver's part.
extern XLA_FFI_Handler* const kHostExecuteHandler;

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_LAUNCHER_H_
