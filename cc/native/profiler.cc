// SPDX-License-Identifier: Apache-2.0
#include "profiler.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"

namespace jax_bolt::native {
namespace {

// Long enough that a graph's own launch cost is below 1 %, short enough to tune many candidates.
constexpr double kReplayMicroseconds = 3000;
// Bounds the graph for kernels of a microsecond or two.
constexpr size_t kMaxLaunches = 2048;

class Stream {
 public:
  explicit Stream(const Driver& driver) : driver_(driver) {
    driver.Check(driver.StreamCreate(&stream_, kCuStreamNonBlocking), "cuStreamCreate");
  }
  ~Stream() { driver_.StreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  CuStream get() const { return stream_; }
  void Synchronize() const {
    driver_.Check(driver_.StreamSynchronize(stream_), "cuStreamSynchronize");
  }

 private:
  const Driver& driver_;
  CuStream stream_ = nullptr;
};

// Timestamps on a stream, in the order they are recorded.
class Marks {
 public:
  Marks(const Driver& driver, size_t count) : driver_(driver), events_(count) {
    for (CuEvent& event : events_) {
      if (CuResult result = driver.EventCreate(&event, kCuEventDefault); result != kCuSuccess) {
        event = nullptr;
        Destroy();
        driver.Check(result, "cuEventCreate");
      }
    }
  }
  ~Marks() { Destroy(); }
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  void Record(size_t index, const Stream& stream) const {
    driver_.Check(driver_.EventRecord(events_[index], stream.get()), "cuEventRecord");
  }
  // Between marks `index` and `index + 1`; both have been reached.
  double Microseconds(size_t index) const {
    float ms = 0;
    driver_.Check(driver_.EventElapsedTime(&ms, events_[index], events_[index + 1]),
                  "cuEventElapsedTime");
    return 1e3 * static_cast<double>(ms);
  }

 private:
  void Destroy() {
    for (CuEvent event : events_) {
      if (event != nullptr) driver_.EventDestroy(event);
    }
  }

  const Driver& driver_;
  std::vector<CuEvent> events_;
};

// A kernel and what it is launched on.
struct Subject {
  const Kernel& kernel;
  const Problem& problem;
  JaxBoltDevice device;

