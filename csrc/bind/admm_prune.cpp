#include "common.h"

namespace sparsebert::bind {
namespace {

void run_admm_prune_step(const Array<float>& q, const Array<float>& qt, const Array<float>& eigenvalues,
                         const Array<float>& goal, Array<float>& b, Array<float>& u, Array<float>& x,
                         Array<float>& scores, const Array<bool>& keep, float rho, float shrink,
                         const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(x.ndim() == 2 && x.shape(0) >= 1 && x.shape(1) >= 1, "x must be [rows >= 1, n_in >= 1]");
  const auto whole = [](std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; };
  const std::int64_t rows = x.shape(0);
  const std::int64_t n_in = x.shape(1);
  const std::int64_t padded_rows = whole(rows, admm_block_rows);
  const std::int64_t padded_n = whole(n_in, admm_panel);
  require(scores.size() == rows * n_in && keep.size() == rows * n_in, "scores and keep must have x's size");
  require_bools(keep);
  require(goal.size() == padded_rows * padded_n && b.size() == goal.size() && u.size() == goal.size(),
          "goal, b and u must have whole blocks of rows and whole panels");
  require(eigenvalues.size() == padded_n && q.size() == padded_n * n_in && qt.size() == padded_n * padded_n,
          "eigenvalues, q and qt must come in whole panels");
  const AdmmState state{rows,        n_in,           q.data(),         qt.data(),        eigenvalues.data(),
                        goal.data(), b.mutable_data(), u.mutable_data(), x.mutable_data(), scores.mutable_data()};
  const bool* keep_data = keep.data();
  const Released released(true);
  admm_prune_step(state, keep_data, rho, shrink, context);
}

}  // namespace

void bind_admm_prune(py::module_& m) {
  m.attr("ADMM_PANEL") = admm_panel;
  m.attr("ADMM_BLOCK_ROWS") = admm_block_rows;
  m.def("admm_prune_step", &run_admm_prune_step, py::arg("q").noconvert(), py::arg("qt").noconvert(),
        py::arg("eigenvalues").noconvert(), py::arg("goal").noconvert(), py::arg("b").noconvert(),
        py::arg("u").noconvert(), py::arg("x").noconvert(), py::arg("scores").noconvert(),
        py::arg("keep").noconvert(), py::arg("rho"), py::arg("shrink"), py::arg("isa"), py::arg("threads"),
        "One iteration; writes b, u, x and scores.");
}

}  // namespace sparsebert::bind
