#include "common.h"
#include "linear.h"

namespace sparsebert::bind {
namespace {

constexpr std::pair<const char*, Activation> activations[] = {
    {"none", Activation::none}, {"gelu", Activation::gelu}, {"relu", Activation::relu}, {"tanh", Activation::tanh}};

Activation activation_named(const std::string& wanted) {
  for (const auto& [name, activation] : activations) {
    if (wanted == name) return activation;
  }
  throw std::invalid_argument("activation " + wanted + " is not known");
}

// A layer with this matrix, whose arrays `kept` keeps alive.
template <typename Matrix>
PyLinear linear_of(Kept kept, const Matrix& matrix, std::int64_t n_in, std::int64_t n_out,
                   const std::optional<Array<float>>& bias, const std::string& activation) {
  require(!bias || (bias->ndim() == 1 && bias->size() == n_out), "bias must be [n_out]");
  const float* bias_data = kept.data(bias);
  return {std::move(kept), matrix, bias_data, activation_named(activation), n_in, n_out};
}

// Whether `length` values from `begin` on lie in an array of `size`.
bool lies_in(std::int64_t begin, std::int64_t length, std::int64_t size) {
  return begin >= 0 && length >= 0 && length <= size && begin <= size - length;
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
    require(lies_in(begin, count, cols.size()), "columns of a group must lie in cols");
    require(lies_in(at, count * group_rows, values.size()), "values of a group must lie in values");
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
    require(lies_in(col_begin.at(g), count * tile_cols, cols.size()), "columns of a group must lie in cols");
    const std::int64_t words = count * tiles.at(g) * tile_rows;
    std::int64_t entries = words * tile_cols;
    if (mask_begin.at(g) >= 0) {
      require(lies_in(mask_begin.at(g), words, masks.size()), "masks of a group must lie in masks");
      entries = 0;
      for (std::int64_t i = 0; i < words; ++i) entries += __builtin_popcount(masks.at(mask_begin.at(g) + i));
    }
    require(lies_in(value_begin.at(g), entries, values.size()), "values of a group must lie in values");
  }
  require_rows(rows, n_out);
  require_cols(cols, n_in);
  Kept kept;
  const TiledMatrix w{kept.data(rows),        kept.data(tiles),      kept.data(col_begin), kept.data(chunks),
                      kept.data(cols),        kept.data(value_begin), kept.data(mask_begin), kept.data(values),
                      kept.data(masks),       groups,                most_chunks};
  return linear_of(std::move(kept), w, n_in, n_out, bias, activation);
}

PyLinear int8_linear(const Array<std::int64_t>& row_begin, const Array<std::int32_t>& rows,
                     const Array<std::int64_t>& col_begin, const Array<std::int32_t>& quads,
                     const Array<std::uint16_t>& cols, const Array<std::int64_t>& value_begin,
                     const Array<std::int8_t>& values, const Array<float>& scale, const Array<float>& step,
                     const Array<std::uint8_t>& zero, std::int64_t n_in, std::int64_t n_out,
                     const std::optional<Array<float>>& bias, const std::string& activation) {
  const std::int64_t groups = quads.size();
  require(row_begin.size() == groups + 1 && col_begin.size() == groups && value_begin.size() == groups,
          "every group must have rows, columns and values");
  require(scale.size() == n_out && step.size() == n_in && zero.size() == n_in,
          "every row must have a scale, every column a step and a zero");
  require_rows(rows, n_out);
  require_cols(cols, n_in);
  require(row_begin.at(0) == 0 && row_begin.at(groups) == rows.size(), "every row must lie in a group");
  std::int64_t most_quads = 0, entries = 0, tall_entries = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t height = row_begin.at(g + 1) - row_begin.at(g), width = std::int64_t{quads.at(g)} * quad_cols;
    require(height >= group_slice && height <= most_int8_rows && height % group_slice == 0,
            "a group must have 4 to 32 rows, a multiple of 4");
    require(lies_in(col_begin.at(g), width, cols.size()), "columns of a group must lie in cols");
    require(lies_in(value_begin.at(g), height * width + int8_overrun, values.size()),
            "values of a group must lie in values, which end with INT8_OVERRUN more");
    most_quads = std::max<std::int64_t>(most_quads, quads.at(g));
    entries += height * width;
    if (height >= 16) tall_entries += height * width;
  }
  Array<std::int32_t> start({n_out});
  Array<float> inverse({n_in}), offset({n_in});
  for (std::int64_t k = 0; k < n_in; ++k) {
    inverse.mutable_at(k) = 1.0f / step.at(k);
    offset.mutable_at(k) = static_cast<float>(zero.at(k)) + 0.5f;
  }
  std::fill_n(start.mutable_data(), n_out, 0);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t height = row_begin.at(g + 1) - row_begin.at(g);
    const std::int8_t* at = values.data() + value_begin.at(g);
    for (std::int64_t r = 0; r < height; ++r) {
      const std::int32_t row = rows.at(row_begin.at(g) + r);
      std::int32_t sum = 0;  // at most 65,536 * 128 * 255 in all, if each row has one group
      for (std::int64_t k = 0; k < quads.at(g) * quad_cols; ++k, ++at) {
        sum += *at * std::int32_t{zero.at(cols.at(col_begin.at(g) + k))};
      }
      if (row >= 0) start.mutable_at(row) -= sum;
    }
  }
  Kept kept;
  const Int8Matrix w{kept.data(row_begin),   kept.data(rows),   kept.data(col_begin),
                     kept.data(quads),       kept.data(cols),   kept.data(value_begin),
                     kept.data(values),      kept.data(scale),  kept.data(start),
                     {kept.data(inverse), kept.data(offset)},   groups,
                     most_quads,             entries,           tall_entries};
  return linear_of(std::move(kept), w, n_in, n_out, bias, activation);
}

