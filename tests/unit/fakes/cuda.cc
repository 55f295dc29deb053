// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 with one device whose time is a number: the profiler's control flow, without a
// GPU. FAKE_CUDA_FAIL=<function> makes that function fail.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "jax_bolt/cast/table.hpp"

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
// Host functions: whatever comes after one in its stream waits for it.
std::atomic<int> host_functions{0};
std::vector<std::thread> host_threads;
std::vector<uintptr_t> operands;
int context;
size_t allocated = 0;

// A library is a text file: "cubin" or "cast" and the size of the parameters of its kernel.
struct Kernel {
  size_t parameter_bytes;
  bool casts;
};
// Of cubins: calls so far, and the last launch.
int64_t encodes = 0, replaces = 0, casts = 0, attributes_set = 0, last_attribute = 0;
std::vector<int64_t> launch;
std::vector<unsigned char> parameters;

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

// Waits until every stream has gone on.
API fake_join() {
  for (std::thread& thread : host_threads) thread.join();
  host_threads.clear();
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

// {encodes, replaces, attributes set, the last one's value}, then the last launch: the grid, the
// block, shared bytes, and the id and three words of each attribute. Returns how many there are.
API fake_cubin(int64_t* out) {
  const int64_t counts[] = {encodes, replaces, attributes_set, last_attribute};
  std::memcpy(out, counts, sizeof(counts));
  std::memcpy(out + 4, launch.data(), launch.size() * sizeof(int64_t));
  return static_cast<int>(4 + launch.size());
}
// How often the cast kernel was launched.
API fake_casts() { return static_cast<int>(casts); }
API fake_parameters(unsigned char* out) {
  std::memcpy(out, parameters.data(), parameters.size());
  return static_cast<int>(parameters.size());
}

API cuLibraryLoadFromFile(void** library, const char* path, int*, void**, unsigned, int*, void**,
                          unsigned) {
  FAIL_IF_ASKED();
  std::ifstream file(path);
  std::string word;
  size_t bytes = 0;
  if (!(file >> word >> bytes) || (word != "cubin" && word != "cast")) return 200;
  *library = new Kernel{bytes, word == "cast"};
  return 0;
}
API cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  FAIL_IF_ASKED();
  static Kernel prologue = {};
  const bool is_prologue = std::strcmp(name, "jax_bolt_prologue") == 0;
  *kernel = is_prologue ? &prologue : library;
  const bool casts = static_cast<Kernel*>(library)->casts;
  const char* symbol = casts ? "jax_bolt_cast" : "jax_bolt_kernel";
  return is_prologue || std::strcmp(name, symbol) == 0 ? 0 : 500;
}
API cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* bytes) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  if (index > 0) return 1;
  *offset = 0;
  *bytes = static_cast<Kernel*>(kernel)->parameter_bytes;
  return 0;
}
API cuKernelSetAttribute(int attribute, int value, void*, int device) {
  FAIL_IF_ASKED();
  if (attribute != 8 || device != 40) return 1;
  ++attributes_set;
  last_attribute = value;
  return 0;
}
// Writes all that it was given: the address, dtype, rank, swizzle, dims, strides, boxes, steps, and
// interleave, L2 promotion and fill.
API cuTensorMapEncodeTiled(uint64_t* map, int dtype, uint32_t rank, void* address,
                           const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* steps, int interleave, int swizzle, int l2, int fill) {
  FAIL_IF_ASKED();
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return 1;
  ++encodes;
  std::memset(map, 0, 128);
  map[0] = reinterpret_cast<uint64_t>(address);
  map[1] = static_cast<uint64_t>(dtype);
  map[2] = rank;
  map[3] = static_cast<uint64_t>(swizzle);
  for (uint32_t i = 0; i < rank; ++i) {
    map[4 + i] = dims[i];
    if (i + 1 < rank) map[9 + i] = strides[i];
    map[13] = map[13] << 12 | box[i];
    map[14] = map[14] << 12 | steps[i];
  }
  map[15] = static_cast<uint64_t>(interleave << 16 | l2 << 8 | fill);
  return 0;
}
// As above, with the corners in the strides' last place: lower W and H, upper W and H.
API cuTensorMapEncodeIm2col(uint64_t* map, int dtype, uint32_t rank, void* address,
                            const uint64_t* dims, const uint64_t* strides, const int* lower,
                            const int* upper, uint32_t channels, uint32_t pixels,
                            const uint32_t* steps, int interleave, int swizzle, int l2, int fill) {
  FAIL_IF_ASKED();
  const uint32_t box[5] = {channels, pixels, 1, 1, 1};
  const int result = cuTensorMapEncodeTiled(map, dtype, rank, address, dims, strides, box, steps,
                                            interleave, swizzle, l2, fill);
  if (result != 0 || rank != 4) return result == 0 ? 1 : result;
  for (const int corner : {lower[0], lower[1], upper[0], upper[1]}) {
    map[12] = map[12] << 8 | (static_cast<uint64_t>(corner) & 0xff);
  }
  return 0;
}
API cuTensorMapReplaceAddress(uint64_t* map, void* address) {
  FAIL_IF_ASKED();
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return 1;
  ++replaces;
  map[0] = reinterpret_cast<uint64_t>(address);
  return 0;
}

