// pybind11 over api.h and nothing else. Pointers arrive as integers from backends/door.py, which has checked them.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "api.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

#ifndef ATLAS_BUILD_NOTES
#define ATLAS_BUILD_NOTES ""
#endif

namespace py = pybind11;

namespace {

// What the CUDA library exports, found by name when it is loaded.
struct CudaLibrary {
  decltype(&atlas_perturb) perturb = nullptr;
  decltype(&atlas_augment) augment = nullptr;
  decltype(&atlas_pairwise) pairwise = nullptr;
  decltype(&atlas_perturb_norm) perturb_norm = nullptr;
  decltype(&atlas_objectives) objectives = nullptr;
  decltype(&atlas_losses) losses = nullptr;
  decltype(&atlas_gairat_weights) gairat_weights = nullptr;
  decltype(&atlas_cuda_runtime) runtime = nullptr;
  decltype(&atlas_cuda_error) error = nullptr;
} cuda;

template <class Function> void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the CUDA library has no symbol ") + name);
}

void load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  CudaLibrary found;
  find(library, "atlas_cuda_runtime", found.runtime);
  find(library, "atlas_cuda_error", found.error);
  find(library, "atlas_perturb", found.perturb);
  find(library, "atlas_augment", found.augment);
  find(library, "atlas_pairwise", found.pairwise);
  find(library, "atlas_perturb_norm", found.perturb_norm);
  find(library, "atlas_objectives", found.objectives);
  find(library, "atlas_losses", found.losses);
  find(library, "atlas_gairat_weights", found.gairat_weights);
  cuda = found;
}

// (built with, supported by the driver or 0, devices or 0, first error's text)
py::tuple cuda_runtime() {
  if (!cuda.runtime) throw std::runtime_error("the CUDA library is not loaded: call load_cuda first");
  int built = 0, driver = 0, devices = 0;
  const int status = cuda.runtime(&built, &driver, &devices);
  return py::make_tuple(built, driver, devices, status ? cuda.error(status) : "");
}

std::string explain(int status) {
  switch (status) {
    case ATLAS_BAD_DTYPE: return "dtype not supported";
    case ATLAS_BAD_SIZE: return "negative or impossible size";
    case ATLAS_NO_CUDA: return "the CUDA library is not loaded";
    default: return std::string("CUDA: ") + cuda.error(status);
  }
}

// What a call with that many elements cannot do without is there, by name.
void require(int64_t elements, std::initializer_list<std::pair<const char*, bool>> there) {
  for (const auto& [name, given] : there)
    if (elements > 0 && !given) throw std::invalid_argument(std::string("the address of ") + name + " is null");
}

// Runs the CPU's function or, for a CUDA device, the library's; Python's lock is released meanwhile.
template <class Params>
void call(const char* name, int (*cpu)(const Params*, const AtlasWhere*), int (*gpu)(const Params*, const AtlasWhere*),
          const Params& params, int device, int threads, uintptr_t stream) {
  const AtlasWhere where = {device, threads, reinterpret_cast<void*>(stream)};
  int status;
  {
    py::gil_scoped_release released;
    status = device < 0 ? cpu(&params, &where) : gpu ? gpu(&params, &where) : ATLAS_NO_CUDA;
  }
  if (status != ATLAS_OK) throw std::runtime_error(std::string(name) + ": " + explain(status));
}

// The lowest page is no memory: what points into it is an offset from null.
template <class T = void> T* at(uintptr_t address) {
  if (address && address < 4096) throw std::invalid_argument("there is no memory at address " + std::to_string(address));
  return reinterpret_cast<T*>(address);
}
const int64_t* integers(uintptr_t address) { return at<const int64_t>(address); }
AtlasImages images(uintptr_t data, int format) { return {at(data), format & 3, format >> 2}; }
AtlasScalar scalar(double value, uintptr_t rows) { return {value, at(rows)}; }

