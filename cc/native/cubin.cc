// SPDX-License-Identifier: Apache-2.0
#include "cubin.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "driver.h"
#include "jax_bolt/abi.h"
#include "kernel.h"
#include "recipe.h"

namespace jax_bolt::native {
namespace {

constexpr const char* kSymbol = "jax_bolt_kernel";
constexpr const char* kPrologueSymbol = "jax_bolt_prologue";
constexpr uintptr_t kAlignment = 16;  // of an address that TMA reads

bool Misaligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kAlignment != 0;
}

int TensorType(int dtype) {
  constexpr int kTypes[] = {kCuTensorBfloat16, kCuTensorFloat16, kCuTensorFloat32, kCuTensorTf32};
  return kTypes[dtype];
}

int Swizzle(int bytes) {
  switch (bytes) {
    case 32:
      return kCuSwizzle32;
    case 64:
      return kCuSwizzle64;
    case 128:
      return kCuSwizzle128;
    default:
      return kCuSwizzleNone;
  }
}

CuResult Encode(const Driver& driver, const MapRecipe& map, void* address, CuTensorMap* out) {
  if (map.im2col) {
    return driver.TensorMapEncodeIm2col(out, TensorType(map.dtype), map.rank, address, map.dims,
                                        map.strides, map.lower, map.upper, map.box[0], map.box[1],
                                        map.steps, kCuInterleaveNone, Swizzle(map.swizzle),
                                        kCuL2Promotion256, kCuOutOfBoundsZeros);
  }
  return driver.TensorMapEncodeTiled(out, TensorType(map.dtype), map.rank, address, map.dims,
                                     map.strides, map.box, map.steps, kCuInterleaveNone,
                                     Swizzle(map.swizzle), kCuL2Promotion256, kCuOutOfBoundsZeros);
}

// JAX_BOLT_OK and the address, `offset` bytes into an operand that is there and aligned.
JaxBoltStatus Bind(int operand, uint64_t offset, const JaxBoltBuffers& buffers, void** address) {
  *address = Address(operand, buffers);
  if (*address == nullptr && operand != kNullOperand) return JAX_BOLT_INTERNAL;
  *address = static_cast<char*>(*address) + offset;
  return Misaligned(*address) ? JAX_BOLT_MISALIGNED : JAX_BOLT_OK;
}

}  // namespace

// One kernel's parameters but for the addresses, and its launch but for the stream.
struct CubinKernel::Step {
  // At 128 bytes, the alignment of a tensor map. Its end is zeros: a kernel's struct may be padded.
  struct alignas(alignof(CuTensorMap)) Parameters {
    unsigned char bytes[kMaxParameterBytes] = {};
  };

  CuKernel kernel = nullptr;
  std::vector<MapRecipe> maps;
  std::vector<int> pointers;
  size_t parameter_bytes = 0;
  Parameters parameters;
  CuLaunchAttribute attributes[2] = {};
  CuLaunchConfig config = {};
};

struct CubinKernel::Prepared {
  std::vector<std::unique_ptr<const Step>> steps;  // in the order of their launches
};

bool CubinKernel::Less::operator()(const Key& a, const KeyView& b) const {
  if (a.first != b.first) return a.first < b.first;
  const int64_t* end = b.second.data + b.second.size;
  return std::lexicographical_compare(a.second.begin(), a.second.end(), b.second.data, end);
}

bool CubinKernel::Less::operator()(const KeyView& a, const Key& b) const {
  if (a.first != b.first) return a.first < b.first;
  const int64_t* end = a.second.data + a.second.size;
  return std::lexicographical_compare(a.second.data, end, b.second.begin(), b.second.end());
}

CubinKernel::CubinKernel(const std::string& path)
    : driver_(Driver::Get()), loaded_(LoadKernel(driver_, path, kSymbol)) {}

CubinKernel::~CubinKernel() = default;

std::string CubinKernel::Check(const Problem& problem) const {
  if (problem.recipe.size == 0) return "it is a cubin, and the call has no launch recipe";
  Recipe recipe;
  if (std::string reason = ParseRecipe(problem.recipe, &recipe); !reason.empty()) return reason;
  if (loaded_.parameter_bytes == 0) return "";
  // A struct that holds tensor maps is padded to their alignment.
  const size_t bytes = recipe.ParameterBytes();
  if (loaded_.parameter_bytes >= bytes && loaded_.parameter_bytes - bytes < alignof(CuTensorMap))
    return "";
  return "its parameters take " + std::to_string(loaded_.parameter_bytes) +
         " bytes, and the launch recipe has " + std::to_string(bytes);
}

int64_t CubinKernel::WorkspaceBytes(const Problem& problem, const JaxBoltDevice&) const {
  return RecipeWorkspaceBytes(problem.recipe);
}

JaxBoltStatus CubinKernel::Launch(const Problem& problem, const JaxBoltBuffers& buffers,
                                  const JaxBoltDevice& device, void* stream) const {
  const KeyView key(device.ordinal, problem.recipe);
  JaxBoltStatus status = JAX_BOLT_OK;
  const Prepared* prepared = Find(key);
  if (prepared == nullptr) prepared = Prepare(key, buffers, &status);
  if (prepared == nullptr) return status;
  for (const auto& step : prepared->steps) {
    if (status = LaunchStep(*step, buffers, stream); status != JAX_BOLT_OK) return status;
  }
  return status;
}

