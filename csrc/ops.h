// All operations of the compiled core in plain C++, without Python and without a tensor library. Callers have checked
// shapes and index bounds; the code below does not check them again.
#pragma once

#include <cstdint>

namespace sparsebert {

// In the order of sparsebert.environment.ISAS, slowest first. avx_vnni is avx2 with other kernels for int8; the last
// three are avx512 with other kernels for int8, for bf16, or for both. A processor may lack one that stands before one
// that it has.
enum class Isa : int { scalar, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx };

namespace cpu {

// What a call may use: an instruction set that can run here, and at most `threads` (>= 1) threads.
struct Context {
  Isa isa;
  int threads;
};

}  // namespace cpu

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

using Bf16 = std::uint16_t;  // the upper half of a float32

enum class Activation : int { none, gelu, relu, tanh };  // gelu: 0.5 v (1 + erf(v / sqrt(2))), the exact form

// A slice: rows that are stored side by side. A block: rows that are sorted into slices, separately in each slab, so
// that the rows of a slice have similar numbers of entries. A slab: columns whose part of a panel stays in the
// first-level cache, and whose index within the slab fits a byte.
constexpr std::int64_t slice_rows = 4;
constexpr std::int64_t block_rows = 64;
constexpr std::int64_t slab_cols = 192;
static_assert(slab_cols <= 256, "a column within its slab is a byte");

// W in the form rows, in which each row has its own columns: sliced ELLPACK, one per slab of columns.
struct SlicedMatrix {
  const std::int32_t* rows;    // [slabs, slices, slice_rows], the row of W, or -1; a block's are the same in every slab
  const std::uint8_t* counts;  // [slabs, slices], entries per row; shorter rows are filled up with zeros
  const std::int64_t* begin;   // [slabs, blocks], index of a block's first entry
  const std::uint8_t* cols;    // [entries, slice_rows], within the slab, in the order of columns along a row
  const float* values;         // [entries, slice_rows]
  std::int64_t slabs;
  std::int64_t slices;
  std::int64_t blocks;
  std::int64_t entries;
};

// Rows per group, and how many of them are stored side by side, with one value of each per column.
constexpr std::int64_t group_rows = 8;
constexpr std::int64_t group_slice = 4;

// W in groups of group_rows rows that share one list of kept columns. Any rows may form a group.
struct GroupedMatrix {
  const std::int32_t* rows;         // [groups, group_rows], the row of W, or -1 if the group is smaller
  const std::int32_t* col_begin;    // [groups], where a group's columns begin in `cols`; groups may share a list
  const std::int32_t* col_count;    // [groups]
  const std::uint16_t* cols;        // column indices below n_in
  const std::int64_t* value_begin;  // [groups], where a group's values begin in `values`
  const float* values;              // per group: [group_rows / group_slice][col_count][group_slice]
  std::int64_t groups;
};

// A tile: the rows and columns of W that are multiplied in one step.
constexpr std::int64_t tile_rows = 16;
constexpr std::int64_t tile_cols = 32;

// W in bf16 tiles. A group is one or two tiles of rows that share one list of kept columns, in chunks of tile_cols; any
// rows may form a group. A tile is stored whole, or as one bit per entry and the values that are not zero.
struct TiledMatrix {
  const std::int32_t* rows;         // [groups, 2 * tile_rows], the row of W, or -1 if the group is smaller
  const std::int32_t* tiles;        // [groups], 1 or 2
  const std::int64_t* col_begin;    // [groups], where a group's columns begin in `cols`; groups may share a list
  const std::int32_t* chunks;       // [groups], the group's columns / tile_cols
  const std::uint16_t* cols;        // column indices below n_in; a list is filled up with any column, of weight zero
  const std::int64_t* value_begin;  // [groups], where a group's values begin in `values`
  const std::int64_t* mask_begin;   // [groups], where its masks begin in `masks`, or -1 if its tiles are stored whole
  const Bf16* values;               // per group: [chunks][tiles][tile_rows][tile_cols], or only those that are not zero
  const std::uint32_t* masks;       // per group: [chunks][tiles][tile_rows], bit c for column c of the tile
  std::int64_t groups;
  std::int64_t most_chunks;         // the largest of `chunks`
};

// A quad: the columns of which one instruction adds up the products.
constexpr std::int64_t quad_cols = 4;
constexpr std::int64_t most_int8_rows = 32;  // of a group
constexpr std::int64_t int8_overrun = 64;    // bytes after the last value that may be read, and do not count

// How values become bytes: value k is trunc(v * inverse[k] + offset[k]), or 0 or 255 beyond; a NaN is 0. `offset` is the
// byte of zero plus one half, which rounds. All instruction sets give the same bytes.
struct Quantizer {
  const float* inverse;
  const float* offset;
};

// W in int8, for an input in bytes. A group is some rows of W that share one list of kept columns, in quads. With w the
// weights and b the bytes, row r of y is scale[r] * (start[r] + sum over k of w_rk b_k); `start` takes away the bytes of
// zero. The sum in brackets is exact in int32.
struct Int8Matrix {
  const std::int64_t* row_begin;    // [groups + 1], where a group's rows begin in `rows`
  const std::int32_t* rows;         // per group a multiple of group_slice: the row of W, or -1 to fill up
  const std::int64_t* col_begin;    // [groups], where a group's columns begin in `cols`; groups may share them
  const std::int32_t* quads;        // [groups], the group's columns / quad_cols
  const std::uint16_t* cols;        // column indices below n_in; a list is filled up with any column, of weight zero
  const std::int64_t* value_begin;  // [groups], where a group's values begin in `values`
  const std::int8_t* values;        // per group: [rows][quads][quad_cols]; then int8_overrun bytes
  const float* scale;               // [n_out]
  const std::int32_t* start;        // [n_out]
  Quantizer input;                  // [n_in]
  std::int64_t groups;
  std::int64_t most_quads;          // the largest of `quads`
  std::int64_t entries;             // values
  std::int64_t tall_entries;        // those in groups of 16 rows or more
};

enum class Form : int { rows, groups, tiles, int8 };

// y = activation(x Wᵀ + bias) for W [n_out, n_in] in one of the forms.
struct Linear {
  Form form;
  union {  // by the form
    const SlicedMatrix* sliced;
    const GroupedMatrix* grouped;
    const TiledMatrix* tiled;
    const Int8Matrix* int8;
  };
  const float* bias;  // [n_out], or null for none
  Activation activation;
  std::int64_t n_in;  // at most 65536
  std::int64_t n_out;
};

// Runs a linear layer with float32 accumulation. If W is in tiles, x and y are rounded to bf16; in int8, x is rounded to
// bytes, and the products are added up in int32.
//   x     [tokens, n_in] row-major floats, any number of tokens from 0; needs no alignment beyond a float's
//   y     [tokens, n_out] row-major floats, written whole; must not overlap x
// A token's result depends neither on other tokens, nor on their number, nor on `context.threads`; avx2 and avx512 give
// the same bits in float32. Throws std::bad_alloc if memory cannot be allocated: for the copies of x and y in panels at
// most max(threads MiB, (n_in + n_out) * 256 B), and with tiles some 320 B more per thread and input.
void sparse_matmul(const float* x, std::int64_t tokens, const Linear& linear, cpu::Context context, float* y);

// Peak operations per second of one core with this instruction set, for linears in this form: from registers, or from
// tiles in the cache; a multiply-add counts as two. No kernel exceeds it. Takes some milliseconds.
double peak_flops(Isa isa, Form form);

struct LayerNorm {
  const float* weight;
  const float* bias;
};

// attention_out and down are added to their layer's states, and have no activation.
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
  const float* positions;  // [types, max_length, embedding], sums of position and token-type vectors
  std::int64_t max_length;
  std::int64_t embedding;
  LayerNorm embedding_norm;
  const Linear* projection;  // embedding -> hidden, or null if they are equal
  const EncoderLayer* layers;
  std::int64_t n_layers;
  std::int64_t hidden;
  std::int64_t heads;  // divides hidden
  float eps;
  Linear pooler;      // applied to a sequence's first token
  Linear classifier;
};

