// The CUDA kernels on a CPU, for tests/test_cuda_layout.py: a thread block's steps by one thread after the other, and
// the instructions of a warp by what the PTX ISA says of them. Compiled by g++ into a library that ctypes loads.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../csrc/cuda/masked_lstsq.h"
#include "../csrc/cuda/sparse_matmul_pack.h"

using namespace sparsebert;
using namespace sparsebert::cuda;

namespace {

// The order in which the threads of a step run: a result that depends on it is a race on the device.
enum class Order : int { forward, backward, odd_first };

template <typename Step>
void in_order(int threads, Order order, const Step& step) {
  for (int i = 0; i < threads; ++i) {
    const int half = (threads + 1) / 2;
    const int odd = i < threads / 2 ? 2 * i + 1 : 2 * (i - threads / 2);
    step(order == Order::forward ? i : order == Order::backward ? threads - 1 - i : (half > 0 ? odd : 0));
  }
}

struct LstsqBlock {
  int count;
  Order order;
  int threads() const { return count; }
  template <typename Step>
  void each(const Step& step) const { in_order(count, order, step); }
};

// What an instruction may not be given, or null.
const char* broken = nullptr;
void demand(bool holds, const char* rule) {
  if (!holds && broken == nullptr) broken = rule;
}

struct Copy {
  int to;
  const Bf16* from;
  bool inside;
};

template <typename Shape>
struct VnmBlock {
  using Lane = VnmLane<Shape::tiles>;
  Order order;
  bool late;  // copies arrive when they are waited for, else at once
  std::vector<Lane> lanes = std::vector<Lane>(Shape::threads);
  std::vector<Bf16> shared = std::vector<Bf16>(buffers * buffer_size, 0x7fc0);  // NaN
  std::vector<std::vector<std::vector<Copy>>> sets = std::vector<std::vector<std::vector<Copy>>>(Shape::threads, {{}});

  template <typename Step>
  void each(const Step& step) {
    in_order(Shape::threads, order, [&](int thread) { step(thread, lanes[thread]); });
  }
  void arrive(const Copy& copy) {
    for (int i = 0; i < piece; ++i) shared[copy.to + i] = copy.inside ? copy.from[i] : 0;
  }
  void copy(int to, const Bf16* from, bool inside, int thread) {
    demand(to % piece == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0, "cp.async copies 16 aligned bytes");
    demand(to >= 0 && to + piece <= buffers * buffer_size, "cp.async stays in shared memory");
    sets[thread].back().push_back({to, from, inside});
    if (!late) arrive(sets[thread].back().back());
  }
  void commit(int thread) { sets[thread].emplace_back(); }
  // cp.async.wait_group N: all but the N latest of the committed groups.
  void wait() {
    for (auto& own : sets) {
      while (own.size() - 1 > buffers - 2) {
        if (late) std::for_each(own.front().begin(), own.front().end(), [&](const Copy& c) { arrive(c); });
        own.erase(own.begin());
      }
    }
  }

  // ldmatrix.m8n8.x4.trans: lanes 8 i to 8 i + 7 give the rows of matrix i, of 8 values each; a lane's register i gets
  // of matrix i, transposed, row lane / 4, values 2 (lane % 4) and the one after it.
  void load_x() {
    for (int w = 0; w < Shape::threads; w += 32) {
      for (int i = 0; i < 4; ++i) {
        std::vector<int> banks;
        for (int r = 0; r < 8; ++r) banks.push_back(lanes[w + 8 * i + r].address / 8 % 8);
        std::sort(banks.begin(), banks.end());
        demand(std::unique(banks.begin(), banks.end()) == banks.end(), "the rows of ldmatrix are in different banks");
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          Bf16 two[2];
          for (int e = 0; e < 2; ++e) two[e] = shared[lanes[w + 8 * i + lane % 4 * 2 + e].address + lane / 4];
          lanes[w + lane].x[i] = two[0] | static_cast<std::uint32_t>(two[1]) << 16;
        }
      }
    }
  }

  static float half_of(std::uint32_t pair, int which) {
    const std::uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // mma.sp::ordered_metadata.m16n8k32 of bf16. Written from the PTX ISA's words and figures alone.
  void mma(int first, int t, int n, int selector) {
    float a[16][32] = {}, b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
        const int first_col = i < 4 ? in_group * 4 : in_group * 4 + 16;
        // Figure of the metadata: the first thread of the pair has columns 0 to 15, the second 16 to 31; the lower half
        // of its register has row `group`, the upper `group + 8`; 4 bits for every 4 columns.
        const int holder = first + group * 4 + selector * 2 + (first_col >= 16 ? 1 : 0);
        const std::uint32_t metadata = lanes[holder].weights.metadata[t / 2];
        const std::uint32_t four = metadata >> ((row >= 8 ? 16 : 0) + first_col % 16) & 0xf;
        demand(four == 4 || four == 8 || four == 9 || four == 12 || four == 13 || four == 14, "indices ascend");
        const int index = i % 2 == 0 ? four & 3 : four >> 2;
        a[row][first_col + index] = half_of(lanes[first + lane].weights.values[t][i / 2], i % 2);
        b[in_group * 2 + i % 2 + i / 2 * 8][group] = half_of(lanes[first + lane].x[i / 2], i % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, col = lane % 4 * 2 + (i & 1);
        double sum = lanes[first + lane].sums[t][n][i];
        for (int k = 0; k < 32; ++k) {
          if (a[row][k] != 0.0f) sum += static_cast<double>(a[row][k]) * b[k][col];
        }
        lanes[first + lane].sums[t][n][i] = static_cast<float>(sum);
      }
    }
  }
  void multiply(int n) {
    for (int w = 0; w < Shape::threads; w += 32) {
      for (int t = 0; t < Shape::tiles; ++t) mma(w, t, n, t % 2);
    }
  }
};

