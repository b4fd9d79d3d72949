// Every operation of the compiled core, in plain C++: no Python and no tensor library in here.
// Callers have checked shapes and index bounds; nothing below checks them again.
#pragma once

#include <cstdint>

namespace sparsebert {

// Slowest first, in the order of sparsebert.environment.ISAS. The last two are avx512 with other kernels for bf16.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx };

using Bf16 = std::uint16_t;  // the upper half of a float32

enum class Activation : int { none, gelu, relu, tanh };  // gelu: 0.5 v (1 + erf(v / sqrt(2))), the exact form

// A slice: rows that are stored side by side. A block: rows among which slices are chosen, slab by slab, for a like
// number of entries. A slab: columns whose part of a panel stays in the first-level cache, and whose index is a byte.
constexpr std::int64_t slice_rows = 4;
constexpr std::int64_t block_rows = 64;
constexpr std::int64_t slab_cols = 192;

// W with columns of its own for every row: sliced ELLPACK, one for each slab of columns.
struct SlicedMatrix {
  const std::int32_t* rows;    // [slabs, slices, slice_rows], the row of W or -1; of a block the same ones in every slab
  const std::uint8_t* counts;  // [slabs, slices], entries of each row, fewer ones filled up with zeros
  const std::int64_t* begin;   // [slabs, blocks], where a block's entries are, of all of these
  const std::uint8_t* cols;    // [entries, slice_rows], within the slab; a row's in their order
  const float* values;         // [entries, slice_rows]
  std::int64_t slabs;
  std::int64_t slices;
  std::int64_t blocks;
  std::int64_t entries;
};

// Rows of a group, and how many of them are stored side by side, one value of each a column.
constexpr std::int64_t group_rows = 8;
constexpr std::int64_t group_tile = 4;

// W in groups of group_rows rows that share one list of kept columns. Any rows may form a group.
struct GroupedMatrix {
  const std::int32_t* rows;         // [groups, group_rows], the row of W, or -1: the group is smaller
  const std::int32_t* col_begin;    // [groups], where a group's columns are in `cols`; groups may share a list
  const std::int32_t* col_count;    // [groups]
  const std::uint16_t* cols;        // column indices below n_in
  const std::int64_t* value_begin;  // [groups], where a group's values are in `values`
  const float* values;              // of a group: [group_rows / group_tile][col_count][group_tile]
  std::int64_t groups;
};

// A tile: rows of W, and columns of it that are multiplied in one step.
constexpr std::int64_t tile_rows = 16;
constexpr std::int64_t tile_cols = 32;

// W in bf16 tiles. A group is one or two tiles of rows that share one list of kept columns, in chunks of tile_cols; any
// rows may form a group. A tile is stored whole, or as a bit an entry and the entries that are not zero.
struct TiledMatrix {
  const std::int32_t* rows;         // [groups, 2 * tile_rows], the row of W, or -1: the group is smaller
  const std::int32_t* tiles;        // [groups], 1 or 2
  const std::int64_t* col_begin;    // [groups], where a group's columns are in `cols`; groups may share a list
  const std::int32_t* chunks;       // [groups], its columns / tile_cols
  const std::uint16_t* cols;        // column indices below n_in; a list is filled up with any, whose weights are zero
  const std::int64_t* value_begin;  // [groups], where a group's values are in `values`
  const std::int64_t* mask_begin;   // [groups], where its masks are in `masks`, or -1: its tiles are stored whole
  const Bf16* values;               // of a group: [chunks][tiles][tile_rows][tile_cols], or what of it is not zero
  const std::uint32_t* masks;       // of a group: [chunks][tiles][tile_rows], bit c for column c of the tile
  std::int64_t groups;
  std::int64_t most_chunks;         // the largest of `chunks`
};

// y = activation(x Wᵀ + bias) for a W [n_out, n_in] in one of the three forms; the others are null.
struct Linear {
  const SlicedMatrix* sliced;
  const GroupedMatrix* grouped;
  const TiledMatrix* tiled;
  const float* bias;  // [n_out], or null for none
  Activation activation;
  std::int64_t n_in;  // at most 65536
  std::int64_t n_out;
};

// Runs a linear layer, float32 accumulation. With W in tiles, x is rounded to bf16, and so is y.
//   x     [tokens, n_in] row-major floats, any number of tokens from 0; needs no alignment beyond a float's
//   y     [tokens, n_out] row-major floats, written whole; must not overlap x
// A token's result depends on no other token, nor on their number, nor on `threads` (>= 1); avx2 and avx512 give the
// same bits in float32. Throws std::bad_alloc when the copies of x and y in panels, at most max(threads MiB, (n_in +
// n_out) * 256 B), cannot be had, or with tiles what a thread needs beside them, 640 B for each of n_in.
void sparse_matmul(const float* x, std::int64_t tokens, const Linear& linear, Isa isa, int threads, float* y);

// Operations a second that one core of this instruction set can do in float32 from registers, or in bf16 on tiles, two a
// multiply-add: what no kernel exceeds. Takes some milliseconds.
double peak_flops(Isa isa, bool bf16);

struct LayerNorm {
  const float* weight;
  const float* bias;
};

struct EncoderLayer {
  Linear qkv;  // query, key and value stacked
  Linear attention_out;
  Linear up;
  Linear down;
  LayerNorm attention_norm;
  LayerNorm norm;
};

// A BERT-like sequence classifier; layer norms come after the residual sums.
struct Encoder {
  const float* words;      // [vocabulary, embedding]
  const float* positions;  // [types, max_length, embedding], position and token-type vectors added
  std::int64_t max_length;
  std::int64_t embedding;
  LayerNorm embedding_norm;
  const Linear* projection;  // embedding -> hidden, or null where they are equal
  const EncoderLayer* layers;
  std::int64_t n_layers;
  std::int64_t hidden;
  std::int64_t heads;  // divides hidden
  float eps;
  Linear pooler;      // of a sequence's first token
  Linear classifier;
};

// Sequences one behind the other, no padding.
struct Sequences {
  const std::int32_t* ids;    // [tokens], below the vocabulary
  const std::int32_t* types;  // [tokens], below the types
  const std::int64_t* starts; // [count + 1]; always increases, by at most max_length
  std::int64_t count;
};

// Classifies sequences. Where the layers' linears are in tiles, all of them, the projection and the pooler are, and
// states between them are bf16; the classifier is not. Otherwise none is.
//   logits  [count, classifier.n_out] row-major floats, written whole
//   states  [tokens, hidden], the last layer's output, or null where it is not wanted
// A sequence's result depends on no other sequence, nor on `threads` (>= 1); avx2 and avx512 give the same bits in
// float32. Throws std::bad_alloc when working memory for 128 tokens a thread, or the longest sequence, cannot be had.
void sparse_encoder(const Encoder& encoder, const Sequences& sequences, Isa isa, int threads, float* logits,
                    float* states);

// Rows of a mask in groups of equal rows.
struct RowGroups {
  const bool* mask;             // [any number of rows, n_in]
  const std::int64_t* row_ptr;  // [count + 1], elements of rows; starts at 0, always increases
  const std::int32_t* rows;     // each row of the mask at most once
  std::int64_t count;
};

// For each row with support S (the True of its mask): H_SS v_S = t_S, float64, by Cholesky, one factorisation a group.
//   target      [rows, n_in] row-major doubles
//   h           [n_in, n_in] symmetric; only i <= j is read, unless `complement`
//   complement  S is the False of the mask, and the solution c no result yet: v = t - cᵀ H_S:, exactly 0 on S
//   v           [rows, n_in]; written on each row's S, or in whole rows with `complement`; must not overlap target
//   failed      [count], -1 or the index in S of the first pivot that is not above 0; v is then undefined in that group
// Groups are handed out in their order: the costliest should come first. The result does not depend on `threads`
// (>= 1). Throws std::bad_alloc when a thread's work, about 4 |S|² bytes, cannot be had.
void masked_lstsq(const double* target, const double* h, std::int64_t n_in, const RowGroups& groups, bool complement,
                  Isa isa, int threads, double* v, std::int64_t* failed);

// How many columns of every `width` consecutive ones a row may lose; width 0: any.
struct Banks {
  std::int64_t width;
  std::int64_t removals;
};

// Exact optimal brain surgeon: the order in which groups of `group` consecutive rows lose their columns, at each step
// the open column p of lowest score, the sum over the group's rows of w_p^2 / [H^-1]_pp, of equals the lower one.
//   weight   [rows, n_in] row-major, rows a multiple of group
//   inverse  [n_in, n_in], H^-1, symmetric
//   steps    at most n_in, and at most n_in / width * removals with banks
//   order    [rows / group, steps], columns; losses [rows / group, steps], the scores when they went
// A trace whose inverse loses its positive diagonal to rounding ends with losses of NaN. Results do not depend on
// `threads` (>= 1). Throws std::bad_alloc; works in 8 * n_in^2 bytes a thread, about.
void obs_prune(const double* weight, std::int64_t rows, std::int64_t n_in, const double* inverse, std::int64_t group,
               Banks banks, std::int64_t steps, Isa isa, int threads, std::int32_t* order, double* losses);

// Which weights an obs_sweep removes. m = 0: of each block of columns, over all rows together, the removals[block] sets
// of `group` consecutive rows and one column with the lowest sums of scores. m > 0: n of m consecutive columns stay, in
// each row; where `shared`, out of the 4 that `group` rows share.
struct SweepPattern {
  std::int64_t group;
  std::int64_t n;
  std::int64_t m;
  bool shared;
  const std::int64_t* removals;  // [ceil(n_in / block)], each at most rows / group times the block's columns
};

// Columns left to right, each removal compensated in the columns to its right; score (w_j / U_jj)^2, H^-1 = Uᵀ U.
//   weight  [rows, n_in] row-major, rows a multiple of group
//   factor  [n_in, n_in], Uᵀ: lower triangular; only that half is read
//   block   columns whose masks are chosen together, at least 1; a multiple of m where m > 0
//   pruned  [rows, n_in], written whole; must not overlap weight
// Results do not depend on `threads` (>= 1). Throws std::bad_alloc; works in about 8 * rows * n_in bytes.
void obs_sweep(const double* weight, std::int64_t rows, std::int64_t n_in, const double* factor,
               const SweepPattern& pattern, std::int64_t block, Isa isa, int threads, double* pruned);

// sums[c] = sum over tokens of w (values - shift)[c]: the difference float32, the product and the sum float64.
//   values   [tokens, n] row-major floats; tokens and n from 1
//   weights  [tokens] floats of at least 0, or null for ones
//   shift    [n] floats
//   sums     [n] doubles, written whole: not finite where a value is not
// The result does not depend on `threads` (>= 1). Throws std::bad_alloc when 64 n doubles cannot be had.
void token_sums(const float* values, std::int64_t tokens, std::int64_t n, const float* weights, const float* shift,
                Isa isa, int threads, double* sums);

// Running sums over tokens, of x and y less their shifts.
struct GramSums {
  double* x;   // [n_in], sum of w x
  double* xx;  // [n_in, n_in], sum of w x_i x_j for i <= j; what lies below the diagonal may change too
  double* y;   // [n_y], sum of w y
  double* yx;  // [n_y, n_in], sum of w y_i x_j
};

// Adds a batch to the sums: products in float32, summed in float32 over at most 256 consecutive tokens and in float64
// from there on. Returns false, with nothing added, where a sum of w x or w y is not finite.
//   x, y     [tokens, n_in], [tokens, n_y] row-major floats; tokens and n from 1; without a y, it and what belongs to
//            it are null
//   shift_x, shift_y  [n_in], [n_y] floats
//   weights  [tokens] floats of at least 0, or null for ones
// The result does not depend on `threads` (>= 1); avx2 and avx512 give the same bits. Throws std::bad_alloc, with
// nothing added, when the packed copy of x and y, at most max(4 MiB, n_in + n_y + 192 KiB) and a tenth, cannot be had.
bool gram(const float* x, std::int64_t n_in, const float* shift_x, const float* y, std::int64_t n_y,
          const float* shift_y, const float* weights, std::int64_t tokens, Isa isa, int threads, const GramSums& sums);

// keep = the k highest scores of each row, exactly k; of equal scores those of lower index. -0 equals +0.
//   scores  [rows, n]; keep [rows, n], written whole; k is 0 to n
// Returns false, keep undefined, where a score is NaN. The result does not depend on `threads` (>= 1). Throws
// std::bad_alloc when 4 bytes a score of a row of more than 16,384 cannot be had, and 64 KiB.
bool topk_mask(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, Isa isa, int threads,
               bool* keep);

// A matrix in panels is stored as [panels, rows, admm_panel], with zeros past its last column; a task of admm_prune
// covers one panel of columns and one block of rows. Multiples of every kernel's tile.
constexpr std::int64_t admm_panel = 48;
constexpr std::int64_t admm_block_rows = 32;

// The running state of admm_prune, float32. R is rows in whole blocks, N is n_in in whole panels; padding is 0.
struct AdmmState {
  std::int64_t rows;
  std::int64_t n_in;
  const float* q;            // panels of Q [n_in, n_in], whose columns are the eigenvectors
  const float* qt;           // panels of Qᵀ [N, n_in]
  const float* eigenvalues;  // [N]
  const float* goal;         // [R, N], B0 Q diag(eigenvalues)
  float* b;                  // [R, N], B Q
  float* u;                  // [R, N], U Q
  float* x;                  // [rows, n_in], B + U
  float* scores;             // [rows, n_in], x²
};

// One iteration: Z = x where kept, else 0; U += B - Z; B = argmin tr((B - B0) Hn (B - B0)ᵀ) + rho |B - Z + U|²; then
// U *= shrink, and x and scores anew. keep: [rows, n_in]. The result does not depend on `threads` (>= 1). Throws
// std::bad_alloc when about 8 bytes a weight cannot be had.
void admm_prune_step(const AdmmState& state, const bool* keep, float rho, float shrink, Isa isa, int threads);

// A weight and its mask. Kept is what has a score of at least its threshold; a NaN has not.
struct MaskedWeight {
  const float* weight;      // [n_out, n_in]
  const float* scores;      // [n_out / share, n_in]
  const float* thresholds;  // [1], or [n_out / share, n_in / reach]
  std::int64_t n_out;
  std::int64_t n_in;
  std::int64_t share;       // consecutive rows that share their scores; divides n_out
  std::int64_t reach;       // consecutive inputs that share a threshold, dividing n_in; 0: all
};

// y = x (weight where kept, else 0)ᵀ + bias, summed in float32. With bf16, x and y are, and the weight is rounded to it.
//   x     [tokens, n_in] row-major, tokens from 0
//   bias  [n_out] or null
//   y     [tokens, n_out], written whole; must not overlap x
// Where little is kept, only that is multiplied: then what is not kept does not turn an infinite x into NaN.
// The result does not depend on `threads` (>= 1). Throws std::bad_alloc when a packed copy of x, and what a thread
// needs, some 100 KB and 384 bytes a token, or 2 KB for each value of a sum, cannot be had.
void masked_matmul(const MaskedWeight& weight, const void* x, std::int64_t tokens, bool bf16, const float* bias,
                   Isa isa, int threads, void* y);

// The gradients, given dy [tokens, n_out] of x's type; each is left out where it is null.
//   dx        [tokens, n_in] of x's type, dy (weight where kept, else 0)
//   d_weight  [n_out, n_in], G = dyᵀ x where kept, else 0
//   d_scores  [n_out / share, n_in], the sum over the rows that share a score of G * weight, kept or not
// Like masked_matmul otherwise, with a packed copy of dy too.
void masked_matmul_backward(const MaskedWeight& weight, const void* x, const void* dy, std::int64_t tokens, bool bf16,
                            Isa isa, int threads, void* dx, float* d_weight, float* d_scores);

// Which values are dropped: those whose 16-bit draw by Philox4x32-7 under the key `seed` is below `limit`; the others
// are scaled up, so that nothing changes on average.
struct Dropout {
  std::uint64_t seed;
  std::uint32_t limit;  // 0: nothing is dropped; below 65536

