// The Python bindings of the compiled core. sparsebert.ops states the contracts and checks them with full messages; the
// checks here only keep a wrong direct call from accessing memory outside its arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cxxabi.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace py = pybind11;
using namespace sparsebert;

namespace {

// c_style without forcecast: with noconvert() below, an array of another type or layout is refused, not copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr std::pair<const char*, Isa> isas[] = {
    {"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512},
    {"avx512_bf16", Isa::avx512_bf16}, {"amx", Isa::amx}};

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : isas) {
    if (isa_supported(isa)) names.emplace_back(name);
  }
  return names;
}

Isa isa_named(const std::string& wanted) {
  for (const auto& [name, isa] : isas) {
    if (wanted == name && isa_supported(isa)) return isa;
  }
  throw std::invalid_argument("isa " + wanted + " cannot run here");
}

void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

// Releases the GIL, and sets this thread's floating-point environment to the defaults of IEEE 754: if the caller had
// denormals flushed to zero (torch can do that), this thread would give other results than the workers. The destructor
// restores the caller's environment.
class Released {
 public:
  // trimmed: frees large working memory at the end.
  explicit Released(bool trimmed = false) : trimmed_(trimmed) {
    fegetenv(&environment_);
    fesetenv(FE_DFL_ENV);
    state_ = PyEval_SaveThread();
  }
  Released(const Released&) = delete;
  ~Released() {
    if (trimmed_) trim_scratch();
    fesetenv(&environment_);
#if defined(__GLIBCXX__)
    // When a process ends, Python ends the other threads that ask for the GIL by unwinding their stacks. The callers of
    // this destructor cannot bear that, as their cleanup would run without the GIL. So this thread waits for the end of
    // the process.
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }

 private:
  bool trimmed_;
  fenv_t environment_;
  PyThreadState* state_;
};

// numpy and torch allow any byte in a bool, C++ does not.
void require_bools(const Array<bool>& array) {
  const auto* bytes = static_cast<const std::uint8_t*>(static_cast<const void*>(array.data()));
  require(std::all_of(bytes, bytes + array.size(), [](std::uint8_t byte) { return byte <= 1; }),
          "masks must hold 0 and 1");
}

// Keeps the arrays alive that C++ points into.
class Kept {
 public:
  template <typename T>
  const T* data(const Array<T>& array) {
    kept_.push_back(array);
    return array.data();
  }
  template <typename T>
  const T* data(const std::optional<Array<T>>& array) {
    return array ? data(*array) : nullptr;
  }

 private:
  std::vector<py::object> kept_;
};

constexpr std::pair<const char*, Activation> activations[] = {
    {"none", Activation::none}, {"gelu", Activation::gelu}, {"relu", Activation::relu}, {"tanh", Activation::tanh}};

Activation activation_named(const std::string& wanted) {
  for (const auto& [name, activation] : activations) {
    if (wanted == name) return activation;
  }
  throw std::invalid_argument("activation " + wanted + " is not known");
}

// A packed linear layer as Python holds it.
struct PyLinear {
  Kept kept;
  std::variant<SlicedMatrix, GroupedMatrix, TiledMatrix> matrix;
  const float* bias;
  Activation activation;
  std::int64_t n_in, n_out;

  // The view points into this object, which must not move while the view is used.
  Linear view() const {
    return {std::get_if<SlicedMatrix>(&matrix), std::get_if<GroupedMatrix>(&matrix), std::get_if<TiledMatrix>(&matrix),
            bias,                            activation,                          n_in,
            n_out};
  }
};

// A layer with this matrix, whose arrays `kept` keeps alive.
template <typename Matrix>
PyLinear linear_of(Kept kept, const Matrix& matrix, std::int64_t n_in, std::int64_t n_out,
                   const std::optional<Array<float>>& bias, const std::string& activation) {
  require(!bias || (bias->ndim() == 1 && bias->size() == n_out), "bias must be [n_out]");
  const float* bias_data = kept.data(bias);
  return {std::move(kept), matrix, bias_data, activation_named(activation), n_in, n_out};
}

void require_rows(const Array<std::int32_t>& rows, std::int64_t n_out) {
  for (std::int64_t i = 0; i < rows.size(); ++i) {
    require(rows.data()[i] >= -1 && rows.data()[i] < n_out, "rows must be rows of W, or -1");
  }
}

void require_cols(const Array<std::uint16_t>& cols, std::int64_t n_in) {
  require(std::all_of(cols.data(), cols.data() + cols.size(), [n_in](std::uint16_t col) { return col < n_in; }),
          "cols must stay below n_in");
}

