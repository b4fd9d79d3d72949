// Packs a weight in V:2:M for sparse_matmul.h, on the host.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "sparse_matmul.h"

namespace sparsebert::cuda {

struct PackedVnm {
  std::vector<std::uint16_t> cols;
  std::vector<std::uint32_t> values;
  std::vector<std::uint32_t> metadata;
  std::int64_t v;
  std::int64_t strip_rows;
  std::int64_t chunks;
  std::int64_t n_out;

  VnmMatrix matrix() const { return {cols.data(), values.data(), metadata.data(), v, strip_rows, chunks, n_out}; }
};

inline bool is_zero(Bf16 bits) { return (bits & 0x7fff) == 0; }

// The 4 columns that a group keeps in a block of m columns from `first` on: those that are not zero in one of its rows,
// and if these are fewer, the leftmost others, whose weights are zero. Returns how many are not zero, which may be more
// than 4.
inline int kept_columns(const Bf16* weight, std::int64_t n_in, std::int64_t row, std::int64_t v, std::int64_t first,
                        std::int64_t m, std::int64_t (&kept)[4]) {
  std::vector<char> used(static_cast<std::size_t>(m), 0);
  for (std::int64_t r = row; r < row + v; ++r) {
    for (std::int64_t c = 0; c < m; ++c) used[c] |= !is_zero(weight[r * n_in + first + c]);
  }
  int count = 0;
  for (const char one : used) count += one;
  int filled = 4 - count;
  for (std::int64_t c = 0, at = 0; c < m && at < 4; ++c) {
    if (used[c] || filled-- > 0) kept[at++] = first + c;
  }
  return count;
}

// Which 2 of the 4 kept columns a row stores, in ascending order: those that are not zero, then the leftmost others.
// Returns how many are not zero, which may be more than 2.
inline int stored_columns(const Bf16* row, const std::int64_t (&kept)[4], int (&stored)[2]) {
  int count = 0;
  for (const std::int64_t col : kept) count += !is_zero(row[col]);
  int filled = 2 - count;
  for (int i = 0, at = 0; i < 4 && at < 2; ++i) {
    if (!is_zero(row[kept[i]]) || filled-- > 0) stored[at++] = i;
  }
  return count;
}

// Packs W, bf16 [n_out, n_in] row-major; v divides n_out, m > 4 divides n_in, n_in is at most 65536. Throws
// std::invalid_argument, naming rows and columns, if W breaks the pattern.
inline PackedVnm pack_vnm(const Bf16* weight, std::int64_t n_out, std::int64_t n_in, std::int64_t v, std::int64_t m) {
  PackedVnm packed{{}, {}, {}, v, strip_rows_of(v), chunks_of(n_in, m), n_out};
  const std::int64_t groups = n_out / v, blocks = n_in / m;
  packed.cols.assign(groups * packed.chunks * tile_cols, 0);
  const std::int64_t strips = strips_of(packed.matrix()), tiles = packed.strip_rows / tile_rows;
  packed.values.assign(strips * packed.chunks * tiles * warp * 4, 0);
  // Indices 0 and 1 where nothing is stored: the two must differ.
  packed.metadata.assign(strips * packed.chunks * (tiles / 2) * warp, 0x44444444u);

  for (std::int64_t strip = 0; strip < strips; ++strip) {
    const Strip here = strip_of(packed.matrix(), strip);
    for (std::int64_t b = 0; b < blocks; ++b) {
      std::int64_t kept[4];
      const int used = kept_columns(weight, n_in, here.group * v, v, b * m, m, kept);
      const std::string columns = "in columns " + std::to_string(b * m) + " to " + std::to_string(b * m + m - 1);
      if (used > 4) {
        throw std::invalid_argument("rows " + std::to_string(here.group * v) + " to " +
                                    std::to_string(here.group * v + v - 1) + " must share 4 columns of " +
                                    std::to_string(m) + ", " + columns + " they keep " + std::to_string(used));
      }
      const std::int64_t chunk = b * 4 / tile_cols;
      const int quad = static_cast<int>(b % (tile_cols / 4));
      for (int i = 0; i < 4; ++i) {
        packed.cols[(here.group * packed.chunks + chunk) * tile_cols + quad * 4 + i] =
            static_cast<std::uint16_t>(kept[i]);
      }
      for (std::int64_t r = 0; r < here.count; ++r) {
        const Bf16* row = weight + (here.row + r) * n_in;
        int stored[2];
        const int count = stored_columns(row, kept, stored);
        if (count > 2) {
          throw std::invalid_argument("row " + std::to_string(here.row + r) + " must keep 2 columns of " +
                                      std::to_string(m) + ", " + columns + " it keeps " + std::to_string(count));
        }
        const std::int64_t tile = r / tile_rows;
        const int within = static_cast<int>(r % tile_rows), selector = static_cast<int>(tile % 2);
        // The two entries of a quad are one register, of the lane and the number that these say.
        for (int lane = within % 8 * 4; lane < within % 8 * 4 + 4; ++lane) {
          for (int reg = 0; reg < 4; ++reg) {
            if (weight_row(lane, reg) != within || weight_entry(lane, reg) != quad * 2) continue;
            packed.values[values_place(packed.matrix(), strip, chunk, tile, lane) + reg] =
                row[kept[stored[0]]] | static_cast<std::uint32_t>(row[kept[stored[1]]]) << 16;
          }
        }
        std::uint32_t& bits = packed.metadata[metadata_place(packed.matrix(), strip, chunk, tile / 2,
                                                             metadata_lane(within, quad, selector))];
        const int bit = metadata_bit(within, quad);
        bits = (bits & ~(0xfu << bit)) | static_cast<std::uint32_t>(stored[0] | stored[1] << 2) << bit;
      }
    }
  }
  return packed;
}

}  // namespace sparsebert::cuda
