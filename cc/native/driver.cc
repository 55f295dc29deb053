// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace jax_bolt::native {
namespace {

// Enough for any host; larger ordinals are queried each time.
constexpr int kCachedDevices = 64;
std::atomic<int> sm_counts[kCachedDevices];

}  // namespace

const Driver* Driver::Open() {
  // Never closed: kernels and XLA hold on to the driver until the process ends.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  auto* driver = new Driver();
  bool complete = true;
  auto resolve = [&](auto& member, const char* symbol) {
    member = reinterpret_cast<std::decay_t<decltype(member)>>(dlsym(library, symbol));
    complete = complete && member != nullptr;
  };
#define JAX_BOLT_DRIVER_RESOLVE(member, symbol, parameters) resolve(driver->member, symbol);
  JAX_BOLT_DRIVER_FUNCTIONS(JAX_BOLT_DRIVER_RESOLVE)
  if (!complete) {
    delete driver;
    return nullptr;
  }
  JAX_BOLT_OPTIONAL_DRIVER_FUNCTIONS(JAX_BOLT_DRIVER_RESOLVE)
#undef JAX_BOLT_DRIVER_RESOLVE
  return driver;
}

const Driver* Driver::Find() {
  static const Driver* const driver = Open();
  return driver;
}

const Driver& Driver::Get() {
  const Driver* driver = Find();
  if (driver == nullptr) {
    throw DriverError("no CUDA driver: libcuda.so.1 is missing or too old (CUDA 12 is the oldest)");
  }
  static const CuResult initialised = driver->Init(0);
  driver->Check(initialised, "cuInit");
  return *driver;
}

std::string Driver::Text(CuResult result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  GetErrorName(result, &name);
  GetErrorString(result, &text);
  return std::string(name ? name : "unknown CUDA error") + " (" +
         (text ? text : std::to_string(result)) + ")";
}

void Driver::Check(CuResult result, const char* what) const {
  if (result == kCuSuccess) return;
  throw DriverError(std::string(what) + ": " + Text(result));
}

CuDevice Driver::Device(int ordinal) const {
  CuDevice device;
  Check(DeviceGet(&device, ordinal), "cuDeviceGet");
  return device;
}

int Driver::Attribute(CuDevice device, CuDeviceAttribute attribute) const {
  int value = 0;
  Check(DeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

ScopedContext::ScopedContext(const Driver& driver, CuDevice device)
    : driver_(driver), device_(device) {
  CuContext context;
  driver.Check(driver.DevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  if (CuResult result = driver.CtxPushCurrent(context); result != kCuSuccess) {
    driver.DevicePrimaryCtxRelease(device);
    driver.Check(result, "cuCtxPushCurrent");
  }
}

ScopedContext::~ScopedContext() {
  CuContext popped;
  driver_.CtxPopCurrent(&popped);
  driver_.DevicePrimaryCtxRelease(device_);
}

std::vector<CuDevice> ActiveDevices(const Driver& driver) {
  std::vector<CuDevice> devices;
  CuDevice device;
  for (int ordinal = 0; driver.DeviceGet(&device, ordinal) == kCuSuccess; ++ordinal) {
    unsigned flags = 0;
    int active = 0;
    if (driver.DevicePrimaryCtxGetState(device, &flags, &active) == kCuSuccess && active) {
      devices.push_back(device);
    }
  }
  return devices;
}

CuGraphExec Captured(const Driver& driver, CuStream stream, const std::function<bool()>& enqueue) {
  if (driver.StreamBeginCapture(stream, kCuCaptureRelaxed) != kCuSuccess) return nullptr;
  const bool enqueued = enqueue();
  CuGraph graph = nullptr;
  CuGraphExec exec = nullptr;
  const CuResult ended = driver.StreamEndCapture(stream, &graph);
  if (enqueued && ended == kCuSuccess &&
      driver.GraphInstantiate(&exec, graph, /*flags=*/0) != kCuSuccess) {
    exec = nullptr;
  }
  if (graph != nullptr) driver.GraphDestroy(graph);
  return exec;
}

namespace {

// Bytes of a kernel's parameters, 0 where they cannot be known. Asking wants a context, whichever:
// this thread may have none.
size_t ParameterBytes(const Driver& driver, CuKernel kernel) {
  if (driver.KernelGetParamInfo == nullptr) return 0;
  size_t offset = 0, bytes = 0;
  CuResult result = driver.KernelGetParamInfo(kernel, 0, &offset, &bytes);
  if (result == kCuInvalidContext) {
    const std::vector<CuDevice> devices = ActiveDevices(driver);
    if (devices.empty()) return 0;
    const ScopedContext context(driver, devices.front());
    result = driver.KernelGetParamInfo(kernel, 0, &offset, &bytes);
  }
  driver.Check(result, "cuKernelGetParamInfo");
  return bytes;
}

}  // namespace

LoadedKernel LoadKernel(const Driver& driver, const std::string& path, const char* symbol) {
  LoadedKernel loaded;
  driver.Check(driver.LibraryLoadFromFile(&loaded.library, path.c_str(), nullptr, nullptr, 0,
                                          nullptr, nullptr, 0),
               "cuLibraryLoadFromFile");
  const std::string what = std::string("cuLibraryGetKernel of ") + symbol;
  driver.Check(driver.LibraryGetKernel(&loaded.kernel, loaded.library, symbol), what.c_str());
  loaded.parameter_bytes = ParameterBytes(driver, loaded.kernel);
  return loaded;
}

DeviceInfo QueryDevice(int ordinal) {
  const Driver& driver = Driver::Get();
  CuDevice device = driver.Device(ordinal);
  DeviceInfo info;
  char name[256] = {};
  driver.Check(driver.DeviceGetName(name, sizeof(name), device), "cuDeviceGetName");
  info.name = name;
  CuUuid uuid;
  driver.Check(driver.DeviceGetUuid(&uuid, device), "cuDeviceGetUuid");
  for (unsigned char byte : uuid.bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    info.uuid += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  info.sm_count = driver.Attribute(device, kCuMultiprocessorCount);
  info.l2_bytes = driver.Attribute(device, kCuL2CacheBytes);
  info.smem_per_block = driver.Attribute(device, kCuSharedMemoryPerBlockOptin);
  info.compute_major = driver.Attribute(device, kCuComputeCapabilityMajor);
  info.compute_minor = driver.Attribute(device, kCuComputeCapabilityMinor);
  driver.Check(driver.DriverGetVersion(&info.driver_version), "cuDriverGetVersion");
  size_t total = 0;
  driver.Check(driver.DeviceTotalMem(&total, device), "cuDeviceTotalMem");
  info.total_bytes = static_cast<int64_t>(total);

  info.free_bytes = -1;
  unsigned flags = 0;
  int active = 0;
  driver.Check(driver.DevicePrimaryCtxGetState(device, &flags, &active),
               "cuDevicePrimaryCtxGetState");
  if (active) {
    ScopedContext context(driver, device);
    size_t free = 0;
    driver.Check(driver.MemGetInfo(&free, &total), "cuMemGetInfo");
    info.free_bytes = static_cast<int64_t>(free);
  }
  return info;
}

int SmCount(int ordinal) {
  const bool cached = ordinal >= 0 && ordinal < kCachedDevices;
  if (cached) {
    if (int count = sm_counts[ordinal].load(std::memory_order_relaxed)) return count;
  }
  const Driver& driver = Driver::Get();
  const int count = driver.Attribute(driver.Device(ordinal), kCuMultiprocessorCount);
  if (cached) sm_counts[ordinal].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace jax_bolt::native