PyLinear sliced_linear(const Array<std::int32_t>& rows, const Array<std::uint8_t>& counts,
                       const Array<std::uint8_t>& cols, const Array<float>& values, std::int64_t n_in,
                       std::int64_t n_out, const std::optional<Array<float>>& bias, const std::string& activation) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t slabs = ceil_div(n_in, slab_cols), slices = ceil_div(n_out, slice_rows);
  const std::int64_t blocks = ceil_div(n_out, block_rows), block_slices = block_rows / slice_rows;
  require(n_in >= 1 && n_out >= 1 && rows.size() == slabs * slices * slice_rows && counts.size() == slabs * slices,
          "every slab must have all slices");
  Array<std::int64_t> begin({slabs, blocks});
  std::int64_t entry = 0;
  for (std::int64_t slab = 0; slab < slabs; ++slab) {
    const std::int64_t start = entry;
    for (std::int64_t slice = 0; slice < slices; ++slice) {
      if (slice % block_slices == 0) begin.mutable_data()[slab * blocks + slice / block_slices] = entry;
      entry += counts.data()[slab * slices + slice];
    }
    require(entry * slice_rows <= cols.size(), "counts must add up to the entries");
    const std::int64_t width = std::min(slab_cols, n_in - slab * slab_cols);
    const bool inside = std::all_of(cols.data() + start * slice_rows, cols.data() + entry * slice_rows,
                                    [width](std::uint8_t col) { return col < width; });
    require(inside, "cols must stay within their slab");
  }
  require(entry * slice_rows == cols.size() && cols.size() == values.size(), "counts must add up to the entries");
  require_rows(rows, n_out);
  Kept kept;
  const SlicedMatrix w{kept.data(rows),   kept.data(counts), kept.data(begin), kept.data(cols),
                       kept.data(values), slabs,             slices,           blocks,          entry};
  return linear_of(std::move(kept), w, n_in, n_out, bias, activation);
}

PyLinear grouped_linear(const Array<std::int32_t>& rows, const Array<std::int32_t>& col_begin,
                        const Array<std::int32_t>& col_count, const Array<std::uint16_t>& cols,
                        const Array<std::int64_t>& value_begin, const Array<float>& values, std::int64_t n_in,
                        std::int64_t n_out, const std::optional<Array<float>>& bias, const std::string& activation) {
  require(rows.ndim() == 2 && rows.shape(1) == group_rows, "rows must be [groups, group_rows]");
  const std::int64_t groups = rows.shape(0);
  require(col_begin.size() == groups && col_count.size() == groups && value_begin.size() == groups,
          "every group must have columns and values");
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t begin = col_begin.at(g), count = col_count.at(g), at = value_begin.at(g);
    require(begin >= 0 && count >= 0 && begin + count <= cols.size(), "columns of a group must lie in cols");
    require(at >= 0 && at + count * group_rows <= values.size(), "values of a group must lie in values");
  }
  require_rows(rows, n_out);
  require_cols(cols, n_in);
  Kept kept;
  const GroupedMatrix w{kept.data(rows),        kept.data(col_begin), kept.data(col_count), kept.data(cols),
                        kept.data(value_begin), kept.data(values),    groups};
  return linear_of(std::move(kept), w, n_in, n_out, bias, activation);
}

PyLinear tiled_linear(const Array<std::int32_t>& rows, const Array<std::int32_t>& tiles,
                      const Array<std::int64_t>& col_begin, const Array<std::int32_t>& chunks,
                      const Array<std::uint16_t>& cols, const Array<std::int64_t>& value_begin,
                      const Array<std::int64_t>& mask_begin, const Array<Bf16>& values,
                      const Array<std::uint32_t>& masks, std::int64_t n_in, std::int64_t n_out,
                      const std::optional<Array<float>>& bias, const std::string& activation) {
  require(rows.ndim() == 2 && rows.shape(1) == 2 * tile_rows, "rows must be [groups, 2 * tile_rows]");
  const std::int64_t groups = rows.shape(0);
  require(tiles.size() == groups && col_begin.size() == groups && chunks.size() == groups &&
              value_begin.size() == groups && mask_begin.size() == groups,
          "every group must have tiles, columns and values");
  std::int64_t most_chunks = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t count = chunks.at(g);
    most_chunks = std::max(most_chunks, count);
    require(tiles.at(g) == 1 || tiles.at(g) == 2, "a group must have 1 or 2 tiles");
    require(col_begin.at(g) >= 0 && count >= 0 && col_begin.at(g) + count * tile_cols <= cols.size(),
            "columns of a group must lie in cols");
    const std::int64_t words = count * tiles.at(g) * tile_rows;
    std::int64_t entries = words * tile_cols;
    if (mask_begin.at(g) >= 0) {
      require(mask_begin.at(g) + words <= masks.size(), "masks of a group must lie in masks");
      entries = 0;
      for (std::int64_t i = 0; i < words; ++i) entries += __builtin_popcount(masks.at(mask_begin.at(g) + i));
    }
    require(value_begin.at(g) >= 0 && value_begin.at(g) + entries <= values.size(),
            "values of a group must lie in values");
  }
  require_rows(rows, n_out);
  require_cols(cols, n_in);
  Kept kept;
  const TiledMatrix w{kept.data(rows),        kept.data(tiles),      kept.data(col_begin), kept.data(chunks),
                      kept.data(cols),        kept.data(value_begin), kept.data(mask_begin), kept.data(values),
                      kept.data(masks),       groups,                most_chunks};
  return linear_of(std::move(kept), w, n_in, n_out, bias, activation);
}

