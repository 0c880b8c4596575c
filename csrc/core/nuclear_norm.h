// The singular values and vectors of ONE matrix [batch, classes], by one-sided Jacobi rotations (Hestenes 1958): the
// vectors of its shorter side are turned in pairs until all are orthogonal. Their lengths are then the singular values;
// how they were turned gives the other side's vectors. In double precision, and without the square of the matrix, whose
// small singular values would be lost. See atlas_kernels/nuclear_norm.py for the operator.
#pragma once
#include <cmath>

#include "../api.h"
#include "platform.h"

namespace atlas {

constexpr int kNuclearLanes = 8;    // vectors are padded with 0 to a multiple of it
constexpr int kNuclearSweeps = 30;  // at most, over all pairs; six to ten are usual

// How a matrix lies in the workspace: `count` vectors of `length`, each followed by what it has of every vector that
// there was at first; then one number for each; then their products, which are vectors themselves.
struct NuclearLayout {
  int64_t count, length, reach, stride;
  bool rows;  // the vectors are rows of the matrix, else columns

  static ATLAS_HD NuclearLayout of(const AtlasNuclearNorm& p) {
    const bool rows = p.batch <= p.classes;
    const int64_t count = rows ? p.batch : p.classes, length = rows ? p.classes : p.batch;
    const int64_t reach = padded(length);
    return {count, length, reach, reach + padded(count), rows};
  }
  static ATLAS_HD int64_t padded(int64_t size) { return (size + kNuclearLanes - 1) / kNuclearLanes * kNuclearLanes; }

  ATLAS_HD int64_t room() const { return count * (stride + 1 + 2 * padded(count)); }

  // Where an entry of a vector lies in the matrix.
  ATLAS_HD int64_t at(int64_t vector, int64_t entry) const {
    return rows ? vector * length + entry : entry * count + vector;
  }
};

inline int status_of(const AtlasNuclearNorm& p) {
  if (p.batch < 0 || p.classes < 0) return ATLAS_BAD_SIZE;
  return p.room >= NuclearLayout::of(p).room() ? ATLAS_OK : ATLAS_REFUSED;
}

// A power of two that brings `top`, the largest entry, near 1: then no square leaves the range of double precision.
// What is smaller than 2^-1000 stays small, but its square is not 0.
ATLAS_HD double nuclear_scale(double top) {
  int64_t exponent = int64_t(bit_cast<uint64_t>(top) >> 52) - 1023;
  exponent = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  return bit_cast<double>(uint64_t(1023 - exponent) << 52);
}

// Singular values up to this share of the largest count as 0: those that rounding a matrix to T makes of it.
template <class T> ATLAS_HD double nuclear_least(const NuclearLayout& of) {
  return double(of.length) * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
}

// The cosine of two vectors that counts as 0, which is then the largest error of the gradient for this pair; float32
// needs no better. And the square of a length that does, where `squares` is the sum of all: roundings of 0.
template <class T> ATLAS_HD double nuclear_cosine(const NuclearLayout& of) {
  return sizeof(T) == 4 ? 0x1p-36 : double(of.length) * 0x1p-52;
}
ATLAS_HD double nuclear_nothing(double squares) { return squares * 0x1p-104; }

// The two vectors that meet in this round, the earlier one first: everyone meets everyone once in `players` - 1 rounds
// (of an even number of players; one that is not there has the number `count`).
struct NuclearPair {
  int64_t first, second;

  static ATLAS_HD NuclearPair of(int64_t round, int64_t pair, int64_t players) {
    const int64_t turning = players - 1, up = round + pair, down = round - pair;
    const int64_t a = up < turning ? up : up - turning;
    const int64_t b = pair == 0 ? turning : down < 0 ? down + turning : down;
    return a < b ? NuclearPair{a, b} : NuclearPair{b, a};
  }
};

// (u, v) -> (c u - s v, s u + c v), after which u . v = 0.
struct NuclearRotation {
  double c, s;
  bool needed;

  // uu, vv, uv: the products of the two. NaN compares as false, so that it ends the sweeps.
  static ATLAS_HD NuclearRotation of(double uu, double vv, double uv, double cosine, double nothing) {
    const double smaller = uu < vv ? uu : vv;
    if (!(smaller > nothing && uv * uv > cosine * cosine * (uu * vv))) return {1, 0, false};
    const double half = (vv - uu) / (2 * uv), root = sqrt(1 + half * half);
    const double t = 1 / (half < 0 ? half - root : half + root), c = 1 / sqrt(1 + t * t);
    return {c, c * t, true};
  }
};

}  // namespace atlas
