// SPDX-License-Identifier: Apache-2.0
#include "sequence_launcher.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "graph_cache.h"
#include "jax_bolt/abi.h"
#include "kernel.h"
#include "kernel_call.h"
#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kVersion = 2;
constexpr int64_t kLeastOfAGraph = 2;  // launches

enum Space : int64_t { kNowhere = 0, kOperand = 1, kResult = 2, kArena = 3 };

struct Place {
  int64_t space = kNowhere;
  int64_t value = 0;
};

struct Step : KernelCall {
  Place a, b, d, workspace;
  std::vector<Place> sides, vectors, auxiliary;
  int64_t workspace_bytes = 0;
};

// Takes a program's numbers in turn. The first thing wrong is the reason.
class Reader {
 public:
  Reader(const int64_t* data, size_t size) : data_(data), size_(size) {}

  int64_t Take(int64_t most = INT64_MAX) {
    if (next_ < size_ && data_[next_] >= 0 && data_[next_] <= most) return data_[next_++];
    if (reason_.empty()) reason_ = "the program is not valid at number " + std::to_string(next_);
    next_ = size_;
    return 0;
  }
  RecipeView TakeNumbers() {
    const auto count = static_cast<size_t>(Take(static_cast<int64_t>(size_)));
    if (count > size_ - next_) {
      Take(-1);
      return {};
    }
    next_ += count;
    return {data_ + next_ - count, count};
  }
  Place TakePlace() {
    const int64_t space = Take(kArena);
    return {space, Take()};
  }
  std::vector<Place> TakePlaces(int64_t most) {
    std::vector<Place> places(static_cast<size_t>(Take(most)));
    for (Place& place : places) place = TakePlace();
    return places;
  }
  bool done() const { return next_ == size_; }
  const std::string& reason() const { return reason_; }

 private:
  const int64_t* data_;
  size_t size_, next_ = 0;
  std::string reason_;
};

ffi::Error BadProgram(const std::string& reason) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jax_bolt.launch: " + reason);
}

std::vector<std::string_view> Split(std::string_view text) {
  std::vector<std::string_view> parts;
  size_t end = text.find(',');
  for (; end != std::string_view::npos; end = text.find(',')) {
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end + 1);
  }
  parts.push_back(text);
  return parts;
}

ffi::Error Parse(const ffi::Dictionary& dictionary, std::vector<Step>* steps) {
  auto digests = dictionary.get<std::string_view>("digests");
  if (digests.has_error()) return digests.error();
  auto program = dictionary.get<ffi::Span<const int64_t>>("program");
  if (program.has_error()) return program.error();
  const std::vector<std::string_view> kernels = Split(*digests);  // at least one
  Reader reader(program->begin(), program->size());
  if (reader.Take() != kVersion) {
    return BadProgram("the program has another version");
  }
  steps->resize(static_cast<size_t>(reader.Take(static_cast<int64_t>(program->size()))));
  for (Step& step : *steps) {
    const int64_t last = static_cast<int64_t>(kernels.size()) - 1;
    step.digest = kernels[static_cast<size_t>(reader.Take(last))];
    const int64_t kind = reader.Take();
    const RecipeView dims = reader.TakeNumbers();
    step.problem.recipe = reader.TakeNumbers();
    for (Place* place : {&step.a, &step.b, &step.d, &step.workspace}) *place = reader.TakePlace();
    step.sides = reader.TakePlaces(JAX_BOLT_MAX_SIDES);
    step.vectors = reader.TakePlaces(JAX_BOLT_MAX_VECTORS);
    step.auxiliary = reader.TakePlaces(JAX_BOLT_MAX_AUXILIARY);
    step.workspace_bytes = reader.Take();
    if (!reader.reason().empty()) break;
    if (const char* reason = MakeProblem(kind, dims.data, dims.size, &step.problem)) {
      return Fail(ffi::ErrorCode::kInvalidArgument, step, reason);
    }
  }
  if (!reader.reason().empty() || !reader.done()) {
    const std::string& reason = reader.reason();
    return BadProgram(reason.empty() ? "the program is longer than it says" : reason);
  }
  return ffi::Error::Success();
}

