#include "topk_mask.h"

namespace sparsebert::topk_mask_scalar {
#include "topk_mask.inl"
}  // namespace sparsebert::topk_mask_scalar
