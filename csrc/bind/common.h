// What the bindings share. sparsebert.ops states the contracts and checks them with full messages; the checks here only
// keep a wrong direct call from accessing memory outside its arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cxxabi.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/scratch.h"
#include "../ops.h"

namespace sparsebert::bind {

namespace py = pybind11;

// c_style without forcecast: with noconvert() below, an array of another type or layout is refused, not copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr std::pair<const char*, Isa> isas[] = {
    {"scalar", Isa::scalar},           {"avx2", Isa::avx2},
    {"avx_vnni", Isa::avx_vnni},       {"avx512", Isa::avx512},
    {"avx512_vnni", Isa::avx512_vnni}, {"avx512_bf16", Isa::avx512_bf16},
    {"amx", Isa::amx}};

inline void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

// The processor's cores, as a call asks for them.
inline cpu::Context context_of(const std::string& isa, int threads) {
  require(threads >= 1, "threads must be at least 1");
  for (const auto& [name, value] : isas) {
    if (isa == name && isa_supported(value)) return {value, threads};
  }
  throw std::invalid_argument("isa " + isa + " cannot run here");
}

// Releases the GIL, and sets this thread's floating-point environment to the defaults of IEEE 754: if the caller had
// denormals flushed to zero (torch can do that), this thread would give other results than the workers. The destructor
// restores the caller's environment.
class Released {
 public:
  // trimmed: frees large working memory at the end.
  explicit Released(bool trimmed = false) : trimmed_(trimmed) {
    fegetenv(&environment_);
    fesetenv(FE_DFL_ENV);
    state_ = PyEval_SaveThread();
  }
  Released(const Released&) = delete;
  ~Released() {
    if (trimmed_) trim_scratch();
    fesetenv(&environment_);
#if defined(__GLIBCXX__)
    // When a process ends, Python ends the other threads that ask for the GIL by unwinding their stacks. The callers of
    // this destructor cannot bear that, as their cleanup would run without the GIL. So this thread waits for the end of
    // the process.
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }

 private:
  bool trimmed_;
  fenv_t environment_;
  PyThreadState* state_;
};

// numpy and torch allow any byte in a bool, C++ does not.
inline void require_bools(const Array<bool>& array) {
  const auto* bytes = static_cast<const std::uint8_t*>(static_cast<const void*>(array.data()));
  require(std::all_of(bytes, bytes + array.size(), [](std::uint8_t byte) { return byte <= 1; }),
          "masks must hold 0 and 1");
}

// Keeps the arrays alive that C++ points into.
class Kept {
 public:
  template <typename T>
  const T* data(const Array<T>& array) {
    kept_.push_back(array);
    return array.data();
  }
  template <typename T>
  const T* data(const std::optional<Array<T>>& array) {
    return array ? data(*array) : nullptr;
  }

 private:
  std::vector<py::object> kept_;
};

// Null if there is no array.
template <typename T>
const T* data_or_null(const std::optional<Array<T>>& array) { return array ? array->data() : nullptr; }

using FloatsOrBf16 = std::variant<Array<float>, Array<Bf16>>;

// The data of an array, which must have `size` values.
inline void* data_of(FloatsOrBf16& array, std::int64_t size, bool bf16, bool written) {
  return std::visit(
      [=](auto& values) -> void* {
        require(values.size() == size && (values.itemsize() == 2) == bf16, "all arrays must have one type and size");
        return written ? values.mutable_data() : const_cast<void*>(static_cast<const void*>(values.data()));
      },
      array);
}

inline bool is_bf16(const FloatsOrBf16& array) { return std::holds_alternative<Array<Bf16>>(array); }

inline Dropout dropout_of(std::uint64_t seed, std::uint32_t limit) {
  require(limit < 65536, "limit must be below 65536");
  return {seed, limit};
}

// Each adds one operation to the module.
void bind_sparse_matmul(py::module_& m);
void bind_sparse_encoder(py::module_& m);
void bind_masked_lstsq(py::module_& m);
void bind_obs_prune(py::module_& m);
void bind_gram(py::module_& m);
void bind_topk_mask(py::module_& m);
void bind_admm_prune(py::module_& m);
void bind_masked_matmul(py::module_& m);
void bind_dropout(py::module_& m);
void bind_attention(py::module_& m);

}  // namespace sparsebert::bind
