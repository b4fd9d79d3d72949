// The arithmetic of sparse_encoder between its linears, written once for every vector width. Compiled by isa/floats.h.

#include "panel.inl"

namespace {

void embed(const EmbedJob<float>& job, std::int64_t panel) {
  const std::int64_t n = job.encoder->embedding;
  const std::int64_t width = std::int64_t{job.shape.width_vectors} * lanes;
  pack_tokens(0, n, width, job.shape.tokens - panel * width, job.out + panel * n * width,
              embedding(job, panel * width));
}

void normalize(const NormJob<float>& job, std::int64_t panel, std::int64_t vector) {
  const std::int64_t n = job.n;
  const std::int64_t width = std::int64_t{job.shape.width_vectors} * lanes;
  float* x = job.x + panel * n * width + vector * lanes;
  const float share = 1.0f / static_cast<float>(n);
  const f32 mean = sum_of(n, [&](std::int64_t k) { return load(x + k * width); }) * share;
  const f32 variance = sum_of(n, [&](std::int64_t k) {
    const f32 d = load(x + k * width) - mean;
    return d * d;
  }) * share;
  f32 scale;
  for (int i = 0; i < lanes; ++i) scale[i] = 1.0f / __builtin_sqrtf(variance[i] + job.eps);
  for (std::int64_t k = 0; k < n; ++k) {
    store(x + k * width, (load(x + k * width) - mean) * scale * job.norm.weight[k] + job.norm.bias[k]);
  }
}

std::int64_t attention_bytes(std::int64_t n, std::int64_t head_size) {
  return (3 * head_size * row_floats(n) + n * 2 * lanes) * 4;
}

// Keys, or values of a head, that are multiplied at a time with 1 or 2 vectors of queries.
constexpr int attention_rows = lanes == 16 ? 8 : 4;

// q: [head_size][stride] of one head's queries (scaled), starting at the first to compute; k and v: its keys and
// values, likewise. The result replaces the queries. All sums run over the head's values, or over the keys, in order,
// so that a query's result does not depend on where its sequence lies.
template <int count>
inline void attend_queries(float* q, const float* k, const float* v, std::int64_t stride, std::int64_t n,
                           std::int64_t head_size, float* scores) {
  constexpr int rows = attention_rows;
  constexpr std::int64_t width = count * lanes;
  f32 most[count];
  for (int c = 0; c < count; ++c) most[c] = splat(-__builtin_inff());
  const auto score = [&](std::int64_t key, const f32(&acc)[count]) {
    for (int c = 0; c < count; ++c) {
      most[c] = acc[c] > most[c] ? acc[c] : most[c];
      store(scores + key * width + c * lanes, acc[c]);
    }
  };
  std::int64_t key = 0;
  for (; key + rows <= n; key += rows) {
    f32 acc[rows][count] = {};
    multiply_tile<float, rows, count>(k + key, 1, stride, q, stride, head_size, acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) score(key + r, acc[r]);
  }
  for (; key < n; ++key) {
    f32 acc[1][count] = {};
    multiply_tile<float, 1, count>(k + key, 1, stride, q, stride, head_size, acc);
    score(key, acc[0]);
  }
  f32 sum[count] = {};
  for (key = 0; key < n; ++key) {
    for (int c = 0; c < count; ++c) {
      float* at = scores + key * width + c * lanes;
      const f32 power = exp_negative(load(at) - most[c]);
      sum[c] += power;
      store(at, power);
    }
  }
  for (int c = 0; c < count; ++c) sum[c] = 1.0f / sum[c];
  const auto finish = [&](std::int64_t i, const f32(&acc)[count]) {
    for (int c = 0; c < count; ++c) store(q + i * stride + c * lanes, acc[c] * sum[c]);
  };
  std::int64_t i = 0;
  for (; i + rows <= head_size; i += rows) {
    f32 acc[rows][count] = {};
    multiply_tile<float, rows, count>(v + i * stride, stride, 1, scores, width, n, acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) finish(i + r, acc[r]);
  }
  for (; i < head_size; ++i) {
    f32 acc[1][count] = {};
    multiply_tile<float, 1, count>(v + i * stride, stride, 1, scores, width, n, acc);
    finish(i, acc[0]);
  }
}

void attend(const AttentionJob<float>& job, std::int64_t start, std::int64_t stop, std::int64_t head, void* memory) {
  auto* work = static_cast<float*>(memory);
  const std::int64_t n = stop - start;
  const std::int64_t size = job.hidden / job.heads;
  const std::int64_t stride = row_floats(n);
  const float share = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  float* parts[3] = {work, work + size * stride, work + 2 * size * stride};
  float* scores = work + 3 * size * stride;
  for (int part = 0; part < 3; ++part) {
    read_head(job, start, stop, head, part, part == 0 ? share : 1.0f, parts[part]);
  }
  std::int64_t t = 0;
  for (; t + lanes < n; t += 2 * lanes) {
    attend_queries<2>(parts[0] + t, parts[1], parts[2], stride, n, size, scores);
  }
  if (t < n) attend_queries<1>(parts[0] + t, parts[1], parts[2], stride, n, size, scores);
  write_head(job, start, stop, head, parts[0]);
}

}  // namespace

const SparseEncoderKernel<float> kernel = {embed, normalize, {attention_bytes, attend}};
