// SPDX-License-Identifier: Apache-2.0
#include "recipe.h"

#include <limits>

#include "driver.h"

namespace jax_bolt::native {
namespace {

constexpr int64_t kVersion = 4;
constexpr size_t kWorkspaceAt = 6;
constexpr size_t kMapNumbers = 29;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxCluster = 8;  // more is not portable and needs another attribute
constexpr int64_t kMaxSharedBytes = 1 << 20;
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Takes the numbers in turn. The first that is missing or out of bounds is the reason.
class Reader {
 public:
  explicit Reader(RecipeView view) : view_(view) {}

  int64_t Take(const char* what, int64_t low, int64_t high) {
    if (!reason_.empty()) return low;
    if (next_ == view_.size) {
      Refuse(std::string("it ends before ") + what);
      return low;
    }
    const int64_t value = view_.data[next_++];
    if (value < low || value > high) {
      Refuse(std::string(what) + " is " + std::to_string(value) + ", not from " +
             std::to_string(low) + " to " + std::to_string(high));
      return low;
    }
    return value;
  }
  void Refuse(const std::string& reason) {
    if (reason_.empty()) reason_ = "the launch recipe is not valid: " + reason;
  }
  size_t left() const { return view_.size - next_; }
  const std::string& reason() const { return reason_; }

 private:
  const RecipeView view_;
  size_t next_ = 0;
  std::string reason_;
};

// What the hardware and cuTensorMapEncodeTiled want of a map beyond this (the box against the
// swizzle, say) the driver checks.
MapRecipe TakeMap(Reader& reader) {
  MapRecipe map = {};
  map.operand = static_cast<int>(reader.Take("a map's operand", 0, kNumOperands - 1));
  map.dtype = static_cast<int>(reader.Take("a map's dtype", 0, 3));
  map.rank = static_cast<uint32_t>(reader.Take("a map's rank", 1, kMaxRank));
  for (uint64_t& dim : map.dims) {
    dim = static_cast<uint64_t>(reader.Take("a map's dim", 1, (int64_t{1} << 32) - 1));
  }
  for (uint64_t& stride : map.strides) {
    stride = static_cast<uint64_t>(reader.Take("a map's stride", 0, (int64_t{1} << 40) - 1));
    if (stride % 16 != 0) reader.Refuse("a map's stride is not a multiple of 16");
  }
  for (uint32_t& extent : map.box) {
    extent = static_cast<uint32_t>(reader.Take("a map's box", 1, 256));
  }
  for (uint32_t& step : map.steps) {
    step = static_cast<uint32_t>(reader.Take("a map's step", 1, 8));
  }
  map.swizzle = static_cast<int>(reader.Take("a map's swizzle", 0, 128));
  if (map.swizzle != 0 && map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128) {
    reader.Refuse("a map's swizzle is " + std::to_string(map.swizzle));
  }
  map.offset = static_cast<uint64_t>(reader.Take("a map's offset", 0, int64_t{1} << 48));
  if (map.offset % 16 != 0) reader.Refuse("a map's offset is not a multiple of 16");
  map.im2col = reader.Take("a map's mode", 0, 1) != 0;
  for (int* corner : {map.lower, map.upper}) {
    for (int i = 0; i < 2; ++i) {
      corner[i] = static_cast<int>(reader.Take("a map's corner", -128, 127));
    }
  }
  if (map.im2col && map.rank != 4) reader.Refuse("a map in im2col mode has four dims");
  return map;
}

}  // namespace

void* Address(int operand, const JaxBoltBuffers& buffers) {
  const void* address = nullptr;
  if (operand == kOperandA) {
    address = buffers.a;
  } else if (operand == kOperandB) {
    address = buffers.b;
  } else if (operand == kOperandD) {
    address = buffers.d;
  } else if (operand == kOperandWorkspace) {
    address = buffers.workspace;
  } else if (operand >= kOperandAuxiliary && operand < kNumOperands) {
    address = buffers.auxiliary[operand - kOperandAuxiliary];
  } else if (operand >= kOperandVectors && operand < kOperandAuxiliary) {
    address = buffers.vectors[operand - kOperandVectors];
  } else if (operand >= kOperandSides && operand < kOperandVectors) {
    address = buffers.sides[operand - kOperandSides];
  }
  return const_cast<void*>(address);
}

size_t Recipe::ParameterBytes() const {
  return maps.size() * sizeof(CuTensorMap) + pointers.size() * sizeof(void*) +
         ints.size() * sizeof(int32_t);
}

int64_t RecipeWorkspaceBytes(RecipeView view) {
  return view.size > kWorkspaceAt ? view.data[kWorkspaceAt] : 0;
}

std::string ParseRecipe(RecipeView view, Recipe* recipe) {
  Reader reader(view);
  reader.Take("the version", kVersion, kVersion);
  recipe->threads = static_cast<unsigned>(reader.Take("threads", 1, kMaxThreads));
  recipe->grid = static_cast<unsigned>(reader.Take("the grid", 1, kMaxInt));
  recipe->cluster = static_cast<unsigned>(reader.Take("the cluster", 1, kMaxCluster));
  recipe->shared_bytes = static_cast<unsigned>(reader.Take("shared memory", 0, kMaxSharedBytes));
  recipe->programmatic = reader.Take("programmatic", 0, 1) != 0;
  recipe->workspace_bytes = reader.Take("the workspace", 0, int64_t{1} << 48);
  const bool prologue = reader.Take("prologue", 0, 1) != 0;
  if (recipe->grid % recipe->cluster != 0) reader.Refuse("the cluster does not divide the grid");
  // Each count is bounded by what fits into the parameters, so that their sum cannot overflow.
  const auto count = [&](const char* what, size_t bytes) {
    return static_cast<size_t>(
        reader.Take(what, 0, static_cast<int64_t>(kMaxParameterBytes / bytes)));
  };
  const size_t maps = count("the number of maps", sizeof(CuTensorMap));
  const size_t pointers = count("the number of pointers", sizeof(void*));
  const size_t ints = count("the number of ints", sizeof(int32_t));
  if (!reader.reason().empty()) return reader.reason();
  const size_t numbers = maps * kMapNumbers + pointers + ints;
  if (prologue ? reader.left() < numbers : reader.left() != numbers) {
    reader.Refuse("it has " + std::to_string(view.size) + " numbers, which is not what it says");
    return reader.reason();
  }
  for (size_t i = 0; i < maps; ++i) recipe->maps.push_back(TakeMap(reader));
  for (size_t i = 0; i < pointers; ++i) {
    recipe->pointers.push_back(
        static_cast<int>(reader.Take("a pointer's operand", kNullOperand, kNumOperands - 1)));
  }
  for (size_t i = 0; i < ints; ++i) {
    recipe->ints.push_back(static_cast<int32_t>(reader.Take("an int", -kMaxInt - 1, kMaxInt)));
  }
  if (recipe->ParameterBytes() > kMaxParameterBytes) {
    reader.Refuse("more than " + std::to_string(kMaxParameterBytes) + " bytes of parameters");
  }
  if (!prologue || !reader.reason().empty()) return reader.reason();
  recipe->prologue = std::make_unique<Recipe>();
  std::string reason =
      ParseRecipe({view.data + view.size - reader.left(), reader.left()}, recipe->prologue.get());
  if (!reason.empty()) return reason;
  if (recipe->prologue->prologue != nullptr) reader.Refuse("a prologue has no prologue");
  if (recipe->prologue->shared_bytes != 0) reader.Refuse("a prologue has no shared memory");
  return reader.reason();
}

}  // namespace jax_bolt::native
