#include "../core/nuclear_norm.h"

#include "isa.h"

namespace atlas::cpu {
namespace {

struct Job {
  AtlasNuclearNorm p;
  NuclearLayout at;
};

// As many vectors, of `reach` and with what belongs to them `stride` numbers.
struct Vectors {
  double* first;
  int64_t count, reach, stride;

  ATLAS_HD double* of(int64_t i) const { return first + i * stride; }
};

template <class Use> void with_matrix(const AtlasNuclearNorm& p, Use&& use) {
  switch (p.dtype) {
    case kFloat32: return use(static_cast<const float*>(p.d));
    case kFloat64: return use(static_cast<const double*>(p.d));
    case kFloat16: return use(static_cast<const half_t*>(p.d));
    default: return use(static_cast<const bfloat16_t*>(p.d));
  }
}

// The sweeps, for registers of Bytes. Sums are made in kNuclearLanes parts, whatever the instruction set.
template <class T, int Bytes> struct Sweeps {
  typedef double Values __attribute__((vector_size(Bytes)));
  static constexpr int kLanes = Bytes / sizeof(double), kAtOnce = kNuclearLanes / kLanes;

  struct Lanes {
    Values of[kAtOnce];
    static ATLAS_HD Lanes load(const double* from) {
      Lanes lanes;
      memcpy(&lanes, from, sizeof(lanes));
      return lanes;
    }
    ATLAS_HD double sum() const {
      double each[kNuclearLanes];
      memcpy(each, of, sizeof(each));
      return ((each[0] + each[1]) + (each[2] + each[3])) + ((each[4] + each[5]) + (each[6] + each[7]));
    }
  };

  static ATLAS_HD double product(const double* u, const double* v, int64_t reach) {
    Lanes sums = {};
    for (int64_t k = 0; k < reach; k += kNuclearLanes) {
      const Lanes a = Lanes::load(u + k), b = Lanes::load(v + k);
      ATLAS_UNROLL for (int r = 0; r < kAtOnce; ++r) sums.of[r] += a.of[r] * b.of[r];
    }
    return sums.sum();
  }

  // Makes two vectors orthogonal; false: they were.
  static ATLAS_HD bool meet(double* u, double* v, const Vectors& all, double cosine, double nothing) {
    Lanes uu = {}, vv = {}, uv = {};
    for (int64_t k = 0; k < all.reach; k += kNuclearLanes) {
      const Lanes a = Lanes::load(u + k), b = Lanes::load(v + k);
      ATLAS_UNROLL for (int r = 0; r < kAtOnce; ++r) {
        uu.of[r] += a.of[r] * a.of[r];
        vv.of[r] += b.of[r] * b.of[r];
        uv.of[r] += a.of[r] * b.of[r];
      }
    }
    const NuclearRotation turn = NuclearRotation::of(uu.sum(), vv.sum(), uv.sum(), cosine, nothing);
    if (!turn.needed) return false;
    for (int64_t k = 0; k < all.stride; k += kNuclearLanes) {
      const Lanes a = Lanes::load(u + k), b = Lanes::load(v + k);
      Lanes c, d;
      ATLAS_UNROLL for (int r = 0; r < kAtOnce; ++r) {
        c.of[r] = turn.c * a.of[r] - turn.s * b.of[r];
        d.of[r] = turn.s * a.of[r] + turn.c * b.of[r];
      }
      memcpy(u + k, &c, sizeof(c));
      memcpy(v + k, &d, sizeof(d));
    }
    return true;
  }

  static ATLAS_HD void make_orthogonal(const Vectors& all, double cosine) {
    double squares = 0;
    for (int64_t i = 0; i < all.count; ++i) squares += product(all.of(i), all.of(i), all.reach);
    const double nothing = nuclear_nothing(squares);
    const int64_t players = all.count + all.count % 2;
    bool moved = true;
    for (int sweep = 0; moved && sweep < kNuclearSweeps; ++sweep) {
      moved = false;
      for (int64_t round = 0; round + 1 < players; ++round)
        for (int64_t pair = 0; pair < players / 2; ++pair) {
          const NuclearPair who = NuclearPair::of(round, pair, players);
          if (who.second < all.count) moved |= meet(all.of(who.first), all.of(who.second), all, cosine, nothing);
        }
    }
  }

  // What makes the products of long vectors orthogonal makes the vectors so, up to the square of their condition: most
  // of the turning is then done in a short space.
  static ATLAS_HD void turn_by_products(const Vectors& all, const Vectors& products, double cosine) {
    for (int64_t i = 0; i < all.count; ++i) {
      memset(products.of(i), 0, size_t(products.stride) * sizeof(double));
      products.of(i)[products.reach + i] = 1;
      for (int64_t j = 0; j <= i; ++j) products.of(i)[j] = products.of(j)[i] = product(all.of(i), all.of(j), all.reach);
    }
    make_orthogonal(products, cosine);
    for (int64_t k = 0; k < all.reach; k += kNuclearLanes) {
      for (int64_t j = 0; j < all.count; ++j)  // the products themselves are of no more use
        memcpy(products.of(j), all.of(j) + k, kNuclearLanes * sizeof(double));
      for (int64_t i = 0; i < all.count; ++i) {
        Lanes sums = {};
        for (int64_t j = 0; j < all.count; ++j) {
          const Lanes before = Lanes::load(products.of(j));
          const double part = products.of(i)[products.reach + j];
          ATLAS_UNROLL for (int r = 0; r < kAtOnce; ++r) sums.of[r] += part * before.of[r];
        }
        memcpy(all.of(i) + k, &sums, sizeof(sums));
      }
    }
    for (int64_t i = 0; i < all.count; ++i)
      memcpy(all.of(i) + all.reach, products.of(i) + products.reach, size_t(all.count) * sizeof(double));
  }

  // Of the one matrix there is.
  static ATLAS_HD void run(const Job& job, int64_t, int64_t) {
    const NuclearLayout& at = job.at;
    double* const lengths = job.p.work + at.count * at.stride;
    const int64_t side = NuclearLayout::padded(at.count);
    const Vectors all = {job.p.work, at.count, at.reach, at.stride};
    const Vectors products = {lengths + at.count, at.count, side, 2 * side};
    const double cosine = nuclear_cosine<T>(at);
    if (at.length >= 2 * at.count) turn_by_products(all, products, cosine);
    make_orthogonal(all, cosine);
    for (int64_t i = 0; i < at.count; ++i) lengths[i] = sqrt(product(all.of(i), all.of(i), at.reach));
  }
};

// The matrix, scaled, into the workspace. Returns the scale; 0 for a matrix of zeros, NaN where an entry is not finite.
template <class S> double lay_out(const Job& job, const S* d) {
  const NuclearLayout& at = job.at;
  double top = 0, rest = 0;
  for (int64_t k = 0; k < at.count * at.length; ++k) {
    const double v = convert<double>(d[k]);
    top = v > top ? v : -v > top ? -v : top;
    rest += v - v;  // NaN, if v is not finite
  }
  if (!(rest == 0)) return NAN;
  if (top == 0) return 0;
  const double scale = nuclear_scale(top);
  memset(job.p.work, 0, size_t(at.count * at.stride) * sizeof(double));
  for (int64_t i = 0; i < at.count; ++i) {
    double* const vector = job.p.work + i * at.stride;
    for (int64_t k = 0; k < at.length; ++k) vector[k] = scale * convert<double>(d[at.at(i, k)]);
    vector[at.reach + i] = 1;
  }
  return scale;
}

// How many of the vectors count, whose lengths become what they are divided by; and the sum of those lengths.
template <class T> double weigh(const Job& job) {
  double* const lengths = job.p.work + job.at.count * job.at.stride;
  double top = 0, sum = 0;
  for (int64_t i = 0; i < job.at.count; ++i) top = lengths[i] > top ? lengths[i] : top;
  for (int64_t i = 0; i < job.at.count; ++i) {
    const bool counts = lengths[i] > nuclear_least<T>(job.at) * top;
    sum += counts ? lengths[i] : 0;
    lengths[i] = counts ? 1 / lengths[i] : 0;
  }
  return sum;
}

template <class T> void write_gradient(const Job& job) {
  const NuclearLayout& at = job.at;
  T* const grad = static_cast<T*>(job.p.grad);
  double* const lengths = job.p.work + at.count * at.stride;
  for (int64_t i = 0; i < at.count; ++i)  // the parts of each, over its length
    for (int64_t j = 0; j < at.count; ++j) job.p.work[i * at.stride + at.reach + j] *= lengths[i];
  for (int64_t j = 0; j < at.count; ++j)
    for (int64_t first = 0; first < at.length; first += kNuclearLanes) {
      double sums[kNuclearLanes] = {};
      for (int64_t i = 0; i < at.count; ++i) {
        const double* const vector = job.p.work + i * at.stride;
        const double part = vector[at.reach + j];
        ATLAS_IVDEP for (int64_t l = 0; l < kNuclearLanes; ++l) sums[l] += part * vector[first + l];
      }
      const int64_t left = at.length - first, width = left < kNuclearLanes ? left : kNuclearLanes;
      for (int64_t l = 0; l < width; ++l) grad[at.at(j, first + l)] = T(sums[l]);
    }
}

template <class T> int run(const AtlasNuclearNorm& p) {
  if (const int status = status_of(p)) return status;
  const Job job = {p, NuclearLayout::of(p)};
  double scale = 0;
  with_matrix(p, [&](auto* d) { scale = lay_out(job, d); });
  T& value = *static_cast<T*>(p.value);
  if (!(scale > 0)) {  // of zeros, or of numbers that are none
    value = T(scale);
    for (int64_t k = 0; p.grad && k < p.batch * p.classes; ++k) static_cast<T*>(p.grad)[k] = T(scale);
    return ATLAS_OK;
  }
  parallel_ranges<Sweeps<T, 16>, Sweeps<T, 32>, Sweeps<T, 64>>(job, 1, 1, 1);
  value = T(weigh<T>(job) / scale);
  if (p.grad) write_gradient<T>(job);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_nuclear_norm(const AtlasNuclearNorm* params, const AtlasWhere*) {
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params) : atlas::cpu::run<float>(*params);
}