py::array_t<float> run_sparse_matmul(const Array<float>& x, const PyLinear& linear, const std::string& isa_name,
                                     int threads) {
  const Isa isa = isa_named(isa_name);
  require(x.ndim() == 2 && x.shape(1) == linear.n_in, "x must be [tokens, n_in]");
  require(threads >= 1, "threads must be at least 1");
  const std::int64_t tokens = x.shape(0);
  py::array_t<float> y({tokens, linear.n_out});
  const float* x_data = x.data();
  float* y_data = y.mutable_data();
  const Linear view = linear.view();
  {
    const Released released;
    sparse_matmul(x_data, tokens, view, isa, threads, y_data);
  }
  return y;
}

// A packed encoder as Python holds it. It contains pointers into itself, so it must not be copied or moved.
class PyEncoder {
 public:
  using Norm = std::pair<Array<float>, Array<float>>;
  PyEncoder(const Array<float>& words, const Array<float>& positions, const Norm& embedding_norm,
            const std::optional<PyLinear>& projection, const py::list& layers, std::int64_t heads, float eps,
            const PyLinear& pooler, const PyLinear& classifier) {
    require(words.ndim() == 2 && positions.ndim() == 3, "words must be 2-d, positions 3-d");
    encoder_.embedding = words.shape(1);
    vocabulary_ = words.shape(0);
    types_ = positions.shape(0);
    encoder_.max_length = positions.shape(1);
    require(positions.shape(2) == encoder_.embedding, "positions must be [types, max_length, embedding]");
    encoder_.words = kept_.data(words);
    encoder_.positions = kept_.data(positions);
    encoder_.embedding_norm = norm(embedding_norm, encoder_.embedding);
    encoder_.hidden = projection ? projection->n_out : encoder_.embedding;
    linears_.reserve(3 + 4 * layers.size());
    if (projection) {
      projection_ = linear(*projection, encoder_.embedding, encoder_.hidden);
      encoder_.projection = &projection_;
    }
    const std::int64_t hidden = encoder_.hidden;
    for (const py::handle& item : layers) {
      const auto fields = item.cast<py::tuple>();
      require(fields.size() == 6, "a layer must have 4 linears and 2 norms");
      EncoderLayer layer{};
      layer.qkv = linear(fields[0].cast<const PyLinear&>(), hidden, 3 * hidden);
      layer.attention_out = linear(fields[1].cast<const PyLinear&>(), hidden, hidden);
      layer.up = linear(fields[2].cast<const PyLinear&>(), hidden, -1);
      layer.down = linear(fields[3].cast<const PyLinear&>(), layer.up.n_out, hidden);
      layer.attention_norm = norm(fields[4].cast<Norm>(), hidden);
      layer.norm = norm(fields[5].cast<Norm>(), hidden);
      layers_.push_back(layer);
    }
    encoder_.layers = layers_.data();
    encoder_.n_layers = static_cast<std::int64_t>(layers_.size());
    require(heads >= 1 && hidden % heads == 0, "heads must divide hidden");
    encoder_.heads = heads;
    encoder_.eps = eps;
    encoder_.pooler = linear(pooler, hidden, -1);
    for (const PyLinear& packed : linears_) {
      require((packed.view().tiled != nullptr) == (encoder_.pooler.tiled != nullptr),
              "all linears but the classifier must be in tiles, or none");
    }
    encoder_.classifier = linear(classifier, encoder_.pooler.n_out, -1);
    require(encoder_.classifier.tiled == nullptr, "the classifier must not be in tiles");
  }
  PyEncoder(const PyEncoder&) = delete;

