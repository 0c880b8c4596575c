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

// A run of pixels of one sample; where a step comes first also its gradient, and where its result and x go.
struct Pixels {
  float* z;
  const float *adv, *x;
  int64_t size;
  const float* grad;
  float *moved, *copy;
};

// The neighbour z of a run that begins with group `first`, in one loop from words to pixels. How many pixels are done:
// the last ones, which fill no vector, are left, and all where the loop does not give neighbour()'s bits.
using DrawNeighbour = int64_t (*)(const Pixels&, const PerturbRow<float>&, const NoiseCounter&, uint32_t first);

// For the current instruction set; null: there is none. The second makes label_start()'s bits, x: the noise of the label.
DrawNeighbour draw_neighbour(bool step, bool project);
DrawNeighbour draw_label_start();

}  // namespace atlas::cpu
