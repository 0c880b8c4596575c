// The largest errors of exp, log and exp_of_negative (csrc/core/math.h), in ulp, over every STRIDE-th fp32 number; and
// whether vectors of them have the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../csrc/cpu/isa.h"
#ifdef BEGIN_TARGET
BEGIN_TARGET
#endif
#include "../csrc/cpu/lanes.h"

using atlas::bit_cast;
using V = atlas::cpu::vector<float, LANES>::type;

// The distance of fp32 numbers around the exact value: below the smallest one, theirs.
static double ulp(double exact) {
  const double a = std::fabs(exact);
  return std::ldexp(1.0, std::max(std::ilogb(a < 0x1p-126 ? 0x1p-126 : a), -126) - 23);
}

static double error(float got, double exact) {
  if (exact != exact) return got != got ? 0 : HUGE_VAL;
  if (exact == 0 || float(exact) == exact || std::fabs(exact) > 0x1.ffffffp127) return got == float(exact) ? 0 : HUGE_VAL;
  return std::fabs(got - exact) / ulp(exact);
}

// What would be subnormal is 0; on the border it may be either.
static double error_of_negative(float got, float x, double exact) {
  if (x < -87.3366f) return got == 0 ? 0 : HUGE_VAL;
  return got == 0 && exact < 0x1.001p-126 ? 0 : error(got, exact);
}

int main(int, char** arguments) {
  const uint64_t stride = std::strtoull(arguments[1], nullptr, 10);
  double worst_exp = 0, worst_log = 0, worst_negative = 0;
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += stride * LANES) {
    V x;
    for (int l = 0; l < LANES; ++l) x[l] = bit_cast<float>(uint32_t(bits + l * stride));
    const V e = atlas::exp(x), g = atlas::log(x), n = atlas::exp_of_negative(x);
    for (int l = 0; l < LANES; ++l) {
      const float one = x[l];
      worst_exp = std::fmax(worst_exp, error(e[l], std::exp(double(one))));
      worst_log = std::fmax(worst_log, error(g[l], std::log(double(one))));
      if (!(one > 0)) worst_negative = std::fmax(worst_negative, error_of_negative(n[l], one, std::exp(double(one))));
      const float alone[] = {atlas::exp(one), atlas::log(one), atlas::exp_of_negative(one), e[l], g[l], n[l]};
      for (int i = 0; i < 3; ++i)
        if (alone[i] == alone[i] && bit_cast<uint32_t>(alone[i]) != bit_cast<uint32_t>(alone[i + 3]))
          return std::printf("a vector differs from a number at %a\n", one), 1;
    }
  }
  std::printf("%.4f %.4f %.4f\n", worst_exp, worst_log, worst_negative);
}
