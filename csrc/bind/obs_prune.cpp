#include "common.h"

namespace sparsebert::bind {
namespace {

std::pair<py::array_t<std::int32_t>, py::array_t<double>> run_obs_prune(
    const Array<double>& weight, const Array<double>& inverse, std::int64_t group, std::int64_t bank_width,
    std::int64_t bank_removals, std::int64_t steps, const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(weight.ndim() == 2 && inverse.ndim() == 2, "weight and inverse must be 2-d");
  const std::int64_t rows = weight.shape(0), n_in = weight.shape(1);
  require(n_in <= INT32_MAX, "n_in must fit 32 bits");
  require(inverse.shape(0) == n_in && inverse.shape(1) == n_in, "inverse must be [n_in, n_in]");
  require(group >= 1 && rows % group == 0, "group must divide the rows");
  require(bank_width >= 0 && (bank_width == 0 || n_in % bank_width == 0), "bank_width must divide n_in");
  const std::int64_t most =
      bank_width == 0 ? n_in : n_in / bank_width * std::clamp<std::int64_t>(bank_removals, 0, bank_width);
  require(steps >= 0 && steps <= most, "steps must be at most what may be removed");

  py::array_t<std::int32_t> order({rows / group, steps});
  py::array_t<double> losses({rows / group, steps});
  const double* weight_data = weight.data();
  const double* inverse_data = inverse.data();
  std::int32_t* order_data = order.mutable_data();
  double* losses_data = losses.mutable_data();
  {
    const Released released(true);
    obs_prune(weight_data, rows, n_in, inverse_data, group, {bank_width, bank_removals}, steps, context,
              order_data, losses_data);
  }
  return {order, losses};
}

py::array_t<double> run_obs_sweep(const Array<double>& weight, const Array<double>& factor, std::int64_t group,
                                  std::int64_t n, std::int64_t m, bool shared, const Array<std::int64_t>& removals,
                                  std::int64_t block, const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(block >= 1, "block must be at least 1");
  require(weight.ndim() == 2 && factor.ndim() == 2 && removals.ndim() == 1, "weight and factor must be 2-d");
  const std::int64_t rows = weight.shape(0), n_in = weight.shape(1);
  require(factor.shape(0) == n_in && factor.shape(1) == n_in, "factor must be [n_in, n_in]");
  require(group >= 1 && rows % group == 0, "group must divide the rows");
  require(m >= 0 && (m == 0 || (n_in % m == 0 && block % m == 0)), "m must divide n_in and block");
  require(!shared || m >= 4, "m must be at least 4 if columns are shared");
  if (m == 0) {
    require(removals.size() == (n_in + block - 1) / block, "removals must be one per block");
    for (std::int64_t b = 0; b < removals.size(); ++b) {
      const std::int64_t most = rows / group * std::min(block, n_in - b * block);
      require(removals.at(b) >= 0 && removals.at(b) <= most, "removals must be at most what a block holds");
    }
  }
  py::array_t<double> pruned({rows, n_in});
  const double* weight_data = weight.data();
  const double* factor_data = factor.data();
  double* pruned_data = pruned.mutable_data();
  const SweepPattern pattern{group, n, m, shared, removals.data()};
  {
    const Released released(true);
    obs_sweep(weight_data, rows, n_in, factor_data, pattern, block, context, pruned_data);
  }
  return pruned;
}

}  // namespace

void bind_obs_prune(py::module_& m) {
  m.def("obs_prune", &run_obs_prune, py::arg("weight").noconvert(), py::arg("inverse").noconvert(), py::arg("group"),
        py::arg("bank_width"), py::arg("bank_removals"), py::arg("steps"), py::arg("isa"), py::arg("threads"),
        "The order in which groups of rows lose their columns, and the loss of each: [groups, steps] both.");
  m.def("obs_sweep", &run_obs_sweep, py::arg("weight").noconvert(), py::arg("factor").noconvert(), py::arg("group"),
        py::arg("n"), py::arg("m"), py::arg("shared"), py::arg("removals").noconvert(), py::arg("block"),
        py::arg("isa"), py::arg("threads"), "The pruned weight; factor is Uᵀ, with H^-1 = Uᵀ U.");
}

}  // namespace sparsebert::bind
