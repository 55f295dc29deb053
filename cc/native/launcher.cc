// SPDX-License-Identifier: Apache-2.0
#include "launcher.h"

#include <cstdint>
#include <string>
#include <string_view>

#include "cast.h"
#include "driver.h"
#include "jax_bolt/abi.h"
#include "kernel.h"
#include "kernel_call.h"
#include "registry.h"
#include "sequence_launcher.h"
#include "xla/ffi/api/ffi.h"

namespace jax_bolt::native {
namespace {

namespace ffi = xla::ffi;

struct Attributes : KernelCall {
  bool cast = false;
  int64_t sides = 0;
  int64_t outputs = 1;
};

bool IsSequence(const ffi::Dictionary& dictionary) {
  auto kind = dictionary.get<int64_t>("kind");
  return kind.has_value() && *kind == kSequenceKind;
}

ffi::Error Parse(const ffi::Dictionary& dictionary, Attributes* attributes) {
  auto digest = dictionary.get<std::string_view>("digest");
  if (digest.has_error()) return digest.error();
  auto kind = dictionary.get<int64_t>("kind");
  if (kind.has_error()) return kind.error();
  attributes->digest = *digest;
  if (dictionary.contains<std::string_view>("site")) {
    attributes->site = *dictionary.get<std::string_view>("site");
  }
  attributes->cast = *kind == kCastKind;
  if (attributes->cast) return ffi::Error::Success();
  auto dims = dictionary.get<ffi::Span<const int64_t>>("dims");
  if (dims.has_error()) return dims.error();
  auto sides = dictionary.get<int64_t>("sides");
  if (sides.has_error()) return sides.error();
  attributes->sides = *sides;
  if (auto outputs = dictionary.get<int64_t>("outputs"); outputs.has_value()) {
    attributes->outputs = *outputs;
  }
  if (dictionary.contains("recipe")) {
    auto recipe = dictionary.get<ffi::Span<const int64_t>>("recipe");
    if (recipe.has_error()) {
      return Fail(ffi::ErrorCode::kInvalidArgument, *attributes,
                  "attribute recipe: " + recipe.error().message());
    }
    attributes->problem.recipe = {recipe->begin(), recipe->size()};
  }
  if (const char* reason = MakeProblem(*kind, dims->begin(), dims->size(), &attributes->problem)) {
    return Fail(ffi::ErrorCode::kInvalidArgument, *attributes, reason);
  }
  if (*sides < 0 || *sides > JAX_BOLT_MAX_SIDES) {
    return Fail(ffi::ErrorCode::kInvalidArgument, *attributes, "too many side inputs");
  }
  if (attributes->outputs < 1 || attributes->outputs > 1 + JAX_BOLT_MAX_AUXILIARY) {
    return Fail(ffi::ErrorCode::kInvalidArgument, *attributes, "too many outputs");
  }
  return ffi::Error::Success();
}

constexpr const char* kNoCastKernel = "it is not a kernel that casts";

std::string CheckCasts(const Kernel& kernel, const Problem&) {
  return dynamic_cast<const CastKernel*>(&kernel) == nullptr ? kNoCastKernel : "";
}

ffi::Error Instantiate(ffi::Dictionary dictionary) {
  if (IsSequence(dictionary)) return InstantiateSequence(dictionary);
  Attributes attributes;
  if (ffi::Error error = Parse(dictionary, &attributes); error.failure()) return error;
  return InstantiateKernel(attributes, attributes.cast ? CheckCasts : CheckProblem);
}

// Operand pointers into `buffers`; null unless the counts and types are right.
const char* Bind(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                 const Attributes& attributes, JaxBoltBuffers* buffers, int64_t* workspace_bytes) {
  const size_t first_vector = 2 + static_cast<size_t>(attributes.sides);
  const size_t outputs = static_cast<size_t>(attributes.outputs);
  if (args.size() < first_vector) return "operands are missing";
  if (args.size() - first_vector > JAX_BOLT_MAX_VECTORS) return "too many per-channel inputs";
  if (rets.size() < outputs || rets.size() > outputs + 1) {
    return "expected one result, or two with a workspace, and the auxiliary outputs";
  }
  for (size_t i = 0; i < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    if (arg.has_error()) return "an operand is not a buffer";
    const void* data = arg->untyped_data();
    if (i == 0) {
      buffers->a = data;
    } else if (i == 1) {
      buffers->b = data;
    } else if (i < first_vector) {
      buffers->sides[i - 2] = data;
    } else {
      buffers->vectors[i - first_vector] = data;
    }
  }
  for (size_t i = 0; i < outputs; ++i) {
    auto output = rets.get<ffi::AnyBuffer>(i);
    if (output.has_error()) return "the result is not a buffer";
    (i == 0 ? buffers->d : buffers->auxiliary[i - 1]) = (*output)->untyped_data();
  }
  if (rets.size() > outputs) {
    auto workspace = rets.get<ffi::AnyBuffer>(outputs);
    if (workspace.has_error()) return "the workspace is not a buffer";
    buffers->workspace = (*workspace)->untyped_data();
    *workspace_bytes = static_cast<int64_t>((*workspace)->size_bytes());
  }
  return nullptr;
}

// Adds the cast of operand i to result i. Returns a reason where there is no such cast, or null.
const char* AddCast(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, size_t i,
                    Casts* casts) {
  auto from = args.get<ffi::AnyBuffer>(i);
  auto to = rets.get<ffi::AnyBuffer>(i);
  if (from.has_error() || to.has_error()) return "an operand or a result is not a buffer";
  const ffi::DataType type = (*to)->element_type();
  if (from->element_type() != ffi::F32 || (type != ffi::BF16 && type != ffi::F16)) {
    return "it casts f32 to bf16 or f16";
  }
  const size_t count = from->element_count();
  if (count != (*to)->element_count()) return "a result has another size than its operand";
  casts->Add(from->untyped_data(), (*to)->untyped_data(), static_cast<int64_t>(count));
  return nullptr;
}

ffi::Error Cast(void* stream, const JaxBoltDevice& device, const ffi::RemainingArgs& args,
                const ffi::RemainingRets& rets, const Attributes& attributes) {
  auto* kernel = dynamic_cast<const CastKernel*>(Registry::Get().Find(attributes.digest));
  if (kernel == nullptr) return Fail(ffi::ErrorCode::kNotFound, attributes, kNoCastKernel);
  const size_t count = args.size();
  if (count != rets.size()) {
    return Fail(ffi::ErrorCode::kInvalidArgument, attributes, "not one result for each operand");
  }
  for (size_t i = 0; i < count;) {
    Casts casts;
    for (; i < count && !casts.full(); ++i) {
      if (const char* reason = AddCast(args, rets, i, &casts)) {
        return Fail(ffi::ErrorCode::kInvalidArgument, attributes, reason);
      }
    }
    const JaxBoltStatus status = kernel->Cast(casts, device, stream);
    if (status != JAX_BOLT_OK) return FailStatus(*kernel, attributes, status);
    kernel->launches.fetch_add(1, std::memory_order_relaxed);
  }
  return ffi::Error::Success();
}

ffi::Error Launch(void* stream, const JaxBoltDevice& device, const ffi::RemainingArgs& args,
                  const ffi::RemainingRets& rets, const Attributes& attributes) {
  if (attributes.cast) return Cast(stream, device, args, rets, attributes);
  JaxBoltBuffers buffers = {};
  int64_t have = 0;
  if (const char* reason = Bind(args, rets, attributes, &buffers, &have)) {
    return Fail(ffi::ErrorCode::kInvalidArgument, attributes, reason);
  }
  return LaunchKernel(attributes, buffers, have, device, stream);
}

ffi::Error LaunchAny(void* stream, const JaxBoltDevice& device, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets, const ffi::Dictionary& dictionary) {
  if (IsSequence(dictionary)) return LaunchSequence(stream, device, args, rets, dictionary);
  Attributes attributes;
  if (ffi::Error error = Parse(dictionary, &attributes); error.failure()) return error;
  return Launch(stream, device, args, rets, attributes);
}

ffi::Error Execute(void* stream, int32_t ordinal, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary dictionary) {
  JaxBoltDevice device = {ordinal, 0};
  try {
    device.sm_count = SmCount(ordinal);
  } catch (const DriverError& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_bolt.launch: ") + error.what());
  }
  return LaunchAny(stream, device, args, rets, dictionary);
}

ffi::Error HostExecute(ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Dictionary dictionary) {
  return LaunchAny(/*stream=*/nullptr, JaxBoltDevice{0, 1}, args, rets, dictionary);
}

XLA_FFI_DEFINE_HANDLER(instantiate_handler, Instantiate, ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER(execute_handler, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(host_execute_handler, HostExecute,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

}  // namespace

XLA_FFI_Handler* const kInstantiateHandler = instantiate_handler;
XLA_FFI_Handler* const kExecuteHandler = execute_handler;
XLA_FFI_Handler* const kHostExecuteHandler = host_execute_handler;

}  // namespace jax_bolt::native
