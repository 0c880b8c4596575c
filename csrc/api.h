// The surface that both libraries (CPU, CUDA) export: one params struct and one function per stem. Raw pointers, sizes,
// a device and a stream in; a status out. The core never allocates and never synchronises. Everything is checked
// before it gets here, in atlas_kernels/backends/door.py.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define ATLAS_EXPORT __attribute__((visibility("default")))
#else
#define ATLAS_EXPORT
#endif

extern "C" {

// 0: done. > 0: a CUDA error code. < 0: one of these.
enum AtlasStatus { ATLAS_OK = 0, ATLAS_BAD_DTYPE = -1, ATLAS_BAD_SIZE = -2, ATLAS_NO_CUDA = -3 };

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

// The four l_inf ops are one pass with parts left out:
//   adv' = clip(project(adv + step sign(grad)))        where grad is given, and the sample is active
//   out_x = x;  out_adv = cast = adv'                   where given
//   out_z[k] = clip([project](adv' + radius noise_k))   for k < count
struct AtlasPerturb {
  int64_t batch, channels, pixels;
  AtlasImages adv, grad, x;
  AtlasImages out_x, out_adv, cast, out_z;  // out_z: `count` batches one after another
  AtlasScalar eps, step_size, radius;       // per sample
  AtlasScalar clip_min, clip_max;           // per channel
  const uint8_t* active;                    // per sample; null: all
  const int64_t* key;                       // (seed, base), in the memory of the device
  const int64_t* ids;                       // per sample; null: base + row
  int64_t count;
  int32_t descend, project;
  uint32_t stream, draw;
};

// Sample b is image index[b] of a resident set of 8-bit images, zero-padded, cropped at a place and mirrored left-right
// as the key and its number (ids[b], else index[b]) say: out = (u / 255 - mean) / std. NaN where no such image is.
struct AtlasAugment {
  int64_t count, channels, height, width;  // of the set
  int64_t batch, crop_height, crop_width, padding;
  const uint8_t* images;
  AtlasImages out;
  AtlasScalar mean, std;  // per channel, in the compute type: fp64 if out is fp64, else fp32
  const int64_t* index;   // per sample
  const int64_t* key;     // (seed, base); null: the crop lies at the top left, and nothing is mirrored
  const int64_t* ids;     // per sample, or null
  int32_t channels_last;  // of the set
  int32_t flip;
  uint32_t stream, draw;
};

// sum_j w_ij ||h_adv_i - h_j|| of every adversary i, times `factor`; w_ij = 1 for labels that are equal, else `other`.
struct AtlasPairwise {
  int64_t batch, features;
  const void *h, *h_adv;   // dense [batch, features], both of `dtype`
  const int64_t* labels;
  void *value, *total;     // per adversary, and their sum, in the compute type (fp64 if h is, else fp32); null: not wanted
  void *grad, *adv_grad;   // of the total by h and by h_adv, in the compute type; null: not wanted
  double* partial;         // workspace [ceil(features / 32), batch]
  double other, factor;
  int32_t dtype, squared;  // squared: the squared l2 distance, else l1
};

// The l2 and l1 operators, and projections in any norm (core/perturb_norms.h numbers them). Results lie in out and cast:
//   adv' = clip(project(adv + step grad / ||grad||))    without a step where there is no grad; l1 with `largest` > 0: along
//                                                       the sign of that many of the largest entries instead
//   adv' = clip(x + eps U^(1/D) z / ||z||)              where key is given; z normal (l2) or Laplace (l1); adv is x
struct AtlasPerturbNorm {
  int64_t batch, channels, pixels;
  AtlasImages adv, grad, x, out, cast;
  AtlasScalar eps, step_size;      // per sample
  AtlasScalar clip_min, clip_max;  // per channel
  const uint8_t* active;           // per sample; null: all
  const int64_t *key, *ids;        // as in AtlasPerturb
  int64_t largest;
  int32_t norm, descend;
  uint32_t stream, draw;
};

// Logits and what is shaped like them: dense [batch, classes], all of one call in one dtype.
enum AtlasObjective {
  ATLAS_OBJECTIVE_CE = 0,
  ATLAS_OBJECTIVE_KL = 1,  // KL(softmax(reference) || softmax(logits))
  ATLAS_OBJECTIVE_MARGIN = 2,
  ATLAS_OBJECTIVE_DLR = 3,
  ATLAS_OBJECTIVE_DLR_TARGETED = 4,
};

// Per sample: cotangent = d(objective)/d(logits) and value = objective, both negated if `descend`; correct = whether the
// prediction is the label; kappa += correct. Null: not wanted, or, for an input, absent.
struct AtlasObjectives {
  int64_t batch, classes;
  const void *logits, *reference;
  const int64_t *labels, *targets;
  void* cotangent;
  uint8_t* correct;
  int64_t* kappa;
  void* value;  // in the compute type: fp64 if the logits are fp64, else fp32
  int32_t dtype, objective, descend;
};

enum AtlasLoss {
  ATLAS_LOSS_CROSS_ENTROPY = 0,  // parameter: label smoothing
  ATLAS_LOSS_KL_DIV = 1,         // KL(softmax(logits) || softmax(adv_logits))
  ATLAS_LOSS_TRADES = 2,         // parameter: beta
  ATLAS_LOSS_MART = 3,           // parameter: beta
  ATLAS_LOSS_ENTROPY = 4,
  ATLAS_LOSS_MARGIN = 5,
  ATLAS_LOSS_DLR = 6,
  ATLAS_LOSS_LOGIT_PAIRING = 7,
  ATLAS_LOSS_ATLAS = 8,
};

// The terms that atlas_loss is made of: kl, ce, logit; none.
enum AtlasTerm { ATLAS_TERM_KL = 0, ATLAS_TERM_CE = 1, ATLAS_TERM_LOGIT = 2, ATLAS_TERM_NONE = 3 };

// value[i] = weights[i] * loss_i;  total = scale * sum of value;  grads = scale * d(sum of value)/d(logits).
struct AtlasLosses {
  int64_t batch, classes;
  const void *logits, *adv_logits;  // atlas_loss: logits = [x; adv; z_1; ..; z_n] in one, x unless global is none
  const int64_t *labels, *targets;
  const void* weights;              // in the compute type; null: 1
  void *value, *total;              // in the compute type; total may be null
  void *grad, *adv_grad;            // null: not wanted
  void* terms;                      // atlas_loss: [3, batch] CE, LOCAL, GLOBAL in the compute type, or null
  double parameter, scale, local_weight, global_weight;
  int64_t neighbours;
  int32_t dtype, loss, local, global;
};

// out[i] = sigmoid(2 lam + 10/h (h - kappa[i])), h = steps / 2 rounded down, divided by the mean over the batch.
struct AtlasGairatWeights {
  int64_t batch, steps;
  const int64_t* kappa;
  float* out;
  double lam;
};

// The CUDA library only. Version numbers as CUDA writes them (13000); driver and devices are 0 where there are none.
ATLAS_EXPORT int atlas_cuda_runtime(int* built, int* driver, int* devices);
ATLAS_EXPORT const char* atlas_cuda_error(int status);

ATLAS_EXPORT int atlas_perturb(const AtlasPerturb* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_augment(const AtlasAugment* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_pairwise(const AtlasPairwise* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_perturb_norm(const AtlasPerturbNorm* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_losses(const AtlasLosses* params, const AtlasWhere* where);
ATLAS_EXPORT int atlas_gairat_weights(const AtlasGairatWeights* params, const AtlasWhere* where);

}  // extern "C"