// The call's buffers. `missing` says whether a place that was asked for is not there.
class Buffers {
 public:
  Buffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
    for (size_t i = 0; i < args.size(); ++i) {
      auto arg = args.get<ffi::AnyBuffer>(i);
      operands_.push_back(arg.has_error() ? nullptr : arg->untyped_data());
    }
    for (size_t i = 0; i < rets.size(); ++i) {
      auto ret = rets.get<ffi::AnyBuffer>(i);
      results_.push_back(ret.has_error() ? nullptr : (*ret)->untyped_data());
      if (!ret.has_error()) arena_bytes_ = static_cast<int64_t>((*ret)->size_bytes());
    }
  }

  void* At(const Place& place, int64_t bytes = 0) {
    const auto index = static_cast<size_t>(place.value);
    void* found = nullptr;
    if (place.space == kOperand && index < operands_.size()) found = operands_[index];
    if (place.space == kResult && index < results_.size()) found = results_[index];
    if (place.space == kArena && !results_.empty() && place.value <= arena_bytes_ &&
        bytes <= arena_bytes_ - place.value) {
      found = static_cast<char*>(results_.back()) + place.value;
    }
    missing_ = missing_ || found == nullptr;
    return found;
  }
  bool missing() const { return missing_; }
  const std::vector<void*>& operands() const { return operands_; }
  const std::vector<void*>& results() const { return results_; }
  int64_t arena_bytes() const { return arena_bytes_; }

 private:
  std::vector<void*> operands_, results_;
  int64_t arena_bytes_ = 0;
  bool missing_ = false;
};

GraphKey KeyOf(const Buffers& given, std::string_view digests,
               const ffi::Span<const int64_t>& program) {
  GraphKey key;
  key.reserve(given.operands().size() + given.results().size() + program.size() +
              digests.size() / sizeof(uint64_t) + 5);
  for (const auto* buffers : {&given.operands(), &given.results()}) {
    key.push_back(buffers->size());
    for (void* buffer : *buffers) key.push_back(reinterpret_cast<uintptr_t>(buffer));
  }
  key.push_back(static_cast<uint64_t>(given.arena_bytes()));
  key.push_back(program.size());
  key.insert(key.end(), program.begin(), program.end());
  const size_t text = key.size();
  key.resize(text + digests.size() / sizeof(uint64_t) + 1);
  std::memcpy(key.data() + text, digests.data(), digests.size());
  return key;
}

ffi::Error EnqueueSequence(void* stream, const JaxBoltDevice& device, Buffers given,
                           const ffi::Dictionary& attributes,
                           std::vector<const Kernel*>* launched) {
  std::vector<Step> steps;
  if (ffi::Error error = Parse(attributes, &steps); error.failure()) return error;
  for (const Step& step : steps) {
    JaxBoltBuffers buffers = {};
    buffers.a = given.At(step.a);
    buffers.b = given.At(step.b);
    buffers.d = given.At(step.d);
    if (step.workspace.space != kNowhere) {
      buffers.workspace = given.At(step.workspace, step.workspace_bytes);
    }
    for (size_t i = 0; i < step.sides.size(); ++i) buffers.sides[i] = given.At(step.sides[i]);
    for (size_t i = 0; i < step.vectors.size(); ++i) buffers.vectors[i] = given.At(step.vectors[i]);
    for (size_t i = 0; i < step.auxiliary.size(); ++i) {
      buffers.auxiliary[i] = given.At(step.auxiliary[i]);
    }
    if (given.missing()) {
      return Fail(ffi::ErrorCode::kInvalidArgument, step, "a buffer is not there");
    }
    ffi::Error error = LaunchKernel(step, buffers, step.workspace_bytes, device, stream);
    if (error.failure()) return error;
    if (launched != nullptr) launched->push_back(Registry::Get().Find(step.digest));
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error InstantiateSequence(const ffi::Dictionary& attributes) {
  std::vector<Step> steps;
  if (ffi::Error error = Parse(attributes, &steps); error.failure()) return error;
  for (const Step& step : steps) {
    if (ffi::Error error = InstantiateKernel(step, CheckProblem); error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error LaunchSequence(void* stream, const JaxBoltDevice& device, const ffi::RemainingArgs& args,
                          const ffi::RemainingRets& rets, const ffi::Dictionary& attributes) {
  Buffers given(args, rets);
  const Enqueue enqueue = [&](void* to, std::vector<const Kernel*>* launched) {
    return EnqueueSequence(to, device, given, attributes, launched);
  };
  auto digests = attributes.get<std::string_view>("digests");
  auto program = attributes.get<ffi::Span<const int64_t>>("program");
  if (digests.has_value() && program.has_value() && program->size() >= 2 &&
      program->begin()[1] >= kLeastOfAGraph) {
    return LaunchAsGraph(stream, device.ordinal, KeyOf(given, *digests, *program), enqueue);
  }
  return enqueue(stream, nullptr);
}

}  // namespace jax_bolt::native
