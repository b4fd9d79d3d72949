#include "common.h"
#include "linear.h"

namespace sparsebert::bind {
namespace {

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
      require(layer.attention_out.activation == Activation::none && layer.down.activation == Activation::none,
              "linears that are added to the states must have no activation");
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
      require((packed.view().form == Form::tiles) == (encoder_.pooler.form == Form::tiles),
              "all linears but the classifier must be in tiles, or none");
    }
    require(encoder_.pooler.form != Form::int8 && projection_.form != Form::int8,
            "only linears of the layers may be in int8");
    encoder_.classifier = linear(classifier, encoder_.pooler.n_out, -1);
    require(encoder_.classifier.form != Form::tiles && encoder_.classifier.form != Form::int8,
            "the classifier must not be in tiles or in int8");
  }
  PyEncoder(const PyEncoder&) = delete;

  std::tuple<py::array_t<float>, std::optional<py::array_t<float>>, std::optional<py::array_t<std::int64_t>>> run(
      const Array<std::int32_t>& ids, const Array<std::int32_t>& types, const Array<std::int64_t>& starts,
      bool with_states, bool with_clipped, const std::string& isa, int threads) const {
    const cpu::Context context = context_of(isa, threads);
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
    std::optional<py::array_t<std::int64_t>> clipped;
    if (with_clipped) {
      clipped.emplace(std::vector<py::ssize_t>{encoder_.n_layers, 4});
      std::fill_n(clipped->mutable_data(), encoder_.n_layers * 4, 0);
    }
    const Sequences sequences{own_ids.data(), own_types.data(), own_starts.data(), count};
    float* logits_data = logits.mutable_data();
    float* states_data = states ? states->mutable_data() : nullptr;
    std::int64_t* clipped_data = clipped ? clipped->mutable_data() : nullptr;
    {
      const Released released;
      sparse_encoder(encoder_, sequences, context, logits_data, states_data, clipped_data);
    }
    return {logits, states, clipped};
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

}  // namespace

void bind_sparse_encoder(py::module_& m) {
  py::class_<PyEncoder>(m, "Encoder", "A packed encoder; arrays are kept, not copied.")
      .def(py::init<const Array<float>&, const Array<float>&, const PyEncoder::Norm&, const std::optional<PyLinear>&,
                    const py::list&, std::int64_t, float, const PyLinear&, const PyLinear&>(),
           py::arg("words").noconvert(), py::arg("positions").noconvert(), py::arg("embedding_norm"),
           py::arg("projection").none(true), py::arg("layers"), py::arg("heads"), py::arg("eps"), py::arg("pooler"),
           py::arg("classifier"))
      .def("run", &PyEncoder::run, py::arg("ids").noconvert(), py::arg("types").noconvert(),
           py::arg("starts").noconvert(), py::arg("with_states"), py::arg("with_clipped"), py::arg("isa"),
           py::arg("threads"), "(logits, states or None, clipped or None)");
}

}  // namespace sparsebert::bind
