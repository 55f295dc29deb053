// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace jax_bolt::native {
namespace {

[[noreturn]] void Fail(const std::string& path, const std::string& reason) {
  throw std::runtime_error("cannot load kernel module " + path + ": " + reason);
}

template <typename Function>
Function* Resolve(void* library, const std::string& path, const char* symbol) {
  void* address = dlsym(library, symbol);
  if (address == nullptr) Fail(path, std::string("it does not export ") + symbol);
  return reinterpret_cast<Function*>(address);
}

// A shared object that brings its own host code: the five functions of abi.h.
class ModuleKernel final : public Kernel {
 public:
  explicit ModuleKernel(const std::string& path) {
    // RTLD_LOCAL: every module exports the same five names.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) Fail(path, dlerror());
    // A refused library stays open: closing one that holds a CUDA runtime is not safe.
    auto* abi_version =
        Resolve<decltype(jax_bolt_abi_version)>(library, path, "jax_bolt_abi_version");
    if (abi_version() != JAX_BOLT_ABI_VERSION) {
      Fail(path, "it has ABI version " + std::to_string(abi_version()) + ", not " +
                     std::to_string(JAX_BOLT_ABI_VERSION));
    }
    check_ = Resolve<decltype(jax_bolt_check)>(library, path, "jax_bolt_check");
    workspace_bytes_ =
        Resolve<decltype(jax_bolt_workspace_bytes)>(library, path, "jax_bolt_workspace_bytes");
    launch_ = Resolve<decltype(jax_bolt_launch)>(library, path, "jax_bolt_launch");
    error_string_ =
        Resolve<decltype(jax_bolt_error_string)>(library, path, "jax_bolt_error_string");
  }

  JaxBoltStatus Check(const JaxBoltProblem& problem) const override { return check_(&problem); }

  int64_t WorkspaceBytes(const JaxBoltProblem& problem,
                         const JaxBoltDevice& device) const override {
    return workspace_bytes_(&problem, &device);
  }

  JaxBoltStatus Launch(const JaxBoltProblem& problem, const JaxBoltBuffers& buffers,
                       const JaxBoltDevice& device, void* stream) const override {
    return launch_(&problem, &buffers, &device, stream);
  }

  const char* ErrorString(JaxBoltStatus status) const override {
    const char* text = error_string_(status);
    return text == nullptr ? "unknown status" : text;
  }

 private:
  decltype(jax_bolt_check)* check_;
  decltype(jax_bolt_workspace_bytes)* workspace_bytes_;
  decltype(jax_bolt_launch)* launch_;
  decltype(jax_bolt_error_string)* error_string_;
};

}  // namespace

Registry& Registry::Get() {
  // Leaked: handlers may still run while static objects are destroyed.
  static Registry* const registry = new Registry();
  return *registry;
}

void Registry::Load(const std::string& digest, const std::string& path) {
  std::lock_guard<std::mutex> loading(load_mutex_);
  if (Find(digest) != nullptr) return;
  // dlopen searches the library path for a name without a slash; a store's path always has one.
  if (path.empty() || path[0] != '/') Fail(path, "the path is not absolute");
  auto kernel = std::make_unique<const ModuleKernel>(path);
  std::unique_lock<std::shared_mutex> lock(mutex_);
  kernels_.emplace(digest, std::move(kernel));
}

const Kernel* Registry::Find(std::string_view digest) const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto it = kernels_.find(digest);
  return it == kernels_.end() ? nullptr : it->second.get();
}

const char* MakeProblem(int64_t kind, const int64_t* dims, size_t num_dims,
                        JaxBoltProblem* problem) {
  size_t expected;
  switch (kind) {
    case JAX_BOLT_GEMM:
      expected = JAX_BOLT_GEMM_DIMS;
      break;
    case JAX_BOLT_CONV_FPROP:
      expected = JAX_BOLT_CONV_DIMS;
      break;
    default:
      return "unknown problem kind";
  }
  if (num_dims != expected) return "wrong number of dims for the problem kind";
  *problem = {};
  problem->kind = static_cast<int32_t>(kind);
  problem->num_dims = static_cast<int32_t>(num_dims);
  for (size_t i = 0; i < num_dims; ++i) problem->dims[i] = dims[i];
  return nullptr;
}

}  // namespace jax_bolt::native
