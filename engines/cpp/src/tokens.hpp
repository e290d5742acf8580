// Sets of tokens: how many each AR step predicts, which; and where a token's values stand in latents.
// Letters: B samples, N tokens of a frame, d values of a token.
#pragma once

#include <vector>

#include "array.hpp"
#include "config.hpp"

namespace nova {

/// Tokens predicted in each AR step: differences of round(N cos(pi i / 2S)); empty steps are dropped.
std::vector<std::int64_t> set_sizes(std::int64_t num_tokens, std::int64_t num_steps);

/// Where each value of each token stands in a flat (C, h, w): N * d, values in the order (row in patch,
/// column in patch, channel).
std::vector<std::int64_t> token_positions(const Config& config);

/// tokens (B, N, d) -> (B, C, h, w).
Array unpatchify(const std::vector<float>& tokens, std::int64_t batch, const Config& config);

} // namespace nova