  float scale() const { return 65536.0f / static_cast<float>(65536 - limit); }
};

// y = x where it is not dropped, scaled up, else 0. Of block b of 128 values, value i is drawn by the half i / 16 (from
// the lowest of the first word on) of the counter (16 b + i % 16, as 64 bits; 0, 0).
//   x, y  [n], bf16 or floats; they may be the same
// The result does not depend on `threads` (>= 1).
void dropout(const void* x, std::int64_t n, bool bf16, const Dropout& dropped, Isa isa, int threads, void* y);

// Attention of every token to the kept tokens of its sequence, in each head.
struct Attention {
  const void* q;  // [sequences, tokens, heads, size], like k and v
  const void* k;
  const void* v;
  bool bf16;          // what they and the results hold, or floats; all sums are of floats
  const bool* keep;   // [sequences, tokens], or null where all keys are kept
  std::int64_t sequences, tokens, heads, size;
  float scale;        // of the products of queries and keys
  // Query i and the j-th key that is kept are drawn by half j % 8 of the counter (i, j / 8, sequence * heads + head, 0).
  Dropout dropout;
};

// out = dropout(softmax(scale q kᵀ)) v, [sequences, tokens, heads, size]; 0 where no key is kept.
//   stats  [sequences, heads, 2, tokens], for the backward pass: of each softmax its largest logarithm (to base 2), and
//          1 over its sum
// The result does not depend on `threads` (>= 1). Throws std::bad_alloc when a thread cannot have 16 size + 128 bytes a
// token, and 32 size + 384 backward.
void attention(const Attention& job, Isa isa, int threads, void* out, float* stats);

// The gradients, of q's type and shape, written whole.
void attention_backward(const Attention& job, const float* stats, const void* d_out, Isa isa, int threads, void* dq,
                        void* dk, void* dv);

}  // namespace sparsebert
