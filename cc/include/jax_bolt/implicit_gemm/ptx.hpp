// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90 that the kernel needs and that CUTLASS's architecture headers wrap
// otherwise or not at all.
#ifndef JAX_BOLT_IMPLICIT_GEMM_PTX_HPP_
#define JAX_BOLT_IMPLICIT_GEMM_PTX_HPP_

#include <cuda_fp16.h>

#include <cstdint>

#include "cutlass/bfloat16.h"
#include "cutlass/half.h"

namespace jax_bolt::implicit_gemm::ptx {

/// A CUtensorMap, as the launcher encoded it.
struct alignas(64) TensorMap {
  std::uint64_t words[16];
};

__device__ __forceinline__ std::uint32_t shared_address(void const* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// True on one thread of a full warp.
__device__ __forceinline__ bool elect() {
  std::uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

// Programmatic dependent launch --------------------------------------------------------------

/// Until every kernel before this one in the stream has ended and its writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets the next kernel's blocks start where there is room for them.
__device__ __forceinline__ void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;");
}

// Barriers -----------------------------------------------------------------------------------

/// A transaction barrier in shared memory (mbarrier). `parity` is that of the phase waited for.
struct Barrier {
  std::uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_and_expect(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait(std::uint32_t parity) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra ready_%=;\n bra again_%=;\n"
        "ready_%=:\n}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
  /// As `wait`, for what other CTAs of the cluster wrote.
  __device__ void wait_for_cluster(std::uint32_t parity) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again_%=:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        " @done bra ready_%=;\n bra again_%=;\n"
        "ready_%=:\n}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

/// Makes initialised barriers visible to other threads and to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Clusters -----------------------------------------------------------------------------------

/// Where the cluster's CTA `rank` has what lies at `address` here.
__device__ __forceinline__ std::uint32_t in_cta(std::uint32_t address, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

/// One arrival at a barrier that lies at `address` in the cluster. It says that something was read:
/// what this thread wrote is not released to other CTAs, which would take long.
__device__ __forceinline__ void arrive_in_cluster(std::uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

/// All of a warp's threads together. What was written before arriving is seen after waiting.
__device__ __forceinline__ void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Four floats to another CTA, whose barrier counts the 16 bytes.
__device__ __forceinline__ void send(std::uint32_t to, float const* values, std::uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
      " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
      : "memory");
}

/// What such a thread finds in its own shared memory.
__device__ __forceinline__ void load(std::uint32_t from, float (&values)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(from)
               : "memory");
}

/// Shared memory to another CTA's, whose barrier counts the bytes.
__device__ __forceinline__ void copy(std::uint32_t to, std::uint32_t from, int bytes,
                                     std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Orders this thread's accesses to shared memory before those of TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Waits until `threads` threads have reached barrier `id`, those that only `arrive` included.
__device__ __forceinline__ void sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// TMA ----------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch(TensorMap const& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load(TensorMap const& map, Barrier& full, std::uint32_t to, int c0,
                                     int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(shared_address(&full)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ __forceinline__ void load(TensorMap const& map, Barrier& full, std::uint32_t to, int c0,
                                     int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(shared_address(&full)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

/// To the same place in every CTA of `ctas`, a bit each, whose own barrier counts the bytes.
__device__ __forceinline__ void load_to_all(std::uint16_t ctas, TensorMap const& map, Barrier& full,
                                            std::uint32_t to, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&map), "r"(shared_address(&full)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(ctas)
      : "memory");
}

/// A tap's column of pixels from that one on, through a map in im2col mode. The tap's offsets are
/// from 0 to 255.
__device__ __forceinline__ void gather(TensorMap const& map, Barrier& full, std::uint32_t to,
                                       int channel, int col, int row, int image, int right,
                                       int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(shared_address(&full)), "r"(channel), "r"(col), "r"(row), "r"(image),
      "h"(static_cast<std::uint16_t>(right)), "h"(static_cast<std::uint16_t>(down))
      : "memory");
}

__device__ __forceinline__ void store(TensorMap const& map, std::uint32_t from, int c0, int c1,
                                      int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Until all but the latest kPending groups of stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Registers ----------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 8 x 8 matrices of 2-byte elements, transposed on their way to or from shared memory: a thread
// has two neighbours of a matrix's row, and the matrix's columns are rows there.
__device__ __forceinline__ void load_transposed(std::uint32_t from, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_transposed(std::uint32_t from, std::uint32_t (&m)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_transposed(std::uint32_t to, std::uint32_t const (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ __forceinline__ void store_transposed(std::uint32_t to, std::uint32_t const (&m)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
               "r"(m[0]), "r"(m[1])
               : "memory");
}

__device__ __forceinline__ float load_float(std::uint32_t from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store(std::uint32_t to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

/// 16 bytes of shared memory.
__device__ __forceinline__ void load(std::uint32_t from, std::uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void store(std::uint32_t to, std::uint32_t const (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

/// Two values of a 2-byte type in one register: to it, rounded to nearest even, and from it; the
/// larger of each two, NaN where one is.
template <class T>
struct Pair;
template <>
struct Pair<cutlass::bfloat16_t> {
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    std::uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ __forceinline__ std::uint32_t max(std::uint32_t a, std::uint32_t b) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
  static __device__ __forceinline__ float low(std::uint32_t packed) {
    return __uint_as_float(packed << 16);
  }
  static __device__ __forceinline__ float high(std::uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);
  }
};
template <>
struct Pair<cutlass::half_t> {
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    std::uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ __forceinline__ std::uint32_t max(std::uint32_t a, std::uint32_t b) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
  static __device__ __forceinline__ float low(std::uint32_t packed) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
  }
  static __device__ __forceinline__ float high(std::uint32_t packed) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
  }
};

}  // namespace jax_bolt::implicit_gemm::ptx
#endif  // JAX_BOLT_IMPLICIT_GEMM_PTX_HPP_
