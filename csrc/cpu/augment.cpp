#include "../core/augment.h"

#include "tile.h"

namespace atlas::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // pixels of all channels: first as bytes, then as numbers, in L1

struct Job {
  AtlasAugment p;
  AtlasImages out;                           // p.out, as it lies in memory
  int64_t channels, rows, columns;           // of a block, at most
  int64_t by_channels, by_rows, by_columns;  // blocks of a sample
  int64_t seed;
  bool normalises, streaming;
};

// A part of one crop that lies in one piece in the result.
struct Block {
  int64_t sample, channel, channels, row, rows, column, columns;

  ATLAS_HD int64_t size() const { return rows * columns * channels; }

  ATLAS_HD int64_t first(const AtlasAugment& p) const {
    if (p.out.channels_last) return ((sample * p.crop_height + row) * p.crop_width + column) * p.channels + channel;
    return ((sample * p.channels + channel) * p.crop_height + row) * p.crop_width + column;
  }
};

ATLAS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ATLAS_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

ATLAS_HD Block locate(const Job& job, int64_t unit) {
  const AtlasAugment& p = job.p;
  const int64_t column = unit % job.by_columns * job.columns, row = unit / job.by_columns % job.by_rows * job.rows;
  unit /= job.by_columns * job.by_rows;
  const int64_t channel = unit % job.by_channels * job.channels;
  return {unit / job.by_channels, channel, least(job.channels, p.channels - channel),
          row, least(job.rows, p.crop_height - row), column, least(job.columns, p.crop_width - column)};
}

// Rows of pixels to be copied. By value: what is written through bytes could otherwise be any of these numbers.
struct Rows {
  uint8_t* to;
  const uint8_t* from;
  int64_t to_stride, from_stride, count, pixels;

  ATLAS_HD bool next() { return to += to_stride, from += from_stride, --count > 0; }
};

// `size` bytes a row as they lie, in words: the last one ends with the row, and repeats some of the one before.
ATLAS_HD void copy(Rows r, int64_t size) {
  constexpr int64_t kWord = 16;
  do {
    if (size < kWord) {
      for (int64_t i = 0; i < size; ++i) r.to[i] = r.from[i];
      continue;
    }
    for (int64_t i = 0; i + kWord < size; i += kWord) memcpy(r.to + i, r.from + i, kWord);
    memcpy(r.to + size - kWord, r.from + size - kWord, kWord);
  } while (r.next());
}

ATLAS_HD void reverse_word(uint8_t* to, const uint8_t* from) {
  uint64_t word;
  memcpy(&word, from, sizeof(word));
  word = __builtin_bswap64(word);
  memcpy(to, &word, sizeof(word));
}

// Pixels of one byte, the last one first.
ATLAS_HD void reverse(Rows r) {
  constexpr int64_t kWord = 8;
  const int64_t size = r.pixels;
  do {
    if (size < kWord) {
      for (int64_t i = 0; i < size; ++i) r.to[i] = r.from[size - 1 - i];
      continue;
    }
    for (int64_t i = 0; i + kWord < size; i += kWord) reverse_word(r.to + i, r.from + size - kWord - i);
    reverse_word(r.to + size - kWord, r.from);
  } while (r.next());
}

// Any order: pixels are `step` bytes apart, their channels `plane` bytes; they come to lie side by side.
ATLAS_HD void interleave(Rows r, int64_t step, int64_t channels, int64_t plane, bool mirrored) {
  if (mirrored) r.from += (r.pixels - 1) * step, step = -step;
  do {
    for (int64_t j = 0; j < r.pixels; ++j)
      for (int64_t c = 0; c < channels; ++c) r.to[j * channels + c] = r.from[j * step + c * plane];
  } while (r.next());
}

// The block as bytes: rows of the image, cut and turned, among zeros.
ATLAS_HD void fetch(uint8_t* bytes, const AtlasAugment& p, const Block& b, const Window& at, int64_t image) {
  memset(bytes, 0, size_t(b.size()));
  // Which columns and rows of the crop the image covers, in this block.
  const int64_t left = at.mirrored ? at.left + p.crop_width - p.width : -at.left;
  const int64_t column = most(left, b.column), pixels = least(left + p.width, b.column + b.columns) - column;
  const int64_t row = most(-at.top, b.row), count = least(p.height - at.top, b.row + b.rows) - row;
  if (pixels <= 0 || count <= 0) return;

  const int64_t step = p.images.channels_last ? p.channels : 1, plane = p.images.channels_last ? 1 : p.height * p.width;
  const int64_t leftmost = at.column(at.mirrored ? column + pixels - 1 : column, p.crop_width);
  const Rows rows = {bytes + ((row - b.row) * b.columns + column - b.column) * b.channels,
                     bytes_of(p.images) + image * p.height * p.width * p.channels + b.channel * plane +
                         (at.row(row) * p.width + leftmost) * step,
                     b.columns * b.channels, p.width * step, count, pixels};
  const bool same_order = b.channels == step;
  if (same_order && !at.mirrored) copy(rows, pixels * step);
  else if (same_order && step == 1) reverse(rows);
  else if (b.channels == 3) interleave(rows, step, 3, plane, at.mirrored);
  else if (step == 3) interleave(rows, 3, b.channels, plane, at.mirrored);
  else interleave(rows, step, b.channels, plane, at.mirrored);
}

