// SPDX-License-Identifier: Apache-2.0
#include "graph_cache.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "driver.h"

namespace jax_bolt::native {
namespace {

namespace ffi = xla::ffi;

// Of one device: buffers lie at few places in turn, and XLA keeps 16 graphs of a call.
constexpr size_t kGraphs = 32;
// Of so many calls a graph is worth making for what comes again, and one worth keeping that is used
// again: recording costs more than one launch saves. Where buffers take turns at more places, some
// have graphs and the others none.
constexpr size_t kRecent = 128;

uint64_t Hash(const GraphKey& key) {
  uint64_t hash = key.size();
  for (const uint64_t word : key) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  }
  return hash;
}

// A recorded sequence. One at a time uses it, since one at a time has its buffers.
class Graph {
 public:
  Graph(const Driver& driver, const Enqueue& enqueue) : driver_(driver) {
    Record(enqueue);
    // Recording them was no launch.
    for (const Kernel* kernel : kernels_) kernel->launches.fetch_sub(1, kRelaxed);
  }
  // What still runs of it ends.
  ~Graph() { Destroy(); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Whether it was launched. One that was not is given up.
  bool Launch(void* stream) {
    if (exec_ == nullptr) return false;
    if (driver_.GraphLaunch(exec_, static_cast<CuStream>(stream)) != kCuSuccess) {
      Destroy();
      return false;
    }
    for (const Kernel* kernel : kernels_) kernel->launches.fetch_add(1, kRelaxed);
    return true;
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;

  // On a stream of its own: on XLA's another thread may be enqueuing, too.
  void Record(const Enqueue& enqueue) {
    CuStream stream = nullptr;
    if (driver_.StreamCreate(&stream, kCuStreamNonBlocking) != kCuSuccess) return;
    exec_ = Captured(driver_, stream, [&] { return enqueue(stream, &kernels_).success(); });
    driver_.StreamDestroy(stream);
  }
  void Destroy() {
    if (exec_ != nullptr) driver_.GraphExecDestroy(std::exchange(exec_, nullptr));
  }

  const Driver& driver_;
  CuGraphExec exec_ = nullptr;  // null where there can be none
  std::vector<const Kernel*> kernels_;
};

class GraphsOfDevice {
 public:
  // Null the first time that a key is met.
  std::shared_ptr<Graph> Find(const Driver& driver, GraphKey key, const Enqueue& enqueue) {
    const uint64_t hash = Hash(key);
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = std::find_if(graphs_.begin(), graphs_.end(), [&](const Entry& entry) {
      return entry.hash == hash && entry.key == key;
    });
    ++calls_;
    if (found != graphs_.end()) {
      std::rotate(graphs_.begin(), found, found + 1);
    } else {
      if (!WasMet(hash)) return nullptr;
      // Making a graph may wait for what runs on another device, and that, being a collective, for
      // this one: XLA makes its graphs while nothing runs.
      if (ActiveDevices(driver).size() > 1) return nullptr;
      if (graphs_.size() == kGraphs) {
        if (calls_ - graphs_.back().used < kRecent) return nullptr;
        graphs_.pop_back();
      }
      graphs_.push_front({hash, std::move(key), std::make_shared<Graph>(driver, enqueue)});
    }
    graphs_.front().used = calls_;
    return graphs_.front().graph;
  }

 private:
  struct Entry {
    uint64_t hash;
    GraphKey key;
    std::shared_ptr<Graph> graph;
    uint64_t used = 0;  // the last call
  };

  bool WasMet(uint64_t hash) {
    if (std::find(met_.begin(), met_.end(), hash) != met_.end()) return true;
    if (met_.size() == kRecent) met_.pop_front();
    met_.push_back(hash);
    return false;
  }

  std::mutex mutex_;
  std::deque<Entry> graphs_;  // the last used first
  std::deque<uint64_t> met_;
  uint64_t calls_ = 0;
};

GraphsOfDevice& Of(int32_t ordinal) {
  // Never destroyed: the driver may be gone when a process ends.
  static auto* const devices = new std::map<int32_t, GraphsOfDevice>();
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  return (*devices)[ordinal];
}

// Launched without a mutex: where much is queued a launch waits for the device.
bool LaunchedAsGraph(void* stream, int32_t ordinal, GraphKey key, const Enqueue& enqueue) {
  const Driver* driver = Driver::Find();
  if (driver == nullptr) return false;
  int capturing = 0;
  const CuResult asked = driver->StreamIsCapturing(static_cast<CuStream>(stream), &capturing);
  if (asked != kCuSuccess || capturing != 0) return false;
  const std::shared_ptr<Graph> graph = Of(ordinal).Find(*driver, std::move(key), enqueue);
  return graph != nullptr && graph->Launch(stream);
}

}  // namespace

ffi::Error LaunchAsGraph(void* stream, int32_t ordinal, GraphKey key, const Enqueue& enqueue) {
  if (LaunchedAsGraph(stream, ordinal, std::move(key), enqueue)) return ffi::Error::Success();
  return enqueue(stream, nullptr);
}

}  // namespace jax_bolt::native
