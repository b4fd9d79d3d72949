// Finds the k-th highest score digit by digit of its key, then marks; the passes are in topk_mask.inl.
#include "topk_mask.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "scratch.h"
#include "threads.h"

namespace sparsebert {
namespace {

// Scores of one vector that one task passes over: enough to be worth waking a core.
constexpr std::int64_t chunk_scores = 1 << 15;

const TopkMaskKernel& kernel_for([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return topk_mask_avx512::kernel;
  if (isa == Isa::avx2) return topk_mask_avx2::kernel;
#endif
  return topk_mask_scalar::kernel;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

float score_of(std::uint32_t key) {
  const std::uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The digit of the k-th highest (k >= 1) and how many are wanted among those that have it.
std::pair<std::uint32_t, std::int64_t> digit_of(const std::int32_t* counts, std::int64_t k) {
  int digit = digits - 1;
  for (; counts[digit] < k; --digit) k -= counts[digit];
  return {static_cast<std::uint32_t>(digit), k};
}

// The k-th highest of n keys that agree in their first digit, and how many that equal it are among the k highest.
std::pair<std::uint32_t, std::int64_t> select(std::uint32_t* keys, std::int64_t n, std::int64_t k) {
  std::int32_t counts[digits];
  for (int shift = key_bits - 2 * digit_bits; shift > -digit_bits; shift -= digit_bits) {
    const int low = std::max(shift, 0);
    const std::uint32_t mask = (1u << (shift + digit_bits - low)) - 1;
    std::fill_n(counts, digits, 0);
    for (std::int64_t i = 0; i < n; ++i) ++counts[keys[i] >> low & mask];
    const auto [digit, wanted] = digit_of(counts, k);
    k = wanted;
    n = std::copy_if(keys, keys + n, keys, [&](std::uint32_t key) { return (key >> low & mask) == digit; }) - keys;
  }
  return {keys[0], k};
}

struct Job {
  const TopkMaskKernel* kernel;
  const float* scores;
  bool* keep;
  std::int64_t rows, n, k;
  std::int64_t rows_a_task;
  std::atomic<bool>* finite;
  // One long vector, in chunks:
  std::int32_t* counts;         // [chunks, digits]
  std::uint32_t* keys;          // those of the threshold's first digit, chunk after chunk
  std::int64_t* ends;           // [chunks], of a chunk's keys
  std::uint32_t digit;
  float threshold;
  std::int64_t* ties;           // [chunks], how many that equal the threshold each chunk keeps
};

void short_rows(const void* context, std::int64_t task) {
  const Job& job = *static_cast<const Job*>(context);
  const std::int64_t row = task * job.rows_a_task;
  const std::int64_t rows = std::min(job.rows_a_task, job.rows - row);
  if (!job.kernel->rank(job.scores + row * job.n, rows, job.n, job.k, job.keep + row * job.n)) *job.finite = false;
}

void long_row(const void* context, std::int64_t row) {
  const Job& job = *static_cast<const Job*>(context);
  const float* scores = job.scores + row * job.n;
  std::int32_t counts[digits];
  if (!job.kernel->count(scores, job.n, counts)) {
    *job.finite = false;
    return;
  }
  const auto [digit, k] = digit_of(counts, job.k);
  auto* keys = static_cast<std::uint32_t*>(scratch(counts[digit] * sizeof(std::uint32_t), Scratch::task));
  job.kernel->collect(scores, job.n, digit, keys);
  const auto [key, ties] = select(keys, counts[digit], k);
  job.kernel->mark(scores, job.n, score_of(key), ties, job.keep + row * job.n);
}

std::int64_t chunk_length(const Job& job, std::int64_t chunk) {
  return std::min(chunk_scores, job.n - chunk * chunk_scores);
}

void count_chunk(const void* context, std::int64_t chunk) {
  const Job& job = *static_cast<const Job*>(context);
  const bool finite = job.kernel->count(job.scores + chunk * chunk_scores, chunk_length(job, chunk),
                                        job.counts + chunk * digits);
  if (!finite) *job.finite = false;
}

void collect_chunk(const void* context, std::int64_t chunk) {
  const Job& job = *static_cast<const Job*>(context);
  job.kernel->collect(job.scores + chunk * chunk_scores, chunk_length(job, chunk), job.digit,
                      job.keys + (chunk == 0 ? 0 : job.ends[chunk - 1]));
}

void mark_chunk(const void* context, std::int64_t chunk) {
  const Job& job = *static_cast<const Job*>(context);
  job.kernel->mark(job.scores + chunk * chunk_scores, chunk_length(job, chunk), job.threshold, job.ties[chunk],
                   job.keep + chunk * chunk_scores);
}

void one_long_vector(Job& job, int threads) {
  const std::int64_t chunks = ceil_div(job.n, chunk_scores);
  const std::size_t counts_bytes = chunks * digits * sizeof(std::int32_t);
  const std::size_t chunk_bytes = 2 * chunks * sizeof(std::int64_t);
  // The keys may be all of them: one digit can hold every score.
  auto* memory = static_cast<char*>(
      scratch(counts_bytes + chunk_bytes + 2 * job.n * sizeof(std::uint32_t), Scratch::call));
  job.counts = reinterpret_cast<std::int32_t*>(memory);
  job.ends = reinterpret_cast<std::int64_t*>(memory + counts_bytes);
  job.ties = job.ends + chunks;
  job.keys = reinterpret_cast<std::uint32_t*>(memory + counts_bytes + chunk_bytes);
  std::uint32_t* sorted_out = job.keys + job.n;  // a copy for select, which keeps no order of chunks

  parallel_for(chunks, threads, count_chunk, &job);
  if (!*job.finite) return;
  std::int32_t sums[digits] = {};
  for (std::int64_t c = 0; c < chunks; ++c) {
    for (int d = 0; d < digits; ++d) sums[d] += job.counts[c * digits + d];
  }
  const auto [digit, k] = digit_of(sums, job.k);
  job.digit = digit;
  for (std::int64_t c = 0; c < chunks; ++c) job.ends[c] = (c == 0 ? 0 : job.ends[c - 1]) + job.counts[c * digits + digit];
  parallel_for(chunks, threads, collect_chunk, &job);
  std::copy_n(job.keys, job.ends[chunks - 1], sorted_out);
  auto [key, ties] = select(sorted_out, job.ends[chunks - 1], k);
  job.threshold = score_of(key);
  for (std::int64_t c = 0; c < chunks; ++c) {
    const std::uint32_t* begin = job.keys + (c == 0 ? 0 : job.ends[c - 1]);
    job.ties[c] = std::min<std::int64_t>(ties, std::count(begin, static_cast<const std::uint32_t*>(job.keys) + job.ends[c], key));
    ties -= job.ties[c];
  }
  parallel_for(chunks, threads, mark_chunk, &job);
}

}  // namespace

bool topk_mask(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, Isa isa, int threads,
               bool* keep) {
  if (rows == 0 || n == 0) return true;
  std::atomic<bool> finite{true};
  Job job{};
  job.kernel = &kernel_for(isa);
  job.scores = scores;
  job.keep = keep;
  job.rows = rows;
  job.n = n;
  job.k = std::max<std::int64_t>(k, 1);  // k = 0 still looks for NaN
  job.finite = &finite;
  if (rows * n < chunk_scores) threads = 1;
  if (n <= ranked_length) {
    job.rows_a_task = std::max<std::int64_t>(1, chunk_scores / n / 4);
    parallel_for(ceil_div(rows, job.rows_a_task), threads, short_rows, &job);
  } else if (rows == 1) {
    one_long_vector(job, threads);
  } else {
    parallel_for(rows, threads, long_row, &job);
  }
  if (k == 0) std::fill_n(keep, rows * n, false);
  return finite;
}

}  // namespace sparsebert
