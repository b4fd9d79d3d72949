#include "common.h"

namespace sparsebert::bind {
namespace {

py::array_t<std::int64_t> run_masked_lstsq(const Array<double>& target, const Array<double>& h,
                                           const Array<bool>& mask, const Array<std::int64_t>& row_ptr,
                                           const Array<std::int32_t>& rows, bool complement, Array<double>& v,
                                           const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(target.ndim() == 2 && h.ndim() == 2 && mask.ndim() == 2 && v.ndim() == 2 && row_ptr.ndim() == 1 &&
              rows.ndim() == 1,
          "target, h, mask and v must be 2-d, the rest 1-d");
  const std::int64_t n_in = target.shape(1);
  require(h.shape(0) == n_in && h.shape(1) == n_in, "h must be [n_in, n_in]");
  require(mask.shape(0) == target.shape(0) && mask.shape(1) == n_in && v.shape(0) == target.shape(0) &&
              v.shape(1) == n_in,
          "mask and v must have target's shape");
  require(row_ptr.size() >= 1 && row_ptr.at(0) == 0, "row_ptr must start with 0");
  require_bools(mask);
  const RowGroups groups{mask.data(), row_ptr.data(), rows.data(), row_ptr.size() - 1};
  for (std::int64_t i = 0; i < groups.count; ++i) {
    require(groups.row_ptr[i] < groups.row_ptr[i + 1], "row_ptr must increase");
  }
  require(groups.row_ptr[groups.count] == rows.size(), "row_ptr must end at the size of rows");
  for (std::int64_t i = 0; i < rows.size(); ++i) {
    require(groups.rows[i] >= 0 && groups.rows[i] < target.shape(0), "rows must be rows of target");
  }
  py::array_t<std::int64_t> failed(groups.count);
  const double* target_data = target.data();
  const double* h_data = h.data();
  double* v_data = v.mutable_data();
  std::int64_t* failed_data = failed.mutable_data();
  {
    const Released released(true);
    masked_lstsq(target_data, h_data, n_in, groups, complement, context, v_data, failed_data);
  }
  return failed;
}

}  // namespace

void bind_masked_lstsq(py::module_& m) {
  m.def("masked_lstsq", &run_masked_lstsq, py::arg("target").noconvert(), py::arg("h").noconvert(),
        py::arg("mask").noconvert(), py::arg("row_ptr").noconvert(), py::arg("rows").noconvert(),
        py::arg("complement"), py::arg("v").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes v; returns a failing pivot, or -1, for each group of rows of equal mask.");
}

}  // namespace sparsebert::bind
