// Cuts an obs_prune and an obs_sweep into tasks, and chooses which weights of a block of columns are removed; the
// arithmetic is in obs_prune_*.inl.
#include "obs_prune.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "scratch.h"
#include "threads.h"

#define SPARSEBERT_KERNEL "../obs_prune.inl"
#include "isa/floats.h"

namespace sparsebert {
namespace {

// Removals between two bases. A step reads half of them on average. A new base reads half of the old base and writes it
// back; this cost is spread over the steps between two bases. 64 balances the two costs at 768 columns, where the
// removals take 0.4 MB of a second-level cache of 1 MB, and is within 5 % of the best at 384 and 1536.
constexpr std::int64_t deferred = 64;

struct TraceRun {
  TraceJob job;
  const ObsPruneKernel* kernel;
  std::int64_t groups;
  std::int64_t bytes;
  char* memory;  // `bytes` per worker
  std::atomic<std::int64_t>* next;
};

// One task per thread, which takes groups until none is left. So each thread needs one piece of memory, which is
// allocated before any of them starts.
void trace_worker(const void* context, std::int64_t worker) {
  const TraceRun& run = *static_cast<const TraceRun*>(context);
  for (std::int64_t group; (group = run.next->fetch_add(1)) < run.groups;) {
    run.kernel->trace(run.job, group, run.memory + worker * run.bytes);
  }
}

// Approximate rows per chunk: few enough that a chunk's block of columns and its errors stay in a second-level cache,
// many enough to make good use of the part of the factor that is read.
constexpr std::int64_t wanted_chunk_rows = 96;

// The scores of a block are counted in bins of 1/64 octave, 2048 to either side of the last threshold; the outermost
// bins also count all scores beyond them. Only the scores in the threshold's bin are looked at again.
constexpr int bins = 4096;
constexpr int bin_shift = 46;

struct Scored {
  std::uint64_t key;  // the score's bits: scores are at least 0, so their bits have the same order
  std::int64_t index;
};

bool operator<(const Scored& a, const Scored& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; }

std::uint64_t bits_of(double score) {
  std::uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits;
}

struct SweepRun {
  SweepJob job;
  const ObsPruneKernel* kernel;
  std::int64_t chunks;
  std::int64_t block;
  std::int64_t blocks;
  std::int64_t bin_base;
  std::int64_t bin;       // the one that holds the threshold
  std::uint32_t* counts;  // [chunks, bins]
  Scored* candidates;     // [chunks, chunk_panels * panel * block], the scores in the bin
  std::int64_t* found;    // [chunks]

  std::int64_t bin_of(std::uint64_t key) const {
    return std::clamp<std::int64_t>(static_cast<std::int64_t>(key >> bin_shift) - bin_base, 0, bins - 1);
  }
  std::int64_t columns_of(std::int64_t b) const { return std::min(job.block, job.n_in - b * job.block); }

  // Calls fn(score, index) for every score of the chunk.
  template <typename Fn>
  void each_score(std::int64_t chunk, Fn fn) const {
    const std::int64_t panel = kernel->panel, columns = columns_of(block);
    const std::int64_t row = chunk * job.chunk_rows;
    const std::int64_t rows = std::min(job.chunk_rows, job.rows - row);
    const double* scores = job.scores + chunk * job.chunk_panels * panel * job.block;
    for (std::int64_t p = 0; p * panel < rows; ++p) {
      const std::int64_t lanes = std::min(panel, rows - p * panel);
      for (std::int64_t c = 0; c < columns; ++c) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
          fn(scores[(p * job.block + c) * panel + lane], (row + p * panel + lane) / job.pattern.group * columns + c);
        }
      }
    }
  }
};

// N:M: nothing is chosen across chunks, so one task sweeps its chunk from end to end.
void sweep_task(const void* context, std::int64_t chunk) {
  const SweepRun& run = *static_cast<const SweepRun*>(context);
  for (std::int64_t block = 0; block < run.blocks; ++block) {
    run.kernel->reach_block(run.job, chunk, block);
    run.kernel->sweep_block(run.job, chunk, block);
  }
}

// Otherwise: sweeps the previous block, whose threshold is known now, and counts the scores of the current one.
void step_task(const void* context, std::int64_t chunk) {
  const SweepRun& run = *static_cast<const SweepRun*>(context);
  if (run.block > 0) run.kernel->sweep_block(run.job, chunk, run.block - 1);
  if (run.block == run.blocks) return;
  run.kernel->reach_block(run.job, chunk, run.block);
  std::uint32_t* counts = run.counts + chunk * bins;
  std::fill_n(counts, bins, 0);
  run.each_score(chunk, [&](double score, std::int64_t) { ++counts[run.bin_of(bits_of(score))]; });
}

void collect_task(const void* context, std::int64_t chunk) {
  const SweepRun& run = *static_cast<const SweepRun*>(context);
  Scored* candidates = run.candidates + chunk * run.job.chunk_panels * run.kernel->panel * run.job.block;
  std::int64_t found = 0;
  run.each_score(chunk, [&](double score, std::int64_t index) {
    const std::uint64_t key = bits_of(score);
    if (run.bin_of(key) == run.bin) candidates[found++] = {key, index};
  });
  run.found[chunk] = found;
}