  std::pair<py::array_t<float>, std::optional<py::array_t<float>>> run(
      const Array<std::int32_t>& ids, const Array<std::int32_t>& types, const Array<std::int64_t>& starts,
      bool with_states, const std::string& isa_name, int threads) const {
    const Isa isa = isa_named(isa_name);
    require(threads >= 1, "threads must be at least 1");
    require(ids.ndim() == 1 && types.ndim() == 1 && types.size() == ids.size(), "ids and types must be [tokens]");
    require(starts.ndim() == 1 && starts.size() >= 1, "starts must be [sequences + 1]");
    // Copied, because another thread may write to the caller's arrays while this one runs.
    const std::vector<std::int32_t> own_ids(ids.data(), ids.data() + ids.size());
    const std::vector<std::int32_t> own_types(types.data(), types.data() + types.size());
    const std::vector<std::int64_t> own_starts(starts.data(), starts.data() + starts.size());
    const std::int64_t count = starts.size() - 1;
    for (std::int64_t s = 0; s < count; ++s) {
      const std::int64_t n = own_starts[s + 1] - own_starts[s];
      require(n >= 1 && n <= encoder_.max_length, "sequences must have 1 to max_length tokens");
    }
    require(own_starts[0] == 0 && own_starts[count] == ids.size(), "starts must go from 0 to tokens");
    for (const std::int32_t id : own_ids) require(id >= 0 && id < vocabulary_, "ids must be in the vocabulary");
    for (const std::int32_t type : own_types) require(type >= 0 && type < types_, "types must be token types");
    py::array_t<float> logits({count, encoder_.classifier.n_out});
    std::optional<py::array_t<float>> states;
    if (with_states) states.emplace(std::vector<py::ssize_t>{ids.size(), encoder_.hidden});
    const Sequences sequences{own_ids.data(), own_types.data(), own_starts.data(), count};
    float* logits_data = logits.mutable_data();
    float* states_data = states ? states->mutable_data() : nullptr;
    {
      const Released released;
      sparse_encoder(encoder_, sequences, isa, threads, logits_data, states_data);
    }
    return {logits, states};
  }

 private:
  Linear linear(const PyLinear& packed, std::int64_t n_in, std::int64_t n_out) {
    require(packed.n_in == n_in && (n_out < 0 || packed.n_out == n_out), "linears must fit each other");
    linears_.push_back(packed);
    return linears_.back().view();
  }

  LayerNorm norm(const Norm& arrays, std::int64_t n) {
    require(arrays.first.ndim() == 1 && arrays.first.size() == n && arrays.second.ndim() == 1 &&
                arrays.second.size() == n,
            "norms must have one weight and one bias per value");
    return {kept_.data(arrays.first), kept_.data(arrays.second)};
  }

  Kept kept_;
  std::vector<PyLinear> linears_;  // never grows past its reserved capacity: views point into it
  Linear projection_{};
  std::vector<EncoderLayer> layers_;
  std::int64_t vocabulary_, types_;
  Encoder encoder_{};
};

py::array_t<std::int64_t> run_masked_lstsq(const Array<double>& target, const Array<double>& h,
                                           const Array<bool>& mask, const Array<std::int64_t>& row_ptr,
                                           const Array<std::int32_t>& rows, bool complement, Array<double>& v,
                                           const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  require(target.ndim() == 2 && h.ndim() == 2 && mask.ndim() == 2 && v.ndim() == 2 && row_ptr.ndim() == 1 &&
              rows.ndim() == 1,
          "target, h, mask and v must be 2-d, the rest 1-d");
  const std::int64_t n_in = target.shape(1);
  require(h.shape(0) == n_in && h.shape(1) == n_in, "h must be [n_in, n_in]");
  require(mask.shape(0) == target.shape(0) && mask.shape(1) == n_in && v.shape(0) == target.shape(0) &&
              v.shape(1) == n_in,
          "mask and v must have target's shape");
  require(row_ptr.size() >= 1 && row_ptr.at(0) == 0, "row_ptr must start with 0");
  require_bools(mask);
  const RowGroups groups{mask.data(), row_ptr.data(), rows.data(), row_ptr.size() - 1};
  for (std::int64_t i = 0; i < groups.count; ++i) {
    require(groups.row_ptr[i] < groups.row_ptr[i + 1], "row_ptr must increase");
  }
  require(groups.row_ptr[groups.count] == rows.size(), "row_ptr must end at the size of rows");
  for (std::int64_t i = 0; i < rows.size(); ++i) {
    require(groups.rows[i] >= 0 && groups.rows[i] < target.shape(0), "rows must be rows of target");
  }
  py::array_t<std::int64_t> failed(groups.count);
  const double* target_data = target.data();
  const double* h_data = h.data();
  double* v_data = v.mutable_data();
  std::int64_t* failed_data = failed.mutable_data();
  {
    const Released released(true);
    masked_lstsq(target_data, h_data, n_in, groups, complement, isa, threads, v_data, failed_data);
  }
  return failed;
}

