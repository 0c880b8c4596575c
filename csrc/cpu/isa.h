// One range body, three targets, one table: a Body's static `run(job, begin, end)` is compiled for each instruction set
// by target attributes (never by flags on the whole file, which would leak into code that any machine runs), and the
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

// For a loop over a vector's lanes or over as many vectors: these are to stay in registers.
#define ATLAS_UNROLL _Pragma("GCC unroll 16")

// Between these, functions are compiled for an instruction set, templates by where they are defined. Inside may only be
// what is always inlined or has the instruction set in its type: the linker keeps one copy of any other function.
#if defined(__clang__)
#define ATLAS_BEGIN_V3 _Pragma("clang attribute push(__attribute__((target(\"arch=x86-64-v3\"))), apply_to = function)")
#define ATLAS_BEGIN_V4 _Pragma("clang attribute push(__attribute__((target(\"arch=x86-64-v4\"))), apply_to = function)")
#define ATLAS_END_TARGET _Pragma("clang attribute pop")
#else
#define ATLAS_BEGIN_V3 _Pragma("GCC push_options") _Pragma("GCC target(\"arch=x86-64-v3\")")
#define ATLAS_BEGIN_V4 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"arch=x86-64-v4,prefer-vector-width=512\")")
#define ATLAS_END_TARGET _Pragma("GCC pop_options")
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

template <class Body, class V3, class V4, class Job> struct Compiled {
  static void baseline(const Job& job, int64_t begin, int64_t end) { Body::run(job, begin, end); }
#if ATLAS_X86
  ATLAS_TARGET_V3 static void v3(const Job& job, int64_t begin, int64_t end) { V3::run(job, begin, end); }
  ATLAS_TARGET_V4 static void v4(const Job& job, int64_t begin, int64_t end) { V4::run(job, begin, end); }
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
template <class Job>
void parallel_ranges(RangeFunction<Job> run, const Job& job, int64_t total, int64_t grain, int threads) {
  const int64_t most = (total + grain - 1) / grain, parts = most < threads ? most : threads;
  if (parts <= 1) return run(job, 0, total);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
#endif
  for (int64_t part = 0; part < parts; ++part) run(job, total * part / parts, total * (part + 1) / parts);
}

// V3, V4: bodies that know how wide the registers of their instruction set are.
template <class Body, class V3 = Body, class V4 = Body, class Job>
void parallel_ranges(const Job& job, int64_t total, int64_t grain, int threads) {
  parallel_ranges(Compiled<Body, V3, V4, Job>::best(), job, total, grain, threads);
}

}  // namespace atlas::cpu