// The score and index of the `removals`-th lowest of the block just counted.
Threshold choose(SweepRun& run, std::int64_t removals, int threads) {
  if (removals == 0) return {-1.0, -1};
  std::int64_t left = removals;  // in the end, the rank within the bin
  for (run.bin = 0;; ++run.bin) {
    std::int64_t count = 0;
    for (std::int64_t chunk = 0; chunk < run.chunks; ++chunk) count += run.counts[chunk * bins + run.bin];
    if (left <= count || run.bin + 1 == bins) break;
    left -= count;
  }
  parallel_for(run.chunks, threads, collect_task, &run);
  const std::int64_t stride = run.job.chunk_panels * run.kernel->panel * run.job.block;
  std::int64_t found = 0;
  for (std::int64_t chunk = 0; chunk < run.chunks; ++chunk) {
    std::copy_n(run.candidates + chunk * stride, run.found[chunk], run.candidates + found);
    found += run.found[chunk];
  }
  std::nth_element(run.candidates, run.candidates + left - 1, run.candidates + found);
  const Scored& last = run.candidates[left - 1];
  run.bin_base = static_cast<std::int64_t>(last.key >> bin_shift) - bins / 2;
  Threshold threshold;
  std::memcpy(&threshold.score, &last.key, sizeof last.key);
  threshold.index = last.index;
  return threshold;
}

// Cuts `count` elements off the front of memory; if memory is null, only counts.
template <typename T>
T* take(char* memory, std::size_t& offset, std::int64_t count) {
  const std::size_t at = offset;
  offset += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
  return memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + at);
}

std::size_t lay_out(SweepRun& run, char* memory) {
  SweepJob& job = run.job;
  const std::int64_t rows = run.chunks * job.chunk_panels * run.kernel->panel;  // including padding
  std::size_t offset = 0;
  job.errors = take<double>(memory, offset, rows * job.n_in);
  job.columns = take<double>(memory, offset, rows * job.block);
  job.scores = take<double>(memory, offset, rows * job.block);
  job.gone = take<double>(memory, offset, rows * job.block);
  job.sums = take<double>(memory, offset, run.chunks * job.pattern.m);
  job.factors = take<double>(memory, offset, run.chunks * job.block * sweep_depth);
  if (job.pattern.m == 0) {
    run.counts = take<std::uint32_t>(memory, offset, run.chunks * bins);
    run.candidates = take<Scored>(memory, offset, rows * job.block);
    run.found = take<std::int64_t>(memory, offset, run.chunks);
  }
  return offset;
}

}  // namespace

void obs_prune(const double* weight, std::int64_t rows, std::int64_t n_in, const double* inverse, std::int64_t group,
               Banks banks, std::int64_t steps, cpu::Context context, std::int32_t* order, double* losses) {
  const ObsPruneKernel& kernel = kernel_for(context.isa);
  const TraceJob job{weight, inverse, n_in, group, banks, steps, deferred, order, losses};
  const std::int64_t groups = rows / group;
  const std::int64_t workers = std::min<std::int64_t>(context.threads, groups);
  const std::int64_t bytes = kernel.trace_bytes(job);
  std::atomic<std::int64_t> next{0};
  const TraceRun run{job, &kernel, groups, bytes,
                     static_cast<char*>(scratch(static_cast<std::size_t>(workers * bytes))), &next};
  parallel_for(workers, context.threads, trace_worker, &run);
}

void obs_sweep(const double* weight, std::int64_t rows, std::int64_t n_in, const double* factor,
               const SweepPattern& pattern, std::int64_t block, cpu::Context context, double* pruned) {
  if (rows == 0 || n_in == 0) return;
  const ObsPruneKernel& kernel = kernel_for(context.isa);
  block = std::min(block, n_in);
  // At least two chunks per thread, if there are enough panels.
  const std::int64_t wanted = std::clamp<std::int64_t>(rows / (2 * std::int64_t{context.threads}), kernel.panel,
                                                       std::max(wanted_chunk_rows, kernel.panel));
  std::int64_t chunk_rows = wanted / kernel.panel * kernel.panel;
  if (pattern.group > 1) chunk_rows = std::max<std::int64_t>(1, chunk_rows / pattern.group) * pattern.group;
  const std::int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const std::int64_t chunk_panels = (chunk_rows + kernel.panel - 1) / kernel.panel;
  Threshold threshold{-1.0, -1};
  SweepRun run{};
  run.job = {weight, factor, pruned, rows, n_in, pattern, block, chunk_rows, chunk_panels, nullptr, nullptr, nullptr,
             nullptr, nullptr, nullptr, &threshold};
  run.kernel = &kernel;
  run.chunks = chunks;
  run.blocks = (n_in + block - 1) / block;
  lay_out(run, static_cast<char*>(scratch(lay_out(run, nullptr))));
  if (pattern.m > 0) {
    parallel_for(chunks, context.threads, sweep_task, &run);
    return;
  }
  run.bin_base = static_cast<std::int64_t>(bits_of(1.0) >> bin_shift) - bins / 2;
  for (run.block = 0; run.block <= run.blocks; ++run.block) {
    parallel_for(chunks, context.threads, step_task, &run);
    if (run.block < run.blocks) threshold = choose(run, pattern.removals[run.block] * pattern.group, context.threads);
  }
}

}  // namespace sparsebert
