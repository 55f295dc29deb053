// SPDX-License-Identifier: Apache-2.0
// Sequences of launches as CUDA graphs. Launched one by one, a kernel begins about a microsecond
// later than as a graph's node (ResNet-50 on an H200: 47 kernels, 0.732 and 0.699 ms). XLA makes a
// graph of a program that has five commands or more, and a whole model may be fewer here.
#ifndef JAX_BOLT_NATIVE_GRAPH_CACHE_H_
#define JAX_BOLT_NATIVE_GRAPH_CACHE_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {

// All that decides what is launched, buffers' addresses and all.
using GraphKey = std::vector<uint64_t>;

// Enqueues the launches on a stream and adds the kernels that it launched, where they are asked
// for.
using Enqueue = std::function<xla::ffi::Error(void* stream, std::vector<const Kernel*>* launched)>;

// Enqueues the launches on `stream`, of the current context: as they are where XLA is capturing,
// and the first time that `key` is met, since buffers may be others at every call; then as a graph,
// which is kept, as are a few of every device. What cannot be a graph is enqueued as it is, and all
// is in a process that uses several devices. Any thread.
xla::ffi::Error LaunchAsGraph(void* stream, int32_t ordinal, GraphKey key, const Enqueue& enqueue);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_GRAPH_CACHE_H_
