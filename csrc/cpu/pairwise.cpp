#include "../core/pairwise.h"

#include "isa.h"

namespace atlas::cpu {
namespace {

constexpr int64_t kAnchors = 32, kOthers = 64, kColumns = 64;  // of a block; what it holds stays in L1
constexpr int64_t kRun = 16;                                   // pairs that are summed one after another
static_assert(kColumns % kPairColumns == 0 && kOthers < 1 << 15, "");

struct Job {
  AtlasPairwise p;
  int64_t anchor_blocks, column_blocks;
};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

ATLAS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One register of an instruction set.
template <class T, int Bytes> struct Lanes {
  typedef T Values __attribute__((vector_size(Bytes)));
  typedef Count<T> Counts __attribute__((vector_size(Bytes)));
};

template <class T> using Rows = T[kColumns];

template <class T, class S> ATLAS_HD void load_rows(Rows<T>* to, const S* from, int64_t stride, int64_t rows,
                                                    int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    ATLAS_IVDEP for (int64_t c = 0; c < columns; ++c) to[r][c] = convert<T>(from[r * stride + c]);
    for (int64_t c = columns; c < kColumns; ++c) to[r][c] = T(0);  // equal on both sides, these add nothing
  }
}

// A block of features as T: rows from `row`, columns from `column`.
template <class T>
ATLAS_HD void load_block(Rows<T>* to, const AtlasPairwise& p, const void* h, int64_t row, int64_t rows, int64_t column,
                         int64_t columns) {
  const int64_t first = row * p.features + column;
  switch (p.dtype) {
    case kFloat32: return load_rows(to, static_cast<const float*>(h) + first, p.features, rows, columns);
    case kFloat64: return load_rows(to, static_cast<const double*>(h) + first, p.features, rows, columns);
    case kFloat16: return load_rows(to, static_cast<const half_t*>(h) + first, p.features, rows, columns);
    default: return load_rows(to, static_cast<const bfloat16_t*>(h) + first, p.features, rows, columns);
  }
}

template <class T, template <class, class> class Sum, int Bytes> struct Body {
  using Values = typename Lanes<T, Bytes>::Values;
  using Distance = Sum<Values, typename Lanes<T, Bytes>::Counts>;
  static constexpr int64_t kLanes = Bytes / sizeof(T), kAtOnce = Bytes == 64 ? 4 : 2;  // as the registers allow

  // A block of anchors against all others, in a block of columns. Anchors are the adversaries, whose rows have the
  // values; once more with the sides exchanged where the clean features need a gradient.
  struct Block {
    alignas(64) T anchors[kAnchors][kColumns], others[kOthers][kColumns];
    PairWeight<T> weights[kAnchors][kOthers];
    double values[kAnchors], slopes[kAnchors][kColumns];
  };

  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    const int64_t per_side = job.anchor_blocks * job.column_blocks;
    for (int64_t unit = begin; unit < end; ++unit)
      run_block(job.p, unit >= per_side, unit % job.anchor_blocks, unit % per_side / job.anchor_blocks);
  }

  static ATLAS_HD void run_block(const AtlasPairwise& p, bool clean, int64_t anchor_block, int64_t column_block) {
    const int64_t anchor = anchor_block * kAnchors, anchors = least(kAnchors, p.batch - anchor);
    const int64_t column = column_block * kColumns, columns = least(kColumns, p.features - column);
    Block block;
    memset(block.values, 0, sizeof(block.values));
    memset(block.slopes, 0, sizeof(block.slopes));
    load_block(block.anchors, p, clean ? p.h : p.h_adv, anchor, anchors, column, columns);
    for (int64_t other = 0; other < p.batch; other += kOthers) {
      const int64_t others = least(kOthers, p.batch - other);
      load_block(block.others, p, clean ? p.h_adv : p.h, other, others, column, columns);
      for (int64_t i = 0; i < anchors; ++i)
        for (int64_t j = 0; j < others; ++j)
          block.weights[i][j] = pair_weight<T>(p.labels[anchor + i] == p.labels[other + j], T(p.other));
      for (int64_t i = 0; i < anchors; ++i) meet(block, i, others, columns, p.other);
    }
    T* const grad = static_cast<T*>(clean ? p.grad : p.adv_grad);
    for (int64_t i = 0; i < anchors; ++i) {
      if (!clean) p.partial[column_block * p.batch + anchor + i] = block.values[i];
      for (int64_t c = 0; grad && c < columns; ++c)
        grad[(anchor + i) * p.features + column + c] = T(p.factor * block.slopes[i][c]);
    }
  }

