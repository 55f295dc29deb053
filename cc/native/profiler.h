// SPDX-License-Identifier: Apache-2.0
// Timed and single runs of one kernel on buffers that the caller owns.
//
// Both use a stream of their own and JAX's primary context: the caller makes sure that the buffers
// are ready (block_until_ready) and stay alive. Nothing is allocated on the device.
#ifndef JAX_BOLT_NATIVE_PROFILER_H_
#define JAX_BOLT_NATIVE_PROFILER_H_

#include <cstddef>
#include <vector>

#include "jax_bolt/abi.h"
#include "kernel.h"

namespace jax_bolt::native {

// Microseconds per launch, one value a replay. A replay launches the kernel on every set of buffers
// in turn, over and over for a few milliseconds; sets that together exceed the L2 cache keep it
// cold. Throws std::runtime_error with the CUDA or the kernel's error.
std::vector<double> Profile(const Kernel& kernel, const Problem& problem,
                            const std::vector<JaxBoltBuffers>& sets, int ordinal, int repeats);

// Whether a launch writes every byte of its outputs: so many of buffers.d, and of the auxiliary
// ones. Launches twice, over different values; throws as Profile does.
bool WritesAll(const Kernel& kernel, const Problem& problem, const JaxBoltBuffers& buffers,
               const std::vector<size_t>& bytes, int ordinal);

// Launches once and waits. Throws as Profile does.
void Run(const Kernel& kernel, const Problem& problem, const JaxBoltBuffers& buffers, int ordinal);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_PROFILER_H_
