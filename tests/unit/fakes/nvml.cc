// SPDX-License-Identifier: Apache-2.0
// libnvidia-ml.so.1 of a machine with two A100 and a GPU that jax_bolt does not know.

#include <cstdint>
#include <cstring>

extern "C" {

int nvmlInit_v2() { return 0; }

int nvmlShutdown() { return 0; }

int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  std::strncpy(version, "580.00.01", length);
  return 0;
}

int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 3;
  return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  *device = reinterpret_cast<void*>(static_cast<std::uintptr_t>(index + 1));
  return index < 3 ? 0 : 2;
}

int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  *major = reinterpret_cast<std::uintptr_t>(device) == 3 ? 6 : 8;
  *minor = 0;
  return 0;
}

int nvmlDeviceGetName(void* device, char* name, unsigned length) {
  std::strncpy(name, "NVIDIA A100-SXM4-40GB", length);
  return 0;
}
}
