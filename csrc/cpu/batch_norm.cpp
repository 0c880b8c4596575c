#include "../core/batch_norm.h"

#include "tile.h"

namespace atlas::cpu {
namespace {

constexpr int kRun = 32;  // strips that are summed one after another

// A channel's share of the batch is cut into blocks, whatever the number of threads.
struct Job {
  AtlasBatchNorm p;
  bool rows, streaming;
  int64_t blocks, tiles;  // of channels: as many as a strip has, or one
};

// Samples [first, last) of one channel; or, where channels lie innermost, pixels of `width` channels.
struct Unit {
  int64_t block, channel, width, first, last, begin, stride, length;
};

ATLAS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

ATLAS_HD Unit locate(const Job& job, int64_t unit, int64_t wide) {
  const AtlasBatchNorm& p = job.p;
  const int64_t block = unit / job.tiles, tile = unit % job.tiles, all = job.rows ? p.batch * p.pixels : p.batch;
  const int64_t first = all * block / job.blocks, last = all * (block + 1) / job.blocks;
  if (!job.rows) return {block, tile, 1, first, last, tile * p.pixels, p.channels * p.pixels, p.pixels};
  const int64_t channel = tile * wide, width = least(wide, p.channels - channel);
  return {block, channel, width, first, last, channel, p.channels, width};
}

// A register of T, of Bytes, and how it lies in memory as S.
template <class T, class S, int Bytes> struct Stored {
  typedef T Values __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(T);

  static ATLAS_HD Values load(const S* from) {
    T lanes[kLanes];
    ATLAS_IVDEP for (int l = 0; l < kLanes; ++l) lanes[l] = convert<T>(from[l]);
    Values values;
    memcpy(&values, lanes, Bytes);
    return values;
  }
  static ATLAS_HD void store(S* to, const Values& values) {
    T lanes[kLanes];
    memcpy(lanes, &values, Bytes);
    ATLAS_IVDEP for (int l = 0; l < kLanes; ++l) to[l] = convert<S>(lanes[l]);
  }
};

template <class T, int Bytes> struct Stored<T, T, Bytes> {
  typedef T Values __attribute__((vector_size(Bytes)));

  static ATLAS_HD Values load(const T* from) {
    Values values;
    memcpy(&values, from, Bytes);
    return values;
  }
  static ATLAS_HD void store(T* to, const Values& values) { memcpy(to, &values, Bytes); }
};

template <int Bytes> struct Bits;
#define ATLAS_BITS(Bytes)                                               \
  template <> struct Bits<Bytes> {                                      \
    typedef uint32_t Words __attribute__((vector_size(Bytes)));         \
    typedef uint16_t Halves __attribute__((vector_size(Bytes / 2)));    \
  };
ATLAS_BITS(16)
ATLAS_BITS(32)
ATLAS_BITS(64)
#undef ATLAS_BITS

// In lanes, what platform.h does with one number: loops this short do not become vectors.
template <int Bytes> struct Stored<float, bfloat16_t, Bytes> {
  typedef float Values __attribute__((vector_size(Bytes)));
  using Words = typename Bits<Bytes>::Words;
  using Halves = typename Bits<Bytes>::Halves;

  static ATLAS_HD Values load(const bfloat16_t* from) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    const Words bits = __builtin_convertvector(halves, Words) << 16;
    Values values;
    memcpy(&values, &bits, Bytes);
    return values;
  }
  static ATLAS_HD void store(bfloat16_t* to, const Values& values) {
    Words bits;
    memcpy(&bits, &values, Bytes);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words made = (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc0u : rounded;
    const Halves halves = __builtin_convertvector(made, Halves);
    memcpy(to, &halves, sizeof(halves));
  }
};

// T: the compute type; S: the stored one.
template <class T, class S, int Bytes> struct Strips {
  typedef T Values __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(T), kAtOnce = Bytes == 64 ? 4 : 2, kWide = kLanes * kAtOnce;

  // Neighbours in memory, of one channel or one of each.
  struct Strip {
    Values of[kAtOnce];
  };

  // Some elements, a register at most; lanes beyond them are 0.
  static ATLAS_HD Values load(const AtlasImages& from, int64_t first, int64_t count) {
    const S* const s = static_cast<const S*>(from.data) + first;
    if (count >= kLanes) return Stored<T, S, Bytes>::load(s);
    S some[kLanes] = {};
    for (int64_t l = 0; l < count; ++l) some[l] = s[l];
    return Stored<T, S, Bytes>::load(some);
  }

  static ATLAS_HD void store(const AtlasImages& to, int64_t first, int64_t count, Values values, bool streaming) {
    S* const s = static_cast<S*>(to.data) + first;
    if (count >= kLanes && !streaming) return Stored<T, S, Bytes>::store(s, values);
    alignas(64) S some[kLanes];
    Stored<T, S, Bytes>::store(some, values);
    if (count >= kLanes) return stream_out(s, some, kLanes);
    for (int64_t l = 0; l < count; ++l) s[l] = some[l];
  }

  // What belongs to the channels of a unit.
  template <class N> static ATLAS_HD Strip spread(const Unit& at, const N* per_channel) {
    alignas(64) T lanes[kWide];
    for (int64_t l = 0; l < kWide; ++l) lanes[l] = T(per_channel[at.channel + least(l, at.width - 1)]);
    Strip strip;
    memcpy(&strip, lanes, sizeof(strip));
    return strip;
  }

  // x - mean, where it counts.
  static ATLAS_HD Strip spread_mean(const Job& job, const Unit& at) {
    return needs_x(job.p) ? spread(at, static_cast<const T*>(job.p.mean)) : Strip{};
  }
  static ATLAS_HD Values centred(const Job& job, int64_t first, int64_t count, const Values& mean) {
    return needs_x(job.p) ? load(job.p.x, first, count) - mean : Values{};
  }

  // Calls use(register of a strip, first element, how many) for all elements, and done() after each strip.
  template <class Use, class Done> static ATLAS_HD void walk(const Unit& at, Use&& use, Done&& done) {
    for (int64_t i = at.first; i < at.last; ++i)
      for (int64_t j = 0; j < at.length; j += kWide) {
        const int64_t first = at.begin + i * at.stride + j, count = at.length - j;
        ATLAS_UNROLL for (int r = 0; r < kAtOnce; ++r)
          if (r * kLanes < count) use(r, first + r * kLanes, count - r * kLanes);
        done();
      }
  }
};

// Into the slots of each block.
template <class T, class S, int Bytes> struct Sums : Strips<T, S, Bytes> {
  using Base = Strips<T, S, Bytes>;
  using typename Base::Strip, typename Base::Values;
  using Base::kAtOnce, Base::kWide;
  using Terms = BatchNormTerms<Values>;
  static_assert(sizeof(Terms) == kBatchNormSums * sizeof(Values), "");

  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) run_unit(job, locate(job, unit, kWide));
  }

