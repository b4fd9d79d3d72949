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

// Panels have one width from the embeddings to the last layer: the width for the form that most linears have.
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

// The kernels for a number of tokens, and the panels that these are cut into.
template <typename T>
struct Plan {
  const Int8Kernel* int8 = nullptr;  // null if no linear is in int8
  const SparseMatmulKernel<T>* matmul;
  const SparseEncoderKernel<T>* encoder;
  const AttentionKernel<T>* attention;
  PanelShape shape;

  // sizes: of the linears in int8. groups: whether most others are in groups or tiles.
  Plan(const Int8Sizes& sizes, bool groups, Isa isa, std::int64_t tokens) {
    if (sizes.rows > 0) int8 = &int8_kernel(isa, tokens, sizes);
    const Isa floats = int8 != nullptr ? floats_beside(*int8) : isa_for<T>(isa, tokens);
    matmul = &sparse_matmul_kernel<T>(floats);
    encoder = &encoder_kernel<T>(floats);
    attention = &encoder->attention;
    if constexpr (std::is_same_v<T, float>) {
      if (int8 != nullptr) attention = &int8_attention(isa, int8->lanes);
    }
    shape = int8 != nullptr ? panel_shape(*int8, tokens) : panel_shape(*matmul, tokens, groups);
  }

  std::int64_t places() const { return shape.panels * shape.width(); }
};

// One batch of whole sequences on its way through the layers; T is float or Bf16.
template <typename T>
class Batch {
 public:
  Batch(const Encoder& encoder, const Sequences& sequences, cpu::Context context)
      : encoder_(encoder),
        sequences_(sequences),
        context_(context),
        plan_(int8_sizes(encoder), mostly_groups(encoder), context.isa,
              sequences.starts[sequences.count] - sequences.starts[0]),
        first_plan_(int8_sizes(encoder), mostly_groups(encoder), context.isa, sequences.count),
        pooler_plan_({}, format_of(encoder.pooler).groups, context.isa, sequences.count),
        places_(std::max(plan_.places(), first_plan_.places())) {}

  // Queries, keys, values and the result of attention are no longer needed when the wider layer is computed, so they
  // share memory with it. So do the embeddings before a projection, and the first tokens in the pooler.
  void run(float* logits, float* states, std::int64_t* clipped) {
    clipped_ = clipped;
    std::int64_t widest = std::max(4 * encoder_.hidden, encoder_.embedding);
    for (std::int64_t i = 0; i < encoder_.n_layers; ++i) widest = std::max(widest, encoder_.layers[i].up.n_out);
    const std::int64_t head = pooler_plan_.places() * (encoder_.hidden + encoder_.pooler.n_out);
    const std::int64_t x = places_ * encoder_.hidden, work = std::max(places_ * widest, head) + overrun;
    const std::int64_t elements = x + work + first_plan_.places() * encoder_.hidden;
    const std::int64_t byte_room = plan_.int8 != nullptr ? places_ * (widest + encoder_.hidden) : 0;
    x_ = static_cast<T*>(scratch(static_cast<std::size_t>(elements) * sizeof(T) + static_cast<std::size_t>(byte_room) +
                                 static_cast<std::size_t>(plan_.shape.tokens) * sizeof(std::int32_t)));
    work_ = x_ + x;
    firsts_ = work_ + work;
    bytes_ = reinterpret_cast<std::uint8_t*>(x_ + elements);
    wide_bytes_ = bytes_ + (plan_.int8 != nullptr ? x : 0);
    positions_ = reinterpret_cast<std::int32_t*>(bytes_ + byte_room);
    embed();
    // The pooler reads first tokens only; but the states that are returned, and the inputs whose clipped bytes are
    // counted, are those of all tokens.
    const bool all = states != nullptr || clipped != nullptr;
    for (std::int64_t i = 0; i < encoder_.n_layers; ++i) {
      run_layer(encoder_.layers[i], !all && i == encoder_.n_layers - 1);
    }
    if (states != nullptr) unpack(x_, encoder_.hidden, states);
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
    clipped_[(layer_ - encoder_.layers) * 4 + which] += count_clipped(plan_.shape, bytes, linear.n_in);
  }

  // y = linear(x), or y += linear(x). `bytes`: the bytes of x, if they are made already, for a linear in int8.
  void linear(const Linear& linear, const T* x, T* y, bool add = false, const std::uint8_t* bytes = nullptr) {
    LinearJob<T> job{plan_.shape, &linear, x, bytes, y, nullptr, nullptr, add, 0};
    if constexpr (std::is_same_v<T, float>) {
      if (linear.form == Form::int8) {
        if (bytes == nullptr) {
          quantize(*plan_.matmul, plan_.shape, x, linear.n_in, linear.int8->input, bytes_, context_.threads);
          job.bytes = bytes_;
        }
        count(linear, job.bytes);
        return run_linear(plan_.int8->linear, job, context_.threads);
      }
    }
    run_linear(plan_.matmul->linear, job, context_.threads);
  }

  // x += down(up(x)). If both are in int8, what lies between them is bytes from the start.
  void feed_forward(const EncoderLayer& layer) {
    if constexpr (std::is_same_v<T, float>) {
      if (layer.up.form == Form::int8 && layer.down.form == Form::int8) {
        quantize(*plan_.matmul, plan_.shape, x_, encoder_.hidden, layer.up.int8->input, bytes_, context_.threads);
        count(layer.up, bytes_);
        run_linear(plan_.int8->linear,
                   {plan_.shape, &layer.up, nullptr, bytes_, nullptr, wide_bytes_, &layer.down.int8->input, false, 0},
                   context_.threads);
        return linear(layer.down, nullptr, x_, true, wide_bytes_);
      }
    }
    linear(layer.up, x_, work_);
    linear(layer.down, work_, x_, true);
  }

