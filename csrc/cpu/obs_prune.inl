// The arithmetic of obs_prune and obs_sweep. Included after vector.inl, by its rules.

typedef Vector<double>::type f64;
typedef Vector<std::int64_t>::type i64;

constexpr int f64_lanes = Vector<double>::size;
constexpr int panel = panel_vectors * f64_lanes;

#include "obs_prune_trace.inl"
#include "obs_prune_sweep.inl"

const ObsPruneKernel kernel = {trace_bytes, trace_group, panel, reach_block, sweep_block};
