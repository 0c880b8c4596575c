// The surface that both libraries (CPU, CUDA) export: one params struct and one function per stem. Raw pointers, sizes,
// a device and a stream in; a status out. The core never allocates and never synchronises. The door (bindings.cpp) checks
// every tensor before its address gets here; whether arguments fit each other, the functions themselves ask.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define ATLAS_EXPORT __attribute__((visibility("default")))
#else
#define ATLAS_EXPORT
#endif

extern "C" {

// 0: done. > 0: a CUDA error code. < 0: one of these.
// ATLAS_REFUSED: arguments do not fit each other; backends/guard.py says which.
enum AtlasStatus { ATLAS_OK = 0, ATLAS_BAD_DTYPE = -1, ATLAS_BAD_SIZE = -2, ATLAS_NO_CUDA = -3, ATLAS_REFUSED = -4 };

struct AtlasWhere {
  int32_t device;   // CUDA device index; -1: CPU
  int32_t threads;  // CPU threads to use at most
  void* stream;     // cudaStream_t
};

// A dense batch of images. Order in memory: [batch, channels, pixels], or [batch, pixels, channels] if channels_last.
struct AtlasImages {
  void* data;  // null: absent
  int32_t dtype, channels_last;
};

// One number, or one per row (sample or channel) in the compute type: fp64 if adv is fp64, else fp32.
struct AtlasScalar {
  double value;
  const void* per_row;  // null: `value` for all
};

// A params struct lists its fields once, as F(type, name). The door (bindings.cpp) fills them by name: what the table in
// atlas_kernels/schema.py declares, arguments and sides of tensors; what it does not name stays 0.
#define ATLAS_FIELD(type, name) type name;

// The four l_inf ops are one pass with parts left out:
//   adv' = clip(project(adv + step sign(grad)))        where grad is given, and the sample is active
//   adv' = clip(project(adv + m (adv' - adv) + (1 - m) (adv - old)))   of that adv', where old is given; m: momentum
//   z_k = clip([project](adv' + radius noise_k))       for k < count; projected if `project`, or x is there without grad
//   out = [x;] [adv';] z_0; z_1; ...                   x if `include_x`, adv' if there is a grad; cast = adv'
// With labels x is a noise for each of the `classes`, and the noise of z is LIET's (core/perturb.h); there is no step then.
// Per sample: eps, step_size, momentum, radius, active (null: all), ids (null: base + row). Per channel: clip_min, clip_max. key:
// (seed, base), in the memory of the device. rows: of out.
#define ATLAS_PERTURB(F) \
  F(int64_t, batch) F(int64_t, channels) F(int64_t, pixels) F(int64_t, rows) \
  F(AtlasImages, adv) F(AtlasImages, old) F(AtlasImages, grad) F(AtlasImages, x) \
  F(AtlasImages, out) F(AtlasImages, cast) \
  F(AtlasScalar, eps) F(AtlasScalar, step_size) F(AtlasScalar, momentum) F(AtlasScalar, radius) \
  F(AtlasScalar, clip_min) F(AtlasScalar, clip_max) \
  F(const uint8_t*, active) F(const int64_t*, key) F(const int64_t*, ids) \
  F(int64_t, count) F(int32_t, descend) F(int32_t, project) F(int32_t, include_x) \
  F(uint32_t, stream) F(uint32_t, draw) \
  F(const int64_t*, labels) F(int64_t, classes) F(int64_t, share_low) F(int64_t, share_high)
struct AtlasPerturb { ATLAS_PERTURB(ATLAS_FIELD) };

// Sample b is image index[b] of a resident set of 8-bit images, zero-padded, cropped at a place and mirrored left-right
// as the key and its number (ids[b], else index[b]) say: out = (u / 255 - mean) / std. NaN where no such image is.
// count, channels, height, width: of the set. Without a key the crop lies at the top left, and nothing is mirrored.
#define ATLAS_AUGMENT(F) \
  F(int64_t, count) F(int64_t, channels) F(int64_t, height) F(int64_t, width) \
  F(int64_t, batch) F(int64_t, crop_height) F(int64_t, crop_width) F(int64_t, padding) \
  F(AtlasImages, images) F(AtlasImages, out) F(AtlasScalar, mean) F(AtlasScalar, std) \
  F(const int64_t*, index) F(const int64_t*, key) F(const int64_t*, ids) \
  F(int32_t, flip) F(uint32_t, stream) F(uint32_t, draw)
struct AtlasAugment { ATLAS_AUGMENT(ATLAS_FIELD) };

// sum_j w_ij ||h_adv_i - h_j|| of every adversary i, times `factor`; w_ij = 1 for labels that are equal, else
// other = 1 - 1/scale. h, h_adv: dense [batch, features], of `dtype`. value: per adversary, total: their sum, grad and
// adv_grad: of the total by h and by h_adv; in the compute type, null: not wanted. squared: the squared l2 distance, else
// l1. partial: workspace [blocks, batch], blocks = ceil(features / 32) or more.
#define ATLAS_PAIRWISE(F) \
  F(int64_t, batch) F(int64_t, features) F(int64_t, blocks) F(const void*, h) F(const void*, h_adv) \
  F(const int64_t*, labels) F(void*, value) F(void*, total) F(void*, grad) F(void*, adv_grad) \
  F(double*, partial) F(double, scale) F(double, other) F(double, factor) \
  F(int32_t, dtype) F(int32_t, squared)
struct AtlasPairwise { ATLAS_PAIRWISE(ATLAS_FIELD) };

// The second derivative of BatchNorm, see core/batch_norm.h. x, the cotangents and what is written: of one dtype and order.
// mean, invstd (of the batch if `training`, else constants) and what is per channel: in the compute type. Null: 1 for the
// weight, 0 for a cotangent; not wanted. partial: workspace [blocks, 8, channels]; sums of a share of the batch, then, in
// the first block, the coefficients of the results.
#define ATLAS_BATCH_NORM(F) \
  F(int64_t, batch) F(int64_t, channels) F(int64_t, pixels) F(int64_t, blocks) \
  F(AtlasImages, x) F(AtlasImages, cotangent) F(AtlasImages, x_cotangent) \
  F(AtlasImages, cotangent_grad) F(AtlasImages, x_grad) F(void*, weight_grad) \
  F(const void*, mean) F(const void*, invstd) F(const void*, weight) \
  F(const void*, weight_cotangent) F(const void*, bias_cotangent) \
  F(double*, partial) F(int32_t, training)
struct AtlasBatchNorm { ATLAS_BATCH_NORM(ATLAS_FIELD) };

// The sum of the singular values of d [batch, classes] in dtype, and its gradient; in the compute type. grad: null: not
// wanted. work: workspace, see core/nuclear_norm.h; room: how much of it.
#define ATLAS_NUCLEAR_NORM(F) \
  F(int64_t, batch) F(int64_t, classes) F(int64_t, room) F(const void*, d) F(void*, value) F(void*, grad) \
  F(double*, work) F(int32_t, dtype)
struct AtlasNuclearNorm { ATLAS_NUCLEAR_NORM(ATLAS_FIELD) };

// The l2 and l1 operators, and projections in any norm (core/perturb_norms.h numbers them). Results lie in out and cast:
//   adv' = clip(project(adv + step grad / ||grad||))    without a step where there is no grad; l1 with `largest` > 0: along
//                                                       the sign of that many of the largest entries instead
//   adv' = clip(project(adv + m (adv' - adv) + (1 - m) (adv - old)))    of that adv', where old is given, in l2; m: momentum
//   adv' = clip(project(adv + step / n * sign(grad)))   where old is given, in l1: n entries of the gradient move, the
//                                                       largest_rows[b] largest and those that tie, none that is 0
//   adv' = clip(x + eps U^(1/D) z / ||z||)              where key is given; z normal (l2) or Laplace (l1); adv is x
#define ATLAS_PERTURB_NORMS(F) \
  F(int64_t, batch) F(int64_t, channels) F(int64_t, pixels) \
  F(AtlasImages, adv) F(AtlasImages, old) F(AtlasImages, grad) F(AtlasImages, x) \
  F(AtlasImages, out) F(AtlasImages, cast) \
  F(AtlasScalar, eps) F(AtlasScalar, step_size) F(AtlasScalar, momentum) \
  F(AtlasScalar, clip_min) F(AtlasScalar, clip_max) \
  F(const uint8_t*, active) F(const int64_t*, key) F(const int64_t*, ids) \
  F(int64_t, largest) F(const int64_t*, largest_rows) \
  F(int32_t, norm) F(int32_t, descend) F(uint32_t, stream) F(uint32_t, draw)
struct AtlasPerturbNorms { ATLAS_PERTURB_NORMS(ATLAS_FIELD) };

// FAB's step towards the plane gap + <grad, z - adv> = 0 (core/hyperplane.h), with d and d0 the shortest ways there from
// adv and x in the range: out = clip((1 - alpha) (adv + overshoot d) + alpha (x + overshoot d0)), alpha = min(|d| / (|d| +
// |d0|), alpha_max). gap: [batch], in the compute type.
#define ATLAS_HYPERPLANE(F) \
  F(int64_t, batch) F(int64_t, channels) F(int64_t, pixels) \
  F(AtlasImages, adv) F(AtlasImages, grad) F(AtlasImages, x) F(AtlasImages, out) \
  F(AtlasScalar, clip_min) F(AtlasScalar, clip_max) F(const void*, gap) \
  F(double, alpha_max) F(double, overshoot) F(int32_t, norm)
struct AtlasHyperplane { ATLAS_HYPERPLANE(ATLAS_FIELD) };

// FGSM-PGI's memory (core/stored.h). Of sample b, d and m are the rows index[b] of stored and momentum, `count` in all:
//   out = clip(x + d)                                  where there is no grad, else
//   out = clip(x + ball(d + step sign(grad)));  m <- grad / ||grad||_1 + decay m;  d <- ball(d + step sign(m)), and so
//   that x + d stays in the range. ||grad||_1 is that of the whole batch; without one that is positive and finite,
// stored and momentum stay as they are. NaN in out where the store has no such row. partial: workspace [blocks], sums
// of shares of the gradient.
#define ATLAS_STORED(F) \
  F(int64_t, batch) F(int64_t, channels) F(int64_t, pixels) F(int64_t, count) F(int64_t, blocks) \
  F(AtlasImages, x) F(AtlasImages, grad) F(AtlasImages, stored) F(AtlasImages, momentum) F(AtlasImages, out) \
  F(AtlasScalar, eps) F(AtlasScalar, step_size) F(AtlasScalar, clip_min) F(AtlasScalar, clip_max) \
  F(const int64_t*, index) F(double*, partial) F(double, decay)
struct AtlasStored { ATLAS_STORED(ATLAS_FIELD) };

// Logits and what is shaped like them: dense [batch, classes], all of one call in one dtype.
enum AtlasObjective {
  ATLAS_OBJECTIVE_CE = 0,
  ATLAS_OBJECTIVE_KL = 1,  // KL(softmax(reference) || softmax(logits))
  ATLAS_OBJECTIVE_MARGIN = 2,
  ATLAS_OBJECTIVE_DLR = 3,
  ATLAS_OBJECTIVE_DLR_TARGETED = 4,
};

// Per sample: cotangent = d(objective)/d(logits) and value = objective, both negated if `descend`; correct = whether the
// prediction is the label; kappa += correct. Null: not wanted, or, for an input, absent. value: in the compute type, fp64
// if the logits are fp64, else fp32.
#define ATLAS_OBJECTIVES(F) \
  F(int64_t, batch) F(int64_t, classes) F(const void*, logits) F(const void*, reference) \
  F(const int64_t*, labels) F(const int64_t*, targets) \
  F(void*, cotangent) F(uint8_t*, correct) F(int64_t*, kappa) F(void*, value) \
  F(int32_t, dtype) F(int32_t, objective) F(int32_t, descend)
struct AtlasObjectives { ATLAS_OBJECTIVES(ATLAS_FIELD) };

// The losses by the names of their operators; each numbers itself. parameter: label smoothing or beta. kl_div:
// KL(softmax(logits) || softmax(adv_logits)). soft_cross_entropy: of the distributions [batch, classes].
#define ATLAS_LOSS_NAMES(F) \
  F(cross_entropy) F(kl_div) F(trades_loss) F(mart_loss) F(entropy) F(margin_loss) F(dlr_loss) \
  F(logit_pairing) F(soft_cross_entropy) F(consistency_loss) F(atlas_loss)
#define ATLAS_LOSS(name) ATLAS_LOSS_##name,
enum AtlasLoss { ATLAS_LOSS_NAMES(ATLAS_LOSS) };

// The terms that atlas_loss is made of: kl, ce, logit; none.
enum AtlasTerm { ATLAS_TERM_KL = 0, ATLAS_TERM_CE = 1, ATLAS_TERM_LOGIT = 2, ATLAS_TERM_NONE = 3 };

// The distances of consistency_loss.
enum AtlasDistance {
  ATLAS_DISTANCE_LOGIT = 0, ATLAS_DISTANCE_PROB = 1, ATLAS_DISTANCE_JS = 2, ATLAS_DISTANCE_KL = 3
};

// value[i] = weights[i] * loss_i;  total = scale * sum of value;  grads = scale * d(sum of value)/d(logits).
// atlas_loss: logits = [x; adv; z_1; ..; z_n] in one, x unless global_term is none; `rows` in all; terms: [3, batch] CE,
// LOCAL, GLOBAL. consistency_loss: of the labels or, where they are given, the distributions; adv_logits are those that
// `distance_weight` ties the logits to; terms: [2, batch] CE, distance. weights (null: 1), distributions, value, total
// and terms are in the compute type; null: not wanted.
#define ATLAS_LOSSES(F) \
  F(int64_t, batch) F(int64_t, classes) F(int64_t, rows) \
  F(const void*, logits) F(const void*, adv_logits) \
  F(const int64_t*, labels) F(const int64_t*, targets) F(const void*, distributions) F(const void*, weights) \
  F(void*, value) F(void*, total) F(void*, grad) F(void*, adv_grad) F(void*, terms) \
  F(double, parameter) F(double, scale) F(double, local_weight) F(double, global_weight) \
  F(AtlasScalar, distance_weight) F(int64_t, neighbours) F(int32_t, dtype) F(int32_t, loss) \
  F(int32_t, local) F(int32_t, global_term) F(int32_t, distance)
struct AtlasLosses { ATLAS_LOSSES(ATLAS_FIELD) };

// out[i] = sigmoid(2 lam + 10/h (h - kappa[i])), h = steps / 2 rounded down, divided by the mean over the batch.
#define ATLAS_GAIRAT_WEIGHTS(F) \
  F(int64_t, batch) F(int64_t, steps) F(const int64_t*, kappa) F(float*, out) F(double, lam)
struct AtlasGairatWeights { ATLAS_GAIRAT_WEIGHTS(ATLAS_FIELD) };

// The CUDA library only. Version numbers as CUDA writes them (13000); driver and devices are 0 where there are none.
ATLAS_EXPORT int atlas_cuda_runtime(int* built, int* driver, int* devices);
ATLAS_EXPORT const char* atlas_cuda_error(int status);

// One for each stem, and for an operator that has a struct of its own.
ATLAS_EXPORT int atlas_perturb(const AtlasPerturb* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_augment(const AtlasAugment* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_pairwise(const AtlasPairwise* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_batch_norm(const AtlasBatchNorm* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_nuclear_norm(const AtlasNuclearNorm* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_perturb_norms(const AtlasPerturbNorms* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_hyperplane(const AtlasHyperplane* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_stored(const AtlasStored* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_losses(const AtlasLosses* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_gairat_weights(const AtlasGairatWeights* params, const AtlasWhere* where);

}  // extern "C"