void perturb(uintptr_t adv, int adv_format, uintptr_t grad, int grad_format, uintptr_t x, int x_format, uintptr_t out_x,
             int out_x_format, uintptr_t out_adv, int out_adv_format, uintptr_t cast, int cast_format, uintptr_t out_z,
             int out_z_format, int64_t batch, int64_t channels, int64_t pixels, double eps, uintptr_t eps_rows,
             double step_size, uintptr_t step_rows, double radius, uintptr_t radius_rows, double clip_min,
             uintptr_t clip_min_rows, double clip_max, uintptr_t clip_max_rows, uintptr_t active, uintptr_t key,
             uintptr_t ids, int64_t count, bool descend, bool project, uint32_t noise, uint32_t draw, int device,
             int threads, uintptr_t stream) {
  const AtlasPerturb params = {
      batch, channels, pixels, images(adv, adv_format), images(grad, grad_format), images(x, x_format),
      images(out_x, out_x_format), images(out_adv, out_adv_format), images(cast, cast_format),
      images(out_z, out_z_format), scalar(eps, eps_rows), scalar(step_size, step_rows), scalar(radius, radius_rows),
      scalar(clip_min, clip_min_rows), scalar(clip_max, clip_max_rows), at<const uint8_t>(active), integers(key),
      integers(ids), count, descend, project, noise, draw};
  require(batch * channels * pixels, {{"adv", adv}, {"x", x || !(grad || project || out_x)},
                                      {"out_adv", out_adv || !grad}, {"out_z", out_z || count <= 0}});
  call("atlas_perturb", atlas_perturb, cuda.perturb, params, device, threads, stream);
}

void perturb_norm(uintptr_t adv, int adv_format, uintptr_t grad, int grad_format, uintptr_t x, int x_format,
                  uintptr_t out, int out_format, uintptr_t cast, int cast_format, int64_t batch, int64_t channels,
                  int64_t pixels, double eps, uintptr_t eps_rows, double step_size, uintptr_t step_rows,
                  double clip_min, uintptr_t clip_min_rows, double clip_max, uintptr_t clip_max_rows, uintptr_t active,
                  uintptr_t key, uintptr_t ids, int64_t largest, int norm, bool descend, uint32_t noise, uint32_t draw,
                  int device, int threads, uintptr_t stream) {
  const AtlasPerturbNorm params = {
      batch, channels, pixels, images(adv, adv_format), images(grad, grad_format), images(x, x_format),
      images(out, out_format), images(cast, cast_format), scalar(eps, eps_rows), scalar(step_size, step_rows),
      scalar(clip_min, clip_min_rows), scalar(clip_max, clip_max_rows), at<const uint8_t>(active), integers(key),
      integers(ids), largest, norm, descend, noise, draw};
  require(batch * channels * pixels, {{"adv", adv}, {"x", x}, {"out", out}});
  call("atlas_perturb_norm", atlas_perturb_norm, cuda.perturb_norm, params, device, threads, stream);
}

void augment(uintptr_t set, bool channels_last, int64_t count, int64_t channels, int64_t height, int64_t width,
             uintptr_t out, int out_format, int64_t batch, int64_t crop_height, int64_t crop_width, int64_t padding,
             bool flip, double mean, uintptr_t mean_rows, double std, uintptr_t std_rows, uintptr_t index,
             uintptr_t key, uintptr_t ids, uint32_t noise, uint32_t draw, int device, int threads, uintptr_t stream) {
  const AtlasAugment params = {
      count, channels, height, width, batch, crop_height, crop_width, padding, at<const uint8_t>(set),
      images(out, out_format), scalar(mean, mean_rows), scalar(std, std_rows), integers(index), integers(key),
      integers(ids), channels_last, flip, noise, draw};
  require(batch * channels * crop_height * crop_width,
          {{"images", set || count * height * width <= 0}, {"out", out}, {"index", index}});
  call("atlas_augment", atlas_augment, cuda.augment, params, device, threads, stream);
}

void pairwise(uintptr_t h, int dtype, uintptr_t h_adv, uintptr_t labels, uintptr_t value, uintptr_t total,
              uintptr_t grad, uintptr_t adv_grad, uintptr_t partial, int64_t batch, int64_t features, double other,
              double factor, bool squared, int device, int threads, uintptr_t stream) {
  const AtlasPairwise params = {
      batch, features, at(h), at(h_adv), integers(labels), at(value), at(total), at(grad), at(adv_grad),
      at<double>(partial), other, factor, dtype, squared};
  require(batch * features, {{"h", h}, {"h_adv", h_adv}, {"labels", labels}, {"partial", partial}});
  call("atlas_pairwise", atlas_pairwise, cuda.pairwise, params, device, threads, stream);
}

