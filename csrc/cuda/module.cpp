// The Python module of the CUDA kernels. Arrays on the device come as addresses, streams as the integers of a
// cudaStream_t; sparsebert.kernels states the contracts and checks them.
#include <cuda_runtime_api.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "masked_lstsq.h"
#include "sparse_matmul_pack.h"

namespace sparsebert::cuda {
namespace {

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

void check(int error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(error)));
}

std::int64_t lstsq_work(std::int64_t k, std::int64_t g, std::int64_t count) {
  std::int64_t doubles = 0;
  check(masked_lstsq_work(k, g, count, &doubles));
  return doubles;
}

void run_masked_lstsq(Address target, Address h, std::int64_t n_in, Address mask, Address row_ptr, Address rows,
                      std::int64_t count, bool complement, std::int64_t k, std::int64_t g, Address work, Address v,
                      Address failed, Address stream) {
  const RowGroups groups{pointer<bool>(mask), pointer<std::int64_t>(row_ptr), pointer<std::int32_t>(rows), count};
  const MaskedLstsqJob job{pointer<double>(target), pointer<double>(h), n_in,       groups, complement,
                           pointer<double>(v),      pointer<std::int64_t>(failed)};
  check(masked_lstsq(job, k, g, pointer<double>(work), pointer<void>(stream)));
}

template <typename T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple pack(const py::array_t<Bf16, py::array::c_style>& weight, std::int64_t v, std::int64_t m) {
  if (weight.ndim() != 2) throw std::invalid_argument("weight must be 2-d");
  const std::int64_t n_out = weight.shape(0), n_in = weight.shape(1);
  if (v < 1 || m <= 4 || n_out % v != 0 || n_in % m != 0 || n_in > 65536) {
    throw std::invalid_argument("v must divide the rows, m > 4 the columns, of which 65536 are allowed");
  }
  const PackedVnm packed = pack_vnm(weight.data(), n_out, n_in, v, m);
  return py::make_tuple(array(packed.cols), array(packed.values), array(packed.metadata), packed.strip_rows,
                        packed.chunks);
}

void run_sparse_matmul(Address cols, Address values, Address metadata, std::int64_t v, std::int64_t strip_rows,
                       std::int64_t chunks, std::int64_t n_out, Address x, std::int64_t x_stride, std::int64_t tokens,
                       Address bias, int activation, Address residual, std::int64_t residual_stride, Address y,
                       std::int64_t y_stride, Address stream) {
  const VnmMatrix weight{pointer<std::uint16_t>(cols), pointer<std::uint32_t>(values), pointer<std::uint32_t>(metadata),
                         v, strip_rows, chunks, n_out};
  const VnmMatmulJob job{weight,   pointer<Bf16>(x), pointer<float>(bias), pointer<Bf16>(residual), pointer<Bf16>(y),
                         x_stride, residual_stride,  y_stride,             tokens, static_cast<Activation>(activation)};
  check(sparse_matmul_vnm(job, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of sparsebert; call them through sparsebert.kernels.";
  m.def("masked_lstsq_work", &lstsq_work, py::arg("k"), py::arg("g"), py::arg("count"),
        "Doubles of working memory that a launch on the current device needs.");
  m.def("masked_lstsq", &run_masked_lstsq, py::arg("target"), py::arg("h"), py::arg("n_in"), py::arg("mask"),
        py::arg("row_ptr"), py::arg("rows"), py::arg("count"), py::arg("complement"), py::arg("k"), py::arg("g"),
        py::arg("work"), py::arg("v"), py::arg("failed"), py::arg("stream"));
  m.def("pack_vnm", &pack, py::arg("weight").noconvert(), py::arg("v"), py::arg("m"),
        "(cols, values, metadata, strip_rows, chunks) of a weight in bf16, on the host.");
  m.def("sparse_matmul_vnm", &run_sparse_matmul, py::arg("cols"), py::arg("values"), py::arg("metadata"),
        py::arg("v"), py::arg("strip_rows"), py::arg("chunks"), py::arg("n_out"), py::arg("x"), py::arg("x_stride"),
        py::arg("tokens"), py::arg("bias"), py::arg("activation"), py::arg("residual"), py::arg("residual_stride"),
        py::arg("y"), py::arg("y_stride"), py::arg("stream"));
}

}  // namespace sparsebert::cuda
