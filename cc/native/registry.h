// SPDX-License-Identifier: Apache-2.0
// Compiled kernels by digest. Host code only; knows nothing about any one kernel.
#ifndef JAX_BOLT_NATIVE_REGISTRY_H_
#define JAX_BOLT_NATIVE_REGISTRY_H_

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>

#include "kernel.h"

namespace jax_bolt::native {

// Loads a digest that an executable needs and nobody has loaded, as when it comes from JAX's
// compilation cache or an export. Returns the reason it could not, or "".
using Resolver = std::function<std::string(const std::string& digest)>;

// Thread-safe. Kernels are never unloaded: XLA executables and CUDA graphs may refer to their code
// until the process ends.
class Registry {
 public:
  static Registry& Get();

  // Loads the artifact at `path` (absolute) under `digest`: a cubin where the name ends so, of
  // casts where it is cast.cubin, else a module. Does nothing when one is loaded already. Throws
  // std::runtime_error with the reason.
  void Load(const std::string& digest, const std::string& path);

  // Null when the digest is not loaded.
  const Kernel* Find(std::string_view digest) const;

  // As Find, but asks the resolver first; null with the reason.
  const Kernel* FindOrResolve(const std::string& digest, std::string* reason) const;
  void SetResolver(Resolver resolver);

 private:
  Registry() = default;

  std::mutex load_mutex_;  // one load at a time; readers do not wait for a dlopen
  mutable std::shared_mutex mutex_;
  std::map<std::string, std::unique_ptr<const Kernel>, std::less<>> kernels_;
  Resolver resolver_;
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_REGISTRY_H_