// Sequences one after the other, without padding.
struct Sequences {
  const std::int32_t* ids;    // [tokens], below the size of the vocabulary
  const std::int32_t* types;  // [tokens], below the number of types
  const std::int64_t* starts; // [count + 1]; strictly increases, by at most max_length
  std::int64_t count;
};

// Classifies sequences. Either all linears of the layers, the projection and the pooler are in tiles, and the states
// between them are bf16, or none is in tiles. The classifier is never in tiles. Only linears of the layers are in int8;
// the states, attention and the norms are float32 then.
//   logits  [count, classifier.n_out] row-major floats, written whole
//   states  [tokens, hidden], the last layer's output, or null if it is not wanted; with neither states nor clipped the
//           last layer computes only what first tokens need, with the same logits
//   clipped  [n_layers, 4], or null: for each linear of a layer that is in int8, the number of its inputs that became the
//            first or the last byte is added
// A sequence's result depends neither on other sequences nor on `context.threads`; avx2 and avx512 give the same bits in
// float32. Throws std::bad_alloc if working memory for 128 tokens per thread, or for the longest sequence, cannot be
// allocated.
void sparse_encoder(const Encoder& encoder, const Sequences& sequences, cpu::Context context, float* logits,
                    float* states, std::int64_t* clipped);

