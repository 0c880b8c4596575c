// Philox words for runs of pixel groups, and the uniform noise made of them. The one loop here that compilers do not
// vectorise well by themselves (they miss the 32 x 32 -> 64 bit multiply), hence the intrinsics; core/philox.h and
// core/perturb.h stay its definition and its test.
#pragma once
#include "../core/perturb.h"
#include "../core/philox.h"

namespace atlas::cpu {

constexpr int kChains = 4;                    // of the loop; the widest has 8 lanes
constexpr int64_t kGroupsAtOnce = 8 * kChains;

// words[4 g + j] = word j of group first + g, for g < groups, rounded up to a multiple of kGroupsAtOnce.
using FillWords = void (*)(uint32_t* words, const NoiseCounter& counter, uint32_t first, int64_t groups);

FillWords fill_words();  // for the current instruction set

// The neighbours z of a run of pixels that begins with group `first`, in registers from words to pixels; projected
// into the ball of x or not. How many pixels are done: the last ones, which do not fill the loop, are left.
using DrawNeighbours = int64_t (*)(float* z, const float* adv, const float* x, const PerturbRow<float>& row,
                                   const NoiseCounter& counter, uint32_t first, int64_t size);

DrawNeighbours draw_neighbours(bool project);  // for the current instruction set

}  // namespace atlas::cpu