std::pair<py::array_t<std::int32_t>, py::array_t<double>> run_obs_prune(
    const Array<double>& weight, const Array<double>& inverse, std::int64_t group, std::int64_t bank_width,
    std::int64_t bank_removals, std::int64_t steps, const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  require(weight.ndim() == 2 && inverse.ndim() == 2, "weight and inverse must be 2-d");
  const std::int64_t rows = weight.shape(0), n_in = weight.shape(1);
  require(n_in <= INT32_MAX, "n_in must fit 32 bits");
  require(inverse.shape(0) == n_in && inverse.shape(1) == n_in, "inverse must be [n_in, n_in]");
  require(group >= 1 && rows % group == 0, "group must divide the rows");
  require(bank_width >= 0 && (bank_width == 0 || n_in % bank_width == 0), "bank_width must divide n_in");
  const std::int64_t most =
      bank_width == 0 ? n_in : n_in / bank_width * std::clamp<std::int64_t>(bank_removals, 0, bank_width);
  require(steps >= 0 && steps <= most, "steps must be at most what may be removed");

  py::array_t<std::int32_t> order({rows / group, steps});
  py::array_t<double> losses({rows / group, steps});
  const double* weight_data = weight.data();
  const double* inverse_data = inverse.data();
  std::int32_t* order_data = order.mutable_data();
  double* losses_data = losses.mutable_data();
  {
    const Released released(true);
    obs_prune(weight_data, rows, n_in, inverse_data, group, {bank_width, bank_removals}, steps, isa, threads,
              order_data, losses_data);
  }
  return {order, losses};
}

py::array_t<double> run_obs_sweep(const Array<double>& weight, const Array<double>& factor, std::int64_t group,
                                  std::int64_t n, std::int64_t m, bool shared, const Array<std::int64_t>& removals,
                                  std::int64_t block, const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1 && block >= 1, "threads and block must be at least 1");
  require(weight.ndim() == 2 && factor.ndim() == 2 && removals.ndim() == 1, "weight and factor must be 2-d");
  const std::int64_t rows = weight.shape(0), n_in = weight.shape(1);
  require(factor.shape(0) == n_in && factor.shape(1) == n_in, "factor must be [n_in, n_in]");
  require(group >= 1 && rows % group == 0, "group must divide the rows");
  require(m >= 0 && (m == 0 || (n_in % m == 0 && block % m == 0)), "m must divide n_in and block");
  require(!shared || m >= 4, "m must be at least 4 if columns are shared");
  if (m == 0) {
    require(removals.size() == (n_in + block - 1) / block, "removals must be one per block");
    for (std::int64_t b = 0; b < removals.size(); ++b) {
      const std::int64_t most = rows / group * std::min(block, n_in - b * block);
      require(removals.at(b) >= 0 && removals.at(b) <= most, "removals must be at most what a block holds");
    }
  }
  py::array_t<double> pruned({rows, n_in});
  const double* weight_data = weight.data();
  const double* factor_data = factor.data();
  double* pruned_data = pruned.mutable_data();
  const SweepPattern pattern{group, n, m, shared, removals.data()};
  {
    const Released released(true);
    obs_sweep(weight_data, rows, n_in, factor_data, pattern, block, isa, threads, pruned_data);
  }
  return pruned;
}

// Null if there is no array.
template <typename T>
const T* data_or_null(const std::optional<Array<T>>& array) { return array ? array->data() : nullptr; }

py::array_t<double> run_token_sums(const Array<float>& values, const std::optional<Array<float>>& weights,
                                   const Array<float>& shift, const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  require(values.ndim() == 2 && values.size() > 0, "values must be 2-d and not empty");
  const std::int64_t tokens = values.shape(0);
  const std::int64_t n = values.shape(1);
  require(shift.ndim() == 1 && shift.size() == n, "shift must be [n]");
  require(!weights || (weights->ndim() == 1 && weights->size() == tokens), "weights must be [tokens]");
  py::array_t<double> sums(n);
  double* sums_data = sums.mutable_data();
  {
    const Released released;
    token_sums(values.data(), tokens, n, data_or_null(weights), shift.data(), isa, threads, sums_data);
  }
  return sums;
}

