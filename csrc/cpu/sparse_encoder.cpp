// Runs a whole encoder layer by layer on a few hundred tokens at a time; the arithmetic is in sparse_matmul.inl and
// sparse_encoder.inl.
#include "sparse_encoder.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../sparse_encoder.inl"
#include "isa/floats.h"
#define SPARSEBERT_KERNEL "../sparse_encoder_tiled.inl"
#include "isa/tiles.h"

namespace sparsebert {
namespace {

// Tokens per thread that go through all layers together: enough that the weights are read seldom, few enough that the
// activations stay in the caches.
constexpr std::int64_t batch_tokens = 128;
// With fewer floats to process, a second core is not used. Less than for a separate sparse_matmul, because within a
// call the other cores keep looking for work and need not be woken.
constexpr std::int64_t serial_work = 1 << 14;

template <typename T>
const SparseEncoderKernel<T>& encoder_kernel(Isa isa) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return kernel_for(isa);
  } else {
    return tile_kernel_for(isa);
  }
}

// The linears of a layer, in the order in which they run.
std::array<const Linear*, 4> linears_of(const EncoderLayer& layer) {
  return {&layer.qkv, &layer.attention_out, &layer.up, &layer.down};
}

// Panels have one width from the embeddings to the pooler: the width for the form that most linears have.
bool mostly_groups(const Encoder& encoder) {
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < encoder.n_layers; ++i) {
    for (const Linear* linear : linears_of(encoder.layers[i])) groups += format_of(*linear).groups ? 1 : -1;
  }
  return groups >= 0;
}

// Of its linears in int8; all zero if it has none.
Int8Sizes int8_sizes(const Encoder& encoder) {
  Int8Sizes sizes;
  for (std::int64_t i = 0; i < encoder.n_layers; ++i) {
    for (const Linear* linear : linears_of(encoder.layers[i])) {
      if (linear->form == Form::int8) sizes.add(*linear);
    }
  }
  return sizes;
}

// One batch of whole sequences on its way through the layers; T is float or Bf16.
template <typename T>
class Batch {
 public:
  Batch(const Encoder& encoder, const Sequences& sequences, cpu::Context context)
      : encoder_(encoder), sequences_(sequences), context_(context) {
    const std::int64_t tokens = sequences.starts[sequences.count] - sequences.starts[0];
    const Int8Sizes sizes = int8_sizes(encoder);
    if (sizes.rows > 0) int8_ = &int8_kernel(context.isa, tokens, sizes);
    const Isa isa = int8_ != nullptr ? floats_beside(*int8_) : isa_for<T>(context.isa, tokens);
    matmul_ = &sparse_matmul_kernel<T>(isa);
    kernel_ = &encoder_kernel<T>(isa);
    attention_ = &kernel_->attention;
    if constexpr (std::is_same_v<T, float>) {
      if (int8_ != nullptr) attention_ = &int8_attention(context.isa, int8_->lanes);
    }
    shape_ = int8_ != nullptr ? panel_shape(*int8_, tokens) : panel_shape(*matmul_, tokens, mostly_groups(encoder));
    // The pooler's panels hold the first token of each sequence, so they hold as many tokens as there are sequences.
    first_kernel_ = &sparse_matmul_kernel<T>(isa_for<T>(context.isa, sequences.count));
    first_shape_ = panel_shape(*first_kernel_, sequences.count, format_of(encoder.pooler).groups);
  }

  // Queries, keys, values and the result of attention are no longer needed when the wider layer is computed, so they
  // share memory with it. So do the embeddings before a projection, and the first tokens in the pooler.
  void run(float* logits, float* states, std::int64_t* clipped) {
    clipped_ = clipped;
    const std::int64_t tokens = shape_.panels * shape_.width(), firsts = first_shape_.panels * first_shape_.width();
    std::int64_t widest = std::max(4 * encoder_.hidden, encoder_.embedding);
    for (std::int64_t i = 0; i < encoder_.n_layers; ++i) widest = std::max(widest, encoder_.layers[i].up.n_out);
    const std::int64_t head = encoder_.hidden + encoder_.pooler.n_out;
    const std::int64_t shared = std::max(tokens * widest, firsts * head) + overrun;
    const std::int64_t elements = tokens * encoder_.hidden + shared;
    const std::int64_t byte_room = int8_ != nullptr ? tokens * (widest + encoder_.hidden) : 0;
    x_ = static_cast<T*>(scratch(static_cast<std::size_t>(elements) * sizeof(T) + static_cast<std::size_t>(byte_room) +
                                 static_cast<std::size_t>(shape_.tokens) * sizeof(std::int32_t)));
    work_ = x_ + tokens * encoder_.hidden;
    bytes_ = reinterpret_cast<std::uint8_t*>(work_ + shared);
    wide_bytes_ = bytes_ + (int8_ != nullptr ? tokens * encoder_.hidden : 0);
    positions_ = reinterpret_cast<std::int32_t*>(bytes_ + byte_room);
    embed();
    for (std::int64_t i = 0; i < encoder_.n_layers; ++i) run_layer(encoder_.layers[i]);
    if (states != nullptr) unpack(*matmul_, shape_, x_, encoder_.hidden, states);
    classify(logits);
  }

