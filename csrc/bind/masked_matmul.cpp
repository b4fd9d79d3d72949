#include "common.h"

namespace sparsebert::bind {
namespace {

struct Values {
  void* data;
  std::int64_t rows, cols;
  bool bf16;
};

Values values_of(FloatsOrBf16& array, bool written) {
  return std::visit(
      [written](auto& values) -> Values {
        require(values.ndim() == 2, "x, y and their gradients must be 2-d");
        void* data = written ? static_cast<void*>(values.mutable_data()) : const_cast<void*>(
                                   static_cast<const void*>(values.data()));
        return {data, values.shape(0), values.shape(1), values.itemsize() == 2};
      },
      array);
}

MaskedWeight masked_weight(const Array<float>& weight, const Array<float>& scores, const Array<float>& thresholds) {
  require(weight.ndim() == 2 && weight.size() > 0, "weight must be 2-d and not empty");
  const std::int64_t n_out = weight.shape(0), n_in = weight.shape(1);
  require(scores.ndim() == 2 && scores.shape(0) >= 1 && n_out % scores.shape(0) == 0 && scores.shape(1) == n_in,
          "scores must be [score_rows, n_in], score_rows dividing n_out");
  std::int64_t reach = 0;
  if (thresholds.ndim() > 0) {
    require(thresholds.ndim() == 2 && thresholds.shape(0) == scores.shape(0) && thresholds.shape(1) >= 1 &&
                n_in % thresholds.shape(1) == 0,
            "thresholds must be [] or [score_rows, n_in / m]");
    reach = n_in / thresholds.shape(1);
  }
  return {weight.data(), scores.data(), thresholds.data(), n_out, n_in, n_out / scores.shape(0), reach};
}

void run_masked_matmul(FloatsOrBf16 x, const Array<float>& weight, const Array<float>& scores,
                       const Array<float>& thresholds, const std::optional<Array<float>>& bias, FloatsOrBf16 y,
                       const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  const MaskedWeight masked = masked_weight(weight, scores, thresholds);
  const Values in = values_of(x, false), out = values_of(y, true);
  require(in.cols == masked.n_in && out.rows == in.rows && out.cols == masked.n_out && in.bf16 == out.bf16,
          "x must be [tokens, n_in], and y [tokens, n_out] of its type");
  require(!bias || (bias->ndim() == 1 && bias->size() == masked.n_out), "bias must be [n_out]");
  const Released released;
  masked_matmul(masked, in.data, in.rows, in.bf16, data_or_null(bias), context, out.data);
}

void run_masked_matmul_backward(FloatsOrBf16 x, FloatsOrBf16 dy, const Array<float>& weight,
                                const Array<float>& scores, const Array<float>& thresholds,
                                std::optional<FloatsOrBf16> dx, std::optional<Array<float>> d_weight,
                                std::optional<Array<float>> d_scores, const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  const MaskedWeight masked = masked_weight(weight, scores, thresholds);
  const Values in = values_of(x, false), out = values_of(dy, false);
  require(in.cols == masked.n_in && out.rows == in.rows && out.cols == masked.n_out && in.bf16 == out.bf16,
          "x must be [tokens, n_in], and dy [tokens, n_out] of its type");
  Values dx_out{};
  if (dx) {
    dx_out = values_of(*dx, true);
    require(dx_out.rows == in.rows && dx_out.cols == in.cols && dx_out.bf16 == in.bf16, "dx must be like x");
  }
  require(!d_weight || d_weight->size() == weight.size(), "d_weight must have the weight's size");
  require(!d_scores || d_scores->size() == scores.size(), "d_scores must have the scores' size");
  float* d_weight_data = d_weight ? d_weight->mutable_data() : nullptr;
  float* d_scores_data = d_scores ? d_scores->mutable_data() : nullptr;
  const Released released;
  masked_matmul_backward(masked, in.data, out.data, in.rows, in.bf16, context, dx_out.data, d_weight_data,
                         d_scores_data);
}

}  // namespace

void bind_masked_matmul(py::module_& m) {
  m.def("masked_matmul", &run_masked_matmul, py::arg("x").noconvert(), py::arg("weight").noconvert(),
        py::arg("scores").noconvert(), py::arg("thresholds").noconvert(), py::arg("bias").noconvert().none(true),
        py::arg("y").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes y; x and y are float32, or bf16 as uint16.");
  m.def("masked_matmul_backward", &run_masked_matmul_backward, py::arg("x").noconvert(), py::arg("dy").noconvert(),
        py::arg("weight").noconvert(), py::arg("scores").noconvert(), py::arg("thresholds").noconvert(),
        py::arg("dx").noconvert().none(true), py::arg("d_weight").noconvert().none(true),
        py::arg("d_scores").noconvert().none(true), py::arg("isa"), py::arg("threads"),
        "Writes the gradients that are not None.");
}

}  // namespace sparsebert::bind