bool run_gram(const Array<float>& x, const Array<float>& shift_x, const std::optional<Array<float>>& y,
              const std::optional<Array<float>>& shift_y, const std::optional<Array<float>>& weights,
              Array<double>& sum_x, Array<double>& sum_xx, std::optional<Array<double>>& sum_y,
              std::optional<Array<double>>& sum_yx, const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  require(x.ndim() == 2 && x.size() > 0, "x must be 2-d and not empty");
  const std::int64_t tokens = x.shape(0);
  const std::int64_t n_in = x.shape(1);
  require(shift_x.ndim() == 1 && shift_x.size() == n_in, "shift_x must be [n_in]");
  require(sum_x.ndim() == 1 && sum_x.size() == n_in, "sum_x must be [n_in]");
  require(sum_xx.ndim() == 2 && sum_xx.shape(0) == n_in && sum_xx.shape(1) == n_in, "sum_xx must be [n_in, n_in]");
  require(!weights || (weights->ndim() == 1 && weights->size() == tokens), "weights must be [tokens]");
  require(y.has_value() == (shift_y && sum_y && sum_yx), "y needs shift_y, sum_y and sum_yx");
  GramSums sums{sum_x.mutable_data(), sum_xx.mutable_data(), nullptr, nullptr};
  std::int64_t n_y = 0;
  if (y) {
    require(y->ndim() == 2 && y->shape(0) == tokens && y->shape(1) >= 1, "y must be [tokens, n_y >= 1]");
    n_y = y->shape(1);
    require(shift_y->ndim() == 1 && shift_y->size() == n_y, "shift_y must be [n_y]");
    require(sum_y->ndim() == 1 && sum_y->size() == n_y, "sum_y must be [n_y]");
    require(sum_yx->ndim() == 2 && sum_yx->shape(0) == n_y && sum_yx->shape(1) == n_in, "sum_yx must be [n_y, n_in]");
    sums.y = sum_y->mutable_data();
    sums.yx = sum_yx->mutable_data();
  }
  const Released released;
  return gram(x.data(), n_in, shift_x.data(), data_or_null(y), n_y, data_or_null(shift_y), data_or_null(weights),
              tokens, isa, threads, sums);
}

std::optional<py::array_t<bool>> run_topk_mask(const Array<float>& scores, std::int64_t k, const std::string& isa_name,
                                                int threads) {
  const Isa isa = isa_named(isa_name);
  require(scores.ndim() == 2, "scores must be 2-d");
  require(threads >= 1, "threads must be at least 1");
  require(0 <= k && k <= scores.shape(1), "k must be between 0 and n");
  py::array_t<bool> keep({scores.shape(0), scores.shape(1)});
  const float* scores_data = scores.data();
  bool* keep_data = keep.mutable_data();
  bool finite;
  {
    const Released released;
    finite = topk_mask(scores_data, keep.shape(0), keep.shape(1), k, isa, threads, keep_data);
  }
  if (!finite) return std::nullopt;
  return keep;
}

void run_admm_prune_step(const Array<float>& q, const Array<float>& qt, const Array<float>& eigenvalues,
                         const Array<float>& goal, Array<float>& b, Array<float>& u, Array<float>& x,
                         Array<float>& scores, const Array<bool>& keep, float rho, float shrink,
                         const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
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
  admm_prune_step(state, keep_data, rho, shrink, isa, threads);
}

using FloatsOrBf16 = std::variant<Array<float>, Array<Bf16>>;

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
                       const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  const MaskedWeight masked = masked_weight(weight, scores, thresholds);
  const Values in = values_of(x, false), out = values_of(y, true);
  require(in.cols == masked.n_in && out.rows == in.rows && out.cols == masked.n_out && in.bf16 == out.bf16,
          "x must be [tokens, n_in], and y [tokens, n_out] of its type");
  require(!bias || (bias->ndim() == 1 && bias->size() == masked.n_out), "bias must be [n_out]");
  const Released released;
  masked_matmul(masked, in.data, in.rows, in.bf16, data_or_null(bias), isa, threads, out.data);
}

void run_masked_matmul_backward(FloatsOrBf16 x, FloatsOrBf16 dy, const Array<float>& weight,
                                const Array<float>& scores, const Array<float>& thresholds,
                                std::optional<FloatsOrBf16> dx, std::optional<Array<float>> d_weight,
                                std::optional<Array<float>> d_scores, const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
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
  masked_matmul_backward(masked, in.data, out.data, in.rows, in.bf16, isa, threads, dx_out.data, d_weight_data,
                         d_scores_data);
}

// The data of an array, which must have `size` values.
void* data_of(FloatsOrBf16& array, std::int64_t size, bool bf16, bool written) {
  return std::visit(
      [=](auto& values) -> void* {
        require(values.size() == size && (values.itemsize() == 2) == bf16, "all arrays must have one type and size");
        return written ? values.mutable_data() : const_cast<void*>(static_cast<const void*>(values.data()));
      },
      array);
}

bool is_bf16(const FloatsOrBf16& array) { return std::holds_alternative<Array<Bf16>>(array); }

Dropout dropout_of(std::uint64_t seed, std::uint32_t limit) {
  require(limit < 65536, "limit must be below 65536");
  return {seed, limit};
}

