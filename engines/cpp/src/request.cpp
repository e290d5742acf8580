#include "request.hpp"

#include <cmath>

#include "errors.hpp"
#include "numbers.hpp"
#include "text.hpp"

namespace nova {
namespace {

[[noreturn]] void unusable(const std::string& text) {
    throw Error(ErrorCode::usage, text);
}

void check_positive(const char* name, std::int64_t value) {
    if (value < 1)
        unusable(std::string(name) + " is " + std::to_string(value) +
                 "; it must be a whole number, at least 1");
}

void check_finite(const char* name, std::optional<double> value) {
    if (value && !(std::isfinite(*value) && *value >= 0))
        unusable(std::string(name) + " is " + show_number(*value) + "; it must be a number, at least 0");
}

std::size_t count_of(const Prompts& prompts) {
    return prompts.texts.size() + prompts.class_ids.size();
}

Prompts checked(const char* name, const Prompts& given, const Config& config, std::int64_t last_class) {
    const bool classes = config.is_class_conditional();
    if (classes ? !given.texts.empty() : !given.class_ids.empty())
        throw Error(
            ErrorCode::input,
            std::string(name) + " must be " + (classes ? "a class id (int)" : "text (str)") +
                " for this checkpoint, not " +
                (classes ? repr(given.texts.front()) : std::to_string(given.class_ids.front())));
    for (const auto& text : given.texts)
        if (!is_utf8(text))
            throw Error(ErrorCode::input, std::string(name) + " is no text: it has bytes that are not UTF-8");
    for (const auto id : given.class_ids)
        if (id < 0 || id > last_class)
            throw Error(ErrorCode::input, std::string(name) + ": class id " + std::to_string(id) +
                                              " is out of range; ids are 0 to " + std::to_string(last_class));
    return given;
}

Guidance guidance_of(const Request& request, const Config& config) {
    Guidance guidance;
    guidance.scale = request.guidance_scale.value_or(config.guidance_scale);
    guidance.min_scale = request.min_guidance_scale;
    guidance.trunc = request.guidance_trunc;
    guidance.renorm = request.guidance_renorm;
    guidance.image_scale = request.image_guidance_scale;
    guidance.spatiotemporal_scale = request.spatiotemporal_guidance_scale;
    guidance.check();
    return guidance;
}

} // namespace

Plan Request::plan(const Config& config) const {
    check_positive("num_images_per_prompt", num_images_per_prompt);
    check_positive("max_latent_length", max_latent_length);
    check_positive("num_inference_steps", num_inference_steps);
    check_positive("num_diffusion_steps", num_diffusion_steps);
    check_finite("motion_flow", motion_flow);
    check_finite("flow_shift", flow_shift);
    const std::string length = "max_latent_length is " + std::to_string(max_latent_length);
    if (max_latent_length > 1 && !config.is_video())
        unusable(length + ", but this is an image checkpoint; use 1");
    if (max_latent_length > max_frames)
        unusable(length + "; the most is " + std::to_string(max_frames));
    if (image && !config.is_video())
        unusable("image to video needs a video checkpoint; this is an image checkpoint");
    const Guidance guidance = guidance_of(*this, config);
    if (count_of(negative_prompt) && guidance.scale <= 1)
        unusable(
            "guidance_scale is " + show_number(guidance.scale) +
            ", at which a negative_prompt has no effect; raise it above 1 or leave the negative_prompt out");
    const auto given = static_cast<std::int64_t>(count_of(prompts(config)));
    if (given > max_batch || num_images_per_prompt > max_batch || given * num_images_per_prompt > max_batch)
        unusable(std::to_string(given) + " prompts of " + std::to_string(num_images_per_prompt) +
                 " samples in one call; the most is " + std::to_string(max_batch));
    return {config,
            given * num_images_per_prompt,
            max_latent_length,
            num_inference_steps,
            make_schedule(config.scheduler, num_diffusion_steps, flow_shift),
            guidance};
}

Prompts Request::prompts(const Config& config) const {
    if (!count_of(prompt))
        throw Error(ErrorCode::input, "prompt is an empty list; give at least one");
    return checked("prompt", prompt, config, num_classes - 1);
}

Prompts Request::negative_prompts(const Config& config) const {
    const auto count = count_of(prompts(config));
    Prompts given = checked("negative_prompt", negative_prompt, config, num_classes);
    if (!count_of(given) && config.is_class_conditional())
        given.class_ids = {num_classes};
    else if (!count_of(given))
        given.texts = {""};
    if (count_of(given) != 1 && count_of(given) != count)
        unusable(std::to_string(count_of(given)) + " negative prompts for " + std::to_string(count) +
                 " prompts; give one, or one for each");
    if (given.texts.size() == 1)
        given.texts.resize(count, std::string(given.texts.front()));
    if (given.class_ids.size() == 1)
        given.class_ids.resize(count, std::int64_t{given.class_ids.front()});
    return given;
}

} // namespace nova
