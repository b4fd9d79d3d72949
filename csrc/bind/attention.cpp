#include "common.h"

namespace sparsebert::bind {
namespace {

Attention attention_of(FloatsOrBf16& q, FloatsOrBf16& k, FloatsOrBf16& v, const std::optional<Array<bool>>& keep,
                       float scale, std::uint64_t seed, std::uint32_t limit) {
  Attention job{};
  std::visit(
      [&job](const auto& values) {
        require(values.ndim() == 4, "q must be [sequences, tokens, heads, size]");
        job.sequences = values.shape(0);
        job.tokens = values.shape(1);
        job.heads = values.shape(2);
        job.size = values.shape(3);
      },
      q);
  require(!keep || keep->size() == job.sequences * job.tokens, "keep must be [sequences, tokens]");
  if (keep) require_bools(*keep);
  const std::int64_t size = job.sequences * job.tokens * job.heads * job.size;
  job.bf16 = is_bf16(q);
  job.q = data_of(q, size, job.bf16, false);
  job.k = data_of(k, size, job.bf16, false);
  job.v = data_of(v, size, job.bf16, false);
  job.keep = data_or_null(keep);
  job.scale = scale;
  job.dropout = dropout_of(seed, limit);
  return job;
}

void run_attention(FloatsOrBf16 q, FloatsOrBf16 k, FloatsOrBf16 v, const std::optional<Array<bool>>& keep, float scale,
                   std::uint64_t seed, std::uint32_t limit, FloatsOrBf16 out, Array<float> stats,
                   const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  const Attention job = attention_of(q, k, v, keep, scale, seed, limit);
  void* out_data = data_of(out, job.sequences * job.tokens * job.heads * job.size, job.bf16, true);
  require(stats.size() == 2 * job.sequences * job.tokens * job.heads, "stats must be [sequences, heads, 2, tokens]");
  float* stats_data = stats.mutable_data();
  const Released released;
  attention(job, context, out_data, stats_data);
}

void run_attention_backward(FloatsOrBf16 q, FloatsOrBf16 k, FloatsOrBf16 v, const std::optional<Array<bool>>& keep,
                            float scale, std::uint64_t seed, std::uint32_t limit, const Array<float>& stats,
                            FloatsOrBf16 d_out, FloatsOrBf16 dq, FloatsOrBf16 dk, FloatsOrBf16 dv,
                            const std::string& isa, int threads) {
  const cpu::Context context = context_of(isa, threads);
  const Attention job = attention_of(q, k, v, keep, scale, seed, limit);
  const std::int64_t size = job.sequences * job.tokens * job.heads * job.size;
  require(stats.size() == 2 * job.sequences * job.tokens * job.heads, "stats must be [sequences, heads, 2, tokens]");
  const void* d_out_data = data_of(d_out, size, job.bf16, false);
  void* dq_data = data_of(dq, size, job.bf16, true);
  void* dk_data = data_of(dk, size, job.bf16, true);
  void* dv_data = data_of(dv, size, job.bf16, true);
  const Released released;
  attention_backward(job, stats.data(), d_out_data, context, dq_data, dk_data, dv_data);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &run_attention, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
        py::arg("keep").noconvert().none(true), py::arg("scale"), py::arg("seed"), py::arg("limit"),
        py::arg("out").noconvert(), py::arg("stats").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes out and stats; all but stats float32, or bf16 as uint16.");
  m.def("attention_backward", &run_attention_backward, py::arg("q").noconvert(), py::arg("k").noconvert(),
        py::arg("v").noconvert(), py::arg("keep").noconvert().none(true), py::arg("scale"), py::arg("seed"),
        py::arg("limit"), py::arg("stats").noconvert(), py::arg("d_out").noconvert(), py::arg("dq").noconvert(),
        py::arg("dk").noconvert(), py::arg("dv").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes the gradients.");
}

}  // namespace sparsebert::bind
