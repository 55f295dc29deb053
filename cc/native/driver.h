// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver API that the launcher and the profiler use.
//
// Declared here rather than taken from cuda.h, and resolved from libcuda.so.1 at first need, so
// that the module builds without a CUDA toolkit and imports on a machine without a GPU.
#ifndef JAX_BOLT_NATIVE_DRIVER_H_
#define JAX_BOLT_NATIVE_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace jax_bolt::native {

using CuResult = int;
using CuDevice = int;
using CuDevicePointer = unsigned long long;
using CuContext = struct CuContextOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuEvent = struct CuEventOpaque*;
using CuGraph = struct CuGraphOpaque*;
using CuGraphExec = struct CuGraphExecOpaque*;
using CuLibrary = struct CuLibraryOpaque*;
using CuKernel = struct CuKernelOpaque*;
using CuFunction = struct CuFunctionOpaque*;  // a CuKernel may be cast to it for a launch

inline constexpr CuResult kCuSuccess = 0;
inline constexpr CuResult kCuOutOfMemory = 2;
inline constexpr CuResult kCuInvalidContext = 201;
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

inline constexpr int kCuMaxDynamicSharedBytes = 8;  // CUfunction_attribute
inline constexpr int kCuClusterDimension = 4;       // CUlaunchAttributeID, as the next
inline constexpr int kCuProgrammaticStreamSerialization = 6;
// CUtensorMapDataType, Interleave, Swizzle (by the log of its bytes), L2promotion, FloatOOBfill.
inline constexpr int kCuTensorFloat16 = 6, kCuTensorFloat32 = 7, kCuTensorBfloat16 = 9,
                     kCuTensorTf32 = 11;
inline constexpr int kCuInterleaveNone = 0;
inline constexpr int kCuSwizzleNone = 0, kCuSwizzle32 = 1, kCuSwizzle64 = 2, kCuSwizzle128 = 3;
inline constexpr int kCuL2Promotion256 = 3;
inline constexpr int kCuOutOfBoundsZeros = 0;

struct CuUuid {
  unsigned char bytes[16];
};

struct alignas(128) CuTensorMap {
  uint64_t opaque[16];
};

struct CuLaunchAttribute {
  int id;
  union {
    uint64_t words[8];
    unsigned cluster[3];
    int allowed;  // programmatic stream serialization
  };
};
static_assert(sizeof(CuLaunchAttribute) == 72 && offsetof(CuLaunchAttribute, words) == 8);

struct CuLaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(CuLaunchConfig) == 56 && offsetof(CuLaunchConfig, stream) == 32);

