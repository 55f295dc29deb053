// SPDX-License-Identifier: Apache-2.0
#include "stopwatch.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "driver.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {
namespace {

namespace ffi = xla::ffi;

// Events belong to the context that is current when they are made, so they live for one reading.
struct Stopwatch {
  CuEvent start = nullptr;
  CuEvent stop = nullptr;
  bool queued = false;

  void Reset(const Driver& driver) {
    for (CuEvent* event : {&start, &stop}) {
      if (*event != nullptr) driver.EventDestroy(*event);
      *event = nullptr;
    }
  }
};

std::mutex mutex;
Stopwatch stopwatch;

// The stream waits in one of the driver's threads, for as long as the host may take to enqueue a
// batch; a batch whose second mark never comes must not hold up a program for longer.
class Gate {
 public:
  void Close(const Driver& driver, CuStream stream) {
    intptr_t ticket;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ticket = ++closed_;
    }
    const CuResult result = driver.LaunchHostFunc(stream, Pass, reinterpret_cast<void*>(ticket));
    driver.Check(result, "cuLaunchHostFunc");
  }

  void Open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = closed_;
    opened_.notify_all();
  }

 private:
  static constexpr std::chrono::milliseconds kLimit{250};

  static void Pass(void* ticket);

  void Wait(intptr_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    opened_.wait_for(lock, kLimit, [&] { return open_ >= ticket; });
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  intptr_t closed_ = 0, open_ = 0;  // the last tickets
};

// Never destroyed: the driver's thread may still wait when the process ends.
Gate& TheGate() {
  static Gate* const gate = new Gate();
  return *gate;
}

void Gate::Pass(void* ticket) { TheGate().Wait(reinterpret_cast<intptr_t>(ticket)); }

void Record(const Driver& driver, CuEvent* event, CuStream stream) {
  driver.Check(driver.EventCreate(event, kCuEventDefault), "cuEventCreate");
  driver.Check(driver.EventRecord(*event, stream), "cuEventRecord");
}

void Start(const Driver& driver, CuStream stream) {
  stopwatch.Reset(driver);
  TheGate().Close(driver, stream);
  Record(driver, &stopwatch.start, stream);
}

void Stop(const Driver& driver, CuStream stream) {
  if (stopwatch.start == nullptr) throw std::runtime_error("slot 1 came before slot 0");
  const CuResult reached = driver.EventQuery(stopwatch.start);
  if (reached != kCuNotReady) driver.Check(reached, "cuEventQuery");
  stopwatch.queued = reached == kCuNotReady;
  Record(driver, &stopwatch.stop, stream);
  TheGate().Open();
}

ffi::Error Mark(void* stream, int64_t slot) {
  std::lock_guard<std::mutex> lock(mutex);
  try {
    (slot == 0 ? Start : Stop)(Driver::Get(), static_cast<CuStream>(stream));
  } catch (const std::runtime_error& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_bolt.mark: ") + error.what());
  }
  return ffi::Error::Success();
}

ffi::Error DeviceMark(void* stream, int64_t slot, ffi::RemainingRets) { return Mark(stream, slot); }

ffi::Error HostMark(int64_t slot, ffi::RemainingRets) { return Mark(nullptr, slot); }

// Not command-buffer compatible: in a graph the event would be recorded at every replay, and the
// gate opened and the query of slot 1 made once.
XLA_FFI_DEFINE_HANDLER(
    mark_handler, DeviceMark,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Attr<int64_t>("slot").RemainingRets());

XLA_FFI_DEFINE_HANDLER(host_mark_handler, HostMark,
                       ffi::Ffi::Bind().Attr<int64_t>("slot").RemainingRets());

}  // namespace

XLA_FFI_Handler* const kMarkHandler = mark_handler;
XLA_FFI_Handler* const kHostMarkHandler = host_mark_handler;

Reading ReadStopwatch(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex);
  if (stopwatch.stop == nullptr) throw std::runtime_error("the stopwatch has not been stopped");
  const Driver& driver = Driver::Get();
  const ScopedContext context(driver, driver.Device(ordinal));
  Stopwatch read = std::exchange(stopwatch, {});
  float ms = 0;
  CuResult result = driver.EventSynchronize(read.stop);
  if (result == kCuSuccess) result = driver.EventElapsedTime(&ms, read.start, read.stop);
  read.Reset(driver);
  driver.Check(result, "cuEventElapsedTime");
  return {1e3 * static_cast<double>(ms), read.queued};
}

}  // namespace jax_bolt::native