template <typename Shape>
void run_vnm(const VnmMatmulJob& job, Order order, bool late) {
  const std::int64_t blocks = strips_of(job.weight) * (round_up(job.tokens, panel_tokens) / panel_tokens);
  for (std::int64_t i = 0; i < blocks; ++i) {
    VnmBlock<Shape> block{order, late};
    // Registers that nothing was written to.
    std::memset(static_cast<void*>(block.lanes.data()), 0xff, block.lanes.size() * sizeof(block.lanes[0]));
    multiply_strip<Shape>(block, job, i);
  }
}

}  // namespace

extern "C" {

// Returns null, or what an instruction was given against its rules. The message of a weight that does not fit the
// pattern is written to `message`, 200 bytes.
const char* emulate_sparse_matmul(const Bf16* weight, std::int64_t n_out, std::int64_t n_in, std::int64_t v,
                                  std::int64_t m, const Bf16* x, std::int64_t tokens, std::int64_t stride,
                                  const float* bias, const Bf16* residual, int activation, Bf16* y, int order,
                                  bool late, char* message) {
  broken = nullptr;
  try {
    const PackedVnm packed = pack_vnm(weight, n_out, n_in, v, m);
    const VnmMatmulJob job{packed.matrix(), x, bias, residual, y, stride, stride, stride, tokens,
                           static_cast<Activation>(activation)};
    const auto how = static_cast<Order>(order);
    if (packed.strip_rows == 32) run_vnm<VnmShape<2, 1>>(job, how, late);
    if (packed.strip_rows == 64) run_vnm<VnmShape<4, 1>>(job, how, late);
    if (packed.strip_rows == 128) run_vnm<VnmShape<4, 2>>(job, how, late);
  } catch (const std::invalid_argument& error) {
    std::strncpy(message, error.what(), 199);
  }
  return broken;
}

// Runs the groups as they would run in shared memory (in_shared) or in working memory. Returns the doubles of a system.
std::int64_t emulate_masked_lstsq(const double* target, const double* h, std::int64_t n_in, const bool* mask,
                                  const std::int64_t* row_ptr, const std::int32_t* rows, std::int64_t count,
                                  std::int64_t k, std::int64_t g, bool complement, bool in_shared, double* v,
                                  std::int64_t* failed, int order) {
  const MaskedLstsqJob job{target, h, n_in, {mask, row_ptr, rows, count}, complement, v, failed};
  const MaskedLstsqPlan plan = plan_masked_lstsq(k, g, count, in_shared ? std::int64_t{1} << 40 : 0, 1);
  const std::int64_t doubles = in_shared ? plan.shared_doubles : plan.work_doubles / plan.blocks;
  // Guards of NaN, which a place outside the system would meet.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> memory(static_cast<std::size_t>(doubles) + 64, nan);
  MaskedLstsqShared shared;
  std::memset(&shared, 0xff, sizeof shared);
  const LstsqBlock block{plan.threads, static_cast<Order>(order)};
  for (std::int64_t group = 0; group < count; ++group) {
    std::fill(memory.begin(), memory.end(), nan);
    solve_group(block, job, group, shared, memory.data() + 32);
    for (std::size_t i = 0; i < 32; ++i) {
      if (memory[i] == memory[i] || memory[memory.size() - 1 - i] == memory[memory.size() - 1 - i]) return -1;
    }
  }
  return doubles;
}

// Whether all that is loaded by 16 bytes begins on 16, if the system does.
bool loads_are_aligned(std::int64_t k, std::int64_t g) {
  const System s{k, g};
  bool even = system_doubles(s) % 2 == 0;
  for (std::int64_t p = 0; p < panels(s); ++p) {
    for (std::int64_t col = 0; col < p * panel; ++col) even = even && place(s, p * panel, col) % 2 == 0;
  }
  return even;
}

// Fills `owner` [doubles] with the number of elements of a system at each place.
std::int64_t places(std::int64_t k, std::int64_t g, std::int32_t* owner) {
  const System s{k, g};
  for (std::int64_t col = 0; col < padded(s); ++col) {
    for (std::int64_t row = col / panel * panel; row < padded(s) + g; ++row) ++owner[place(s, row, col)];
  }
  for (std::int64_t i = 0; i < padded(s); ++i) ++owner[inverse_begin(s) + i];
  return system_doubles(s);
}
std::int64_t doubles_of(std::int64_t k, std::int64_t g) { return system_doubles({k, g}); }

}  // extern "C"
