/// A bundle, opened, that makes images and videos.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "config.hpp"
#include "decode.hpp"
#include "request.hpp"
#include "tokenizer.hpp"

namespace nova {

/// What a caller is told while it waits. Each may throw to end the run.
struct Listener {
    std::function<void(const Step&)> on_step = [](const Step&) {}; ///< after every AR step
    /// Frames of a tile as soon as it is decoded, `first` of them before it. None: decoded when all latents
    /// are there.
    std::function<void(const Frames&, std::int64_t first)> on_frames;
    bool keep_frames = true; ///< false: `on_frames` takes them all, and the output has none
};

struct Output {
    Frames frames;              ///< of the whole video
    std::vector<Array> latents; ///< (B, C, h, w) of each latent frame
    std::uint64_t seed = 0;
    std::vector<std::string> notices; ///< what was cut to fit
};

class Pipeline {
  public:
    /// tokenizer: none for classes. All but the tokenizer must outlive the pipeline.
    Pipeline(const Config& config, Stages& stages, std::optional<Tokenizer> tokenizer, bool lean_decode,
             std::optional<std::int64_t> vae_tile)
        : config_(config), stages_(stages), tokenizer_(std::move(tokenizer)),
          decoder_(decoder_of(stages, config, lean_decode, vae_tile)) {}

    Output generate(const Request& request, const Listener& listener);

  private:
    std::optional<Array> first_frame(const Request& request, const Plan& plan, TorchGenerator& generator,
                                     Output& output);
    Array condition(const Request& request, const Plan& plan, Output& output);
    Arrays text_states(const std::vector<std::string>& texts, std::int64_t copies, Output& output);

    const Config& config_;
    Stages& stages_;
    std::optional<Tokenizer> tokenizer_;
    Decoder decoder_;
};

} // namespace nova
