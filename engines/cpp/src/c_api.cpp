// nova_export.h over the pipeline: copies options in, results out, and turns every exception into a status.
#include "nova_export.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "bundle.hpp"
#include "bundle_stages.hpp"
#include "errors.hpp"
#include "pipeline.hpp"

struct nova_pipeline {
    nova_pipeline(nova::Bundle opened, const nova::DeviceOptions& options,
                  std::optional<std::int64_t> vae_tile)
        : bundle(std::move(opened)), stages(bundle, options),
          pipeline(bundle.config, stages, tokenizer_of(bundle), !bundle.lean_decode.empty(),
                   vae_tile ? vae_tile : stages.vae_tile()) {}

    static std::optional<nova::Tokenizer> tokenizer_of(const nova::Bundle& bundle) {
        if (bundle.tokenizer.empty())
            return std::nullopt;
        bundle.check(bundle.tokenizer);
        return nova::Tokenizer(bundle.path(bundle.tokenizer), bundle.config.text_len);
    }

    const nova::Bundle bundle;
    nova::BundleStages stages;
    nova::Pipeline pipeline;
    std::mutex one_call;
    std::atomic<std::thread::id> caller{};
    std::atomic<bool> cancelled = false;
};

struct nova_result {
    nova::Output output;
    std::vector<float> latents; // (B, C, L, h, w)
    std::int64_t latents_shape[5] = {};
    std::vector<const char*> notices;
    std::map<std::string, nova::StageTime> times;
    std::vector<nova_stage_time> shown_times;
    double seconds = 0;
};

