// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "cast.h"
#include "cubin.h"
#include "driver.h"
#include "jax_bolt/abi.h"

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

  std::string Check(const Problem& problem) const override {
    if (problem.recipe.size != 0) return "it is a module, which takes no launch recipe";
    const JaxBoltStatus status = check_(&problem.sizes);
    return status == JAX_BOLT_OK ? "" : ErrorString(status);
  }

  int64_t WorkspaceBytes(const Problem& problem, const JaxBoltDevice& device) const override {
    return workspace_bytes_(&problem.sizes, &device);
  }

  JaxBoltStatus Launch(const Problem& problem, const JaxBoltBuffers& buffers,
                       const JaxBoltDevice& device, void* stream) const override {
    return launch_(&problem.sizes, &buffers, &device, stream);
  }

  std::string ErrorString(JaxBoltStatus status) const override {
    const char* text = error_string_(status);
    return text == nullptr ? "unknown status" : text;
  }

 private:
  decltype(jax_bolt_check)* check_;
  decltype(jax_bolt_workspace_bytes)* workspace_bytes_;
  decltype(jax_bolt_launch)* launch_;
  decltype(jax_bolt_error_string)* error_string_;
};

bool EndsWith(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::unique_ptr<const Kernel> Open(const std::string& path) {
  if (!EndsWith(path, ".cubin")) return std::make_unique<const ModuleKernel>(path);
  try {
    if (EndsWith(path, "/cast.cubin")) return std::make_unique<const CastKernel>(path);
    return std::make_unique<const CubinKernel>(path);
  } catch (const DriverError& error) {
    Fail(path, error.what());
  }
}

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
  auto kernel = Open(path);
  std::unique_lock<std::shared_mutex> lock(mutex_);
  kernels_.emplace(digest, std::move(kernel));
}

const Kernel* Registry::Find(std::string_view digest) const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto it = kernels_.find(digest);
  return it == kernels_.end() ? nullptr : it->second.get();
}

const Kernel* Registry::FindOrResolve(const std::string& digest, std::string* reason) const {
  if (const Kernel* kernel = Find(digest)) return kernel;
  Resolver resolver;
  {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    resolver = resolver_;
  }
  *reason = resolver ? resolver(digest)
                     : "it is not loaded, and nothing is set to find it; import jax_bolt first";
  const Kernel* kernel = Find(digest);
  if (kernel != nullptr) {
    reason->clear();
  } else if (reason->empty()) {
    *reason = "it is neither loaded nor in the kernel cache";
  }
  return kernel;
}

void Registry::SetResolver(Resolver resolver) {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  resolver_ = std::move(resolver);
}

}  // namespace jax_bolt::native
