// The one door to the core: a Plan is made of an operator's line in atlas_kernels/schema.py, and takes the operator's
// arguments as they are. It reads what each tensor is, asks whether that is what the line declares, packs the params
// struct of api.h by the names of its fields, and calls the core. What looks wrong is left to Python, which says why.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "api.h"
#include "core/platform.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "dlpack.h"

#ifndef ATLAS_BUILD_NOTES
#define ATLAS_BUILD_NOTES ""
#endif

namespace py = pybind11;

namespace {

// --- params structs, by the names of their fields -------------------------------------------------------------------

enum class Field { integer, word, low_word, number, images, scalar, address };
constexpr Field field_of(const int64_t*) { return Field::integer; }
constexpr Field field_of(const int32_t*) { return Field::word; }
constexpr Field field_of(const uint32_t*) { return Field::low_word; }
constexpr Field field_of(const double*) { return Field::number; }
constexpr Field field_of(const AtlasImages*) { return Field::images; }
constexpr Field field_of(const AtlasScalar*) { return Field::scalar; }
template <class T> constexpr Field field_of(T* const*) { return Field::address; }

struct Slot {
  Field field;
  size_t offset;
};

using Function = int (*)(const void* params, const AtlasWhere* where);

// What runs a stem, or an operator that has a struct of its own.
struct Entry {
  size_t size;
  std::map<std::string, Slot> fields;
  Function cpu, cuda;
};

template <class Params> Entry entry(int (*cpu)(const Params*, const AtlasWhere*), std::map<std::string, Slot> fields) {
  return {sizeof(Params), std::move(fields), reinterpret_cast<Function>(cpu), nullptr};
}

#define ATLAS_SLOT(type, name) {#name, {field_of(static_cast<type*>(nullptr)), offsetof(Params, name)}},
#define ATLAS_ENTRY(name, Struct, FIELDS) \
  {#name, [] { \
     using Params = Struct; \
     return entry<Params>(&atlas_##name, {FIELDS(ATLAS_SLOT)}); \
   }()}

std::map<std::string, Entry> entries = {
    ATLAS_ENTRY(perturb, AtlasPerturb, ATLAS_PERTURB),
    ATLAS_ENTRY(augment, AtlasAugment, ATLAS_AUGMENT),
    ATLAS_ENTRY(pairwise, AtlasPairwise, ATLAS_PAIRWISE),
    ATLAS_ENTRY(batch_norm, AtlasBatchNorm, ATLAS_BATCH_NORM),
    ATLAS_ENTRY(nuclear_norm, AtlasNuclearNorm, ATLAS_NUCLEAR_NORM),
    ATLAS_ENTRY(perturb_norms, AtlasPerturbNorms, ATLAS_PERTURB_NORMS),
    ATLAS_ENTRY(hyperplane, AtlasHyperplane, ATLAS_HYPERPLANE),
    ATLAS_ENTRY(stored, AtlasStored, ATLAS_STORED),
    ATLAS_ENTRY(objectives, AtlasObjectives, ATLAS_OBJECTIVES),
    ATLAS_ENTRY(losses, AtlasLosses, ATLAS_LOSSES),
    ATLAS_ENTRY(gairat_weights, AtlasGairatWeights, ATLAS_GAIRAT_WEIGHTS),
};

#define ATLAS_NAME(name) #name,
const std::vector<std::string> losses = {ATLAS_LOSS_NAMES(ATLAS_NAME)};

// --- the CUDA library -----------------------------------------------------------------------------------------------

struct {
  decltype(&atlas_cuda_runtime) runtime = nullptr;
  decltype(&atlas_cuda_error) error = nullptr;
} cuda;

template <class T> void find(void* library, const std::string& name, T& function) {
  function = reinterpret_cast<T>(dlsym(library, name.c_str()));
  if (!function) throw std::runtime_error("the CUDA library has no symbol " + name);
}

void load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto found = cuda;
  find(library, "atlas_cuda_runtime", found.runtime);
  find(library, "atlas_cuda_error", found.error);
  for (auto& [name, entry] : entries) find(library, "atlas_" + name, entry.cuda);
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

// --- tensors --------------------------------------------------------------------------------------------------------

struct Torch {
  py::object tensor, is_neg = py::str("is_neg");
  DLPackExchangeAPI* api = nullptr;

