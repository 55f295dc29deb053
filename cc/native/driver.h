// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver API that the launcher and the profiler use.
//
// Declared here rather than taken from cuda.h, and resolved from libcuda.so.1 at first need, so
// that the module builds without a CUDA toolkit and imports on a machine without a GPU.
#ifndef JAX_BOLT_NATIVE_DRIVER_H_
#define JAX_BOLT_NATIVE_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace jax_bolt::native {

using CuResult = int;
using CuDevice = int;
using CuContext = struct CuContextOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuEvent = struct CuEventOpaque*;
using CuGraph = struct CuGraphOpaque*;
using CuGraphExec = struct CuGraphExecOpaque*;

inline constexpr CuResult kCuSuccess = 0;
inline constexpr CuResult kCuNotReady = 600;
inline constexpr unsigned kCuStreamNonBlocking = 1;
inline constexpr unsigned kCuEventDefault = 0;
// "Relaxed": a capture neither forbids other threads' allocations nor a module's lazy loading.
inline constexpr int kCuCaptureRelaxed = 2;

enum CuDeviceAttribute : int {
  kCuMultiprocessorCount = 16,
  kCuL2CacheBytes = 38,
  kCuComputeCapabilityMajor = 75,
  kCuComputeCapabilityMinor = 76,
  kCuSharedMemoryPerBlockOptin = 97,
};

// X(member, exported symbol, parameters). The symbol is the one that cuda.h maps the plain name to
// (`_v2`), except where the change needs a newer driver than this code does: cuEventElapsedTime.
#define JAX_BOLT_DRIVER_FUNCTIONS(X)                                                            \
  X(Init, "cuInit", (unsigned flags))                                                           \
  X(DriverGetVersion, "cuDriverGetVersion", (int* version))                                     \
  X(GetErrorName, "cuGetErrorName", (CuResult error, const char** name))                        \
  X(GetErrorString, "cuGetErrorString", (CuResult error, const char** text))                    \
  X(DeviceGet, "cuDeviceGet", (CuDevice * device, int ordinal))                                 \
  X(DeviceGetName, "cuDeviceGetName", (char* name, int length, CuDevice device))                \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, CuDevice device))   \
  X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t* bytes, CuDevice device))                    \
  X(DevicePrimaryCtxGetState, "cuDevicePrimaryCtxGetState",                                     \
    (CuDevice device, unsigned* flags, int* active))                                            \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CuContext * context, CuDevice device)) \
  X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CuDevice device))                 \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (CuContext context))                                 \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (CuContext * context))                                 \
  X(MemGetInfo, "cuMemGetInfo_v2", (size_t* free_bytes, size_t* total_bytes))                   \
  X(StreamCreate, "cuStreamCreate", (CuStream * stream, unsigned flags))                        \
  X(StreamDestroy, "cuStreamDestroy_v2", (CuStream stream))                                     \
  X(StreamSynchronize, "cuStreamSynchronize", (CuStream stream))                                \
  X(StreamBeginCapture, "cuStreamBeginCapture_v2", (CuStream stream, int mode))                 \
  X(StreamEndCapture, "cuStreamEndCapture", (CuStream stream, CuGraph * graph))                 \
  X(EventCreate, "cuEventCreate", (CuEvent * event, unsigned flags))                            \
  X(EventDestroy, "cuEventDestroy_v2", (CuEvent event))                                         \
  X(EventRecord, "cuEventRecord", (CuEvent event, CuStream stream))                             \
  X(EventQuery, "cuEventQuery", (CuEvent event))                                                \
  X(EventSynchronize, "cuEventSynchronize", (CuEvent event))                                    \
  X(EventElapsedTime, "cuEventElapsedTime", (float* ms, CuEvent start, CuEvent end))            \
  X(GraphInstantiate, "cuGraphInstantiateWithFlags",                                            \
    (CuGraphExec * exec, CuGraph graph, unsigned long long flags))                              \
  X(GraphLaunch, "cuGraphLaunch", (CuGraphExec exec, CuStream stream))                          \
  X(GraphDestroy, "cuGraphDestroy", (CuGraph graph))                                            \
  X(GraphExecDestroy, "cuGraphExecDestroy", (CuGraphExec exec))

class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Driver {
 public:
#define JAX_BOLT_DRIVER_MEMBER(member, symbol, parameters) CuResult(*member) parameters = nullptr;
  JAX_BOLT_DRIVER_FUNCTIONS(JAX_BOLT_DRIVER_MEMBER)
#undef JAX_BOLT_DRIVER_MEMBER

  // The driver, opened but not initialised; null where there is none. Thread-safe.
  static const Driver* Find();

  // The driver after cuInit. Throws DriverError where there is none or it finds no device.
  static const Driver& Get();

  // Throws DriverError("<what>: <name> (<text>)") unless `result` is success.
  void Check(CuResult result, const char* what) const;

  // Throws DriverError for an ordinal that names no device.
  CuDevice Device(int ordinal) const;
  int Attribute(CuDevice device, CuDeviceAttribute attribute) const;

 private:
  Driver() = default;
  static const Driver* Open();
};

// Makes the device's primary context (JAX's own) current on this thread while it lives.
class ScopedContext {
 public:
  ScopedContext(const Driver& driver, CuDevice device);
  ~ScopedContext();
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

 private:
  const Driver& driver_;
  CuDevice device_;
};

struct DeviceInfo {
  std::string name;
  int sm_count;
  int64_t l2_bytes;
  int64_t smem_per_block;
  int compute_major;
  int compute_minor;
  int driver_version;
  int64_t total_bytes;
  int64_t free_bytes;  // -1 when the device has no context yet: asking would create one
};

// Creates no context. Throws DriverError.
DeviceInfo QueryDevice(int ordinal);

// Cached after the first query of a device. Throws DriverError.
int SmCount(int ordinal);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_DRIVER_H_
