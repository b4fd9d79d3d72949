#include "common.h"

namespace sparsebert::bind {
namespace {

void run_dropout(FloatsOrBf16 x, std::uint64_t seed, std::uint32_t limit, FloatsOrBf16 y, const std::string& isa,
                 int threads) {
  const cpu::Context context = context_of(isa, threads);
  const Dropout dropped = dropout_of(seed, limit);
  const bool bf16 = is_bf16(x);
  const std::int64_t n = std::visit([](const auto& values) { return values.size(); }, x);
  const void* from = data_of(x, n, bf16, false);
  void* to = data_of(y, n, bf16, true);
  const Released released;
  dropout(from, n, bf16, dropped, context, to);
}

}  // namespace

void bind_dropout(py::module_& m) {
  m.def("dropout", &run_dropout, py::arg("x").noconvert(), py::arg("seed"), py::arg("limit"),
        py::arg("y").noconvert(), py::arg("isa"), py::arg("threads"), "Writes y; both float32, or bf16 as uint16.");
}

}  // namespace sparsebert::bind
