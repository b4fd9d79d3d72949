#include "common.h"

namespace sparsebert::bind {
namespace {

py::array_t<double> run_token_sums(const Array<float>& values, const std::optional<Array<float>>& weights,
                                   const Array<float>& shift, const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(values.ndim() == 2 && values.size() > 0, "values must be 2-d and not empty");
  const std::int64_t tokens = values.shape(0);
  const std::int64_t n = values.shape(1);
  require(shift.ndim() == 1 && shift.size() == n, "shift must be [n]");
  require(!weights || (weights->ndim() == 1 && weights->size() == tokens), "weights must be [tokens]");
  py::array_t<double> sums(n);
  double* sums_data = sums.mutable_data();
  {
    const Released released;
    token_sums(values.data(), tokens, n, data_or_null(weights), shift.data(), context, sums_data);
  }
  return sums;
}

bool run_gram(const Array<float>& x, const Array<float>& shift_x, const std::optional<Array<float>>& y,
              const std::optional<Array<float>>& shift_y, const std::optional<Array<float>>& weights,
              Array<double>& sum_x, Array<double>& sum_xx, std::optional<Array<double>>& sum_y,
              std::optional<Array<double>>& sum_yx, const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(x.ndim() == 2 && x.size() > 0, "x must be 2-d and not empty");
  const std::int64_t tokens = x.shape(0);
  const std::int64_t n_in = x.shape(1);
  require(shift_x.ndim() == 1 && shift_x.size() == n_in, "shift_x must be [n_in]");
  require(sum_x.ndim() == 1 && sum_x.size() == n_in, "sum_x must be [n_in]");
  require(sum_xx.ndim() == 2 && sum_xx.shape(0) == n_in && sum_xx.shape(1) == n_in, "sum_xx must be [n_in, n_in]");
  require(!weights || (weights->ndim() == 1 && weights->size() == tokens), "weights must be [tokens]");
  require(y.has_value() == (shift_y && sum_y && sum_yx), "y needs shift_y, sum_y and sum_yx");
  GramSums sums{sum_x.mutable_data(), sum_xx.mutable_data(), nullptr, nullptr};
  std::int64_t n_y = 0;
  if (y) {
    require(y->ndim() == 2 && y->shape(0) == tokens && y->shape(1) >= 1, "y must be [tokens, n_y >= 1]");
    n_y = y->shape(1);
    require(shift_y->ndim() == 1 && shift_y->size() == n_y, "shift_y must be [n_y]");
    require(sum_y->ndim() == 1 && sum_y->size() == n_y, "sum_y must be [n_y]");
    require(sum_yx->ndim() == 2 && sum_yx->shape(0) == n_y && sum_yx->shape(1) == n_in, "sum_yx must be [n_y, n_in]");
    sums.y = sum_y->mutable_data();
    sums.yx = sum_yx->mutable_data();
  }
  const Released released;
  return gram(x.data(), n_in, shift_x.data(), data_or_null(y), n_y, data_or_null(shift_y), data_or_null(weights),
              tokens, context, sums);
}

}  // namespace

void bind_gram(py::module_& m) {
  m.def("token_sums", &run_token_sums, py::arg("values").noconvert(), py::arg("weights").noconvert().none(true),
        py::arg("shift").noconvert(), py::arg("isa"), py::arg("threads"), "Sum over tokens of w (values - shift).");
  m.def("gram", &run_gram, py::arg("x").noconvert(), py::arg("shift_x").noconvert(),
        py::arg("y").noconvert().none(true), py::arg("shift_y").noconvert().none(true),
        py::arg("weights").noconvert().none(true), py::arg("sum_x").noconvert(), py::arg("sum_xx").noconvert(),
        py::arg("sum_y").noconvert().none(true), py::arg("sum_yx").noconvert().none(true), py::arg("isa"),
        py::arg("threads"),
        "Adds a batch to the sums, in place; xx for i <= j only. False, with nothing added, where it is not finite.");
}

}  // namespace sparsebert::bind
