// nova_call CALLS.json OUT: loads bundles and generates as the calls say, through nova_export.hpp; writes
// what came of each to OUT/N.json, OUT/N.latents (float32) and OUT/N.frames (uint8).
//
// A call: {"bundle": …, "load": {…}, "options": {…}, "cancel_at": [frame, step], "stream": true}. Calls in a
// row with the same bundle and load share a pipeline.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>

#include <nlohmann/json.hpp>
#include <nova_export.hpp>

namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

template <typename T>
void set(T& to, const Json& options, const char* key) {
    if (options.contains(key))
        to = options.at(key).get<T>();
}
template <typename T>
void set(std::optional<T>& to, const Json& options, const char* key) {
    if (options.contains(key))
        to = options.at(key).get<T>();
}

nova_export::Options options_of(const Json& given) {
    nova_export::Options made;
    set(made.prompts, given, "prompts");
    set(made.class_ids, given, "class_ids");
    set(made.negative_prompts, given, "negative_prompts");
    set(made.negative_class_ids, given, "negative_class_ids");
    set(made.num_images_per_prompt, given, "num_images_per_prompt");
    set(made.max_latent_length, given, "max_latent_length");
    set(made.num_inference_steps, given, "num_inference_steps");
    set(made.num_diffusion_steps, given, "num_diffusion_steps");
    set(made.guidance_scale, given, "guidance_scale");
    set(made.min_guidance_scale, given, "min_guidance_scale");
    set(made.guidance_trunc, given, "guidance_trunc");
    set(made.guidance_renorm, given, "guidance_renorm");
    set(made.image_guidance_scale, given, "image_guidance_scale");
    set(made.spatiotemporal_guidance_scale, given, "spatiotemporal_guidance_scale");
    set(made.flow_shift, given, "flow_shift");
    set(made.motion_flow, given, "motion_flow");
    set(made.seed, given, "seed");
    if (given.contains("image")) {
        const auto& image = given.at("image");
        std::ifstream file(image.at("file").get<std::string>(), std::ios::binary);
        made.image = nova_export::Image{image.at("height"), image.at("width"), {}};
        made.image->pixels.assign(std::istreambuf_iterator<char>(file), {});
    }
    return made;
}

template <typename T>
void write(const fs::path& path, const T* data, std::int64_t count) {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(data), count * static_cast<std::int64_t>(sizeof(T)));
}

Json call(nova_export::Pipeline& pipeline, const Json& given, const fs::path& out) {
    Json told = {{"steps", Json::array()}, {"frames", Json::array()}};
    auto options = options_of(given.at("options"));
    const auto cancel_at = given.value("cancel_at", std::vector<std::int64_t>{});
    options.on_step = [&](const nova_step& step) {
        told["steps"].push_back({step.frame, step.num_frames, step.step, step.num_steps});
        return cancel_at != std::vector{step.frame, step.step};
    };
    std::ofstream streamed;
    if (given.value("stream", false)) {
        streamed.open(out.string() + ".streamed", std::ios::binary);
        options.on_frame = [&](const nova_frame& frame) {
            told["frames"].push_back({{"index", frame.index}, {"after_steps", told["steps"].size()}});
            streamed.write(reinterpret_cast<const char*>(frame.pixels),
                           frame.samples * frame.height * frame.width * 3);
            return true;
        };
    }
    try {
        const auto result = pipeline.generate(options);
        const auto latents = result.latents();
        const auto frames = result.frames();
        write(out.string() + ".latents", latents.data, latents.size());
        write(out.string() + ".frames", frames.data, frames.size());
        told["latents_shape"] = latents.shape;
        told["frames_shape"] = frames.shape;
        told["seed"] = result.seed();
        told["notices"] = result.notices();
        told["seconds"] = result.seconds();
        for (const auto& time : result.stage_times())
            told["stages"][time.stage] = {
                {"calls", time.calls}, {"load", time.load_seconds}, {"run", time.run_seconds}};
    } catch (const nova_export::Error& error) {
        told["status"] = error.status();
        told["error"] = error.what();
    }
    return told;
}

Json describe(const nova_export::Pipeline& pipeline) {
    const nova_info info = pipeline.describe();
    return {{"height", info.height},
            {"width", info.width},
            {"is_video", info.is_video},
            {"is_class_conditional", info.is_class_conditional},
            {"latent_frames", info.latent_frames},
            {"latent_shape", {info.latent_channels, info.latent_height, info.latent_width}},
            {"text_tokens", info.text_tokens},
            {"guidance_scale", info.guidance_scale},
            {"fps", info.fps},
            {"device", info.device}};
}

} // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: nova_call CALLS.json OUT\n";
        return 2;
    }
    const Json calls = Json::parse(std::ifstream(argv[1]));
    std::unique_ptr<nova_export::Pipeline> pipeline;
    Json loaded;
    for (std::size_t number = 0; number < calls.size(); ++number) {
        const Json& given = calls[number];
        const fs::path out = fs::path(argv[2]) / std::to_string(number);
        const Json wanted = {given.at("bundle"), given.value("load", Json::object())};
        Json told;
        try {
            if (!pipeline || wanted != loaded) {
                pipeline.reset();
                const std::string device = wanted[1].value("device", "");
                nova_load_options options = NOVA_LOAD_OPTIONS_INIT;
                options.device = device.empty() ? nullptr : device.c_str();
                options.threads = wanted[1].value("threads", 0);
                options.low_memory = wanted[1].value("low_memory", false);
                options.vae_tile = wanted[1].value("vae_tile", 0);
                pipeline = std::make_unique<nova_export::Pipeline>(wanted[0].get<std::string>(), options);
                loaded = wanted;
            }
            told = call(*pipeline, given, out);
            told["info"] = describe(*pipeline);
        } catch (const nova_export::Error& error) {
            told = {{"status", error.status()}, {"error", error.what()}};
        }
        std::ofstream(out.string() + ".json") << told.dump();
    }
    return 0;
}