 private:
  static constexpr std::int64_t overrun = 64;  // elements that attention may read past queries, keys and values

  template <typename Fn>
  void run_parallel(std::int64_t n, std::int64_t elements, const Fn& fn) {
    parallel(n, elements < serial_work ? 1 : context_.threads, fn);
  }

  // Counts the clipped bytes of this linear's input, if that is wanted.
  void count(const Linear& linear, const std::uint8_t* bytes) {
    if (clipped_ == nullptr) return;
    const auto all = linears_of(*layer_);
    const auto which = std::find(all.begin(), all.end(), &linear) - all.begin();
    clipped_[(layer_ - encoder_.layers) * 4 + which] += count_clipped(shape_, bytes, linear.n_in);
  }

  // y = linear(x), or y += linear(x). `bytes`: the bytes of x, if they are made already, for a linear in int8.
  void linear(const Linear& linear, const T* x, T* y, bool add = false, const std::uint8_t* bytes = nullptr) {
    LinearJob<T> job{shape_, &linear, x, bytes, y, nullptr, nullptr, add, 0};
    if constexpr (std::is_same_v<T, float>) {
      if (linear.form == Form::int8) {
        if (bytes == nullptr) {
          quantize(*matmul_, shape_, x, linear.n_in, linear.int8->input, bytes_, context_.threads);
          job.bytes = bytes_;
        }
        count(linear, job.bytes);
        return run_linear(int8_->linear, job, context_.threads);
      }
    }
    run_linear(matmul_->linear, job, context_.threads);
  }

  // x += down(up(x)). If both are in int8, what lies between them is bytes from the start.
  void feed_forward(const EncoderLayer& layer) {
    if constexpr (std::is_same_v<T, float>) {
      if (layer.up.form == Form::int8 && layer.down.form == Form::int8) {
        quantize(*matmul_, shape_, x_, encoder_.hidden, layer.up.int8->input, bytes_, context_.threads);
        count(layer.up, bytes_);
        run_linear(int8_->linear,
                   {shape_, &layer.up, nullptr, bytes_, nullptr, wide_bytes_, &layer.down.int8->input, false, 0},
                   context_.threads);
        return linear(layer.down, nullptr, x_, true, wide_bytes_);
      }
    }
    linear(layer.up, x_, work_);
    linear(layer.down, work_, x_, true);
  }

  void normalize(T* x, std::int64_t n, const LayerNorm& norm) {
    const NormJob<T> job{shape_, x, n, norm, encoder_.eps};
    run_parallel(shape_.panels * shape_.width_vectors, shape_.tokens * n, [&](std::int64_t i) {
      kernel_->normalize(job, i / shape_.width_vectors, i % shape_.width_vectors);
    });
  }

  void embed() {
    const std::int64_t first = sequences_.starts[0];
    for (std::int64_t s = 0; s < sequences_.count; ++s) {
      const std::int64_t start = sequences_.starts[s] - first, stop = sequences_.starts[s + 1] - first;
      for (std::int64_t t = start; t < stop; ++t) positions_[t] = static_cast<std::int32_t>(t - start);
    }
    T* out = encoder_.projection != nullptr ? work_ : x_;
    const EmbedJob<T> job{shape_, &encoder_, sequences_.ids + first, sequences_.types + first, positions_, out};
    run_parallel(shape_.panels, shape_.tokens * encoder_.embedding, [&](std::int64_t i) { kernel_->embed(job, i); });
    normalize(out, encoder_.embedding, encoder_.embedding_norm);
    if (encoder_.projection != nullptr) linear(*encoder_.projection, out, x_);
  }

  void run_layer(const EncoderLayer& layer) {
    layer_ = &layer;
    T* attended = work_ + shape_.panels * shape_.width() * 3 * encoder_.hidden;
    linear(layer.qkv, x_, work_);
    attend(work_, attended);
    linear(layer.attention_out, attended, x_, true);
    normalize(x_, encoder_.hidden, layer.attention_norm);
    feed_forward(layer);
    normalize(x_, encoder_.hidden, layer.norm);
  }

