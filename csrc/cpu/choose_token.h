// How a token is chosen from a row of weights, once for every SIMD level.
#pragma once

#include <cstdint>

#include "common/args.h"

namespace memdec::cpu {

// The token that 64 random bits draw from `n` tokens, of which weights[i] is the probability to the
// power 1 / temperature, over that of the most probable. Without filters tokens are laid side by
// side as they come, else by falling probability, ties by id. `ids` is scratch of n values.
int64_t choose_token(const float* log_probs, const float* weights, int64_t n,
                     const InterpolateSampleArgs& args, uint64_t bits, int32_t* ids);

}  // namespace memdec::cpu
