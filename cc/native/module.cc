// SPDX-License-Identifier: Apache-2.0
// The Python module jax_bolt._native. Signatures and meaning: jax_bolt/_native.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "driver.h"
#include "jax_bolt/abi.h"
#include "kernel.h"
#include "launcher.h"
#include "memory.h"
#include "profiler.h"
#include "registry.h"
#include "stopwatch.h"

namespace jax_bolt::native {
namespace {

namespace py = pybind11;

using Address = std::uintptr_t;
using Dims = std::vector<int64_t>;
using Addresses = std::vector<Address>;
// a, b, outputs, sides, vectors, workspace
using BufferSet = std::tuple<Address, Address, Addresses, Addresses, Addresses, Address>;

const Kernel& FindKernel(const std::string& digest) {
  const Kernel* kernel = Registry::Get().Find(digest);
  if (kernel == nullptr) throw std::runtime_error("kernel " + digest + " is not loaded");
  return *kernel;
}

// The recipe stays the caller's.
Problem CallProblem(int64_t kind, const Dims& dims, const Dims& recipe = {}) {
  Problem problem = {{}, {recipe.data(), recipe.size()}};
  if (const char* reason = MakeProblem(kind, dims.data(), dims.size(), &problem)) {
    throw std::invalid_argument(reason);
  }
  return problem;
}

JaxBoltBuffers Buffers(const BufferSet& set) {
  const auto& [a, b, outputs, sides, vectors, workspace] = set;
  if (outputs.empty() || outputs.size() > 1 + JAX_BOLT_MAX_AUXILIARY) {
    throw std::invalid_argument("no outputs, or too many");
  }
  if (sides.size() > JAX_BOLT_MAX_SIDES) throw std::invalid_argument("too many side inputs");
  if (vectors.size() > JAX_BOLT_MAX_VECTORS) {
    throw std::invalid_argument("too many per-channel inputs");
  }
  JaxBoltBuffers buffers = {};
  buffers.a = reinterpret_cast<const void*>(a);
  buffers.b = reinterpret_cast<const void*>(b);
  buffers.d = reinterpret_cast<void*>(outputs[0]);
  for (size_t i = 1; i < outputs.size(); ++i) {
    buffers.auxiliary[i - 1] = reinterpret_cast<void*>(outputs[i]);
  }
  for (size_t i = 0; i < sides.size(); ++i) {
    buffers.sides[i] = reinterpret_cast<const void*>(sides[i]);
  }
  for (size_t i = 0; i < vectors.size(); ++i) {
    buffers.vectors[i] = reinterpret_cast<const void*>(vectors[i]);
  }
  buffers.workspace = reinterpret_cast<void*>(workspace);
  return buffers;
}

std::optional<std::string> CheckProblem(const std::string& digest, int64_t kind, const Dims& dims,
                                        const Dims& recipe) {
  std::string reason = FindKernel(digest).Check(CallProblem(kind, dims, recipe));
  if (reason.empty()) return std::nullopt;
  return reason;
}

int64_t WorkspaceBytes(const std::string& digest, int64_t kind, const Dims& dims, int ordinal,
                       std::optional<int> sm_count, const Dims& recipe) {
  const Problem problem = CallProblem(kind, dims, recipe);
  const int sms = sm_count ? *sm_count : SmCount(ordinal);
  return FindKernel(digest).WorkspaceBytes(problem, {ordinal, sms});
}

std::vector<double> ProfileKernel(const std::string& digest, int64_t kind, const Dims& dims,
                                  const std::vector<BufferSet>& buffer_sets, int ordinal,
                                  int repeats, const Dims& recipe) {
  std::vector<JaxBoltBuffers> sets;
  for (const BufferSet& set : buffer_sets) sets.push_back(Buffers(set));
  return Profile(FindKernel(digest), CallProblem(kind, dims, recipe), sets, ordinal, repeats);
}

bool WritesAllOf(const std::string& digest, int64_t kind, const Dims& dims,
                 const BufferSet& buffers, const std::vector<size_t>& bytes, int ordinal,
                 const Dims& recipe) {
  return WritesAll(FindKernel(digest), CallProblem(kind, dims, recipe), Buffers(buffers), bytes,
                   ordinal);
}

void RunKernel(const std::string& digest, int64_t kind, const Dims& dims, const BufferSet& buffers,
               int ordinal, const Dims& recipe) {
  Run(FindKernel(digest), CallProblem(kind, dims, recipe), Buffers(buffers), ordinal);
}

void SetPythonResolver(const py::object& function) {
  if (function.is_none()) {
    Registry::Get().SetResolver(nullptr);
    return;
  }
  // Copied and destroyed by threads that do not hold the GIL, so it owns its reference through a
  // pointer whose deleter takes the GIL.
  std::shared_ptr<py::object> shared(new py::object(function), [](py::object* object) {
    py::gil_scoped_acquire gil;
    delete object;
  });
  Registry::Get().SetResolver([shared](const std::string& digest) -> std::string {
    py::gil_scoped_acquire gil;
    try {
      (*shared)(digest);
      return "";
    } catch (const py::error_already_set& error) {
      // what() would add the Python stack; the user's own follows with XLA's error.
      return py::cast<std::string>(error.type().attr("__name__")) + ": " +
             py::cast<std::string>(py::str(error.value()));
    }
  });
}

py::capsule Capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict Handlers(XLA_FFI_Handler* execute) {
  py::dict handlers;
  handlers["instantiate"] = Capsule(kInstantiateHandler);
  handlers["execute"] = Capsule(execute);
  return handlers;
}

py::dict MarkHandlers(XLA_FFI_Handler* execute) {
  py::dict handlers;
  handlers["execute"] = Capsule(execute);
  return handlers;
}

py::dict DeviceInfoDict(int ordinal) {
  DeviceInfo info;
  {
    py::gil_scoped_release nogil;
    info = QueryDevice(ordinal);
  }
  py::dict dict;
  dict["name"] = info.name;
  dict["uuid"] = info.uuid;
  dict["compute_capability"] =
      std::to_string(info.compute_major) + "." + std::to_string(info.compute_minor);
  dict["sm_count"] = info.sm_count;
  dict["l2_bytes"] = info.l2_bytes;
  dict["smem_per_block"] = info.smem_per_block;
  dict["driver_version"] = info.driver_version;
  dict["total_bytes"] = info.total_bytes;
  dict["free_bytes"] = info.free_bytes < 0 ? py::object(py::none()) : py::int_(info.free_bytes);
  return dict;
}

std::optional<int> DriverVersion() {
  const Driver* driver = Driver::Find();
  int version = 0;
  if (driver == nullptr || driver->DriverGetVersion(&version) != kCuSuccess) return std::nullopt;
  return version;
}

PYBIND11_MODULE(_native, m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.attr("ABI_VERSION") = JAX_BOLT_ABI_VERSION;
  m.attr("MAX_VECTORS") = JAX_BOLT_MAX_VECTORS;
  m.attr("MAX_SIDES") = JAX_BOLT_MAX_SIDES;
  m.attr("MAX_AUXILIARY") = JAX_BOLT_MAX_AUXILIARY;

  m.def(
      "load",
      [](const std::string& digest, const std::string& path) {
        Registry::Get().Load(digest, path);
      },
      py::arg("digest"), py::arg("path"), Release());
  m.def(
      "is_loaded",
      [](const std::string& digest) { return Registry::Get().Find(digest) != nullptr; },
      py::arg("digest"));
  m.def(
      "launches", [](const std::string& digest) { return FindKernel(digest).launches.load(); },
      py::arg("digest"));
  m.def("check", CheckProblem, py::arg("digest"), py::arg("kind"), py::arg("dims"),
        py::arg("recipe") = Dims());
  m.def("workspace_bytes", WorkspaceBytes, py::arg("digest"), py::arg("kind"), py::arg("dims"),
        py::arg("ordinal") = 0, py::arg("sm_count") = py::none(), py::arg("recipe") = Dims(),
        Release());

  m.def("handlers", [] { return Handlers(kExecuteHandler); });
  m.def("host_handlers", [] { return Handlers(kHostExecuteHandler); });
  m.def("set_resolver", SetPythonResolver, py::arg("resolver").none(true));

  m.def("profile", ProfileKernel, py::arg("digest"), py::arg("kind"), py::arg("dims"),
        py::arg("buffer_sets"), py::arg("ordinal"), py::arg("repeats"), py::arg("recipe") = Dims(),
        Release());
  m.def("writes_all", WritesAllOf, py::arg("digest"), py::arg("kind"), py::arg("dims"),
        py::arg("buffers"), py::arg("bytes"), py::arg("ordinal"), py::arg("recipe") = Dims(),
        Release());
  m.def("run", RunKernel, py::arg("digest"), py::arg("kind"), py::arg("dims"), py::arg("buffers"),
        py::arg("ordinal"), py::arg("recipe") = Dims(), Release());
  py::class_<Memory>(m, "Memory")
      .def(py::init<int>(), py::arg("ordinal"), Release())
      .def(
          "allocate",
          [](Memory& memory, size_t bytes, const std::string& pattern) {
            return memory.Allocate(bytes, pattern);
          },
          py::arg("bytes"), py::arg("pattern"), Release());
  m.def("mark_handlers", [] { return MarkHandlers(kMarkHandler); });
  m.def("host_mark_handlers", [] { return MarkHandlers(kHostMarkHandler); });
  m.def(
      "read_stopwatch",
      [](int ordinal) {
        const Reading reading = ReadStopwatch(ordinal);
        return std::make_tuple(reading.microseconds, reading.queued);
      },
      py::arg("ordinal"), Release());
  m.def("device_info", DeviceInfoDict, py::arg("ordinal") = 0);
  m.def("driver_version", DriverVersion, Release());
}

}  // namespace
}  // namespace jax_bolt::native
