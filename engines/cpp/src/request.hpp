/// What a caller asks for, checked against the checkpoint before anything runs. Names and defaults are those
/// of nova_export/runtime/request.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "config.hpp"
#include "generate.hpp"
#include "image.hpp"

namespace nova {

constexpr float trained_fps = 12; // that published checkpoints are trained and conditioned on

/// Prompts are texts, or for class-conditional checkpoints class ids.
struct Prompts {
    std::vector<std::string> texts;
    std::vector<std::int64_t> class_ids;
};

struct Request {
    Prompts prompt;
    Prompts negative_prompt; ///< none given: the empty text, or the null class
    std::optional<Image> image;
    std::int64_t num_images_per_prompt = 1;
    std::int64_t max_latent_length = 1;
    std::int64_t num_inference_steps = 64;
    std::int64_t num_diffusion_steps = 25;
    std::optional<double> guidance_scale; ///< none: the checkpoint's own
    std::optional<double> min_guidance_scale;
    double guidance_trunc = 0;
    double guidance_renorm = 1;
    double image_guidance_scale = 0;
    double spatiotemporal_guidance_scale = 0;
    std::optional<double> flow_shift;
    double motion_flow = 5;
    std::optional<std::uint64_t> seed; ///< none draws one

    /// Check all, decide sizes and tables. Error(usage) or Error(input) naming the argument.
    Plan plan(const Config& config) const;

    /// Texts, or class ids as texts' place, of all prompts; negative ones are as many as prompts.
    Prompts prompts(const Config& config) const;
    Prompts negative_prompts(const Config& config) const;
};

} // namespace nova
