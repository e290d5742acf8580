/// What a manifest's `config` says, as nova_export/config.py has it, and the names of stages that follow from it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "json.hpp"

namespace nova {

constexpr std::int64_t motion_tokens = 2, frequencies = 256, num_classes = 1000;
constexpr std::int64_t max_batch = 256, max_passes = 3, max_frames = 1024, max_diffusion_steps = 1000;

struct Vit {
    std::int64_t depth = 0, width = 0;
};

/// How a video VAE is decoded in time; as Tiling in config.py.
struct Tiling {
    std::int64_t latent_frames = 0, overlap = 0, drop = 0, frames_per_latent = 0;
};

/// Sizes of one NOVA checkpoint. vae, scheduler: the parts' own configs.
struct Config {
    Vit temporal, spatial, head;
    std::int64_t latent_channels = 0;
    std::array<std::int64_t, 2> latent_size{}, image_size{};
    std::int64_t patch = 0;
    std::optional<std::int64_t> text_dim;
    std::int64_t text_len = 0, base_frames = 0;
    std::optional<std::int64_t> mixer_rank;
    bool rotary = false;
    Json vae, scheduler;
    double guidance_scale = 5.0;

    bool is_video() const;
    bool is_class_conditional() const;
    std::int64_t video_length() const;
    Tiling tiling() const;
    std::array<std::int64_t, 2> token_grid() const;
    std::int64_t num_tokens() const;
    std::int64_t frame_tokens() const;
    std::int64_t token_dim() const;
    std::int64_t condition_tokens() const;
};

Config config_of(const Field& data); ///< Error(bundle)
inline Config config_of(const Json& data) { return config_of(Field(data, "config")); }

std::vector<std::string> cache_names(const Config& config);
/// Stages of a lean decode, in order. Error(bundle) where the autoencoder cannot be cut so.
std::vector<std::string> lean_pieces(const Config& config);
/// All stages, in the order that a run uses them.
std::vector<std::string> stage_names(const Config& config, bool lean_decode);

} // namespace nova
