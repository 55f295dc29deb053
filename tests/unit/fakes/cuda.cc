// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 with one device whose time is a number: the profiler's control flow, without a
// GPU. FAKE_CUDA_FAIL=<function> makes that function fail.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

constexpr int kFailed = 719;
constexpr double kStreamLaunchMicroseconds = 5;  // a launch that is not part of a graph

struct Graph {
  std::vector<double> launches;
};
struct Stream {
  Graph* capture = nullptr;
};
struct Event {
  double time = 0;
};

double now = 0;
int retained = 0, pushed = 0, objects = 0, graph_launches = 0, stream_launches = 0;
int reached = 0;
std::vector<uintptr_t> operands;
int context;

bool Fails(const char* name) {
  const char* failing = std::getenv("FAKE_CUDA_FAIL");
  return failing != nullptr && std::strcmp(failing, name) == 0;
}

}  // namespace

#define FAIL_IF_ASKED() \
  if (Fails(__func__)) return kFailed
#define NEEDS_CONTEXT() \
  if (pushed == 0) return 201

// What the tests read: {retained, pushed, live objects, graph launches, stream launches}.
API fake_state(int* out) {
  const int state[] = {retained, pushed, objects, graph_launches, stream_launches};
  std::memcpy(out, state, sizeof(state));
  return 0;
}
API fake_num_operands() { return static_cast<int>(operands.size()); }
API fake_operand(int i) { return static_cast<int>(operands[i]); }

// Time passes without a launch: XLA's own kernels.
API fake_advance(int microseconds) {
  now += microseconds;
  return 0;
}
// The next `count` queries find the event reached.
API fake_reached(int count) {
  reached = count;
  return 0;
}

API fake_launch(void* stream, double microseconds, uintptr_t operand) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  operands.push_back(operand);
  auto* s = static_cast<Stream*>(stream);
  if (s->capture != nullptr) {
    if (Fails("captured launch")) return kFailed;
    s->capture->launches.push_back(microseconds);
  } else {
    ++stream_launches;
    now += microseconds + kStreamLaunchMicroseconds;
  }
  return 0;
}

API cuInit(unsigned) {
  FAIL_IF_ASKED();
  return 0;
}
API cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
API cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
API cuGetErrorString(int, const char** text) {
  *text = "a fake failure";
  return 0;
}
API cuDeviceGet(int* device, int ordinal) {
  if (ordinal != 0) return 101;
  *device = 40;
  return 0;
}
API cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "Fake H100", length);
  return 0;
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 40) return 101;
  switch (attribute) {
    case 16:
      *value = 132;
      return 0;
    case 38:
      *value = 50 << 20;
      return 0;
    case 75:
      *value = 9;
      return 0;
    case 76:
      *value = 0;
      return 0;
    case 97:
      *value = 232448;
      return 0;
    default:
      return 1;
  }
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = size_t{80} << 30;
  return 0;
}
API cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = std::getenv("FAKE_CUDA_ACTIVE") != nullptr;
  return 0;
}
API cuDevicePrimaryCtxRetain(void** out, int device) {
  FAIL_IF_ASKED();
  if (device != 40) return 101;
  ++retained;
  *out = &context;
  return 0;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  --retained;
  return 0;
}
API cuCtxPushCurrent_v2(void* pushed_context) {
  FAIL_IF_ASKED();
  if (pushed_context != &context) return 201;
  ++pushed;
  return 0;
}
API cuCtxPopCurrent_v2(void** out) {
  --pushed;
  *out = &context;
  return 0;
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  NEEDS_CONTEXT();
  *free_bytes = size_t{20} << 30;
  *total = size_t{80} << 30;
  return 0;
}
API cuStreamCreate(void** stream, unsigned flags) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  if (flags != 1) return 1;
  ++objects;
  *stream = new Stream;
  return 0;
}
API cuStreamDestroy_v2(void* stream) {
  NEEDS_CONTEXT();
  --objects;
  delete static_cast<Stream*>(stream);
  return 0;
}
API cuStreamSynchronize(void* stream) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  return static_cast<Stream*>(stream)->capture == nullptr ? 0 : 900;
}
API cuStreamBeginCapture_v2(void* stream, int mode) {
  FAIL_IF_ASKED();
  if (mode != 2) return 1;
  ++objects;
  static_cast<Stream*>(stream)->capture = new Graph;
  return 0;
}
API cuStreamEndCapture(void* stream, void** graph) {
  auto* s = static_cast<Stream*>(stream);
  *graph = s->capture;
  s->capture = nullptr;
  if (!Fails(__func__)) return 0;
  delete static_cast<Graph*>(*graph);
  --objects;
  *graph = nullptr;
  return kFailed;
}
API cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
  FAIL_IF_ASKED();
  ++objects;
  *exec = new Graph(*static_cast<Graph*>(graph));
  return 0;
}
API cuGraphLaunch(void* exec, void*) {
  FAIL_IF_ASKED();
  ++graph_launches;
  for (double microseconds : static_cast<Graph*>(exec)->launches) now += microseconds;
  return 0;
}
API cuGraphDestroy(void* graph) {
  --objects;
  delete static_cast<Graph*>(graph);
  return 0;
}
API cuGraphExecDestroy(void* exec) {
  --objects;
  delete static_cast<Graph*>(exec);
  return 0;
}
API cuEventCreate(void** event, unsigned) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  ++objects;
  *event = new Event;
  return 0;
}
API cuEventDestroy_v2(void* event) {
  NEEDS_CONTEXT();
  --objects;
  delete static_cast<Event*>(event);
  return 0;
}
API cuEventRecord(void* event, void*) {
  FAIL_IF_ASKED();
  static_cast<Event*>(event)->time = now;
  return 0;
}
API cuEventQuery(void*) {
  FAIL_IF_ASKED();
  return reached-- > 0 ? 0 : 600;
}
API cuEventSynchronize(void*) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  return 0;
}
API cuEventElapsedTime(float* ms, void* start, void* end) {
  FAIL_IF_ASKED();
  *ms = static_cast<float>((static_cast<Event*>(end)->time - static_cast<Event*>(start)->time) /
                           1000);
  return 0;
}
