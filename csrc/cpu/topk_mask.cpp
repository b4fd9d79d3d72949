// Finds the k-th highest score by bisection over float keys, then marks what is kept; the passes are in topk_mask.inl.
#include "topk_mask.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../topk_mask.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Scores per task: 64 KB, which stay in a second-level cache. A longer vector is cut into chunks of this size, and its
// threshold is first searched near the threshold of a sample.
constexpr std::int64_t chunk_scores = 1 << 14;
constexpr std::int64_t sample_scores = 1 << 13;
constexpr float infinity = std::numeric_limits<float>::infinity();

// Keys are integers in the order of the floats. -0 has its own key, next to the key of +0.
std::int64_t key_of(float score) {
  std::int32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

float score_of(std::int64_t key) {
  const auto narrow = static_cast<std::int32_t>(key);
  const std::int32_t bits = narrow ^ (narrow >> 31 & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The k highest are those above the threshold and the first `ties` that equal it.
struct Cut {
  float threshold;
  std::int64_t ties;
};

// The k-th highest (1 <= k <= n) of n scores that lie from `low` to `high`.
Cut select(const TopkMaskKernel& kernel, const float* scores, std::int64_t n, std::int64_t k, float low = -infinity,
           float high = infinity) {
  std::int64_t first = key_of(low);
  std::int64_t last = key_of(high);
  std::int64_t above = 0;  // scores above `last`
  while (first < last) {
    const std::int64_t middle = first + (last - first + 1) / 2;
    const std::int64_t found = kernel.count(scores, n, score_of(middle));
    if (found == k) return {score_of(middle), n};
    if (found > k) {
      first = middle;
    } else {
      last = middle - 1;
      above = found;
    }
  }
  return {score_of(first), k - above};
}

struct Job {
  const TopkMaskKernel* kernel;
  const float* scores;  // [rows, n]
  bool* keep;
  std::int64_t rows, n, k;
  std::int64_t rows_a_task;
  std::atomic<bool>* finite;
};

void ranked_rows(const void* context, std::int64_t task) {
  const Job& job = *static_cast<const Job*>(context);
  const std::int64_t row = task * job.rows_a_task;
  const std::int64_t rows = std::min(job.rows_a_task, job.rows - row);
  if (!job.kernel->rank(job.scores + row * job.n, rows, job.n, job.k, job.keep + row * job.n)) *job.finite = false;
}

void selected_rows(const void* context, std::int64_t task) {
  const Job& job = *static_cast<const Job*>(context);
  const std::int64_t end = std::min((task + 1) * job.rows_a_task, job.rows);
  for (std::int64_t row = task * job.rows_a_task; row < end; ++row) {
    const float* scores = job.scores + row * job.n;
    if (job.kernel->count(scores, job.n, -infinity) < job.n) {
      *job.finite = false;
      return;
    }
    const Cut cut = select(*job.kernel, scores, job.n, job.k);
    job.kernel->mark(scores, job.n, cut.threshold, cut.ties, job.keep + row * job.n);
  }
}

// One vector, cut into chunks.
struct LongJob {
  const TopkMaskKernel* kernel;
  const float* scores;  // [n]
  bool* keep;
  std::int64_t n;
  float low, high;
  float* candidates;    // [chunks, chunk_scores + 1], each chunk's scores from low to high
  std::int64_t* found;  // [chunks], the number of candidates, or -1 if there is a NaN
  std::int64_t* above;  // [chunks], the number of scores above `high`
  float threshold;
  std::int64_t* ties;   // [chunks], the number of scores equal to the threshold that are kept

  std::int64_t length(std::int64_t chunk) const { return std::min(chunk_scores, n - chunk * chunk_scores); }
};

void collect_chunk(const void* context, std::int64_t chunk) {
  const LongJob& job = *static_cast<const LongJob*>(context);
  job.found[chunk] = job.kernel->collect(job.scores + chunk * chunk_scores, job.length(chunk), job.low, job.high,
                                         job.candidates + chunk * (chunk_scores + 1), job.above + chunk);
}

void mark_chunk(const void* context, std::int64_t chunk) {
  const LongJob& job = *static_cast<const LongJob*>(context);
  job.kernel->mark(job.scores + chunk * chunk_scores, job.length(chunk), job.threshold, job.ties[chunk],
                   job.keep + chunk * chunk_scores);
}

// Sets low and high to a range in which the k-th highest of the vector is likely to lie, from a sample of the vector.
void bracket(LongJob& job, std::int64_t k, float* sample) {
  const std::int64_t stride = job.n / sample_scores;
  for (std::int64_t i = 0; i < sample_scores; ++i) {
    // Scattered within each stride: a fixed step could see the same few columns of a matrix again and again.
    const std::uint32_t jitter = static_cast<std::uint32_t>(i) * 2654435761u >> 8;
    sample[i] = job.scores[i * stride + jitter % stride];
  }
  // Four standard deviations of the rank in the sample. If the vector's k-th is outside, the search continues there.
  const double share = static_cast<double>(k) / job.n;
  const double margin = 4 * std::sqrt(share * (1 - share) * sample_scores) + 4;
  const auto upper = static_cast<std::int64_t>(share * sample_scores - margin);
  const auto lower = static_cast<std::int64_t>(share * sample_scores + margin);
  job.high = upper < 1 ? infinity : select(*job.kernel, sample, sample_scores, upper).threshold;
  job.low = lower > sample_scores ? -infinity : select(*job.kernel, sample, sample_scores, lower).threshold;
}

// Returns false if there is a NaN.
bool long_vector(const Job& all, std::int64_t row, int threads) {
  const std::int64_t chunks = ceil_div(all.n, chunk_scores);
  const std::size_t candidates_bytes = chunks * (chunk_scores + 1) * sizeof(float);
  const std::size_t counts_bytes = chunks * sizeof(std::int64_t);
  auto* memory = static_cast<char*>(scratch(3 * counts_bytes + candidates_bytes + sample_scores * sizeof(float)));
  LongJob job{all.kernel, all.scores + row * all.n, all.keep + row * all.n, all.n, 0.0f, 0.0f,
              reinterpret_cast<float*>(memory + 3 * counts_bytes), reinterpret_cast<std::int64_t*>(memory),
              reinterpret_cast<std::int64_t*>(memory + counts_bytes), 0.0f,
              reinterpret_cast<std::int64_t*>(memory + 2 * counts_bytes)};
  bracket(job, all.k, reinterpret_cast<float*>(memory + 3 * counts_bytes + candidates_bytes));
  std::int64_t found = 0;
  std::int64_t above = 0;
  for (;;) {
    parallel_for(chunks, threads, collect_chunk, &job);
    if (*std::min_element(job.found, job.found + chunks) < 0) return false;
    found = std::accumulate(job.found, job.found + chunks, std::int64_t{0});
    above = std::accumulate(job.above, job.above + chunks, std::int64_t{0});
    if (all.k <= above) {
      job.low = score_of(key_of(job.high) + 1);
      job.high = infinity;
    } else if (all.k > above + found) {
      job.high = score_of(key_of(job.low) - 1);
      job.low = -infinity;
    } else {
      break;
    }
  }
  float* end = job.candidates;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    end = std::copy_n(job.candidates + chunk * (chunk_scores + 1), job.found[chunk], end);
  }
  const Cut cut = select(*job.kernel, job.candidates, found, all.k - above, job.low, job.high);
  job.threshold = cut.threshold;
  std::int64_t ties = cut.ties;
  const float* candidate = job.candidates;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t equal = std::count(candidate, candidate + job.found[chunk], cut.threshold);
    job.ties[chunk] = std::min(ties, equal);
    ties -= job.ties[chunk];
    candidate += job.found[chunk];
  }
  parallel_for(chunks, threads, mark_chunk, &job);
  return true;
}

}  // namespace

bool topk_mask(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, cpu::Context context,
               bool* keep) {
  if (rows == 0 || n == 0) return true;
  std::atomic<bool> finite{true};
  // k = 0 still looks for NaN.
  Job job{&kernel_for(context.isa), scores, keep, rows, n, std::max<std::int64_t>(k, 1), 0, &finite};
  job.rows_a_task = std::max<std::int64_t>(1, chunk_scores / n);
  if (rows * n < 2 * chunk_scores) context.threads = 1;
  if (n <= chunk_scores) {
    parallel_for(ceil_div(rows, job.rows_a_task), context.threads, n <= ranked_length ? ranked_rows : selected_rows, &job);
  } else {
    for (std::int64_t row = 0; row < rows && finite; ++row) finite = long_vector(job, row, context.threads);
  }
  if (k == 0) std::fill_n(keep, rows * n, false);
  return finite;
}

}  // namespace sparsebert