void objectives(int64_t batch, int64_t classes, int dtype, uintptr_t logits, uintptr_t reference, uintptr_t labels,
                uintptr_t targets, int objective, bool descend, uintptr_t cotangent, uintptr_t correct, uintptr_t kappa,
                uintptr_t value, int device, int threads, uintptr_t stream) {
  const AtlasObjectives params = {
      batch, classes, at(logits), at(reference), integers(labels), integers(targets), at(cotangent),
      at<uint8_t>(correct), at<int64_t>(kappa), at(value), dtype, objective, descend};
  const bool kl = objective == ATLAS_OBJECTIVE_KL;
  require(batch * classes,
          {{"logits", logits}, {"reference", reference || !kl}, {"labels", labels || (kl && !correct && !kappa)},
           {"targets", targets || (objective >= ATLAS_OBJECTIVE_CE && objective < ATLAS_OBJECTIVE_DLR_TARGETED)}});
  call("atlas_objectives", atlas_objectives, cuda.objectives, params, device, threads, stream);
}

void losses(int loss, int64_t batch, int64_t classes, int dtype, uintptr_t logits, uintptr_t adv_logits,
            uintptr_t labels, uintptr_t targets, uintptr_t weights, double parameter, double scale, uintptr_t value,
            uintptr_t total, uintptr_t grad, uintptr_t adv_grad, int64_t neighbours, int local, double local_weight,
            int global, double global_weight, uintptr_t terms, int device, int threads, uintptr_t stream) {
  const AtlasLosses params = {
      batch, classes, at(logits), at(adv_logits), integers(labels), integers(targets), at(weights),
      at(value), at(total), at(grad), at(adv_grad), at(terms), parameter, scale, local_weight, global_weight,
      neighbours, dtype, loss, local, global};
  const bool pair = loss == ATLAS_LOSS_KL_DIV || loss == ATLAS_LOSS_LOGIT_PAIRING, one = loss == ATLAS_LOSS_ENTROPY;
  const bool both = pair || loss == ATLAS_LOSS_TRADES || loss == ATLAS_LOSS_MART;
  require(batch * classes, {{"logits", logits}, {"adv_logits", adv_logits || !both}, {"labels", labels || pair || one},
                            {"value", value}});
  call("atlas_losses", atlas_losses, cuda.losses, params, device, threads, stream);
}

void gairat_weights(int64_t batch, int64_t steps, uintptr_t kappa, double lam, uintptr_t out, int device, int threads,
                    uintptr_t stream) {
  const AtlasGairatWeights params = {batch, steps, integers(kappa), at<float>(out), lam};
  require(batch, {{"kappa", kappa}, {"out", out}});
  call("atlas_gairat_weights", atlas_gairat_weights, cuda.gairat_weights, params, device, threads, stream);
}

// The first of `count` class indices that is not in [0, classes); `count` if all are.
int64_t first_outside(uintptr_t indices, int64_t count, int64_t classes) {
  require(count, {{"indices", indices}});
  if (count < 0) throw std::invalid_argument("count is negative");
  return std::find_if(integers(indices), integers(indices) + count, [&](int64_t c) { return c < 0 || c >= classes; }) -
         integers(indices);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("perturb", &perturb);
  m.def("augment", &augment);
  m.def("pairwise", &pairwise);
  m.def("perturb_norm", &perturb_norm);
  m.def("objectives", &objectives);
  m.def("losses", &losses);
  m.def("gairat_weights", &gairat_weights);
  m.def("first_outside", &first_outside);
  m.def("advise_huge_pages", &atlas::cpu::advise_huge_pages);
  m.def("load_cuda", &load_cuda);
  m.def("cuda_runtime", &cuda_runtime);
  m.def("best_isa", [] { return int(atlas::cpu::best_isa()); });
  m.def("current_isa", [] { return int(atlas::cpu::current_isa()); });
  m.def("force_isa", [](int isa) { return atlas::cpu::force_isa(atlas::cpu::Isa(isa)); });
  m.attr("build_notes") = ATLAS_BUILD_NOTES;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
