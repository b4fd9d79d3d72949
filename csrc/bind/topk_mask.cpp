#include "common.h"

namespace sparsebert::bind {
namespace {

std::optional<py::array_t<bool>> run_topk_mask(const Array<float>& scores, std::int64_t k, const std::string& isa,
                                                int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(scores.ndim() == 2, "scores must be 2-d");
  require(0 <= k && k <= scores.shape(1), "k must be between 0 and n");
  py::array_t<bool> keep({scores.shape(0), scores.shape(1)});
  const float* scores_data = scores.data();
  bool* keep_data = keep.mutable_data();
  bool finite;
  {
    const Released released;
    finite = topk_mask(scores_data, keep.shape(0), keep.shape(1), k, context, keep_data);
  }
  if (!finite) return std::nullopt;
  return keep;
}

}  // namespace

void bind_topk_mask(py::module_& m) {
  m.def("topk_mask", &run_topk_mask, py::arg("scores").noconvert(), py::arg("k"), py::arg("isa"), py::arg("threads"),
        "The k highest of each row, or None where there is a NaN.");
}

}  // namespace sparsebert::bind