  void attend(const T* qkv, T* out) {
    const AttentionJob<T> job{shape_, qkv, out, encoder_.hidden, encoder_.heads};
    const std::int64_t size = encoder_.hidden / encoder_.heads, first = sequences_.starts[0];
    run_parallel(sequences_.count * encoder_.heads, shape_.tokens * encoder_.hidden, [&](std::int64_t i) {
      const std::int64_t s = i / encoder_.heads;
      const std::int64_t start = sequences_.starts[s] - first, stop = sequences_.starts[s + 1] - first;
      const auto bytes = static_cast<std::size_t>(attention_->bytes(stop - start, size));
      attention_->attend(job, start, stop, i % encoder_.heads, scratch(bytes, Scratch::task));
    });
  }

  void classify(float* logits) {
    const std::int64_t width = shape_.width(), first_width = first_shape_.width(), n = encoder_.hidden;
    const std::int64_t firsts = first_shape_.panels * first_width;
    T* pooled = work_ + firsts * n;
    std::fill_n(work_, firsts * n, T{});
    for (std::int64_t s = 0; s < sequences_.count; ++s) {
      const std::int64_t t = sequences_.starts[s] - sequences_.starts[0];
      const T* from = x_ + t / width * n * width + t % width;
      T* to = work_ + s / first_width * n * first_width + s % first_width;
      for (std::int64_t k = 0; k < n; ++k) to[k * first_width] = from[k * width];
    }
    run_linear(first_kernel_->linear,
               LinearJob<T>{first_shape_, &encoder_.pooler, work_, nullptr, pooled, nullptr, nullptr, false, 0},
               context_.threads);
    const std::int64_t pooled_floats = sequences_.count * encoder_.pooler.n_out;
    // From here on, sparse_matmul uses the call's buffer, which held the states; the rows are in the task's buffer.
    auto* rows = static_cast<float*>(
        scratch(static_cast<std::size_t>(pooled_floats) * sizeof(float), Scratch::task));
    unpack(*first_kernel_, first_shape_, pooled, encoder_.pooler.n_out, rows);
    sparse_matmul(rows, sequences_.count, encoder_.classifier, {context_.isa, 1}, logits);
  }

  void unpack(const SparseMatmulKernel<T>& kernel, const PanelShape& shape, T* panels, std::int64_t n, float* rows) {
    const TransposeJob<T> job{shape, rows, panels, n, n};
    run_parallel(shape.panels, shape.tokens * n, [&](std::int64_t i) { kernel.unpack(job, i, 0); });
  }

  const Encoder& encoder_;
  Sequences sequences_;
  cpu::Context context_;
  const Int8Kernel* int8_ = nullptr;  // null if no linear is in int8
  const SparseMatmulKernel<T>* matmul_;
  const SparseMatmulKernel<T>* first_kernel_;
  const SparseEncoderKernel<T>* kernel_;
  const AttentionKernel<T>* attention_;
  PanelShape shape_;
  PanelShape first_shape_;
  const EncoderLayer* layer_ = nullptr;  // the one that is run
  std::int64_t* clipped_ = nullptr;
  T* x_ = nullptr;  // panels of [hidden]
  T* work_ = nullptr;
  std::uint8_t* bytes_ = nullptr;       // panels of the bytes of [hidden], or of [widest]
  std::uint8_t* wide_bytes_ = nullptr;  // panels of the bytes of [widest]
  std::int32_t* positions_ = nullptr;   // [tokens]
};

template <typename T>
void run_batches(const Encoder& encoder, const Sequences& sequences, cpu::Context context, float* logits,
                 float* states, std::int64_t* clipped) {
  const std::int64_t* starts = sequences.starts;
  for (std::int64_t first = 0; first < sequences.count;) {
    std::int64_t last = first + 1;
    while (last < sequences.count && starts[last + 1] - starts[first] <= batch_tokens * context.threads) ++last;
    Batch<T> batch(encoder, {sequences.ids, sequences.types, starts + first, last - first}, context);
    batch.run(logits + first * encoder.classifier.n_out,
              states != nullptr ? states + starts[first] * encoder.hidden : nullptr, clipped);
    first = last;
  }
}

}  // namespace

void sparse_encoder(const Encoder& encoder, const Sequences& sequences, cpu::Context context, float* logits,
                    float* states, std::int64_t* clipped) {
  if (scratch_is_poisoned()) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(logits, sequences.count * encoder.classifier.n_out, nan);
    if (states != nullptr) std::fill_n(states, sequences.starts[sequences.count] * encoder.hidden, nan);
  }
  if (format_of(encoder.pooler).bf16) {
    run_batches<Bf16>(encoder, sequences, context, logits, states, clipped);
  } else {
    run_batches<float>(encoder, sequences, context, logits, states, clipped);
  }
}

}  // namespace sparsebert
