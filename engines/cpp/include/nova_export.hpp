/// nova_export.hpp: nova_export.h for C++17: handles that free themselves, exceptions, containers, lambdas.
///
///     nova_export::Pipeline pipeline("bundle");
///     nova_export::Options options;
///     options.prompts = {"a red circle moving right"};
///     options.max_latent_length = 9;
///     nova_export::Result result = pipeline.generate(options);
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "nova_export.h"

namespace nova_export {

/// What nova_last_error() says, and the status that came with it.
class Error : public std::runtime_error {
  public:
    explicit Error(nova_status status) : std::runtime_error(nova_last_error()), status_(status) {}
    nova_status status() const noexcept { return status_; }

  private:
    nova_status status_;
};

inline void check(nova_status status) {
    if (status != NOVA_OK)
        throw Error(status);
}

/// A view of a result's array, row by row; valid as long as the result.
template <typename T>
struct View {
    const T* data = nullptr;
    std::array<std::int64_t, 5> shape{};

    std::int64_t size() const { return shape[0] * shape[1] * shape[2] * shape[3] * shape[4]; }
    const T* begin() const { return data; }
    const T* end() const { return data + size(); }
};

class Result {
  public:
    explicit Result(nova_result* result) : result_(result, nova_result_free) {}

    /// RGB (samples, frames, height, width, 3).
    View<std::uint8_t> frames() const {
        View<std::uint8_t> view;
        view.data = nova_result_frames(result_.get(), view.shape.data());
        return view;
    }
    /// (samples, channels, latent frames, height, width).
    View<float> latents() const {
        View<float> view;
        view.data = nova_result_latents(result_.get(), view.shape.data());
        return view;
    }
    std::uint64_t seed() const { return nova_result_seed(result_.get()); }
    double seconds() const { return nova_result_seconds(result_.get()); }
    std::vector<std::string> notices() const {
        std::vector<std::string> all;
        for (const char* const* notice = nova_result_notices(result_.get()); *notice; ++notice)
            all.emplace_back(*notice);
        return all;
    }
    std::vector<nova_stage_time> stage_times() const {
        std::size_t count = 0;
        const nova_stage_time* first = nova_result_stage_times(result_.get(), &count);
        return {first, first + count};
    }

  private:
    std::unique_ptr<nova_result, void (*)(nova_result*)> result_;
};

/// 8-bit RGB, row by row.
struct Image {
    std::int64_t height = 0, width = 0;
    std::vector<std::uint8_t> pixels;
};

/// As nova_generate_options says.
struct Options {
    std::vector<std::string> prompts;
    std::vector<std::int64_t> class_ids; ///< instead of prompts where the bundle is class-conditional
    std::vector<std::string> negative_prompts;
    std::vector<std::int64_t> negative_class_ids;
    std::optional<Image> image; ///< the first frame of a video
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
    /// Return false to cancel. What they throw comes out of `generate`.
    std::function<bool(const nova_step&)> on_step;
    std::function<bool(const nova_frame&)> on_frame;
};

class Pipeline {
  public:
    explicit Pipeline(const std::string& bundle, nova_load_options options = NOVA_LOAD_OPTIONS_INIT) {
        if (nova_abi_version() != NOVA_ABI_VERSION)
            throw std::runtime_error(
                "libnova_export is of another version than its header; compile against its own");
        nova_pipeline* made = nullptr;
        check(nova_load(bundle.c_str(), &options, &made));
        pipeline_.reset(made);
    }

    nova_info describe() const {
        nova_info info = NOVA_INFO_INIT;
        check(nova_describe(pipeline_.get(), &info));
        return info;
    }

    /// Generate and decode.
    Result generate(const Options& options) {
        nova_result* result = nullptr;
        run(options, &result);
        return Result(result);
    }

    /// Frames go to options.on_frame alone, and none is kept.
    void stream(const Options& options) { run(options, nullptr); }

    void cancel() { nova_cancel(pipeline_.get()); }
    void unload() { check(nova_unload(pipeline_.get())); }

  private:
    struct Callbacks {
        const Options& options;
        std::exception_ptr thrown;

        template <typename Call, typename Told>
        static int call(const Call& callback, const Told* told, std::exception_ptr& thrown) {
            try {
                return !callback(*told);
            } catch (...) {
                thrown = std::current_exception();
                return 1;
            }
        }
    };

    static std::vector<const char*> pointers(const std::vector<std::string>& texts) {
        std::vector<const char*> made;
        for (const auto& text : texts)
            made.push_back(text.c_str());
        return made;
    }

    void run(const Options& options, nova_result** result) {
        const auto prompts = pointers(options.prompts), negatives = pointers(options.negative_prompts);
        nova_generate_options given = NOVA_GENERATE_OPTIONS_INIT;
        given.prompts = prompts.data();
        given.num_prompts = prompts.size();
        given.class_ids = options.class_ids.data();
        given.num_class_ids = options.class_ids.size();
        given.negative_prompts = negatives.data();
        given.num_negative_prompts = negatives.size();
        given.negative_class_ids = options.negative_class_ids.data();
        given.num_negative_class_ids = options.negative_class_ids.size();
        if (options.image) {
            const Image& image = *options.image;
            if (image.height < 0 || image.width < 0 ||
                image.pixels.size() != static_cast<std::size_t>(image.height * image.width * 3))
                throw std::invalid_argument("an image must have height * width * 3 bytes");
            given.image = image.pixels.data();
            given.image_height = image.height;
            given.image_width = image.width;
        }
        given.num_images_per_prompt = options.num_images_per_prompt;
        given.max_latent_length = options.max_latent_length;
        given.num_inference_steps = options.num_inference_steps;
        given.num_diffusion_steps = options.num_diffusion_steps;
        given.guidance_scale = options.guidance_scale.value_or(NOVA_UNSET);
        given.min_guidance_scale = options.min_guidance_scale.value_or(NOVA_UNSET);
        given.guidance_trunc = options.guidance_trunc;
        given.guidance_renorm = options.guidance_renorm;
        given.image_guidance_scale = options.image_guidance_scale;
        given.spatiotemporal_guidance_scale = options.spatiotemporal_guidance_scale;
        given.flow_shift = options.flow_shift.value_or(NOVA_UNSET);
        given.motion_flow = options.motion_flow;
        given.has_seed = options.seed.has_value();
        given.seed = options.seed.value_or(0);
        Callbacks callbacks{options, nullptr};
        given.user_data = &callbacks;
        if (options.on_step)
            given.on_step = [](const nova_step* step, void* data) {
                auto* own = static_cast<Callbacks*>(data);
                return Callbacks::call(own->options.on_step, step, own->thrown);
            };
        if (options.on_frame)
            given.on_frame = [](const nova_frame* frame, void* data) {
                auto* own = static_cast<Callbacks*>(data);
                return Callbacks::call(own->options.on_frame, frame, own->thrown);
            };
        const nova_status status = nova_generate(pipeline_.get(), &given, result);
        if (callbacks.thrown)
            std::rethrow_exception(callbacks.thrown);
        check(status);
    }

    struct Free {
        void operator()(nova_pipeline* pipeline) const { nova_free(pipeline); }
    };
    std::unique_ptr<nova_pipeline, Free> pipeline_;
};

} // namespace nova_export