  // Anchor i with the others of the block; sums of T reach over one such meeting only.
  static ATLAS_HD void meet(Block& block, int64_t i, int64_t others, int64_t columns, double other) {
    Values value = {};
    for (int64_t c = 0; c < columns; c += kAtOnce * kLanes) {
      Values anchor[kAtOnce], near[kAtOnce];
      Distance sum[kAtOnce] = {};
      memcpy(anchor, &block.anchors[i][c], sizeof(anchor));
      for (int64_t j = 0; j < others;) {  // sums of sums, which round less
        Distance part[kAtOnce] = {};
        for (const int64_t end = least(j + kRun, others); j < end; ++j) {
          memcpy(near, &block.others[j][c], sizeof(near));
          for (int v = 0; v < kAtOnce; ++v) part[v].add(anchor[v], near[v], block.weights[i][j]);
        }
        for (int v = 0; v < kAtOnce; ++v) {
          sum[v].value += part[v].value;
          sum[v].slope += part[v].slope;
        }
      }
      decltype(Sum<T, Count<T>>::slope) slopes[kAtOnce * kLanes];
      for (int v = 0; v < kAtOnce; ++v) {
        value += sum[v].value;
        memcpy(&slopes[v * kLanes], &sum[v].slope, Bytes);
      }
      ATLAS_IVDEP for (int64_t l = 0; l < kAtOnce * kLanes; ++l)
        block.slopes[i][c + l] += Distance::weigh(slopes[l], other);
    }
    T lanes[kLanes];
    memcpy(lanes, &value, Bytes);
    for (int64_t l = 0; l < kLanes; ++l) block.values[i] += double(lanes[l]);
  }
};

template <class T> void reduce(const AtlasPairwise& p, int64_t column_blocks) {
  double total = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    double row = 0;
    for (int64_t block = 0; block < column_blocks; ++block) row += p.partial[block * p.batch + i];
    if (p.value) static_cast<T*>(p.value)[i] = T(p.factor * row);
    total += row;
  }
  if (p.total) *static_cast<T*>(p.total) = T(p.factor * total);
}

template <class T, template <class, class> class Sum>
void pass(const Job& job, int64_t units, int64_t grain, int threads) {
  parallel_ranges<Body<T, Sum, 16>, Body<T, Sum, 32>, Body<T, Sum, 64>>(job, units, grain, threads);
}

template <class T> int run(const AtlasPairwise& p, int threads) {
  if (const int status = status_of(p)) return status;
  const Job job = {p, blocks(p.batch, kAnchors), blocks(p.features, kColumns)};
  const int64_t units = job.anchor_blocks * job.column_blocks * (p.grad ? 2 : 1);
  const int64_t grain = 1 + (1 << 19) / (1 + p.batch * kAnchors * kColumns);
  if (p.squared) pass<T, SquaredSum>(job, units, grain, threads);
  else pass<T, L1Sum>(job, units, grain, threads);
  reduce<T>(p, job.column_blocks);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_pairwise(const AtlasPairwise* params, const AtlasWhere* where) {
  if (params->dtype < atlas::kFloat32 || params->dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->dtype == atlas::kFloat64 ? atlas::cpu::run<double>(atlas::with_other(*params), where->threads)
                                          : atlas::cpu::run<float>(atlas::with_other(*params), where->threads);
}
