// SPDX-License-Identifier: Apache-2.0
// Device time of whole XLA executables: the FFI custom call "jax_bolt.mark" records a CUDA event on
// XLA's own stream. Attribute: slot (i64), 0 starts the stopwatch and 1 stops it.
//
// A reading is worth something only if the host had enqueued everything before the device began;
// else the time contains the device's waiting for the host. So slot 0 also holds the stream up,
// until slot 1 has been enqueued: idle, since what runs ahead at full power lowers the clock of
// what is timed. No longer than a quarter of a second; the handler of slot 1 notes whether that was
// enough.
#ifndef JAX_BOLT_NATIVE_STOPWATCH_H_
#define JAX_BOLT_NATIVE_STOPWATCH_H_

#include "xla/ffi/api/c_api.h"

namespace jax_bolt::native {

struct Reading {
  double microseconds;
  bool queued;  // slot 1 was enqueued before the device reached slot 0
};

// Waits for slot 1 and resets the stopwatch. One measurement at a time in a process; the caller
// makes sure that both handlers have run (block_until_ready). Throws std::runtime_error when they
// have not, or with the CUDA error.
Reading ReadStopwatch(int ordinal);

extern XLA_FFI_Handler* const kMarkHandler;

// Without a stream (the default stream then), for XLA's CPU client and a driver that only counts.
extern XLA_FFI_Handler* const kHostMarkHandler;

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_STOPWATCH_H_