// The set is far larger than the caches, and no processor can guess where its next image lies: each block of a sample
// asks for its share of that.
ATLAS_HD void prefetch_next(const Job& job, int64_t unit) {
  const AtlasAugment& p = job.p;
  const int64_t blocks = job.by_channels * job.by_rows * job.by_columns, sample = unit / blocks + 1;
  const int64_t image = sample < p.batch ? p.index[sample] : -1;
  if (image < 0 || image >= p.count) return;
  const int64_t bytes = p.channels * p.height * p.width, part = (bytes + blocks - 1) / blocks;
  const int64_t begin = unit % blocks * part, end = least(begin + part, bytes);
  for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(bytes_of(p.images) + image * bytes + i);
}

template <class T> ATLAS_HD T at_channel(const AtlasScalar& s, int64_t channel) {
  return s.per_row ? static_cast<const T*>(s.per_row)[channel] : T(s.value);
}

template <class T> struct Body {
  static ATLAS_HD void run(const Job& job, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      prefetch_next(job, unit);
      run_block(job, locate(job, unit));
    }
    if (job.streaming) finish_streaming();
  }

  static ATLAS_HD void run_block(const Job& job, const Block& b) {
    const AtlasAugment& p = job.p;
    const PlaneShape flat = {1, 0};
    const Place at = {0, 0, b.first(p), b.size()};
    alignas(64) T buffer[kBlock];
    T* values = in_place_of(job.out, flat, at, buffer, job.streaming);
    const int64_t image = p.index[b.sample];
    if (image >= 0 && image < p.count) {
      alignas(64) uint8_t bytes[kBlock];
      fetch(bytes, p, b, draw_window(p, job.seed, p.ids ? p.ids[b.sample] : image), image);
      ATLAS_IVDEP for (int64_t i = 0; i < at.size; ++i) values[i] = dequantise<T>(bytes[i]);
      if (job.normalises) normalise(values, p, b);
    } else {
      for (int64_t i = 0; i < at.size; ++i) values[i] = no_image<T>();
    }
    store(job.out, flat, at, values, job.streaming);
  }

  // The channels' numbers are repeated until they fill some vectors.
  static ATLAS_HD void normalise(T* values, const AtlasAugment& p, const Block& b) {
    constexpr int64_t kLanes = 64;
    alignas(64) T mean[kBlock + kLanes], std[kBlock + kLanes];
    const int64_t period = b.channels * ((kLanes + b.channels - 1) / b.channels), size = b.size();
    for (int64_t c = 0; c < b.channels; ++c) {
      const T m = at_channel<T>(p.mean, b.channel + c), s = at_channel<T>(p.std, b.channel + c);
      for (int64_t i = c; i < period; i += b.channels) mean[i] = m, std[i] = s;
    }
    for (int64_t first = 0; first < size; first += period) {
      const int64_t some = least(period, size - first);
      T* v = values + first;
      ATLAS_IVDEP for (int64_t i = 0; i < some; ++i) v[i] = normalised(v[i], mean[i], std[i]);
    }
  }
};

Job plan(const AtlasAugment& p) {
  Job job = {};
  job.p = p;
  job.out = {p.out.data, p.out.dtype, false};
  job.channels = p.out.channels_last ? least(p.channels, kBlock) : 1;
  job.columns = least(p.crop_width, kBlock / job.channels);
  const bool whole_rows = job.columns == p.crop_width && (job.channels == p.channels || !p.out.channels_last);
  job.rows = whole_rows ? least(p.crop_height, kBlock / (job.columns * job.channels)) : 1;
  const auto blocks = [](int64_t size, int64_t at_once) { return (size + at_once - 1) / at_once; };
  job.by_channels = blocks(p.channels, job.channels);
  job.by_rows = blocks(p.crop_height, job.rows);
  job.by_columns = blocks(p.crop_width, job.columns);
  job.seed = p.key ? p.key[0] : 0;
  job.normalises = normalises(p);
  return job;
}

template <class T> int run(const AtlasAugment& p, int threads) {
  if (const int status = status_of(p)) return status;
  const int64_t numel = p.batch * p.channels * p.crop_height * p.crop_width;
  if (numel == 0) return ATLAS_OK;
  Job job = plan(p);
  job.streaming = outgrows_cache(numel * int64_t(sizeof(T)));
  const int64_t units = p.batch * job.by_channels * job.by_rows * job.by_columns;
  constexpr int64_t kGrain = 65536;  // about what a thread must do to be worth waking
  const int64_t unit_cost = job.channels * job.rows * job.columns;
  parallel_ranges<Body<T>>(job, units, (kGrain + unit_cost - 1) / unit_cost, threads);
  return ATLAS_OK;
}

}  // namespace
}  // namespace atlas::cpu

extern "C" int atlas_augment(const AtlasAugment* params, const AtlasWhere* where) {
  if (params->out.dtype < atlas::kFloat32 || params->out.dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  return params->out.dtype == atlas::kFloat64 ? atlas::cpu::run<double>(*params, where->threads)
                                              : atlas::cpu::run<float>(*params, where->threads);
}
