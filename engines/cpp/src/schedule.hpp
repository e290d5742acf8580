// Schedulers as tables: every step of NOVA's diffusion is x' = a x + b prediction + s noise.
// Formulas and what is published about them: nova_export/runtime/schedule.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "array.hpp"
#include "json.hpp"

namespace nova {

/// T steps: the timestep each is conditioned on, its (a, b, s), and whether it draws noise.
struct Schedule {
    std::vector<float> timesteps;
    Array coefficients; // (T, 3)
    std::vector<bool> draws_noise;

    /// (T, 256): cos, then sin, of each timestep times 128 frequencies 10000^(-i/128).
    Array frequencies() const;
};

/// The steps of a checkpoint's scheduler. Error(checkpoint): a scheduler, or an option of it, that the
/// published pipeline cannot run either. Error(usage): too many steps, or `flow_shift` for a scheduler
/// without one.
Schedule make_schedule(const Json& config, std::int64_t num_steps, std::optional<double> flow_shift);

} // namespace nova