JaxBoltStatus CubinKernel::LaunchStep(const Step& step, const JaxBoltBuffers& buffers,
                                      void* stream) const {
  Step::Parameters parameters;
  std::memcpy(parameters.bytes, step.parameters.bytes, step.parameter_bytes);
  unsigned char* next = parameters.bytes;
  void* address = nullptr;
  JaxBoltStatus status = JAX_BOLT_OK;
  for (const MapRecipe& map : step.maps) {
    if (status = Bind(map.operand, map.offset, buffers, &address); status != JAX_BOLT_OK) {
      return status;
    }
    // In place: the buffer is as aligned as a map must be, and a map is a multiple of that.
    status = driver_.TensorMapReplaceAddress(reinterpret_cast<CuTensorMap*>(next), address);
    if (status != JAX_BOLT_OK) return status;
    next += sizeof(CuTensorMap);
  }
  for (const int operand : step.pointers) {
    if (status = Bind(operand, 0, buffers, &address); status != JAX_BOLT_OK) return status;
    std::memcpy(next, &address, sizeof(address));
    next += sizeof(address);
  }
  CuLaunchConfig config = step.config;
  config.stream = static_cast<CuStream>(stream);
  void* arguments[] = {parameters.bytes};
  return driver_.LaunchKernelEx(&config, reinterpret_cast<CuFunction>(step.kernel), arguments,
                                nullptr);
}

const CubinKernel::Prepared* CubinKernel::Find(const KeyView& key) const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto it = prepared_.find(key);
  return it == prepared_.end() ? nullptr : it->second.get();
}

const CubinKernel::Prepared* CubinKernel::Prepare(const KeyView& key, const JaxBoltBuffers& buffers,
                                                  JaxBoltStatus* status) const {
  Recipe recipe;
  *status = JAX_BOLT_UNSUPPORTED;
  if (!ParseRecipe(key.second, &recipe).empty()) return nullptr;

  auto made = std::make_unique<Prepared>();
  if (recipe.prologue != nullptr) {
    CuKernel prologue = nullptr;
    *status = driver_.LibraryGetKernel(&prologue, loaded_.library, kPrologueSymbol);
    if (*status != JAX_BOLT_OK) return nullptr;
    made->steps.push_back(PrepareStep(prologue, *recipe.prologue, buffers, status));
    if (*status != JAX_BOLT_OK) return nullptr;
  }
  made->steps.push_back(PrepareStep(loaded_.kernel, recipe, buffers, status));
  if (*status != JAX_BOLT_OK) return nullptr;

  std::unique_lock<std::shared_mutex> lock(mutex_);
  *status = AllowSharedBytes(key.first, recipe.shared_bytes);
  if (*status != JAX_BOLT_OK) return nullptr;
  const int64_t* numbers = key.second.data;
  Key own(key.first, {numbers, numbers + key.second.size});
  // Another thread may have been first; its entry stays.
  return prepared_.emplace(std::move(own), std::move(made)).first->second.get();
}

std::unique_ptr<CubinKernel::Step> CubinKernel::PrepareStep(CuKernel kernel, const Recipe& recipe,
                                                            const JaxBoltBuffers& buffers,
                                                            JaxBoltStatus* status) const {
  auto made = std::make_unique<Step>();
  made->kernel = kernel;
  made->maps = recipe.maps;
  made->pointers = recipe.pointers;
  made->parameter_bytes = recipe.ParameterBytes();
  *status = JAX_BOLT_OK;
  unsigned char* next = made->parameters.bytes;
  for (const MapRecipe& map : recipe.maps) {
    void* address = nullptr;
    *status = Bind(map.operand, map.offset, buffers, &address);
    if (*status != JAX_BOLT_OK) return nullptr;
    CuTensorMap encoded = {};
    if (*status = Encode(driver_, map, address, &encoded); *status != JAX_BOLT_OK) return nullptr;
    std::memcpy(next, &encoded, sizeof(encoded));
    next += sizeof(encoded);
  }
  next += recipe.pointers.size() * sizeof(void*);
  if (!recipe.ints.empty()) {
    std::memcpy(next, recipe.ints.data(), recipe.ints.size() * sizeof(int32_t));
  }

  CuLaunchConfig& config = made->config;
  config = {{recipe.grid, 1, 1}, {recipe.threads, 1, 1}, recipe.shared_bytes, nullptr, nullptr, 0};
  config.attributes = made->attributes;
  if (recipe.cluster > 1) {
    CuLaunchAttribute& attribute = made->attributes[config.num_attributes++];
    attribute.id = kCuClusterDimension;
    attribute.cluster[0] = recipe.cluster;
    attribute.cluster[1] = attribute.cluster[2] = 1;
  }
  if (recipe.programmatic) {
    CuLaunchAttribute& attribute = made->attributes[config.num_attributes++];
    attribute.id = kCuProgrammaticStreamSerialization;
    attribute.allowed = 1;
  }
  return made;
}

JaxBoltStatus CubinKernel::AllowSharedBytes(int ordinal, unsigned bytes) const {
  unsigned& allowed = allowed_shared_bytes_[ordinal];
  if (bytes <= allowed) return JAX_BOLT_OK;
  CuDevice device;
  CuResult result = driver_.DeviceGet(&device, ordinal);
  if (result != kCuSuccess) return result;
  result = driver_.KernelSetAttribute(kCuMaxDynamicSharedBytes, static_cast<int>(bytes),
                                      loaded_.kernel, device);
  if (result == kCuSuccess) allowed = bytes;
  return result;
}

std::string CubinKernel::ErrorString(JaxBoltStatus status) const {
  switch (status) {
    case JAX_BOLT_OK:
      return "success";
    case JAX_BOLT_UNSUPPORTED:
      return "the launch recipe is not valid";
    case JAX_BOLT_INTERNAL:
      return "the launch recipe names an operand that the call does not have";
    case JAX_BOLT_MISALIGNED:
      return "a buffer is not aligned to 16 bytes, as TMA needs";
    default:
      return status > 0 ? driver_.Text(status) : "unknown kernel status";
  }
}

}  // namespace jax_bolt::native
