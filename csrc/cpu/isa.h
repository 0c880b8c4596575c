// One range body, three targets, one table: a Body's static `run<isa>(job, begin, end)` is compiled for each instruction
// set by target attributes (never by flags on the whole file, which would leak into code that any machine runs), and the
// best one this machine has is chosen once.
#pragma once
#include <cstdint>

#include "../core/platform.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ATLAS_X86 1
#define ATLAS_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#if defined(__clang__)
#define ATLAS_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#else
#define ATLAS_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif
#else
#define ATLAS_X86 0
#endif

// "No iteration reads what another one writes": true for all of our loops, in-place ones included, which the compiler
// could otherwise only find out by falling back to scalar code.
#if defined(__clang__)
#define ATLAS_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ATLAS_IVDEP _Pragma("GCC ivdep")
#else
#define ATLAS_IVDEP
#endif

// For a lambda that a range body calls: it has to follow into the body's instruction set.
#if defined(__GNUC__)
#define ATLAS_INLINE_LAMBDA __attribute__((always_inline))
#else
#define ATLAS_INLINE_LAMBDA
#endif

namespace atlas::cpu {

enum Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

Isa best_isa();          // what this machine can run
Isa current_isa();       // what the kernels use: the best one, unless forced
bool force_isa(Isa isa);  // false: this machine cannot run it

template <class Job> using RangeFunction = void (*)(const Job&, int64_t begin, int64_t end);

template <class Body, class Job> struct Compiled {
  static void baseline(const Job& job, int64_t begin, int64_t end) {
    Body::template run<kBaseline>(job, begin, end);
  }
#if ATLAS_X86
  ATLAS_TARGET_V3 static void v3(const Job& job, int64_t begin, int64_t end) {
    Body::template run<kV3>(job, begin, end);
  }
  ATLAS_TARGET_V4 static void v4(const Job& job, int64_t begin, int64_t end) {
    Body::template run<kV4>(job, begin, end);
  }
#endif
  static RangeFunction<Job> best() {
#if ATLAS_X86
    static constexpr RangeFunction<Job> table[] = {baseline, v3, v4};
    return table[current_isa()];
#else
    return baseline;
#endif
  }
};

// Splits [0, total) over at most `threads` OpenMP threads, at least `grain` each.
template <class Body, class Job> void parallel_ranges(const Job& job, int64_t total, int64_t grain, int threads) {
  const RangeFunction<Job> run = Compiled<Body, Job>::best();
  const int64_t most = (total + grain - 1) / grain, parts = most < threads ? most : threads;
  if (parts <= 1) return run(job, 0, total);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
#endif
  for (int64_t part = 0; part < parts; ++part) run(job, total * part / parts, total * (part + 1) / parts);
}

}  // namespace atlas::cpu