  static ATLAS_HD void run_unit(const Job& job, const Unit& at) {
    const AtlasBatchNorm& p = job.p;
    const Strip mean = Base::spread_mean(job, at);
    double totals[kBatchNormSums][kWide] = {};
    Terms sums[kAtOnce] = {};
    int run = 0;
    Base::walk(
        at,
        [&](int r, int64_t first, int64_t count) ATLAS_INLINE_LAMBDA {
          sums[r].add(Base::load(p.x_cotangent, first, count), Base::load(p.cotangent, first, count),
                      Base::centred(job, first, count, mean.of[r]));
        },
        [&]() ATLAS_INLINE_LAMBDA {
          if (++run == kRun) add_to(totals, sums), run = 0;
        });
    add_to(totals, sums);
    double* const to = p.partial + at.block * kBatchNormSlots * p.channels + at.channel;
    for (int k = 0; k < kBatchNormSums; ++k) {
      if (!job.rows)
        for (int l = 1; l < kWide; ++l) totals[k][0] += totals[k][l];
      for (int64_t l = 0; l < at.width; ++l) to[k * p.channels + l] = totals[k][l];
    }
  }

  static ATLAS_HD void add_to(double (&totals)[kBatchNormSums][kWide], Terms (&sums)[kAtOnce]) {
    T lanes[kAtOnce][kBatchNormSums][Base::kLanes];
    memcpy(lanes, sums, sizeof(lanes));
    memset(static_cast<void*>(sums), 0, sizeof(sums));
    for (int i = 0; i < kAtOnce; ++i)
      for (int k = 0; k < kBatchNormSums; ++k)
        for (int l = 0; l < Base::kLanes; ++l) totals[k][i * Base::kLanes + l] += lanes[i][k][l];
  }
};

template <class T, class S, int Bytes> struct Results : Strips<T, S, Bytes> {
  using Base = Strips<T, S, Bytes>;
  using typename Base::Strip, typename Base::Values;
  using Base::kWide;

  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) run_unit(job, locate(job, unit, kWide));
    if (job.streaming) finish_streaming();
  }

  static ATLAS_HD void run_unit(const Job& job, const Unit& at) {
    const AtlasBatchNorm& p = job.p;
    const Strip mean = Base::spread_mean(job, at);
    Strip of[kBatchNormSlots - 1];
    for (int k = 0; k < kBatchNormSlots - 1; ++k) of[k] = Base::spread(at, p.partial + k * p.channels);
    const Strip &g_v = of[0], &g_c = of[1], &g_1 = of[2], &x_v = of[3], &x_g = of[4], &x_c = of[5], &x_1 = of[6];
    Base::walk(
        at,
        [&](int r, int64_t first, int64_t count) ATLAS_INLINE_LAMBDA {
          const Values v = Base::load(p.x_cotangent, first, count), c = Base::centred(job, first, count, mean.of[r]);
          if (p.cotangent_grad.data) {
            const Values out = g_v.of[r] * v + g_c.of[r] * c + g_1.of[r];
            Base::store(p.cotangent_grad, first, count, out, job.streaming);
          }
          if (p.x_grad.data) {
            Values out = x_g.of[r] * Base::load(p.cotangent, first, count);
            if (p.training) out = (out + x_v.of[r] * v) + (x_c.of[r] * c + x_1.of[r]);
            Base::store(p.x_grad, first, count, out, job.streaming);
          }
        },
        []() ATLAS_INLINE_LAMBDA {});
  }
};