// The rows of a mask, in groups of equal rows.
struct RowGroups {
  const bool* mask;             // [any number of rows, n_in]
  const std::int64_t* row_ptr;  // [count + 1], indices into rows; starts at 0, strictly increases
  const std::int32_t* rows;     // each row of the mask at most once
  std::int64_t count;
};

// Solves H_SS v_S = t_S for each row, where S is its support (the True of its mask). float64, by Cholesky, with one
// factorisation per group.
//   target      [rows, n_in] row-major doubles
//   h           [n_in, n_in] symmetric; only i <= j is read, unless `complement`
//   complement  S is the False of the mask; from the solution c follows the result v = t - cᵀ H_S:, exactly 0 on S
//   v           [rows, n_in]; written on each row's S, with `complement` in whole rows; must not overlap target
//   failed      [count], -1, or the index in S of the first pivot that is not above 0; the group's v is then undefined
// A thread takes the groups of its share in order, so the costliest should come first. The result does not depend on
// `threads`. Throws std::bad_alloc if a thread's working memory, about 4 |S|² bytes, cannot be allocated.
void masked_lstsq(const double* target, const double* h, std::int64_t n_in, const RowGroups& groups, bool complement,
                  cpu::Context context, double* v, std::int64_t* failed);

// A row may lose at most `removals` of each `width` consecutive columns; width 0: no such limit.
struct Banks {
  std::int64_t width;
  std::int64_t removals;
};

// Exact optimal brain surgeon: the order in which groups of `group` consecutive rows lose their columns. Each step
// removes the open column p of lowest score, the sum over the group's rows of w_p^2 / [H^-1]_pp; of equal scores, the
// lower column.
//   weight   [rows, n_in] row-major, rows a multiple of group
//   inverse  [n_in, n_in], H^-1, symmetric
//   steps    at most n_in, and at most n_in / width * removals with banks
//   order    [rows / group, steps], columns; losses [rows / group, steps], their scores when they were removed
// A trace ends with losses of NaN if its inverse loses its positive diagonal to rounding. Results do not depend on
// `threads`. Needs about 8 * n_in^2 bytes per thread; throws std::bad_alloc.
void obs_prune(const double* weight, std::int64_t rows, std::int64_t n_in, const double* inverse, std::int64_t group,
               Banks banks, std::int64_t steps, cpu::Context context, std::int32_t* order, double* losses);

// The weights that an obs_sweep removes. A set is `group` consecutive rows of one column. m = 0: in each block of
// columns, the removals[block] sets with the lowest sums of scores, chosen over all rows together. m > 0: each row
// keeps n of m consecutive columns, or if `shared`, n of the 4 of them that `group` rows keep together.
struct SweepPattern {
  std::int64_t group;
  std::int64_t n;
  std::int64_t m;
  bool shared;
  const std::int64_t* removals;  // [ceil(n_in / block)], each at most rows / group times the block's columns
};

