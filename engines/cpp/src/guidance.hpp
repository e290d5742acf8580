// Guidance as weights: a guided prediction is a weighted sum of the passes' predictions.
// Passes stand along the batch, in the order conditional, unconditional, extra.
#pragma once

#include <optional>
#include <vector>

#include "array.hpp"

namespace nova {

struct Guidance {
    double scale = 5.0;
    std::optional<double> min_scale;
    double trunc = 0.0;
    double renorm = 1.0;
    double image_scale = 0.0;
    double spatiotemporal_scale = 0.0;

    /// Error(usage): a value, or a combination of values, that has no meaning.
    void check() const;
    /// 1 without guidance, 2 with it, 3 with image or spatiotemporal guidance.
    std::int64_t passes() const;
    /// Which text each pass sees: 0 the prompt, 1 the negative prompt.
    std::vector<int> texts() const;
    /// Which passes see begin-of-video tokens instead of the previous frame, at every frame.
    std::vector<bool> blanks() const;
    /// Linear from min_scale to scale over a frame's AR steps; `progress` is (step + 1) / steps.
    double scale_at(double progress) const;

    /// Of T diffusion steps: weights (T, G) under the renorm, weights (T, G) added behind it, renorm (T, 1).
    struct Weights {
        Array under, behind, renorm;
    };
    Weights weights(double progress, const std::vector<float>& timesteps) const;
};

} // namespace nova
