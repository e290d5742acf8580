// NOVA's loops: frames, sets of tokens within a frame, and what each call of a stage is fed.
// Nothing here knows a backend. Letters: B samples, G guidance passes, rows = G * B, N tokens of a frame,
// P predicted, K predicted now, T diffusion steps.
#pragma once

#include <functional>
#include <optional>

#include "array.hpp"
#include "config.hpp"
#include "guidance.hpp"
#include "noise.hpp"
#include "runner.hpp"
#include "schedule.hpp"

namespace nova {

/// One finished AR step. `latents` (B, C, h, w) is the frame so far; is_last when the frame is whole.
struct Step {
    std::int64_t frame, num_frames, step, num_steps;
    Array latents;
    bool is_last() const { return step + 1 == num_steps; }
};

/// A request as the loops need it: sizes, tables and choices, all decided before the first stage runs.
struct Plan {
    const Config& config;
    std::int64_t batch, num_frames, num_inference_steps;
    Schedule schedule;
    Guidance guidance;
    std::int64_t rows() const { return batch * guidance.passes(); }
};

/// Every AR step of every generated frame, in order, is told to `on_step`; frame t's latents are whole at its
/// last.
///
/// condition: (rows, text and motion tokens, D), passes in the order of plan.guidance. first_frame: given
/// latents (B, C, h, w), frame 0 of image to video. What `on_step` throws ends the loops.
void generate_latents(const Plan& plan, Stages& stages, const Array& condition, TorchGenerator& generator,
                      const std::optional<Array>& first_frame,
                      const std::function<void(const Step&)>& on_step);

/// Short vectors (n, B, m) with the inner products of the given ones (n, B, values), m = min(n, values) or 1:
/// the head only wants norms of sums of them, which depend on nothing else.
Array compress(const std::vector<float>& noise, std::int64_t count, std::int64_t batch, std::int64_t values);

} // namespace nova
