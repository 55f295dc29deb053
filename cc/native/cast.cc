// SPDX-License-Identifier: Apache-2.0
#include "cast.h"

#include <cstddef>
#include <string>

namespace jax_bolt::native {

void Casts::Add(const void* from, void* to, int64_t count) {
  if (count == 0) return;
  const int i = table.tensors++;
  table.from[i] = from;
  table.to[i] = to;
  table.count[i] = count;
  table.first_block[i] = blocks;
  // No memory holds as many elements as would overflow this.
  blocks += static_cast<uint32_t>((count - 1) / cast::kBlockElements + 1);
}

CastKernel::CastKernel(const std::string& path)
    : driver_(Driver::Get()), loaded_(LoadKernel(driver_, path, "jax_bolt_cast")) {
  const size_t bytes = loaded_.parameter_bytes;
  if (bytes != 0 && bytes != sizeof(cast::Table)) {
    throw DriverError("jax_bolt_cast takes " + std::to_string(bytes) + " bytes, not " +
                      std::to_string(sizeof(cast::Table)));
  }
}

JaxBoltStatus CastKernel::Cast(const Casts& casts, const JaxBoltDevice& device,
                               void* stream) const {
  if (casts.blocks == 0) return JAX_BOLT_OK;
  CuDevice ordinal;
  int major = 0;
  CuResult result = driver_.DeviceGet(&ordinal, device.ordinal);
  if (result != kCuSuccess) return result;
  result = driver_.DeviceGetAttribute(&major, kCuComputeCapabilityMajor, ordinal);
  if (result != kCuSuccess) return result;

  CuLaunchAttribute programmatic = {};
  programmatic.id = kCuProgrammaticStreamSerialization;
  programmatic.allowed = 1;
  // Before 9.0 the kernel does not wait itself for the one ahead.
  CuLaunchConfig config = {
      {casts.blocks, 1, 1},          {cast::kThreads, 1, 1}, 0,
      static_cast<CuStream>(stream), &programmatic,          major >= 9 ? 1u : 0u};
  void* arguments[] = {const_cast<cast::Table*>(&casts.table)};
  return driver_.LaunchKernelEx(&config, reinterpret_cast<CuFunction>(loaded_.kernel), arguments,
                                nullptr);
}

std::string CastKernel::ErrorString(JaxBoltStatus status) const {
  return status > 0 ? driver_.Text(status) : "unknown kernel status";
}

}  // namespace jax_bolt::native
