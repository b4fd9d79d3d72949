// A packed linear layer as Python holds it.
#pragma once

#include "common.h"

namespace sparsebert::bind {

struct PyLinear {
  Kept kept;
  std::variant<SlicedMatrix, GroupedMatrix, TiledMatrix, Int8Matrix> matrix;  // in the order of Form
  const float* bias;
  Activation activation;
  std::int64_t n_in, n_out;

  // The view points into this object, which must not move while the view is used.
  Linear view() const {
    Linear linear{};
    linear.form = static_cast<Form>(matrix.index());
    if (linear.form == Form::rows) linear.sliced = &std::get<SlicedMatrix>(matrix);
    if (linear.form == Form::groups) linear.grouped = &std::get<GroupedMatrix>(matrix);
    if (linear.form == Form::tiles) linear.tiled = &std::get<TiledMatrix>(matrix);
    if (linear.form == Form::int8) linear.int8 = &std::get<Int8Matrix>(matrix);
    linear.bias = bias;
    linear.activation = activation;
    linear.n_in = n_in;
    linear.n_out = n_out;
    return linear;
  }
};

}  // namespace sparsebert::bind
