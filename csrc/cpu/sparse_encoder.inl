// The arithmetic of sparse_encoder between its linears, written once for every vector width. Compiled by isa/floats.h.

#include "panel.inl"
#include "attend.inl"

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
  const float inverse = 1.0f / static_cast<float>(n);
  const f32 mean = sum_of(n, [&](std::int64_t k) { return load(x + k * width); }) * inverse;
  const f32 variance = sum_of(n, [&](std::int64_t k) {
    const f32 d = load(x + k * width) - mean;
    return d * d;
  }) * inverse;
  f32 scale;
  for (int i = 0; i < lanes; ++i) scale[i] = 1.0f / __builtin_sqrtf(variance[i] + job.eps);
  for (std::int64_t k = 0; k < n; ++k) {
    store(x + k * width, (load(x + k * width) - mean) * scale * job.norm.weight[k] + job.norm.bias[k]);
  }
}

std::int64_t attention_bytes(std::int64_t n, std::int64_t head_size) {
  return (3 * head_size * row_floats(n) + n * 2 * lanes) * 4;
}

struct Floats {
  typedef f32 Sum;
  static constexpr int rows = lanes == 16 ? 8 : 4;
  static constexpr float least = -__builtin_inff();

  static std::int64_t words(std::int64_t n) { return n; }

  template <int height, int count>
  static void multiply(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b, std::int64_t b_step,
                       std::int64_t depth, f32 (&acc)[height][count]) {
    multiply_tile<float, height, count>(a, a_row, a_step, b, b_step, depth, acc);
  }

  template <int count>
  void weigh(float* scores, std::int64_t n, const f32 (&top)[count], f32 (&factor)[count]) const {
    f32 sum[count] = {};
    for (std::int64_t key = 0; key < n; ++key) {
      for (int c = 0; c < count; ++c) {
        float* at = scores + (key * count + c) * lanes;
        const f32 power = exp_negative(load(at) - top[c]);
        sum[c] += power;
        store(at, power);
      }
    }
    for (int c = 0; c < count; ++c) factor[c] = 1.0f / sum[c];
  }
};

void attend(const AttentionJob<float>& job, std::int64_t start, std::int64_t stop, std::int64_t head, void* memory) {
  auto* work = static_cast<float*>(memory);
  const std::int64_t n = stop - start;
  const std::int64_t size = job.hidden / job.heads;
  const std::int64_t stride = row_floats(n);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  float* parts[3] = {work, work + size * stride, work + 2 * size * stride};
  float* scores = work + 3 * size * stride;
  for (int part = 0; part < 3; ++part) {
    read_head(job, start, stop, head, part, part == 0 ? scale : 1.0f, parts[part]);
  }
  attend_all(Floats(), parts[0], parts[1], parts[2], stride, stride, queries_of(job, n), n, size, scores, parts[0]);
  write_head(job, start, stop, head, parts[0]);
}

}  // namespace

const SparseEncoderKernel<float> kernel = {embed, normalize, {attention_bytes, attend}};
