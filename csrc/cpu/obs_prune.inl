// The arithmetic of obs_prune and obs_sweep. Compiled by isa/floats.h.

typedef Vector<double>::type f64;
typedef Vector<std::int64_t>::type i64;

// A tile of sums: as many as the registers hold beside their operands.
constexpr int tile_rows = lanes == 16 ? 8 : 4;
constexpr int panel_vectors = lanes == 4 ? 2 : 3;
constexpr int f64_lanes = Vector<double>::size;
constexpr int panel = panel_vectors * f64_lanes;

#include "obs_prune_trace.inl"
#include "obs_prune_sweep.inl"

const ObsPruneKernel kernel = {trace_bytes, trace_group, panel, reach_block, sweep_block};