// X(member, exported symbol, parameters). The symbol is the one that cuda.h maps the plain name to
// (`_v2`), except where the change needs a newer driver than this code does: cuEventElapsedTime.
#define JAX_BOLT_DRIVER_FUNCTIONS(X)                                                            \
  X(Init, "cuInit", (unsigned flags))                                                           \
  X(DriverGetVersion, "cuDriverGetVersion", (int* version))                                     \
  X(GetErrorName, "cuGetErrorName", (CuResult error, const char** name))                        \
  X(GetErrorString, "cuGetErrorString", (CuResult error, const char** text))                    \
  X(DeviceGet, "cuDeviceGet", (CuDevice * device, int ordinal))                                 \
  X(DeviceGetName, "cuDeviceGetName", (char* name, int length, CuDevice device))                \
  X(DeviceGetUuid, "cuDeviceGetUuid_v2", (CuUuid * uuid, CuDevice device))                      \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, CuDevice device))   \
  X(DeviceTotalMem, "cuDeviceTotalMem_v2", (size_t* bytes, CuDevice device))                    \
  X(DevicePrimaryCtxGetState, "cuDevicePrimaryCtxGetState",                                     \
    (CuDevice device, unsigned* flags, int* active))                                            \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CuContext * context, CuDevice device)) \
  X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CuDevice device))                 \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (CuContext context))                                 \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (CuContext * context))                                 \
  X(MemGetInfo, "cuMemGetInfo_v2", (size_t* free_bytes, size_t* total_bytes))                   \
  X(CtxSynchronize, "cuCtxSynchronize", ())                                                     \
  X(MemAlloc, "cuMemAlloc_v2", (CuDevicePointer * address, size_t bytes))                       \
  X(MemFree, "cuMemFree_v2", (CuDevicePointer address))                                         \
  X(MemsetD8, "cuMemsetD8_v2", (CuDevicePointer address, unsigned char value, size_t bytes))    \
  X(MemsetD8Async, "cuMemsetD8Async",                                                           \
    (CuDevicePointer address, unsigned char value, size_t bytes, CuStream stream))              \
  X(MemcpyHtoD, "cuMemcpyHtoD_v2", (CuDevicePointer to, const void* from, size_t bytes))        \
  X(MemcpyDtoD, "cuMemcpyDtoD_v2", (CuDevicePointer to, CuDevicePointer from, size_t bytes))    \
  X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2",                                                    \
    (void* to, CuDevicePointer from, size_t bytes, CuStream stream))                            \
  X(StreamCreate, "cuStreamCreate", (CuStream * stream, unsigned flags))                        \
  X(StreamDestroy, "cuStreamDestroy_v2", (CuStream stream))                                     \
  X(StreamSynchronize, "cuStreamSynchronize", (CuStream stream))                                \
  X(StreamIsCapturing, "cuStreamIsCapturing", (CuStream stream, int* status))                   \
  X(StreamBeginCapture, "cuStreamBeginCapture_v2", (CuStream stream, int mode))                 \
  X(StreamEndCapture, "cuStreamEndCapture", (CuStream stream, CuGraph * graph))                 \
  X(LaunchHostFunc, "cuLaunchHostFunc", (CuStream stream, void (*function)(void*), void* data)) \
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
  X(GraphExecDestroy, "cuGraphExecDestroy", (CuGraphExec exec))                                 \
  X(LibraryLoadFromFile, "cuLibraryLoadFromFile",                                               \
    (CuLibrary * library, const char* path, int* jit_options, void** jit_values,                \
     unsigned num_jit_options, int* options, void** values, unsigned num_options))              \
  X(LibraryGetKernel, "cuLibraryGetKernel",                                                     \
    (CuKernel * kernel, CuLibrary library, const char* name))                                   \
  X(KernelSetAttribute, "cuKernelSetAttribute",                                                 \
    (int attribute, int value, CuKernel kernel, CuDevice device))                               \
  X(TensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                             \
    (CuTensorMap * map, int dtype, uint32_t rank, void* address, const uint64_t* dims,          \
     const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,       \
     int swizzle, int l2_promotion, int out_of_bounds))                                         \
  X(TensorMapEncodeIm2col, "cuTensorMapEncodeIm2col",                                           \
    (CuTensorMap * map, int dtype, uint32_t rank, void* address, const uint64_t* dims,          \
     const uint64_t* strides, const int* lower, const int* upper, uint32_t channels,            \
     uint32_t pixels, const uint32_t* steps, int interleave, int swizzle, int l2_promotion,     \
     int out_of_bounds))                                                                        \
  X(TensorMapReplaceAddress, "cuTensorMapReplaceAddress", (CuTensorMap * map, void* address))   \
  X(LaunchKernelEx, "cuLaunchKernelEx",                                                         \
    (const CuLaunchConfig* config, CuFunction function, void** parameters, void** extra))

// As above, but null where the driver is older than the version in the comment.
#define JAX_BOLT_OPTIONAL_DRIVER_FUNCTIONS(X)              \
  X(KernelGetParamInfo, "cuKernelGetParamInfo", /* 12.4 */ \
    (CuKernel kernel, size_t index, size_t* offset, size_t* bytes))

class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Driver {
 public:
#define JAX_BOLT_DRIVER_MEMBER(member, symbol, parameters) CuResult(*member) parameters = nullptr;
  JAX_BOLT_DRIVER_FUNCTIONS(JAX_BOLT_DRIVER_MEMBER)
  JAX_BOLT_OPTIONAL_DRIVER_FUNCTIONS(JAX_BOLT_DRIVER_MEMBER)
#undef JAX_BOLT_DRIVER_MEMBER

  // The driver, opened but not initialised; null where there is none. Thread-safe.
  static const Driver* Find();

  // The driver after cuInit. Throws DriverError where there is none or it finds no device.
  static const Driver& Get();

  // "<name> (<text>)".
  std::string Text(CuResult result) const;

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

// Devices whose primary contexts exist already: making one takes the device's memory.
std::vector<CuDevice> ActiveDevices(const Driver& driver);

// What `enqueue` enqueues on `stream`, as a graph; null where it is false or no graph can be made.
CuGraphExec Captured(const Driver& driver, CuStream stream, const std::function<bool()>& enqueue);

struct DeviceInfo {
  std::string name;
  std::string uuid;  // 32 hex digits; a MIG instance's own
  int sm_count;
  int64_t l2_bytes;
  int64_t smem_per_block;
  int compute_major;
  int compute_minor;
  int driver_version;
  int64_t total_bytes;
  int64_t free_bytes;  // -1 when the device has no context yet: asking would create one
};

// A cubin's kernel. Loads into no context: the driver does that at a context's first launch.
struct LoadedKernel {
  CuLibrary library = nullptr;  // never unloaded, as no kernel is; see Registry
  CuKernel kernel = nullptr;
  size_t parameter_bytes = 0;  // of its one parameter; 0: the driver is too old to say
};

// Loads the kernel `symbol` of the cubin at `path`. Throws DriverError.
LoadedKernel LoadKernel(const Driver& driver, const std::string& path, const char* symbol);

// Creates no context. Throws DriverError.
DeviceInfo QueryDevice(int ordinal);

// Cached after the first query of a device. Throws DriverError.
int SmCount(int ordinal);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_DRIVER_H_