struct LaunchAttribute {
  int id;
  alignas(8) unsigned words[16];
};
struct LaunchConfig {
  unsigned sizes[7];
  void* stream;
  const LaunchAttribute* attributes;
  unsigned num_attributes;
};
// What the blocks of the cast kernel do, to bf16 and towards zero.
void Cast(const jax_bolt::cast::Table& table, unsigned blocks) {
  constexpr int64_t kElements = jax_bolt::cast::kBlockElements;
  for (unsigned block = 0; block < blocks; ++block) {
    const int i = jax_bolt::cast::tensor_of(table, block);
    const int64_t begin = (block - table.first_block[i]) * kElements;
    const int64_t end = std::min(begin + kElements, table.count[i]);
    for (int64_t at = begin; at < end; ++at) {
      const auto* from = static_cast<const uint16_t*>(table.from[i]) + 2 * at;
      static_cast<uint16_t*>(table.to[i])[at] = from[1];
    }
  }
}

API cuLaunchKernelEx(const LaunchConfig* config, void* kernel, void** arguments, void** extra) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  if (extra != nullptr) return 1;
  launch.assign(config->sizes, config->sizes + 7);
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const LaunchAttribute& attribute = config->attributes[i];
    launch.push_back(attribute.id);
    launch.insert(launch.end(), attribute.words, attribute.words + 3);
  }
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  parameters.assign(bytes, bytes + static_cast<Kernel*>(kernel)->parameter_bytes);
  if (static_cast<Kernel*>(kernel)->casts) {
    ++casts;
    Cast(*static_cast<const jax_bolt::cast::Table*>(arguments[0]), config->sizes[0]);
    return 0;
  }
  if (config->stream == nullptr) return 0;
  uintptr_t first = 0;
  std::memcpy(&first, bytes, sizeof(first));
  return fake_launch(config->stream, config->sizes[0], first);  // a launch of `grid` microseconds
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
  const int devices = std::getenv("FAKE_CUDA_TWO_DEVICES") != nullptr ? 2 : 1;
  if (ordinal >= devices) return 101;
  *device = 40 + ordinal;
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
      *value = std::getenv("FAKE_CUDA_AMPERE") != nullptr ? 8 : 9;
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
  *active = retained > 0 || std::getenv("FAKE_CUDA_ACTIVE") != nullptr;
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
API cuDeviceGetUuid_v2(unsigned char* uuid, int) {
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(16 * i + 1);
  return 0;
}
// Device memory is the host's; of FAKE_CUDA_MEMORY bytes, where that is set.
API cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  const char* limit = std::getenv("FAKE_CUDA_MEMORY");
  allocated += bytes;
  if (limit != nullptr && allocated > std::strtoull(limit, nullptr, 10)) return 2;
  *address = reinterpret_cast<unsigned long long>(std::malloc(bytes));
  return 0;
}
API cuMemFree_v2(unsigned long long address) {
  NEEDS_CONTEXT();
  std::free(reinterpret_cast<void*>(address));
  allocated = 0;
  return 0;
}
API cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t bytes) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  std::memset(reinterpret_cast<void*>(address), value, bytes);
  return 0;
}
API cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void*) {
  return cuMemsetD8_v2(address, value, bytes);
}
API cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
API cuMemcpyDtoD_v2(unsigned long long to, unsigned long long from, size_t bytes) {
  NEEDS_CONTEXT();
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  return 0;
}
API cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void*) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return 0;
}
API cuCtxSynchronize() {
  NEEDS_CONTEXT();
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
API cuStreamIsCapturing(void* stream, int* status) {
  FAIL_IF_ASKED();
  *status = stream != nullptr && static_cast<Stream*>(stream)->capture != nullptr;
  return 0;
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
  return reached-- > 0 || host_functions == 0 ? 0 : 600;
}
API cuEventSynchronize(void*) {
  FAIL_IF_ASKED();
  NEEDS_CONTEXT();
  return fake_join();
}
API cuLaunchHostFunc(void*, void (*function)(void*), void* data) {
  FAIL_IF_ASKED();
  ++host_functions;
  host_threads.emplace_back([=] {
    function(data);
    --host_functions;
  });
  return 0;
}
API cuEventElapsedTime(float* ms, void* start, void* end) {
  FAIL_IF_ASKED();
  *ms = static_cast<float>((static_cast<Event*>(end)->time - static_cast<Event*>(start)->time) /
                           1000);
  return 0;
}
