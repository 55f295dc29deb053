// SPDX-License-Identifier: Apache-2.0
// What turns a kernel class into a device-only artifact, a cubin that a recipe launches.
//
// The class has kThreads, kCtas (blocks that an SM should hold at least), Parameters (the kernel's
// only parameter, which the launcher fills) and run(Parameters const&).
#ifndef JAX_BOLT_DEVICE_KERNEL_HPP_
#define JAX_BOLT_DEVICE_KERNEL_HPP_

/// The one kernel of a device-only artifact, under the name that the launcher looks for.
#define JAX_BOLT_DEVICE_KERNEL(...)                                                           \
  using JaxBoltKernel = __VA_ARGS__;                                                          \
  extern "C" __global__ void __launch_bounds__(JaxBoltKernel::kThreads, JaxBoltKernel::kCtas) \
      jax_bolt_kernel(const __grid_constant__ typename JaxBoltKernel::Parameters params) {    \
    JaxBoltKernel::run(params);                                                               \
  }

#endif  // JAX_BOLT_DEVICE_KERNEL_HPP_