// Goes through the columns from left to right and compensates each removal in the columns to its right. The score is
// (w_j / U_jj)^2, with H^-1 = Uᵀ U.
//   weight  [rows, n_in] row-major, rows a multiple of group
//   factor  [n_in, n_in], Uᵀ: lower triangular; only that half is read
//   block   columns whose masks are chosen together, at least 1; a multiple of m if m > 0
//   pruned  [rows, n_in], written whole; must not overlap weight
// Results do not depend on `context.threads`. Needs about 8 * rows * n_in bytes; throws std::bad_alloc.
void obs_sweep(const double* weight, std::int64_t rows, std::int64_t n_in, const double* factor,
               const SweepPattern& pattern, std::int64_t block, cpu::Context context, double* pruned);

// sums[c] = sum over tokens of w (values - shift)[c]. The difference is float32, the product and the sum are float64.
//   values   [tokens, n] row-major floats; tokens and n are at least 1
//   weights  [tokens] floats of at least 0, or null for ones
//   shift    [n] floats
//   sums     [n] doubles, written whole; an entry is not finite if one of its values is not
// The result does not depend on `context.threads`. Throws std::bad_alloc if 64 n doubles cannot be allocated.
void token_sums(const float* values, std::int64_t tokens, std::int64_t n, const float* weights, const float* shift,
                cpu::Context context, double* sums);

// Running sums over tokens, of x and y minus their shifts.
struct GramSums {
  double* x;   // [n_in], sum of w x
  double* xx;  // [n_in, n_in], sum of w x_i x_j for i <= j; entries below the diagonal may change too
  double* y;   // [n_y], sum of w y
  double* yx;  // [n_y, n_in], sum of w y_i x_j
};

// Adds a batch to the sums. Products are float32; they are summed in float32 over at most 256 consecutive tokens, then
// in float64. Returns false and adds nothing if a sum of w x or w y is not finite.
//   x, y     [tokens, n_in], [tokens, n_y] row-major floats; tokens, n_in and n_y are at least 1. Without y, all
//            arguments of y are null
//   shift_x, shift_y  [n_in], [n_y] floats
//   weights  [tokens] floats of at least 0, or null for ones
// The result does not depend on `context.threads`; avx2 and avx512 give the same bits. Throws std::bad_alloc and adds
// nothing if the packed copy of x and y cannot be allocated: at most about 1.1 * max(4 MiB, (n_in + n_y + 192) KiB).
bool gram(const float* x, std::int64_t n_in, const float* shift_x, const float* y, std::int64_t n_y,
          const float* shift_y, const float* weights, std::int64_t tokens, cpu::Context context, const GramSums& sums);

// keep = the k highest scores of each row, exactly k; of equal scores, those of lower index. -0 equals +0.
//   scores  [rows, n]; keep [rows, n], written whole; k is 0 to n
// Returns false, with keep undefined, if a score is NaN. The result does not depend on `context.threads`. A row of more
// than 16,384 scores needs 4 bytes per score and 64 KiB; throws std::bad_alloc if they cannot be allocated.
bool topk_mask(const float* scores, std::int64_t rows, std::int64_t n, std::int64_t k, cpu::Context context,
               bool* keep);

// A matrix in panels is stored as [panels, rows, admm_panel], with zeros past its last column. A task of admm_prune
// covers one panel of columns and one block of rows. Both sizes are multiples of every kernel's tile.
constexpr std::int64_t admm_panel = 48;
constexpr std::int64_t admm_block_rows = 32;

// The running state of admm_prune, float32. R is rows rounded up to whole blocks, N is n_in rounded up to whole panels;
// padding is 0.
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

// One iteration: Z = x where kept, else 0; U += B - Z; B = argmin tr((B - B0) Hn (B - B0)ᵀ) + rho |B - Z + U|². Then
// U *= shrink, and x and scores are computed again. keep: [rows, n_in]. The result does not depend on `context.threads`.
// Throws std::bad_alloc if about 8 bytes per weight cannot be allocated.
void admm_prune_step(const AdmmState& state, const bool* keep, float rho, float shrink, cpu::Context context);

