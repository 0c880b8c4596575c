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

// T: the compute type; S: the stored one; Bytes: of a register.
template <class T, class S, int Bytes> struct Strips {
  typedef T Values __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(T), kAtOnce = Bytes == 64 ? 4 : 2, kWide = kLanes * kAtOnce;

  // Neighbours in memory, of one channel or one of each. Lanes beyond the edge are 0.
  struct Strip {
    Values of[kAtOnce];
  };

  static ATLAS_HD Strip load(const AtlasImages& from, int64_t first, int64_t count) {
    const S* s = static_cast<const S*>(from.data) + first;
    Strip strip;
    ATLAS_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      alignas(Bytes) T lanes[kLanes] = {};
      const int64_t left = count - i * kLanes;
      if (left >= kLanes) {
        ATLAS_IVDEP for (int l = 0; l < kLanes; ++l) lanes[l] = convert<T>(s[i * kLanes + l]);
      } else {
        for (int64_t l = 0; l < left; ++l) lanes[l] = convert<T>(s[i * kLanes + l]);
      }
      memcpy(&strip.of[i], lanes, Bytes);
    }
    return strip;
  }

  static ATLAS_HD void store(const AtlasImages& to, int64_t first, int64_t count, const Strip& strip, bool streaming) {
    S* const s = static_cast<S*>(to.data) + first;
    alignas(64) T lanes[kWide];
    alignas(64) S stored[kWide];
    memcpy(lanes, &strip, sizeof(strip));
    ATLAS_IVDEP for (int l = 0; l < kWide; ++l) stored[l] = convert<S>(lanes[l]);
    if (streaming) stream_out(s, stored, count);
    else if (count == kWide) memcpy(s, stored, sizeof(stored));
    else for (int64_t l = 0; l < count; ++l) s[l] = stored[l];
  }

  // What belongs to the channels of a unit.
  template <class N> static ATLAS_HD Strip spread(const Unit& at, const N* per_channel) {
    alignas(64) T lanes[kWide];
    for (int64_t l = 0; l < kWide; ++l) lanes[l] = T(per_channel[at.channel + least(l, at.width - 1)]);
    Strip strip;
    memcpy(&strip, lanes, sizeof(strip));
    return strip;
  }

  static ATLAS_HD Strip spread_mean(const Job& job, const Unit& at) {
    return needs_x(job.p) ? spread(at, static_cast<const T*>(job.p.mean)) : Strip{};
  }

  static ATLAS_HD Strip centred(const Job& job, int64_t first, int64_t count, const Strip& mean) {
    if (!needs_x(job.p)) return {};
    Strip strip = load(job.p.x, first, count);
    ATLAS_UNROLL for (int i = 0; i < kAtOnce; ++i) strip.of[i] -= mean.of[i];
    return strip;
  }

  // Calls use(first element, how many) for every strip.
  template <class Use> static ATLAS_HD void walk(const Unit& at, Use&& use) {
    for (int64_t i = at.first; i < at.last; ++i)
      for (int64_t j = 0; j < at.length; j += kWide) use(at.begin + i * at.stride + j, least(kWide, at.length - j));
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
    Base::walk(at, [&](int64_t first, int64_t count) ATLAS_INLINE_LAMBDA {
      const Strip v = Base::load(p.x_cotangent, first, count), g = Base::load(p.cotangent, first, count);
      const Strip c = Base::centred(job, first, count, mean);
      ATLAS_UNROLL for (int i = 0; i < kAtOnce; ++i) sums[i].add(v.of[i], g.of[i], c.of[i]);
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
  using typename Base::Strip;
  using Base::kAtOnce, Base::kWide;

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
    Base::walk(at, [&](int64_t first, int64_t count) ATLAS_INLINE_LAMBDA {
      const Strip c = Base::centred(job, first, count, mean), v = Base::load(p.x_cotangent, first, count);
      Strip out;
      if (p.cotangent_grad.data) {
        ATLAS_UNROLL for (int i = 0; i < kAtOnce; ++i)
          out.of[i] = g_v.of[i] * v.of[i] + g_c.of[i] * c.of[i] + g_1.of[i];
        Base::store(p.cotangent_grad, first, count, out, job.streaming);
      }
      if (p.x_grad.data) {
        const Strip g = Base::load(p.cotangent, first, count);
        ATLAS_UNROLL for (int i = 0; i < kAtOnce; ++i) {
          out.of[i] = x_g.of[i] * g.of[i];
          if (p.training) out.of[i] = (out.of[i] + x_v.of[i] * v.of[i]) + (x_c.of[i] * c.of[i] + x_1.of[i]);
        }
        Base::store(p.x_grad, first, count, out, job.streaming);
      }
    });
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