py::array_t<float> run_sparse_matmul(const Array<float>& x, const PyLinear& linear, const std::string& isa,
                                     int threads) {
  const cpu::Context context = context_of(isa, threads);
  require(x.ndim() == 2 && x.shape(1) == linear.n_in, "x must be [tokens, n_in]");
  const std::int64_t tokens = x.shape(0);
  py::array_t<float> y({tokens, linear.n_out});
  const float* x_data = x.data();
  float* y_data = y.mutable_data();
  const Linear view = linear.view();
  {
    const Released released;
    sparse_matmul(x_data, tokens, view, context, y_data);
  }
  return y;
}

}  // namespace

void bind_sparse_matmul(py::module_& m) {
  m.def(
      "peak_flops",
      [](const std::string& isa, const std::string& dtype) {
        const Form form = dtype == "int8" ? Form::int8 : dtype == "bf16" ? Form::tiles : Form::rows;
        return peak_flops(context_of(isa, 1).isa, form);
      },
      py::arg("isa"), py::arg("dtype"));
  m.attr("GROUP_ROWS") = group_rows;
  m.attr("GROUP_SLICE") = group_slice;
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
  m.attr("QUAD_COLS") = quad_cols;
  m.attr("MOST_INT8_ROWS") = most_int8_rows;
  m.attr("INT8_OVERRUN") = int8_overrun;
  m.def("int8_linear", &int8_linear, py::arg("row_begin").noconvert(), py::arg("rows").noconvert(),
        py::arg("col_begin").noconvert(), py::arg("quads").noconvert(), py::arg("cols").noconvert(),
        py::arg("value_begin").noconvert(), py::arg("values").noconvert(), py::arg("scale").noconvert(),
        py::arg("step").noconvert(), py::arg("zero").noconvert(), py::arg("n_in"), py::arg("n_out"),
        py::arg("bias").noconvert().none(true), py::arg("activation"));
  m.def("sparse_matmul", &run_sparse_matmul, py::arg("x").noconvert(), py::arg("linear"), py::arg("isa"),
        py::arg("threads"), "y = activation(x Wᵀ + bias).");
}

}  // namespace sparsebert::bind