template <class T> double at(const void* per_channel, int64_t channel, double absent) {
  return per_channel ? double(static_cast<const T*>(per_channel)[channel]) : absent;
}

// The sums of all blocks, then the coefficients in their place.
template <class T> void fold(const Job& job) {
  const AtlasBatchNorm& p = job.p;
  const int64_t size = kBatchNormSlots * p.channels, sums = kBatchNormSums * p.channels;
  if (!needs_sums(p)) memset(p.partial, 0, size_t(sums) * sizeof(double));
  for (int64_t block = 1; needs_sums(p) && block < job.blocks; ++block)
    for (int64_t i = 0; i < sums; ++i) p.partial[i] += p.partial[block * size + i];
  for (int64_t c = 0; c < p.channels; ++c) {
    double* const slots = p.partial + c;
    BatchNormTerms<double> sum;
    double each[kBatchNormSlots];
    for (int k = 0; k < kBatchNormSums; ++k) each[k] = slots[k * p.channels];
    memcpy(&sum, each, sizeof(sum));
    const BatchNormCoefficients made = coefficients(
        sum, double(p.batch * p.pixels), at<T>(p.weight, c, 1), at<T>(p.invstd, c, 0), at<T>(p.weight_cotangent, c, 0),
        at<T>(p.bias_cotangent, c, 0), p.training);
    memcpy(each, &made, sizeof(made));
    for (int k = 0; k < kBatchNormSlots; ++k) slots[k * p.channels] = each[k];
    if (p.weight_grad) static_cast<T*>(p.weight_grad)[c] = T(made.weight);
  }
}

template <template <class, class, int> class Body, class T, class S> void pass(Job job, int threads) {
  // Units are as many channels as the strips of the instruction set are wide.
  const Isa isa = current_isa();
  const int64_t wide = isa == kV4 ? Strips<T, S, 64>::kWide : isa == kV3 ? Strips<T, S, 32>::kWide : Strips<T, S, 16>::kWide;
  job.tiles = job.rows ? (job.p.channels + wide - 1) / wide : job.p.channels;
  const int64_t units = job.blocks * job.tiles, all = job.p.batch * job.p.channels * job.p.pixels;
  constexpr int64_t kGrain = 32768;  // about what a thread must do to be worth waking
  const int64_t grain = units ? (kGrain * units + all - 1) / (all > 0 ? all : 1) : 1;
  parallel_ranges<Body<T, S, 16>, Body<T, S, 32>, Body<T, S, 64>>(job, units, grain > 0 ? grain : 1, threads);
}

template <class T, class S> int run(const AtlasBatchNorm& p, int threads) {
  if (const int status = status_of(p)) return status;
  Job job = {p, has_channel_rows(p), false, 0, 0};
  // Shares that are worth a unit; whole samples, where they are cut into planes.
  const int64_t size = p.batch * p.pixels, worth = job.rows ? size / 256 : least(size / 16384, p.batch);
  job.blocks = worth < 1 ? 1 : least(worth, p.blocks);
  const int64_t outputs = (p.cotangent_grad.data != nullptr) + (p.x_grad.data != nullptr);
  job.streaming = outgrows_cache(outputs * p.batch * p.channels * p.pixels * int64_t(sizeof(S)));
  if (needs_sums(p)) pass<Sums, T, S>(job, threads);
  fold<T>(job);
  if (outputs) pass<Results, T, S>(job, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_batch_norm(const AtlasBatchNorm* params, const AtlasWhere* where) {
  switch (params->x.dtype) {
    case atlas::kFloat32: return atlas::cpu::run<float, float>(*params, where->threads);
    case atlas::kFloat64: return atlas::cpu::run<double, double>(*params, where->threads);
    case atlas::kFloat16: return atlas::cpu::run<float, atlas::half_t>(*params, where->threads);
    case atlas::kBFloat16: return atlas::cpu::run<float, atlas::bfloat16_t>(*params, where->threads);
    default: return ATLAS_BAD_DTYPE;
  }
}