  Torch() {
    tensor = py::module_::import("torch").attr("Tensor");
    constexpr const char* kName = "__dlpack_c_exchange_api__";
    if (py::hasattr(tensor, kName))
      api = py::reinterpret_borrow<py::capsule>(tensor.attr(kName)).get_pointer<DLPackExchangeAPI>();
    if (!api || api->version.major != 1 || !api->dltensor_from_py_object_no_sync)
      throw std::runtime_error("this PyTorch has no DLPack 1 exchange functions: install 2.10 or later");
  }
};

// Made by who holds Python's lock, and never freed: Python is gone before it would be.
const Torch& torch() {
  static Torch* found = nullptr;
  if (!found) found = new Torch();
  return *found;
}

// Beside atlas::Dtype: other types; and what a tensor may be that is declared as one of several (schema.Argument).
enum : int { kBytes = 4, kInt64, kBool, kOther, kAnyFloat, kSame, kWide };
const std::map<std::string, int> types = {
    {"images", kAnyFloat}, {"bytes", kBytes}, {"same", kSame}, {"wide", kWide},
    {"int64", kInt64}, {"bool", kBool}, {"float32", atlas::kFloat32}, {"float64", atlas::kFloat64},
};

int dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return kOther;
  switch (t.dtype.code << 8 | t.dtype.bits) {
    case kDLFloat << 8 | 32: return atlas::kFloat32;
    case kDLFloat << 8 | 64: return atlas::kFloat64;
    case kDLFloat << 8 | 16: return atlas::kFloat16;
    case kDLBfloat << 8 | 16: return atlas::kBFloat16;
    case kDLUInt << 8 | 8: return kBytes;
    case kDLInt << 8 | 64: return kInt64;
    case kDLBool << 8 | 8: return kBool;
    default: return kOther;
  }
}

int64_t numel_of(const DLTensor& t) {
  int64_t found = 1;
  for (int i = 0; i < t.ndim; ++i) found *= t.shape[i];
  return found;
}

// Whether the sides lie in memory in this order, the last one innermost.
template <class Order> bool is_dense(const DLTensor& t, Order side) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const int at = side(i);
    if (t.shape[at] != 1 && t.strides[at] != stride) return false;
    stride *= t.shape[at];
  }
  return true;
}

bool is_contiguous(const DLTensor& t) {
  return numel_of(t) == 0 || is_dense(t, [](int i) { return i; });
}

bool is_channels_last(const DLTensor& t) {
  if (t.ndim != 4 && t.ndim != 5) return false;
  return is_dense(t, [&](int i) { return i == t.ndim - 1 ? 1 : i ? i + 1 : 0; });
}

struct Tensor : DLTensor {
  PyObject* object = nullptr;  // null: None
  int dtype = kOther;
  bool channels_last = false;

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  uintptr_t end() const { return begin() + uintptr_t(numel_of(*this)) * (DLTensor::dtype.bits / 8); }
  bool is_float() const { return dtype >= atlas::kFloat32 && dtype <= atlas::kBFloat16; }

  // False: it is no plain memory, or none that is known without a closer look.
  bool read(PyObject* from, bool looked_at) {
    object = from;
    if (!PyObject_TypeCheck(from, reinterpret_cast<PyTypeObject*>(torch().tensor.ptr()))) return false;
    if (torch().api->dltensor_from_py_object_no_sync(from, this)) {
      PyErr_Clear();
      return false;
    }
    data = static_cast<char*>(data) + byte_offset;
    dtype = dtype_of(*this);
    if (looked_at) return true;
    constexpr uintptr_t kLow = uintptr_t(1) << 40;  // LOW of atlas_kernels/layout.py
    if (begin() < kLow) return false;
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(from, torch().is_neg.ptr()));
    if (!negated) throw py::error_already_set();
    return negated.ptr() == Py_False;
  }
};

// Whether all are of the types that eager code hands to an operator: no subclass of Tensor, no other library's number.
bool plain(const py::tuple& args) {
  const auto tensor = reinterpret_cast<PyTypeObject*>(torch().tensor.ptr());
  for (size_t i = 0; i < args.size(); ++i) {
    PyObject* const object = PyTuple_GET_ITEM(args.ptr(), i);
    PyTypeObject* const type = Py_TYPE(object);
    if (type != tensor && object != Py_None && type != &PyFloat_Type && type != &PyLong_Type && type != &PyBool_Type)
      return false;
  }
  return true;
}

