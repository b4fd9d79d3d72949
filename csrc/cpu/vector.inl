// Vectors of one instruction set, and the register tile that the dense kernels are made of. Included inside a namespace
// that names the ISA and defines `lanes`, the floats per vector, under that ISA's target pragma. Files included there
// include no header and call no library template: its function would be emitted here as a shared symbol, with
// instructions that other callers of it may not be able to run.

namespace {

constexpr int vector_bytes = lanes * 4;

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T unaligned __attribute__((vector_size(vector_bytes), aligned(alignof(T))));
  static constexpr int size = vector_bytes / static_cast<int>(sizeof(T));
};

template <typename T>
inline typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}

template <typename T>
inline void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}

template <typename T>
inline typename Vector<T>::type splat(T v) {
  return typename Vector<T>::type{} + v;
}

// Count<n>::type is Indices<0, ..., n - 1>, for masks of shuffles.
template <int... i>
struct Indices {};
template <int n, int... i>
struct Count : Count<n - 1, n - 1, i...> {};
template <int... i>
struct Count<0, i...> {
  typedef Indices<i...> type;
};

// acc[i][n] += sum over k < depth of a[i * a_row + k * a_step] * (vector n at b + k * b_step). Nothing needs alignment.
// Two multiply-adds per cycle of latency 4 need rows * width >= 8.
template <typename T, int rows, int width>
inline void multiply_tile(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_step,
                          std::int64_t depth, typename Vector<T>::type (&acc)[rows][width]) {
  for (std::int64_t k = 0; k < depth; ++k) {
    typename Vector<T>::type right[width];
#pragma GCC unroll 8
    for (int n = 0; n < width; ++n) right[n] = load(b + n * Vector<T>::size);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int n = 0; n < width; ++n) acc[i][n] += right[n] * a[i * a_row];
    }
    a += a_step;
    b += b_step;
  }
}

}  // namespace
