/// A small checkpoint, and stages that do no work: what the loops do with them can be told from what comes
/// out.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "config.hpp"
#include "runner.hpp"

namespace nova::test {

inline Config small_config() {
    Config config;
    config.temporal = config.spatial = {2, 64};
    config.head = {2, 64};
    config.latent_channels = 4;
    config.latent_size = {8, 12};
    config.image_size = {64, 96};
    config.patch = 2;
    config.text_len = 0; // class-conditional: no tokenizer
    config.base_frames = 4;
    config.vae = {{"_class_name", "AutoencoderKLOpenSora"}, {"block_out_channels", {32, 32, 64, 64}}};
    config.scheduler = {{"_class_name", "DDPMScheduler"}};
    return config;
}

/// The head gives back a tenth of its noise, the decoder the latents' first channel as grey.
class FakeStages : public Stages {
  public:
    explicit FakeStages(const Config& config) : config_(config) { spec_.axes = {{"steps", 1, 25, 1000}}; }

    const StageSpec& spec(const std::string&) const override { return spec_; }

    Arrays run(const std::string& stage, const Arrays& inputs, Place) override {
        calls.push_back(stage);
        if (stage == "condition")
            return {{"condition", Array::zeros<float>({inputs.at("class_ids").shape()[0], 1, 64})}};
        if (stage == "temporal_encoder")
            return encode(inputs);
        if (stage == "spatial_encoder") {
            const Shape& ids = inputs.at("next_ids").shape();
            return {{"z", Array::zeros<float>({ids[0], ids[1], 64})}};
        }
        if (stage == "diffusion_head")
            return {{"denoised", scaled(inputs.at("noise"), 0.1f)}};
        return {{"pixels", decode(inputs.at("latents"))}};
    }

    std::vector<std::string> calls;

  private:
    Arrays encode(const Arrays& inputs) const {
        const auto rows = inputs.at("text").shape()[0];
        Arrays outputs{{"context", Array::zeros<float>({rows, config_.frame_tokens(), 64})}};
        for (const auto& name : cache_names(config_))
            outputs["new_" + name] = inputs.at(name);
        return outputs;
    }

    static Array scaled(const Array& array, float factor) {
        Array made = Array::empty(array.dtype(), array.shape());
        for (std::int64_t i = 0; i < array.size(); ++i)
            made.data<float>()[i] = array.data<float>()[i] * factor;
        return made;
    }

    /// One frame for the first latent, four for each other.
    static Array decode(const Array& latents) {
        const Shape& shape = latents.shape();
        const auto frames = 1 + (shape[2] - 1) * 4, area = shape[3] * shape[4];
        Array pixels = Array::empty(DType::float32, {1, 3, frames, shape[3], shape[4]});
        float* to = pixels.data<float>();
        for (int channel = 0; channel < 3; ++channel)
            for (std::int64_t frame = 0; frame < frames; ++frame, to += area)
                std::copy_n(latents.data<float>() + (frame + 3) / 4 * area, area, to);
        return pixels;
    }

    const Config& config_;
    StageSpec spec_;
};

} // namespace nova::test