void run_dropout(FloatsOrBf16 x, std::uint64_t seed, std::uint32_t limit, FloatsOrBf16 y, const std::string& isa_name,
                 int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  const Dropout dropped = dropout_of(seed, limit);
  const bool bf16 = is_bf16(x);
  const std::int64_t n = std::visit([](const auto& values) { return values.size(); }, x);
  const void* from = data_of(x, n, bf16, false);
  void* to = data_of(y, n, bf16, true);
  const Released released;
  dropout(from, n, bf16, dropped, isa, threads, to);
}

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
                   const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  const Attention job = attention_of(q, k, v, keep, scale, seed, limit);
  void* out_data = data_of(out, job.sequences * job.tokens * job.heads * job.size, job.bf16, true);
  require(stats.size() == 2 * job.sequences * job.tokens * job.heads, "stats must be [sequences, heads, 2, tokens]");
  float* stats_data = stats.mutable_data();
  const Released released;
  attention(job, isa, threads, out_data, stats_data);
}

void run_attention_backward(FloatsOrBf16 q, FloatsOrBf16 k, FloatsOrBf16 v, const std::optional<Array<bool>>& keep,
                            float scale, std::uint64_t seed, std::uint32_t limit, const Array<float>& stats,
                            FloatsOrBf16 d_out, FloatsOrBf16 dq, FloatsOrBf16 dk, FloatsOrBf16 dv,
                            const std::string& isa_name, int threads) {
  const Isa isa = isa_named(isa_name);
  require(threads >= 1, "threads must be at least 1");
  const Attention job = attention_of(q, k, v, keep, scale, seed, limit);
  const std::int64_t size = job.sequences * job.tokens * job.heads * job.size;
  require(stats.size() == 2 * job.sequences * job.tokens * job.heads, "stats must be [sequences, heads, 2, tokens]");
  const void* d_out_data = data_of(d_out, size, job.bf16, false);
  void* dq_data = data_of(dq, size, job.bf16, true);
  void* dk_data = data_of(dk, size, job.bf16, true);
  void* dv_data = data_of(dv, size, job.bf16, true);
  const Released released;
  attention_backward(job, stats.data(), d_out_data, isa, threads, dq_data, dk_data, dv_data);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of sparsebert; call it through sparsebert.ops.";
  m.def("supported_isas", &supported_isas, "Instruction sets that can run here, slowest first.");
  m.def("peak_flops", [](const std::string& isa, bool bf16) { return peak_flops(isa_named(isa), bf16); },
        py::arg("isa"), py::arg("bf16"));
  m.def("poison_scratch", &poison_scratch, py::arg("on"), "For tests: fill working memory with NaN before every use.");
  m.attr("GROUP_ROWS") = group_rows;
  m.attr("GROUP_TILE") = group_tile;
  py::class_<PyLinear>(m, "Linear",
                       "A packed linear layer; arrays are kept, not copied, and must not change.");
  m.attr("SLICE_ROWS") = slice_rows;
  m.attr("BLOCK_ROWS") = block_rows;
  m.attr("SLAB_COLS") = slab_cols;
  m.def("sliced_linear", &sliced_linear, py::arg("rows").noconvert(), py::arg("counts").noconvert(),
        py::arg("cols").noconvert(), py::arg("values").noconvert(), py::arg("n_in"), py::arg("n_out"),
        py::arg("bias").noconvert().none(true), py::arg("activation"));
  m.def("grouped_linear", &grouped_linear, py::arg("rows").noconvert(), py::arg("col_begin").noconvert(),
        py::arg("col_count").noconvert(), py::arg("cols").noconvert(), py::arg("value_begin").noconvert(),
        py::arg("values").noconvert(), py::arg("n_in"), py::arg("n_out"), py::arg("bias").noconvert().none(true),
        py::arg("activation"));
  m.attr("TILE_ROWS") = tile_rows;
  m.attr("TILE_COLS") = tile_cols;
  m.def("tiled_linear", &tiled_linear, py::arg("rows").noconvert(), py::arg("tiles").noconvert(),
        py::arg("col_begin").noconvert(), py::arg("chunks").noconvert(), py::arg("cols").noconvert(),
        py::arg("value_begin").noconvert(), py::arg("mask_begin").noconvert(), py::arg("values").noconvert(),
        py::arg("masks").noconvert(), py::arg("n_in"), py::arg("n_out"), py::arg("bias").noconvert().none(true),
        py::arg("activation"));
  m.def("sparse_matmul", &run_sparse_matmul, py::arg("x").noconvert(), py::arg("linear"), py::arg("isa"),
        py::arg("threads"), "y = activation(x Wᵀ + bias).");
  py::class_<PyEncoder>(m, "Encoder", "A packed encoder; arrays are kept, not copied.")
      .def(py::init<const Array<float>&, const Array<float>&, const PyEncoder::Norm&, const std::optional<PyLinear>&,
                    const py::list&, std::int64_t, float, const PyLinear&, const PyLinear&>(),
           py::arg("words").noconvert(), py::arg("positions").noconvert(), py::arg("embedding_norm"),
           py::arg("projection").none(true), py::arg("layers"), py::arg("heads"), py::arg("eps"), py::arg("pooler"),
           py::arg("classifier"))
      .def("run", &PyEncoder::run, py::arg("ids").noconvert(), py::arg("types").noconvert(),
           py::arg("starts").noconvert(), py::arg("with_states"), py::arg("isa"), py::arg("threads"),
           "(logits, states or None)");
  m.def("masked_lstsq", &run_masked_lstsq, py::arg("target").noconvert(), py::arg("h").noconvert(),
        py::arg("mask").noconvert(), py::arg("row_ptr").noconvert(), py::arg("rows").noconvert(),
        py::arg("complement"), py::arg("v").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes v; returns a failing pivot, or -1, for each group of rows of equal mask.");
  m.def("obs_prune", &run_obs_prune, py::arg("weight").noconvert(), py::arg("inverse").noconvert(), py::arg("group"),
        py::arg("bank_width"), py::arg("bank_removals"), py::arg("steps"), py::arg("isa"), py::arg("threads"),
        "The order in which groups of rows lose their columns, and the loss of each: [groups, steps] both.");
  m.def("obs_sweep", &run_obs_sweep, py::arg("weight").noconvert(), py::arg("factor").noconvert(), py::arg("group"),
        py::arg("n"), py::arg("m"), py::arg("shared"), py::arg("removals").noconvert(), py::arg("block"),
        py::arg("isa"), py::arg("threads"), "The pruned weight; factor is Uᵀ, with H^-1 = Uᵀ U.");
  m.def("token_sums", &run_token_sums, py::arg("values").noconvert(), py::arg("weights").noconvert().none(true),
        py::arg("shift").noconvert(), py::arg("isa"), py::arg("threads"), "Sum over tokens of w (values - shift).");
  m.def("gram", &run_gram, py::arg("x").noconvert(), py::arg("shift_x").noconvert(),
        py::arg("y").noconvert().none(true), py::arg("shift_y").noconvert().none(true),
        py::arg("weights").noconvert().none(true), py::arg("sum_x").noconvert(), py::arg("sum_xx").noconvert(),
        py::arg("sum_y").noconvert().none(true), py::arg("sum_yx").noconvert().none(true), py::arg("isa"),
        py::arg("threads"),
        "Adds a batch to the sums, in place; xx for i <= j only. False, with nothing added, where it is not finite.");
  m.def("topk_mask", &run_topk_mask, py::arg("scores").noconvert(), py::arg("k"), py::arg("isa"), py::arg("threads"),
        "The k highest of each row, or None where there is a NaN.");
  m.attr("ADMM_PANEL") = admm_panel;
  m.attr("ADMM_BLOCK_ROWS") = admm_block_rows;
  m.def("admm_prune_step", &run_admm_prune_step, py::arg("q").noconvert(), py::arg("qt").noconvert(),
        py::arg("eigenvalues").noconvert(), py::arg("goal").noconvert(), py::arg("b").noconvert(),
        py::arg("u").noconvert(), py::arg("x").noconvert(), py::arg("scores").noconvert(),
        py::arg("keep").noconvert(), py::arg("rho"), py::arg("shrink"), py::arg("isa"), py::arg("threads"),
        "One iteration; writes b, u, x and scores.");
  m.def("masked_matmul", &run_masked_matmul, py::arg("x").noconvert(), py::arg("weight").noconvert(),
        py::arg("scores").noconvert(), py::arg("thresholds").noconvert(), py::arg("bias").noconvert().none(true),
        py::arg("y").noconvert(), py::arg("isa"), py::arg("threads"),
        "Writes y; x and y are float32, or bf16 as uint16.");
  m.def("masked_matmul_backward", &run_masked_matmul_backward, py::arg("x").noconvert(), py::arg("dy").noconvert(),
        py::arg("weight").noconvert(), py::arg("scores").noconvert(), py::arg("thresholds").noconvert(),
        py::arg("dx").noconvert().none(true), py::arg("d_weight").noconvert().none(true),
        py::arg("d_scores").noconvert().none(true), py::arg("isa"), py::arg("threads"),
        "Writes the gradients that are not None.");
  m.def("dropout", &run_dropout, py::arg("x").noconvert(), py::arg("seed"), py::arg("limit"),
        py::arg("y").noconvert(), py::arg("isa"), py::arg("threads"), "Writes y; both float32, or bf16 as uint16.");
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