// Whether these are plain images, float and dense, of one shape and device, the first two of one type.
bool alike(const py::args& tensors) {
  Tensor first, t;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* const object = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch().tensor.ptr()) || !t.read(object, true)) return false;
    if (t.ndim == 0 || !t.is_float() || !(is_contiguous(t) || is_channels_last(t))) return false;
    if (i == 0) first = t;
    if (t.ndim != first.ndim || !std::equal(t.shape, t.shape + t.ndim, first.shape)) return false;
    if (memcmp(&t.device, &first.device, sizeof(DLDevice)) || (i == 1 && t.dtype != first.dtype)) return false;
  }
  return true;
}

// --- plans ----------------------------------------------------------------------------------------------------------

int on_cuda = -1;  // the device that CPU tensors are taken to be on; -1: the CPU

struct Argument {
  Slot slot;  // of its field
  bool is_tensor, optional, written, in_place;
  int type;
  std::vector<int> sides;  // >= 0: which name; < 0: ~size

  bool is_images() const { return type == kAnyFloat || type == kBytes; }
};

class Plan {
 public:
  // What a call returns, if not the number of the argument that is not as declared.
  enum : int { kDone = -1, kLook = -2, kRefused = -3 };

  Plan(const std::string& stem, const std::string& name, const py::list& arguments, const py::dict& fixed)
      : entry_(entries.at(entries.count(name) ? name : stem)), function_(entries.count(name) ? name : stem),
        blank_(entry_.size, 0) {
    if (entry_.size > kMostBytes || arguments.size() > kMost) throw std::invalid_argument(name + " takes too much");
    for (const py::handle each : arguments) add(each, name);
    for (const auto& [field, value] : fixed) put(&blank_[0], slot(py::str(field)), value.cast<int64_t>());
    const auto loss = std::find(losses.begin(), losses.end(), name);
    if (loss != losses.end()) put(&blank_[0], slot("loss"), loss - losses.begin());
    has_dtype_ = entry_.fields.count("dtype");
    if (has_dtype_) dtype_ = slot("dtype");
    if (lead_ >= 0 && follows(arguments_[lead_])) channels_ = side("channels"), pixels_ = side("pixels");
  }

  // Whether the arguments are as declared, and what is written shares its memory with no other.
  int check(const py::tuple& args, bool looked_at) const {
    Read read;
    return check(args, looked_at, read);
  }

