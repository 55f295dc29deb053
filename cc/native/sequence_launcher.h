// SPDX-License-Identifier: Apache-2.0
// jax_bolt.launch with kind kSequenceKind: several kernels, one after the other on the call's
// stream, or as a CUDA graph (graph_cache.h). XLA records every custom call into a graph of its
// own; within one call, a kernel may begin while the one ahead of it ends (programmatic dependent
// launch).
//
// Operands and results: any number. Attributes: digests (string: of all kernels, separated by
// commas) and program (i64 array). The program is its version and its number of launches; of each
// launch the digest's index, kind and dims (as a single call has them) and recipe, both with their
// lengths ahead; then where its buffers are: a, b, d, workspace, and, with their numbers ahead,
// side inputs and vectors; last the bytes of workspace. Where is two numbers: 0 nowhere, 1 an
// operand, 2 a result, by number; 3 bytes from the start of the last result, an arena.
#ifndef JAX_BOLT_NATIVE_SEQUENCE_LAUNCHER_H_
#define JAX_BOLT_NATIVE_SEQUENCE_LAUNCHER_H_

#include "jax_bolt/abi.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {

// Makes sure that all kernels are loaded and fit their problems.
xla::ffi::Error InstantiateSequence(const xla::ffi::Dictionary& attributes);

// Checks the buffers and enqueues the launches.
xla::ffi::Error LaunchSequence(void* stream, const JaxBoltDevice& device,
                               const xla::ffi::RemainingArgs& args,
                               const xla::ffi::RemainingRets& rets,
                               const xla::ffi::Dictionary& attributes);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_SEQUENCE_LAUNCHER_H_
