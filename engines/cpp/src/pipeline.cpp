#include "pipeline.hpp"

#include <algorithm>
#include <random>

#include "errors.hpp"

namespace nova {
namespace {

/// Decodes tiles as their latents come; keeps the frames of all.
class TileDecoder {
  public:
    TileDecoder(const Decoder& decoder, const Config& config, std::int64_t num_latents,
                const Listener& listener)
        : decoder_(decoder), waiting_(tiles(config.tiling(), num_latents)), listener_(listener) {}

    void decode(const std::vector<Array>& latents) {
        for (; next_ < waiting_.size() && waiting_[next_].stop <= static_cast<std::int64_t>(latents.size());
             ++next_) {
            Frames frames = decode_tile(decoder_, latents, waiting_[next_]);
            if (listener_.on_frames)
                listener_.on_frames(frames, count_);
            count_ += frames.count;
            if (listener_.keep_frames)
                parts_.push_back(std::move(frames));
        }
    }

    /// One sample after another, each with the frames of all tiles.
    Frames all() const {
        Frames made = parts_.front();
        made.count = count_;
        made.pixels.clear();
        for (std::int64_t sample = 0; sample < made.batch; ++sample)
            for (const auto& part : parts_) {
                const auto size = static_cast<std::ptrdiff_t>(part.pixels.size()) / part.batch;
                const auto begin = part.pixels.begin() + sample * size;
                made.pixels.insert(made.pixels.end(), begin, begin + size);
            }
        return made;
    }

  private:
    const Decoder& decoder_;
    const std::vector<Tile> waiting_;
    const Listener& listener_;
    std::size_t next_ = 0;
    std::int64_t count_ = 0; // frames decoded
    std::vector<Frames> parts_;
};

std::uint64_t fresh_seed() {
    return std::random_device()();
}

} // namespace

Output Pipeline::generate(const Request& request, const Listener& listener) {
    const Plan plan = request.plan(config_);
    Output output;
    output.seed = request.seed ? *request.seed : fresh_seed();
    TorchGenerator generator(output.seed);
    TileDecoder decoder(decoder_, config_, plan.num_frames, listener);
    auto frame_done = [&](const Array& latents) {
        output.latents.push_back(latents);
        if (listener.on_frames)
            decoder.decode(output.latents);
    };
    const auto first = first_frame(request, plan, generator, output);
    const Array condition = this->condition(request, plan, output);
    if (first)
        frame_done(*first);
    generate_latents(plan, stages_, condition, generator, first, [&](const Step& step) {
        listener.on_step(step);
        if (step.is_last())
            frame_done(step.latents);
    });
    decoder.decode(output.latents);
    if (listener.keep_frames)
        output.frames = decoder.all();
    return output;
}

/// The given image's latents, one draw of the posterior shared by every sample: (B, C, h, w).
std::optional<Array> Pipeline::first_frame(const Request& request, const Plan& plan,
                                           TorchGenerator& generator, Output& output) {
    if (!request.image)
        return std::nullopt;
    const auto [height, width] = config_.image_size;
    const Fitted fitted = fit(*request.image, height, width);
    if (!fitted.notice.empty())
        output.notices.push_back(fitted.notice);
    Array pixels = Array::empty(DType::float32, {1, 3, height, width});
    for (std::int64_t at = 0; at < height * width; ++at)
        for (std::int64_t channel = 0; channel < 3; ++channel) {
            const auto value =
                static_cast<float>(fitted.image.pixels[static_cast<std::size_t>(at * 3 + channel)]);
            pixels.data<float>()[channel * height * width + at] = (value - 127.5f) / 127.5f;
        }
    const Arrays posterior = stages_.run("vae_encoder", {{"pixels", pixels}}, Place::host);
    const Array& mean = posterior.at("latents_mean");
    Shape shape = mean.shape();
    shape[0] = plan.batch;
    Array latents = Array::empty(DType::float32, std::move(shape));
    float* values = latents.data<float>();
    std::copy_n(mean.data<float>(), mean.size(), values);
    const auto double_z = Field(config_.vae, "vae").find("double_z");
    if (!double_z || double_z->boolean()) { // without a variance the published pipeline draws nothing
        const float* deviation = posterior.at("latents_std").data<float>();
        const auto noise = generator.normal(mean.size());
        for (std::size_t i = 0; i < noise.size(); ++i)
            values[i] += deviation[i] * noise[i];
    }
    for (std::int64_t sample = 1; sample < plan.batch; ++sample)
        std::copy_n(values, mean.size(), values + sample * mean.size());
    return latents;
}

/// What stands before the first frame (rows, tokens, D); each prompt is repeated in place.
Array Pipeline::condition(const Request& request, const Plan& plan, Output& output) {
    const Prompts given[] = {request.prompts(config_), request.negative_prompts(config_)};
    const auto copies = request.num_images_per_prompt;
    Arrays inputs;
    if (config_.is_class_conditional()) {
        std::vector<std::int64_t> ids;
        for (const int which : plan.guidance.texts())
            for (const auto id : given[which].class_ids)
                ids.insert(ids.end(), static_cast<std::size_t>(copies), id);
        inputs["class_ids"] = Array::of<std::int64_t>({plan.rows()}, ids);
    } else {
        std::vector<std::string> texts;
        for (const int which : plan.guidance.texts())
            texts.insert(texts.end(), given[which].texts.begin(), given[which].texts.end());
        inputs = text_states(texts, copies, output);
        if (config_.is_video()) {
            Array motion = Array::empty(DType::float32, {plan.rows(), motion_tokens});
            for (std::int64_t row = 0; row < plan.rows(); ++row) {
                motion.data<float>()[2 * row] = static_cast<float>(request.motion_flow);
                motion.data<float>()[2 * row + 1] = trained_fps;
            }
            inputs["motion"] = motion;
        }
    }
    return stages_.run("condition", inputs, Place::device).at("condition");
}

/// Hidden states (rows, text_len, text dim) and lengths, `copies` of each text; each different text is
/// encoded once, at its true length: the encoder is causal, so padding never changes a prompt's own tokens.
Arrays Pipeline::text_states(const std::vector<std::string>& texts, std::int64_t copies, Output& output) {
    std::map<std::string, Array> encoded;
    for (const auto& text : texts) {
        if (encoded.count(text))
            continue;
        const auto tokens = tokenizer_->encode(text);
        if (!tokens.notice.empty())
            output.notices.push_back(tokens.notice);
        const auto length = static_cast<std::int64_t>(tokens.ids.size());
        encoded[text] = Array::zeros<float>({1, 0, *config_.text_dim});
        if (length)
            encoded[text] =
                stages_
                    .run("text_encoder", {{"token_ids", Array::of<std::int64_t>({1, length}, tokens.ids)}},
                         Place::host)
                    .at("text_states");
    }
    const auto rows = static_cast<std::int64_t>(texts.size()) * copies,
               row_size = config_.text_len * *config_.text_dim;
    Array states = Array::zeros<float>({rows, config_.text_len, *config_.text_dim});
    Array lengths = Array::empty(DType::int64, {rows});
    for (std::int64_t row = 0; row < rows; ++row) {
        const Array& of_text = encoded.at(texts[static_cast<std::size_t>(row / copies)]);
        std::copy_n(of_text.data<float>(), of_text.size(), states.data<float>() + row * row_size);
        lengths.data<std::int64_t>()[row] = of_text.shape()[1];
    }
    return {{"text_states", states}, {"text_lengths", lengths}};
}

} // namespace nova
