// SPDX-License-Identifier: Apache-2.0
#include "graph_cache.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "driver.h"

namespace jax_bolt::native {
namespace {

namespace ffi = xla::ffi;

// Of one device: buffers lie at few places in turn, and XLA keeps 16 graphs of a call.
constexpr size_t kGraphs = 32;
constexpr size_t kRemembered = 256;

uint64_t Hash(const GraphKey& key) {
  uint64_t hash = key.size();
  for (const uint64_t word : key) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  return hash;
}

struct Graph {
  uint64_t hash;
  GraphKey key;
  CuGraphExec exec = nullptr;  // null where there can be none
  std::vector<const Kernel*> kernels;
};

// A stream of its own: on XLA's another thread may be enqueuing, too.
CuGraphExec Record(const Driver& driver, const Enqueue& enqueue,
                   std::vector<const Kernel*>* kernels) {
  CuStream stream = nullptr;
  if (driver.StreamCreate(&stream, kCuStreamNonBlocking) != kCuSuccess) return nullptr;
  CuGraph graph = nullptr;
  CuGraphExec exec = nullptr;
  if (driver.StreamBeginCapture(stream, kCuCaptureRelaxed) == kCuSuccess) {
    const bool enqueued = enqueue(stream, kernels).success();
    const CuResult ended = driver.StreamEndCapture(stream, &graph);
    if (enqueued && ended == kCuSuccess &&
        driver.GraphInstantiate(&exec, graph, /*flags=*/0) != kCuSuccess) {
      exec = nullptr;
    }
  }
  if (graph != nullptr) driver.GraphDestroy(graph);
  driver.StreamDestroy(stream);
  return exec;
}

class GraphsOfDevice {
 public:
  ffi::Error Launch(const Driver& driver, void* stream, GraphKey key, const Enqueue& enqueue) {
    const uint64_t hash = Hash(key);
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = std::find_if(graphs_.begin(), graphs_.end(), [&](const Graph& graph) {
      return graph.hash == hash && graph.key == key;
    });
    if (found == graphs_.end()) {
      if (!WasMet(hash)) return AsTheyAre(stream, enqueue);
      Graph graph = {hash, std::move(key)};
      graph.exec = Record(driver, enqueue, &graph.kernels);
      // Recording them was no launch.
      for (const Kernel* kernel : graph.kernels) kernel->launches.fetch_sub(1, kRelaxed);
      if (graphs_.size() == kGraphs) {
        if (graphs_.back().exec != nullptr) driver.GraphExecDestroy(graphs_.back().exec);
        graphs_.pop_back();
      }
      graphs_.push_front(std::move(graph));
    } else if (found != graphs_.begin()) {
      std::rotate(graphs_.begin(), found, found + 1);
    }
    Graph& graph = graphs_.front();
    if (graph.exec == nullptr) return AsTheyAre(stream, enqueue);
    if (driver.GraphLaunch(graph.exec, static_cast<CuStream>(stream)) != kCuSuccess) {
      driver.GraphExecDestroy(std::exchange(graph.exec, nullptr));
      return AsTheyAre(stream, enqueue);
    }
    for (const Kernel* kernel : graph.kernels) kernel->launches.fetch_add(1, kRelaxed);
    return ffi::Error::Success();
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;

  static ffi::Error AsTheyAre(void* stream, const Enqueue& enqueue) {
    std::vector<const Kernel*> launched;
    return enqueue(stream, &launched);
  }

  bool WasMet(uint64_t hash) {
    if (std::find(met_.begin(), met_.end(), hash) != met_.end()) return true;
    if (met_.size() == kRemembered) met_.pop_front();
    met_.push_back(hash);
    return false;
  }

  std::mutex mutex_;
  std::deque<Graph> graphs_;  // the last used first
  std::deque<uint64_t> met_;
};

GraphsOfDevice& Of(int32_t ordinal) {
  // Never destroyed: the driver may be gone when a process ends.
  static auto* const devices = new std::map<int32_t, GraphsOfDevice>();
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  return (*devices)[ordinal];
}

}  // namespace

ffi::Error LaunchAsGraph(void* stream, int32_t ordinal, GraphKey key, const Enqueue& enqueue) {
  const Driver* driver = Driver::Find();
  int capturing = 0;
  if (driver == nullptr ||
      driver->StreamIsCapturing(static_cast<CuStream>(stream), &capturing) != kCuSuccess ||
      capturing != 0) {
    std::vector<const Kernel*> launched;
    return enqueue(stream, &launched);
  }
  return Of(ordinal).Launch(*driver, stream, std::move(key), enqueue);
}

}  // namespace jax_bolt::native
