/* SPDX-License-Identifier: Apache-2.0 */
/* The C ABI between the launcher (cc/native) and a compiled kernel module.
 *
 * Plain C, fixed-width members, no pointers to owned memory: a module built by one compiler is
 * loaded by a launcher built by another. A module exports the five functions at the end; the
 * launcher refuses one whose jax_bolt_abi_version() differs from its own. */
#ifndef JAX_BOLT_ABI_H_
#define JAX_BOLT_ABI_H_

#include <stdint.h>

#define JAX_BOLT_ABI_VERSION 3
#define JAX_BOLT_MAX_VECTORS 12
#define JAX_BOLT_MAX_SIDES 3
#define JAX_BOLT_MAX_AUXILIARY 1
#define JAX_BOLT_MAX_DIMS 16

#ifdef __cplusplus
extern "C" {
#endif

typedef enum JaxBoltProblemKind {
  JAX_BOLT_GEMM = 0, /* dims: M, N, K, batch */
  JAX_BOLT_CONV_FPROP =
      1, /* dims: N, H, W, C, K, R, S, P, Q, stride h, w, pad top, left, dilation h, w */
} JaxBoltProblemKind;

/* Number of dims each kind uses. */
#define JAX_BOLT_GEMM_DIMS 4
#define JAX_BOLT_CONV_DIMS 15

typedef struct JaxBoltProblem {
  int32_t kind; /* JaxBoltProblemKind */
  int32_t num_dims;
  int64_t dims[JAX_BOLT_MAX_DIMS];
} JaxBoltProblem;

/* Device pointers. Unused entries are null. */
typedef struct JaxBoltBuffers {
  const void* a;                             /* gemm: A; conv: x, N H W C */
  const void* b;                             /* gemm: B; conv: filter, K R S C */
  void* d;                                   /* row-major, [batch * M, N] or [N * P * Q, K] */
  void* auxiliary[JAX_BOLT_MAX_AUXILIARY];   /* further outputs, as d, each with its own dtype */
  const void* sides[JAX_BOLT_MAX_SIDES];     /* as d, each with its own dtype */
  const void* vectors[JAX_BOLT_MAX_VECTORS]; /* N (K) elements each, or one */
  void* workspace;                           /* jax_bolt_workspace_bytes bytes, 256-byte aligned */
} JaxBoltBuffers;

typedef struct JaxBoltDevice {
  int32_t ordinal;
  int32_t sm_count;
} JaxBoltDevice;

/* Status: 0 is success; above zero a CUDA error code; below zero a reason of the kernel's own. */
typedef int32_t JaxBoltStatus;
#define JAX_BOLT_OK 0
#define JAX_BOLT_WRONG_KIND (-1)
#define JAX_BOLT_UNSUPPORTED (-2)
#define JAX_BOLT_INTERNAL (-3)
#define JAX_BOLT_MISALIGNED (-4)

int32_t jax_bolt_abi_version(void);
/* Whether this kernel can run the problem; touches no device. */
JaxBoltStatus jax_bolt_check(const JaxBoltProblem* problem);
int64_t jax_bolt_workspace_bytes(const JaxBoltProblem* problem, const JaxBoltDevice* device);
/* Enqueues on `stream` (a cudaStream_t); no allocation, no synchronisation. */
JaxBoltStatus jax_bolt_launch(const JaxBoltProblem* problem, const JaxBoltBuffers* buffers,
                              const JaxBoltDevice* device, void* stream);
const char* jax_bolt_error_string(JaxBoltStatus status);

#ifdef __cplusplus
}
#endif
#endif /* JAX_BOLT_ABI_H_ */