// A matrix of weights and its mask. A weight is kept if its score is at least its threshold; one whose score is NaN is
// not kept.
struct MaskedWeight {
  const float* weight;      // [n_out, n_in]
  const float* scores;      // [n_out / score_rows, n_in]
  const float* thresholds;  // [1], or [n_out / score_rows, n_in / reach]
  std::int64_t n_out;
  std::int64_t n_in;
  std::int64_t score_rows;  // consecutive rows that share their scores; divides n_out
  std::int64_t reach;       // consecutive inputs that share a threshold; divides n_in; 0: one threshold for all
};

// y = x (weight where kept, else 0)ᵀ + bias, summed in float32. With `bf16`, x and y are bf16, and the weight is
// rounded to bf16.
//   x     [tokens, n_in] row-major, tokens >= 0
//   bias  [n_out] or null
//   y     [tokens, n_out], written whole; must not overlap x
// If few weights are kept, only these are multiplied; an infinite x then gives no NaN at the other weights. The
// result does not depend on `context.threads`. Throws std::bad_alloc if memory cannot be allocated for a packed copy of
// x and, per thread, some 100 KB and 384 bytes per token, or 2 KB per term of a sum.
void masked_matmul(const MaskedWeight& weight, const void* x, std::int64_t tokens, bool bf16, const float* bias,
                   cpu::Context context, void* y);

// Computes the gradients, given dy [tokens, n_out] of x's type; leaves out those whose pointer is null.
//   dx        [tokens, n_in] of x's type, dy (weight where kept, else 0)
//   d_weight  [n_out, n_in], G = dyᵀ x where kept, else 0
//   d_scores  [n_out / score_rows, n_in], the sum over the rows that share a score of G * weight, kept or not
// Otherwise like masked_matmul, with a packed copy of dy too.
void masked_matmul_backward(const MaskedWeight& weight, const void* x, const void* dy, std::int64_t tokens, bool bf16,
                            cpu::Context context, void* dx, float* d_weight, float* d_scores);

// A value is dropped if its 16-bit random number, from Philox4x32-7 with the key `seed`, is below `limit`. The others
// are scaled up, so that the mean does not change.
struct Dropout {
  std::uint64_t seed;
  std::uint32_t limit;  // 0: nothing is dropped; below 65536

  float scale() const { return 65536.0f / static_cast<float>(65536 - limit); }
};

// y = x scaled up, or 0 if dropped. Value i of block b of 128 values takes its random number from the output for the
// counter (16 b + i % 16, as 64 bits; 0, 0): its 16-bit half i / 16, counted from the lower half of the first word.
//   x, y  [n], bf16 or floats; they may be the same array
// The result does not depend on `context.threads`.
void dropout(const void* x, std::int64_t n, bool bf16, const Dropout& dropped, cpu::Context context, void* y);

// Attention of each token to the kept tokens of its sequence, in each attention head.
struct Attention {
  const void* q;  // [sequences, tokens, heads, size]; so are k and v
  const void* k;
  const void* v;
  bool bf16;          // q, k, v and the results are bf16, else float32; all sums are float32
  const bool* keep;   // [sequences, tokens], or null if all keys are kept
  std::int64_t sequences, tokens, heads, size;
  float scale;        // factor on the products of queries and keys
  // Query i and the j-th kept key take their random number from half j % 8 of the output for the counter (i, j / 8,
  // sequence * heads + head, 0).
  Dropout dropout;
};

// out = dropout(softmax(scale q kᵀ)) v, [sequences, tokens, heads, size]; 0 if no key is kept.
//   stats  [sequences, heads, 2, tokens], for the backward pass: the largest base-2 exponent of each softmax,
//          and 1 / its sum
// The result does not depend on `context.threads`. Needs 16 size + 128 bytes per token and thread, 32 size + 384 in the
// backward pass; throws std::bad_alloc if they cannot be allocated.
void attention(const Attention& job, cpu::Context context, void* out, float* stats);

// Computes the gradients, of q's type and shape; all are written whole.
void attention_backward(const Attention& job, const float* stats, const void* d_out, cpu::Context context, void* dq,
                        void* dk, void* dv);

}  // namespace sparsebert