  JaxBoltStatus Enqueue(const JaxBoltBuffers& buffers, const Stream& stream) const {
    return kernel.Launch(problem, buffers, device, stream.get());
  }
  void Launch(const JaxBoltBuffers& buffers, const Stream& stream) const {
    const JaxBoltStatus status = Enqueue(buffers, stream);
    if (status == JAX_BOLT_OK) return;
    throw std::runtime_error("launch: " + kernel.ErrorString(status) + " (status " +
                             std::to_string(status) + ")");
  }
};

// `count` launches over rotating sets, as a CUDA graph where they can be captured.
class Replay {
 public:
  Replay(const Driver& driver, const Subject& subject, const std::vector<JaxBoltBuffers>& sets,
         size_t count, const Stream& stream)
      : driver_(driver), subject_(subject), sets_(sets), count_(count), stream_(stream) {
    Capture();
  }
  ~Replay() {
    if (exec_ != nullptr) driver_.GraphExecDestroy(exec_);
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  void Enqueue() const {
    if (exec_ != nullptr) {
      driver_.Check(driver_.GraphLaunch(exec_, stream_.get()), "cuGraphLaunch");
      return;
    }
    for (size_t i = 0; i < count_; ++i) subject_.Launch(sets_[i % sets_.size()], stream_);
  }

 private:
  // Leaves exec_ null on any failure: a kernel may do something no capture allows, and is then
  // timed by plain launches.
  void Capture() {
    exec_ = Captured(driver_, stream_.get(), [&] {
      JaxBoltStatus status = JAX_BOLT_OK;
      for (size_t i = 0; i < count_ && status == JAX_BOLT_OK; ++i) {
        status = subject_.Enqueue(sets_[i % sets_.size()], stream_);
      }
      return status == JAX_BOLT_OK;
    });
  }

  const Driver& driver_;
  const Subject& subject_;
  const std::vector<JaxBoltBuffers>& sets_;
  const size_t count_;
  const Stream& stream_;
  CuGraphExec exec_ = nullptr;
};

// How often to launch so that a replay takes about kReplayMicroseconds: every set equally often.
size_t LaunchCount(double microseconds, size_t sets) {
  const double wanted = std::ceil(kReplayMicroseconds / std::max(microseconds, 0.1));
  const double limit = static_cast<double>(std::max(kMaxLaunches, sets));
  const size_t count = static_cast<size_t>(std::min(wanted, limit));
  return std::max<size_t>(count / sets, 1) * sets;
}

Subject MakeSubject(const Kernel& kernel, const Problem& problem, int ordinal) {
  Subject subject{kernel, problem, {ordinal, SmCount(ordinal)}};
  if (std::string reason = kernel.Check(problem); !reason.empty()) {
    throw std::runtime_error("check: " + reason);
  }
  return subject;
}

}  // namespace

std::vector<double> Profile(const Kernel& kernel, const Problem& problem,
                            const std::vector<JaxBoltBuffers>& sets, int ordinal, int repeats) {
  if (sets.empty()) throw std::invalid_argument("profile needs at least one set of buffers");
  if (repeats < 1) throw std::invalid_argument("profile needs at least one repeat");
  const Driver& driver = Driver::Get();
  const Subject subject = MakeSubject(kernel, problem, ordinal);
  const ScopedContext context(driver, driver.Device(ordinal));
  const Stream stream(driver);
  const size_t replays = static_cast<size_t>(repeats);
  const Marks marks(driver, replays + 1);

  // The first launch loads the kernel's code.
  subject.Launch(sets[0], stream);
  stream.Synchronize();

  marks.Record(0, stream);
  for (const JaxBoltBuffers& buffers : sets) subject.Launch(buffers, stream);
  marks.Record(1, stream);
  stream.Synchronize();
  const double estimate = marks.Microseconds(0) / static_cast<double>(sets.size());
  const size_t count = LaunchCount(estimate, sets.size());

  const Replay replay(driver, subject, sets, count, stream);
  // All enqueued at once behind an untimed replay: the host stays ahead, so that its own launch
  // latency does not fall between two marks.
  replay.Enqueue();
  marks.Record(0, stream);
  for (size_t i = 0; i < replays; ++i) {
    replay.Enqueue();
    marks.Record(i + 1, stream);
  }
  stream.Synchronize();

  std::vector<double> times;
  for (size_t i = 0; i < replays; ++i) {
    times.push_back(marks.Microseconds(i) / static_cast<double>(count));
  }
  return times;
}

bool WritesAll(const Kernel& kernel, const Problem& problem, const JaxBoltBuffers& buffers,
               const std::vector<size_t>& bytes, int ordinal) {
  if (bytes.empty() || bytes.size() > 1 + JAX_BOLT_MAX_AUXILIARY) {
    throw std::invalid_argument("a kernel has one result, and few auxiliary outputs");
  }
  const Driver& driver = Driver::Get();
  const Subject subject = MakeSubject(kernel, problem, ordinal);
  const ScopedContext context(driver, driver.Device(ordinal));
  const Stream stream(driver);
  const auto output = [&](size_t index) {
    void* const found = index == 0 ? buffers.d : buffers.auxiliary[index - 1];
    return static_cast<CuDevicePointer>(reinterpret_cast<uintptr_t>(found));
  };
  // What a kernel writes is the same both times, so that a byte which follows what was there
  // before was not written.
  constexpr unsigned char kBefore[] = {0x00, 0xff};
  constexpr size_t kBlock = 1 << 16;
  std::vector<std::vector<unsigned char>> after[2];
  for (int i = 0; i < 2; ++i) {
    for (size_t k = 0; k < bytes.size(); ++k) {
      driver.Check(driver.MemsetD8Async(output(k), kBefore[i], bytes[k], stream.get()),
                   "cuMemsetD8Async");
    }
    subject.Launch(buffers, stream);
    for (size_t k = 0; k < bytes.size(); ++k) {
      std::vector<unsigned char>& read = after[i].emplace_back(bytes[k]);
      driver.Check(driver.MemcpyDtoHAsync(read.data(), output(k), bytes[k], stream.get()),
                   "cuMemcpyDtoHAsync");
    }
    stream.Synchronize();
  }
  for (size_t k = 0; k < bytes.size(); ++k) {
    const std::vector<unsigned char>&first = after[0][k], &second = after[1][k];
    for (size_t i = 0; i < bytes[k]; i += kBlock) {
      // Without a way out in the middle compilers vectorise it; results have tens of megabytes.
      const size_t end = std::min(bytes[k], i + kBlock);
      unsigned unwritten = 0;
      for (size_t j = i; j < end; ++j) {
        unwritten |= (first[j] == kBefore[0]) & (second[j] == kBefore[1]);
      }
      if (unwritten != 0) return false;
    }
  }
  return true;
}

void Run(const Kernel& kernel, const Problem& problem, const JaxBoltBuffers& buffers, int ordinal) {
  const Driver& driver = Driver::Get();
  const Subject subject = MakeSubject(kernel, problem, ordinal);
  const ScopedContext context(driver, driver.Device(ordinal));
  const Stream stream(driver);
  subject.Launch(buffers, stream);
  stream.Synchronize();
}

}  // namespace jax_bolt::native