namespace {

using nova::Error;
using nova::ErrorCode;

thread_local std::string last_error;

nova_status failed(nova_status status, const char* text) noexcept {
    try {
        last_error = text;
    } catch (...) { // no memory for it
        last_error.clear();
    }
    return status;
}

template <typename Call>
nova_status guarded(const Call& call) noexcept {
    try {
        call();
        return NOVA_OK;
    } catch (const Error& error) {
        return failed(static_cast<nova_status>(error.code()), error.what());
    } catch (const std::bad_alloc&) {
        return failed(NOVA_MEMORY_ERROR,
                      "there is not enough memory for this; ask for less, or load with low_memory");
    } catch (const std::exception& error) {
        return failed(NOVA_ERROR, error.what());
    } catch (...) {
        return failed(NOVA_ERROR, "unknown failure");
    }
}

[[noreturn]] void unusable(const std::string& text) {
    throw Error(ErrorCode::usage, text);
}

/// A structure as this library knows it; what an older caller's does not have is as in `defaults`.
template <typename T>
T read(const T* given, T defaults, const char* name) {
    if (!given)
        return defaults;
    if (given->size < sizeof given->size || given->size > sizeof(T))
        unusable(std::string(name) + ".size is " + std::to_string(given->size) + "; set it to sizeof(" +
                 name + "), of this library's header at most");
    std::memcpy(&defaults, given, given->size);
    return defaults;
}

nova::Prompts prompts_of(const char* const* texts, std::size_t num_texts, const std::int64_t* ids,
                         std::size_t num_ids) {
    if ((num_texts && !texts) || (num_ids && !ids) ||
        std::any_of(texts, texts + num_texts, [](const char* text) { return !text; }))
        throw Error(ErrorCode::input, "a prompt is NULL; give a text, or fewer of them");
    nova::Prompts prompts;
    prompts.texts.assign(texts, texts + num_texts);
    prompts.class_ids.assign(ids, ids + num_ids);
    return prompts;
}

std::optional<nova::Image> image_of(const nova_generate_options& options) {
    if (!options.image)
        return std::nullopt;
    constexpr std::int64_t most = 1 << 16;
    const auto height = options.image_height, width = options.image_width;
    if (height < 1 || width < 1 || height > most || width > most)
        throw Error(ErrorCode::input, "the image has " + std::to_string(width) + "x" +
                                          std::to_string(height) + " pixels; a side must be 1 to " +
                                          std::to_string(most));
    return nova::Image{height, width, {options.image, options.image + height * width * 3}};
}

std::optional<double> scale_of(double value) {
    return value == NOVA_UNSET ? std::nullopt : std::optional(value);
}

nova::Request request_of(const nova_generate_options& options) {
    nova::Request request;
    request.prompt =
        prompts_of(options.prompts, options.num_prompts, options.class_ids, options.num_class_ids);
    request.negative_prompt = prompts_of(options.negative_prompts, options.num_negative_prompts,
                                         options.negative_class_ids, options.num_negative_class_ids);
    request.image = image_of(options);
    request.num_images_per_prompt = options.num_images_per_prompt;
    request.max_latent_length = options.max_latent_length;
    request.num_inference_steps = options.num_inference_steps;
    request.num_diffusion_steps = options.num_diffusion_steps;
    request.guidance_scale = scale_of(options.guidance_scale);
    request.min_guidance_scale = scale_of(options.min_guidance_scale);
    request.guidance_trunc = options.guidance_trunc;
    request.guidance_renorm = options.guidance_renorm;
    request.image_guidance_scale = options.image_guidance_scale;
    request.spatiotemporal_guidance_scale = options.spatiotemporal_guidance_scale;
    request.flow_shift = scale_of(options.flow_shift);
    request.motion_flow = options.motion_flow;
    if (options.has_seed)
        request.seed = options.seed;
    return request;
}

/// The caller's callbacks, as the pipeline calls them; throws Error(cancelled) where they, or nova_cancel,
/// say so.
nova::Listener listener_of(nova_pipeline& pipeline, const nova_generate_options& options, bool keep_frames) {
    nova::Listener listener;
    listener.on_step = [&](const nova::Step& step) {
        const nova_step told{sizeof told, step.frame,     step.num_frames,
                             step.step,   step.num_steps, step.latents.data<float>()};
        if ((options.on_step && options.on_step(&told, options.user_data)) || pipeline.cancelled)
            throw Error(ErrorCode::cancelled, "cancelled at frame " + std::to_string(step.frame + 1) +
                                                  " of " + std::to_string(step.num_frames) + ", step " +
                                                  std::to_string(step.step + 1));
    };
    if (options.on_frame)
        listener.on_frames = [&](const nova::Frames& frames, std::int64_t first) {
            const auto size = static_cast<std::size_t>(frames.height * frames.width * 3);
            std::vector<std::uint8_t> pixels(static_cast<std::size_t>(frames.batch) * size);
            for (std::int64_t index = 0; index < frames.count; ++index) {
                for (std::int64_t sample = 0; sample < frames.batch; ++sample)
                    std::memcpy(pixels.data() + static_cast<std::size_t>(sample) * size,
                                frames.pixels.data() +
                                    static_cast<std::size_t>(sample * frames.count + index) * size,
                                size);
                const nova_frame told{sizeof told,   first + index, frames.batch,
                                      frames.height, frames.width,  pixels.data()};
                if (options.on_frame(&told, options.user_data) || pipeline.cancelled)
                    throw Error(ErrorCode::cancelled,
                                "cancelled after decoded frame " + std::to_string(first + index + 1));
            }
        };
    listener.keep_frames = keep_frames;
    return listener;
}

/// (B, C, h, w) of each latent frame to one (B, C, L, h, w).
void join_latents(nova_result& result) {
    const auto& frames = result.output.latents;
    const nova::Shape& shape = frames.front().shape();
    const auto length = static_cast<std::int64_t>(frames.size());
    const std::int64_t joined[5] = {shape[0], shape[1], length, shape[2], shape[3]};
    std::copy(joined, joined + 5, result.latents_shape);
    const auto plane = shape[2] * shape[3];
    result.latents.reserve(static_cast<std::size_t>(length * frames.front().size()));
    for (std::int64_t channel = 0; channel < shape[0] * shape[1]; ++channel)
        for (const auto& frame : frames) {
            const float* from = frame.data<float>() + channel * plane;
            result.latents.insert(result.latents.end(), from, from + plane);
        }
}

/// Whose call runs, for as long as it does.
class Call {
  public:
    explicit Call(nova_pipeline& pipeline) : pipeline_(pipeline) {
        if (pipeline.caller == std::this_thread::get_id())
            unusable("nova_generate was called from a callback of its own pipeline; return from it first");
        lock_ = std::unique_lock(pipeline.one_call);
        pipeline.caller = std::this_thread::get_id();
        pipeline.cancelled = false;
        pipeline.stages.restart_clock();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() { pipeline_.caller = std::thread::id(); }

  private:
    nova_pipeline& pipeline_;
    std::unique_lock<std::mutex> lock_;
};

std::unique_ptr<nova_result> generate(nova_pipeline& pipeline, const nova_generate_options& options,
                                      bool keep_frames) {
    using Clock = std::chrono::steady_clock;
    const Call call(pipeline);
    const auto start = Clock::now();
    auto result = std::make_unique<nova_result>();
    result->output =
        pipeline.pipeline.generate(request_of(options), listener_of(pipeline, options, keep_frames));
    join_latents(*result);
    result->times = pipeline.stages.times();
    for (const auto& [stage, time] : result->times)
        result->shown_times.push_back({stage.c_str(), time.calls, time.load_seconds, time.run_seconds});
    for (const auto& notice : result->output.notices)
        result->notices.push_back(notice.c_str());
    result->notices.push_back(nullptr);
    result->seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return result;
}

nova_info info_of(const nova_pipeline& pipeline) {
    auto whole = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    const auto& config = pipeline.bundle.config;
    nova_info info = NOVA_INFO_INIT;
    info.height = whole(config.image_size[0]);
    info.width = whole(config.image_size[1]);
    info.is_video = config.is_video();
    info.is_class_conditional = config.is_class_conditional();
    info.latent_frames = whole(config.video_length());
    info.latent_channels = whole(config.latent_channels);
    info.latent_height = whole(config.latent_size[0]);
    info.latent_width = whole(config.latent_size[1]);
    info.text_tokens = whole(config.text_len);
    info.guidance_scale = config.guidance_scale;
    info.fps = static_cast<double>(nova::trained_fps);
    info.device = pipeline.stages.device().c_str();
    return info;
}

} // namespace

uint32_t nova_abi_version(void) {
    return NOVA_ABI_VERSION;
}

const char* nova_version(void) {
    return NOVA_VERSION;
}

const char* nova_last_error(void) {
    return last_error.c_str();
}

nova_status nova_load(const char* bundle, const nova_load_options* options, nova_pipeline** pipeline) {
    return guarded([&] {
        if (!bundle || !pipeline)
            unusable(
                "nova_load needs the path of a bundle, and where to put the pipeline; one of them is NULL");
        *pipeline = nullptr;
        const auto given = read<nova_load_options>(options, NOVA_LOAD_OPTIONS_INIT, "nova_load_options");
        if (given.threads < 0 || given.vae_tile < 0)
            unusable("threads is " + std::to_string(given.threads) + " and vae_tile is " +
                     std::to_string(given.vae_tile) + "; they must be at least 0");
        const nova::DeviceOptions device{given.device ? given.device : "", given.threads,
                                         given.low_memory != 0};
        const auto vae_tile = given.vae_tile ? std::optional<std::int64_t>(given.vae_tile) : std::nullopt;
        *pipeline = std::make_unique<nova_pipeline>(nova::Bundle::open(bundle), device, vae_tile).release();
    });
}

void nova_free(nova_pipeline* pipeline) {
    delete pipeline;
}

nova_status nova_unload(nova_pipeline* pipeline) {
    return guarded([&] {
        if (!pipeline)
            unusable("nova_unload needs a pipeline, not NULL");
        const Call call(*pipeline);
        pipeline->stages.close();
    });
}

nova_status nova_describe(const nova_pipeline* pipeline, nova_info* info) {
    return guarded([&] {
        if (!pipeline || !info)
            unusable("nova_describe needs a pipeline and an info, not NULL");
        const auto size = read(info, nova_info NOVA_INFO_INIT, "nova_info").size;
        nova_info made = info_of(*pipeline);
        made.size = size;
        std::memcpy(info, &made, size);
    });
}

nova_status nova_generate(nova_pipeline* pipeline, const nova_generate_options* options,
                          nova_result** result) {
    return guarded([&] {
        if (result)
            *result = nullptr;
        if (!pipeline || !options)
            unusable("nova_generate needs a pipeline and options, not NULL");
        const auto given =
            read<nova_generate_options>(options, NOVA_GENERATE_OPTIONS_INIT, "nova_generate_options");
        if (!result && !given.on_frame)
            unusable("nova_generate has nowhere to put frames: give a result, or on_frame");
        auto made = generate(*pipeline, given, result != nullptr);
        if (result)
            *result = made.release();
    });
}

void nova_cancel(nova_pipeline* pipeline) {
    if (pipeline)
        pipeline->cancelled = true;
}

const uint8_t* nova_result_frames(const nova_result* result, int64_t shape[5]) {
    const auto& frames = result->output.frames;
    const std::int64_t sizes[5] = {frames.batch, frames.count, frames.height, frames.width, 3};
    std::copy(sizes, sizes + 5, shape);
    return frames.pixels.data();
}

const float* nova_result_latents(const nova_result* result, int64_t shape[5]) {
    std::copy(result->latents_shape, result->latents_shape + 5, shape);
    return result->latents.data();
}

uint64_t nova_result_seed(const nova_result* result) {
    return result->output.seed;
}

const char* const* nova_result_notices(const nova_result* result) {
    return result->notices.data();
}

const nova_stage_time* nova_result_stage_times(const nova_result* result, size_t* count) {
    *count = result->shown_times.size();
    return result->shown_times.data();
}

double nova_result_seconds(const nova_result* result) {
    return result->seconds;
}

void nova_result_free(nova_result* result) {
    delete result;
}