  void normalize(T* x, std::int64_t n, const LayerNorm& norm) {
    const NormJob<T> job{plan_.shape, x, n, norm, encoder_.eps};
    run_parallel(plan_.shape.panels * plan_.shape.width_vectors, plan_.shape.tokens * n, [&](std::int64_t i) {
      plan_.encoder->normalize(job, i / plan_.shape.width_vectors, i % plan_.shape.width_vectors);
    });
  }

  void embed() {
    const std::int64_t first = sequences_.starts[0];
    for (std::int64_t s = 0; s < sequences_.count; ++s) {
      const std::int64_t start = sequences_.starts[s] - first, stop = sequences_.starts[s + 1] - first;
      for (std::int64_t t = start; t < stop; ++t) positions_[t] = static_cast<std::int32_t>(t - start);
    }
    T* out = encoder_.projection != nullptr ? work_ : x_;
    const EmbedJob<T> job{plan_.shape, &encoder_, sequences_.ids + first, sequences_.types + first, positions_, out};
    run_parallel(plan_.shape.panels, plan_.shape.tokens * encoder_.embedding,
                 [&](std::int64_t i) { plan_.encoder->embed(job, i); });
    normalize(out, encoder_.embedding, encoder_.embedding_norm);
    if (encoder_.projection != nullptr) linear(*encoder_.projection, out, x_);
  }

  // firsts_only: what follows qkv is computed for the first token of each sequence only, and only these stay in x_.
  void run_layer(const EncoderLayer& layer, bool firsts_only) {
    layer_ = &layer;
    T* attended = work_ + places_ * 3 * encoder_.hidden;
    linear(layer.qkv, x_, work_);
    attend(work_, attended, firsts_only ? 1 : plan_.shape.tokens);
    if (firsts_only) {
      gather_firsts(attended, first_plan_, work_);
      attended = work_;
      keep_firsts(first_plan_, firsts_);
    }
    linear(layer.attention_out, attended, x_, true);
    normalize(x_, encoder_.hidden, layer.attention_norm);
    feed_forward(layer);
    normalize(x_, encoder_.hidden, layer.norm);
  }

  void attend(const T* qkv, T* out, std::int64_t queries) {
    const AttentionJob<T> job{plan_.shape, qkv, out, encoder_.hidden, encoder_.heads, queries};
    const std::int64_t size = encoder_.hidden / encoder_.heads, first = sequences_.starts[0];
    run_parallel(sequences_.count * encoder_.heads, plan_.shape.tokens * encoder_.hidden, [&](std::int64_t i) {
      const std::int64_t s = i / encoder_.heads;
      const std::int64_t start = sequences_.starts[s] - first, stop = sequences_.starts[s + 1] - first;
      const auto bytes = static_cast<std::size_t>(plan_.attention->bytes(stop - start, size));
      plan_.attention->attend(job, start, stop, i % encoder_.heads, scratch(bytes, Scratch::task));
    });
  }

  // Panels of [hidden] -> those of the first token of each sequence, zeros past the last one.
  void gather_firsts(const T* from, const Plan<T>& plan, T* to) {
    const std::int64_t width = plan_.shape.width(), first_width = plan.shape.width(), n = encoder_.hidden;
    const bool only_firsts = plan_.shape.tokens == sequences_.count;  // token s is the one of sequence s
    std::fill_n(to, plan.places() * n, T{});
    for (std::int64_t s = 0; s < sequences_.count; ++s) {
      const std::int64_t t = only_firsts ? s : sequences_.starts[s] - sequences_.starts[0];
      const T* token = from + t / width * n * width + t % width;
      T* first = to + s / first_width * n * first_width + s % first_width;
      for (std::int64_t k = 0; k < n; ++k) first[k * first_width] = token[k * width];
    }
  }

  // Leaves only the first tokens in x_, which becomes `to`.
  void keep_firsts(const Plan<T>& plan, T* to) {
    gather_firsts(x_, plan, to);
    x_ = to;
    plan_ = plan;
  }

  void classify(float* logits) {
    keep_firsts(pooler_plan_, work_);
    T* pooled = work_ + plan_.places() * encoder_.hidden;
    linear(encoder_.pooler, x_, pooled);
    const std::int64_t pooled_floats = sequences_.count * encoder_.pooler.n_out;
    // From here on, sparse_matmul uses the call's buffer, which held the states; the rows are in the task's buffer.
    auto* rows = static_cast<float*>(
        scratch(static_cast<std::size_t>(pooled_floats) * sizeof(float), Scratch::task));
    unpack(pooled, encoder_.pooler.n_out, rows);
    sparse_matmul(rows, sequences_.count, encoder_.classifier, {context_.isa, 1}, logits);
  }

  void unpack(T* panels, std::int64_t n, float* rows) {
    const TransposeJob<T> job{plan_.shape, rows, panels, n, n};
    run_parallel(plan_.shape.panels, plan_.shape.tokens * n, [&](std::int64_t i) { plan_.matmul->unpack(job, i, 0); });
  }

  const Encoder& encoder_;
  Sequences sequences_;
  cpu::Context context_;
  Plan<T> plan_;               // for the tokens in x_
  const Plan<T> first_plan_;   // for the first tokens in the last layer
  const Plan<T> pooler_plan_;  // and in the pooler
  const std::int64_t places_;  // in the panels of all tokens, or of the first ones
  const EncoderLayer* layer_ = nullptr;  // the one that is run
  std::int64_t* clipped_ = nullptr;
  T* x_ = nullptr;  // panels of [hidden]
  T* work_ = nullptr;
  T* firsts_ = nullptr;                 // panels of [hidden], of the first token of each sequence
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
