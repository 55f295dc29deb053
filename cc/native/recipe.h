// SPDX-License-Identifier: Apache-2.0
// A launch recipe: everything the host does for a cubin, as numbers. Computed by
// jax_bolt/_src/kernels/recipe.py, which states their order and meaning.
#ifndef JAX_BOLT_NATIVE_RECIPE_H_
#define JAX_BOLT_NATIVE_RECIPE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "jax_bolt/abi.h"
#include "kernel.h"

namespace jax_bolt::native {

inline constexpr size_t kMaxParameterBytes = 4096;
inline constexpr size_t kMaxRank = 5;

// Where an address of the kernel's parameters comes from; sides, vectors and auxiliary outputs are
// counted from these.
enum Operand : int {
  kNullOperand = -1,
  kOperandA = 0,
  kOperandB = 1,
  kOperandD = 2,
  kOperandWorkspace = 3,
  kOperandSides = 4,
  kOperandVectors = kOperandSides + JAX_BOLT_MAX_SIDES,
  kOperandAuxiliary = kOperandVectors + JAX_BOLT_MAX_VECTORS,
  kNumOperands = kOperandAuxiliary + JAX_BOLT_MAX_AUXILIARY,
};

// The operand's address; null for kNullOperand and for one that the call does not have.
void* Address(int operand, const JaxBoltBuffers& buffers);

struct MapRecipe {
  int operand;
  int dtype;  // 0 bf16, 1 f16, 2 f32, 3 f32 that a load rounds to TF32
  uint32_t rank;
  uint64_t dims[kMaxRank];         // elements, innermost first
  uint64_t strides[kMaxRank - 1];  // bytes, of dims 1..
  uint32_t box[kMaxRank];
  uint32_t steps[kMaxRank];
  int swizzle;      // bytes
  uint64_t offset;  // bytes from the operand's start
  bool im2col;      // dims are C W H N, a box is box[1] pixels between the corners (W, H)
  int lower[2];
  int upper[2];
};

// The parameters are the maps, then the pointers, then the ints, without gaps.
struct Recipe {
  unsigned threads;
  unsigned grid;
  unsigned cluster;
  unsigned shared_bytes;
  bool programmatic;
  std::vector<MapRecipe> maps;
  std::vector<int> pointers;
  std::vector<int32_t> ints;
  int64_t workspace_bytes;
  std::unique_ptr<Recipe> prologue;  // launched before it; may be null

  size_t ParameterBytes() const;
};

// The workspace of a recipe that ParseRecipe took; every launch asks.
int64_t RecipeWorkspaceBytes(RecipeView view);

// Reads `view`, which may hold anything. Returns a reason, or "" and fills `recipe`.
std::string ParseRecipe(RecipeView view, Recipe* recipe);

}  // namespace jax_bolt::native

#endif  // JAX_BOLT_NATIVE_RECIPE_H_
