// The Python module of the compiled core.
#include "../cpu/threads.h"
#include "common.h"

namespace sparsebert::bind {
namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : isas) {
    if (isa_supported(isa)) names.emplace_back(name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of sparsebert; call it through sparsebert.ops.";
  m.def("supported_isas", &supported_isas, "Instruction sets that can run here, slowest first.");
  m.def("share_cores", &share_cores, py::arg("n"), "Sets the number of cores that calls at once may use together.");
  m.def("poison_scratch", &poison_scratch, py::arg("on"), "For tests: fill working memory with NaN before every use.");
  bind_sparse_matmul(m);
  bind_sparse_encoder(m);
  bind_masked_lstsq(m);
  bind_obs_prune(m);
  bind_gram(m);
  bind_topk_mask(m);
  bind_admm_prune(m);
  bind_masked_matmul(m);
  bind_dropout(m);
  bind_attention(m);
}

}  // namespace sparsebert::bind