  int call(const py::tuple& args, int threads, bool looked_at) const {
    Read read;
    if (const int told = check(args, looked_at, read); told != kDone) return told;
    alignas(16) char params[kMostBytes];
    memcpy(params, blank_.data(), blank_.size());
    for (int i = 0; i < int(arguments_.size()); ++i) {
      const Argument& a = arguments_[i];
      if (a.is_tensor) {
        put(params, a.slot, read.tensors[i]);
      } else if (a.slot.field == Field::number) {
        const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(args.ptr(), i));
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        memcpy(params + a.slot.offset, &value, sizeof(value));
      } else {
        const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(args.ptr(), i));
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        if (a.slot.field == Field::word && value != int32_t(value)) return looked_at ? i : kLook;
        put(params, a.slot, value);
      }
    }
    for (const auto& [side, to] : wanted_)
      if (read.sizes[side] >= 0) put(params, to, read.sizes[side]);
    if (has_dtype_) put(params, dtype_, read.tensors[lead_].dtype);
    return run(params, read.tensors[read.first].device, threads, looked_at);
  }

 private:
  static constexpr int kMost = 32;
  static constexpr size_t kMostBytes = 512;

  struct Read {
    Tensor tensors[kMost];
    int64_t sizes[kMost];  // of the sides, by their numbers
    int first = -1;        // tensor

    Read() { std::fill_n(sizes, kMost, int64_t(-1)); }
  };

  int check(const py::tuple& args, bool looked_at, Read& read) const {
    const int count = int(arguments_.size());
    if (int(args.size()) != count) throw std::invalid_argument(function_ + " got another number of arguments");
    Tensor* const tensors = read.tensors;
    int& first = read.first;
    for (int i = 0; i < count; ++i) {
      const Argument& a = arguments_[i];
      PyObject* const object = PyTuple_GET_ITEM(args.ptr(), i);
      if (!a.is_tensor || (object == Py_None && a.optional)) continue;
      if (object == Py_None) return kLook;
      if (!tensors[i].read(object, looked_at)) return looked_at ? i : kLook;
      if (first < 0) first = i;
      if (tensors[i].begin() == 0 && numel_of(tensors[i])) return i;
    }
    if (lead_ >= 0 && !fits(lead_, tensors, read.sizes)) return lead_;
    for (int i = 0; i < count; ++i) {
      if (!tensors[i].object) continue;
      if (i != lead_ && !fits(i, tensors, read.sizes)) return i;
      if (memcmp(&tensors[i].device, &tensors[first].device, sizeof(DLDevice))) return i;
    }
    return !looked_at && overlap(tensors) ? kLook : kDone;
  }

  const Entry& entry_;
  std::string function_;
  std::vector<Argument> arguments_;
  std::vector<std::string> sides_;            // names, by their numbers
  std::vector<std::pair<int, Slot>> wanted_;  // sides that have a field
  std::vector<char> blank_;                   // params with what is fixed
  Slot dtype_ = {};
  bool has_dtype_ = false;
  int lead_ = -1, channels_ = -1, pixels_ = -1;  // lead_: the first tensor of a float type, which others go by

  // (field, type, sides, optional, written, in_place); of a number sides is None.
  void add(const py::handle& declared, const std::string& name) {
    const auto words = declared.cast<py::tuple>();
    Argument a = {slot(words[0].cast<std::string>()), !words[2].is_none(), words[3].cast<bool>(),
                  words[4].cast<bool>(), words[5].cast<bool>(), kOther, {}};
    if (a.is_tensor) {
      a.type = types.at(words[1].cast<std::string>());
      for (const auto& word : words[2].cast<std::vector<std::string>>())
        a.sides.push_back(isdigit(word[0]) ? ~std::stoi(word) : side(word));
      if (lead_ < 0 && (a.type == kAnyFloat || a.type == kSame)) lead_ = int(arguments_.size());
      if (a.slot.field != (a.is_images() ? Field::images : Field::address))
        throw std::invalid_argument(name + ": field " + words[0].cast<std::string>() + " is of another type");
    }
    arguments_.push_back(std::move(a));
  }

  // Where a field lies. "eps" of a pair is its number, "eps_rows" its address.
  Slot slot(std::string field) const {
    const auto& fields = entry_.fields;
    if (const auto found = fields.find(field); found != fields.end()) {
      if (found->second.field != Field::scalar) return found->second;
      return {Field::number, found->second.offset + offsetof(AtlasScalar, value)};
    }
    const std::string pair = field.substr(0, field.rfind("_rows"));
    if (const auto found = fields.find(pair); pair != field && found != fields.end())
      if (found->second.field == Field::scalar)
        return {Field::address, found->second.offset + offsetof(AtlasScalar, per_row)};
    throw std::invalid_argument("csrc/api.h: what " + function_ + " takes has no field " + field);
  }

  int side(const std::string& name) {
    const int number = int(std::find(sides_.begin(), sides_.end(), name) - sides_.begin());
    if (number < int(sides_.size())) return number;
    sides_.push_back(name);
    if (entry_.fields.count(name)) wanted_.push_back({number, slot(name)});
    return number;
  }

  static void put(char* params, const Slot& to, int64_t value) {
    const uint32_t word = uint32_t(value);
    if (to.field == Field::integer) memcpy(params + to.offset, &value, sizeof(value));
    else memcpy(params + to.offset, &word, sizeof(word));
  }

  static void put(char* params, const Slot& to, const Tensor& t) {
    if (!t.object) return;
    if (to.field == Field::address) {
      memcpy(params + to.offset, &t.data, sizeof(t.data));
    } else {
      const AtlasImages images = {t.data, t.dtype, t.channels_last};
      memcpy(params + to.offset, &images, sizeof(images));
    }
  }

  // Images of which the first side alone is named: the others are those of the lead.
  static bool follows(const Argument& a) { return a.type == kAnyFloat && a.sides.size() == 1; }

  bool fits(int number, Tensor* tensors, int64_t* sizes) const {
    const Argument& a = arguments_[number];
    Tensor& t = tensors[number];
    if (!has_type(a.type, t, tensors) || t.ndim < int(a.sides.size())) return false;
    if (follows(a)) {
      const Tensor& lead = tensors[lead_];
      if (t.ndim != lead.ndim || !std::equal(t.shape + 1, t.shape + t.ndim, lead.shape + 1)) return false;
      if (number == lead_) {
        sizes[channels_] = t.ndim > 2 ? t.shape[1] : 1;
        sizes[pixels_] = 1;
        for (int i = t.ndim > 2 ? 2 : 1; i < t.ndim; ++i) sizes[pixels_] *= t.shape[i];
      }
    } else if (t.ndim != int(a.sides.size())) {
      return false;
    }
    for (size_t i = 0; i < a.sides.size(); ++i) {
      int64_t fixed = ~int64_t(a.sides[i]);
      int64_t& size = a.sides[i] < 0 ? fixed : sizes[a.sides[i]];
      if (size < 0) size = t.shape[i];
      if (size != t.shape[i]) return false;
    }
    if (is_contiguous(t)) return true;
    t.channels_last = a.is_images() && is_channels_last(t);
    return t.channels_last;
  }

  bool has_type(int type, const Tensor& t, const Tensor* tensors) const {
    const int lead = lead_ < 0 ? atlas::kFloat32 : tensors[lead_].dtype;
    if (type == kAnyFloat) return t.is_float();
    if (type == kSame) return t.is_float() && t.dtype == lead;
    if (type == kWide) return t.dtype == (lead == atlas::kFloat64 ? atlas::kFloat64 : atlas::kFloat32);
    return t.dtype == type;
  }

  // Does anything that is written share memory with another argument? An input that is `out` itself may.
  bool overlap(const Tensor* tensors) const {
    const int count = int(arguments_.size());
    for (int i = 0; i < count; ++i) {
      if (!arguments_[i].written || !tensors[i].object) continue;
      const uintptr_t begin = tensors[i].begin(), end = tensors[i].end();
      for (int j = 0; j < count; ++j) {
        if (j == i || !tensors[j].object || tensors[j].begin() >= end || begin >= tensors[j].end()) continue;
        const bool in_place = arguments_[i].in_place && arguments_[j].in_place;
        if (!in_place || tensors[j].object != tensors[i].object) return true;
      }
    }
    return false;
  }

  // On the CPU or, for a CUDA device, by the library; Python's lock is released meanwhile.
  int run(const char* params, DLDevice device, int threads, bool looked_at) const {
    AtlasWhere where = {on_cuda, threads, nullptr};
    if (device.device_type == kDLCUDA) {
      where.device = device.device_id;
      if (torch().api->current_work_stream(kDLCUDA, device.device_id, &where.stream)) throw py::error_already_set();
    } else if (device.device_type != kDLCPU) {
      return kRefused;
    }
    int status;
    {
      py::gil_scoped_release released;
      const Function function = where.device < 0 ? entry_.cpu : entry_.cuda;
      status = function ? function(params, &where) : int(ATLAS_NO_CUDA);
    }
    if (status == ATLAS_OK) return kDone;
    if (status == ATLAS_REFUSED) return looked_at ? kRefused : kLook;
    throw std::runtime_error("atlas_" + function_ + ": " + explain(status));
  }
};

// --- the rest -------------------------------------------------------------------------------------------------------

// The lowest page is no memory: what points into it is an offset from null.
const int64_t* integers(uintptr_t address) {
  if (address && address < 4096) throw std::invalid_argument("there is no memory at address " + std::to_string(address));
  return reinterpret_cast<const int64_t*>(address);
}

// The first of `count` class indices that is not in [0, classes); `count` if all are.
int64_t first_outside(uintptr_t indices, int64_t count, int64_t classes) {
  if (count > 0 && !indices) throw std::invalid_argument("the address of indices is null");
  if (count < 0) throw std::invalid_argument("count is negative");
  return std::find_if(integers(indices), integers(indices) + count, [&](int64_t c) { return c < 0 || c >= classes; }) -
         integers(indices);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::string&, const py::list&, const py::dict&>())
      .def("__call__", &Plan::call)
      .def("check", py::overload_cast<const py::tuple&, bool>(&Plan::check, py::const_));
  m.attr("DONE") = int(Plan::kDone);
  m.attr("LOOK") = int(Plan::kLook);
  m.def("plain", &plain);
  m.def("alike", &alike);
  m.def("on_cuda", [](int device) { on_cuda = device; });  // tests run the CUDA kernels on the host
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
