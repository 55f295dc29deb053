// SPDX-License-Identifier: Apache-2.0
// Compiled kernels by digest. Host code only; knows nothing about any one kernel.
#ifndef JAX_BOLT_NATIVE_REGISTRY_H_
#define JAX_BOLT_NATIVE_REGISTRY_H_

#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>

#include "kernel.h"

namespace jax_bolt::native {

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

 private:
  Registry() = default;

  std::mutex load_mutex_;  // one load at a time; readers do not wait for a dlopen
  mutable std::shared_mutex mutex_;
  std::map<std::string, std::unique_ptr<const Kernel>, std::less<>> kernels_;
};

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_REGISTRY_H_
