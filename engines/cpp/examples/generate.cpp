// generate BUNDLE --prompt TEXT -o OUT: what `nova-export run` does, in C++. `generate --help` lists all
// options.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <nova_export.hpp>

#include "media.hpp"

namespace {

constexpr int usage_error = NOVA_USAGE_ERROR, output_error = 6;

class UsageError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct Arguments {
    std::string bundle, output, image, device, ffmpeg = "ffmpeg";
    nova_load_options load = NOVA_LOAD_OPTIONS_INIT;
    nova_export::Options options;
    bool quiet = false, times = false;
};

std::int64_t whole(const std::string& name, const std::string& text) {
    std::size_t used = 0;
    try {
        const auto value = std::stoll(text, &used);
        if (used == text.size())
            return value;
    } catch (const std::exception&) {
    }
    throw UsageError(name + " is '" + text + "'; it must be a whole number");
}

std::uint64_t seed(const std::string& name, const std::string& text) {
    if (text.rfind("-", 0) == 0) // as torch takes it: two's complement
        return static_cast<std::uint64_t>(whole(name, text));
    std::size_t used = 0;
    try {
        const auto value = std::stoull(text, &used);
        if (used == text.size())
            return value;
    } catch (const std::exception&) {
    }
    throw UsageError(name + " is '" + text + "'; it must be a whole number of at most 64 bits");
}

double number(const std::string& name, const std::string& text) {
    std::size_t used = 0;
    try {
        const auto value = std::stod(text, &used);
        if (used == text.size())
            return value;
    } catch (const std::exception&) {
    }
    throw UsageError(name + " is '" + text + "'; it must be a number");
}

/// An option: whether a value follows it, what it does with it, and what it is for.
struct Option {
    const char* value;
    std::function<void(const std::string& name, const std::string& text)> set;
    const char* help;
};

std::map<std::string, Option> options_of(Arguments& a) {
    auto& o = a.options;
    auto text = [](std::string& to) { return [&to](auto&, auto& given) { to = given; }; };
    auto texts = [](auto& to) { return [&to](auto&, auto& given) { to.push_back(given); }; };
    auto ids = [](auto& to) { return [&to](auto& name, auto& given) { to.push_back(whole(name, given)); }; };
    auto count = [](auto& to) { return [&to](auto& name, auto& given) { to = whole(name, given); }; };
    auto small = [](auto& to) {
        return [&to](auto& name, auto& given) { to = static_cast<std::int32_t>(whole(name, given)); };
    };
    auto scale = [](auto& to) { return [&to](auto& name, auto& given) { to = number(name, given); }; };
    auto flag = [](auto& to) { return [&to](auto&, auto&) { to = true; }; };
    return {
        {"--prompt", {"TEXT", texts(o.prompts), "what to make; may be given again"}},
        {"--class-id", {"N", ids(o.class_ids), "instead of a prompt, where the bundle is class-conditional"}},
        {"--negative-prompt", {"TEXT", texts(o.negative_prompts), "what to guide away from"}},
        {"--negative-class-id", {"N", ids(o.negative_class_ids), "likewise, as a class"}},
        {"--image", {"FILE", text(a.image), "a .png or .ppm that becomes the first frame"}},
        {"--output",
         {"FILE", text(a.output), "-o: .mp4, .y4m, .png or .ppm (first frame); - is Y4M on stdout"}},
        {"--ffmpeg", {"PATH", text(a.ffmpeg), "the program that writes .mp4"}},
        {"--num-images-per-prompt", {"N", count(o.num_images_per_prompt), "samples of each prompt"}},
        {"--max-latent-length",
         {"N", count(o.max_latent_length), "latent frames; the bundle's usual if not given"}},
        {"--num-inference-steps", {"N", count(o.num_inference_steps), "autoregressive steps of a frame"}},
        {"--num-diffusion-steps", {"N", count(o.num_diffusion_steps), "denoising steps of each"}},
        {"--guidance-scale",
         {"X", scale(o.guidance_scale), "1 or less is off; the checkpoint's own if not given"}},
        {"--min-guidance-scale",
         {"X", scale(o.min_guidance_scale), "at the first step, growing to the scale"}},
        {"--guidance-trunc",
         {"X", scale(o.guidance_trunc), "below this timestep only the conditional pass counts"}},
        {"--guidance-renorm",
         {"X", scale(o.guidance_renorm), "least factor to the conditional's norm; 1 is off"}},
        {"--image-guidance-scale", {"X", scale(o.image_guidance_scale), "guidance by the previous frames"}},
        {"--spatiotemporal-guidance-scale",
         {"X", scale(o.spatiotemporal_guidance_scale), "guidance against a perturbed third pass"}},
        {"--flow-shift", {"X", scale(o.flow_shift), "of flow-matching checkpoints"}},
        {"--motion-flow", {"X", scale(o.motion_flow), "mean optical-flow magnitude to ask for"}},
        {"--seed",
         {"N", [&o](auto& name, auto& given) { o.seed = seed(name, given); },
          "draws as torch's CPU generator; a random one if not given"}},
        {"--device", {"NAME", text(a.device), "cpu, cuda, or a target that the bundle has engines for"}},
        {"--threads", {"N", small(a.load.threads), "of ONNX Runtime; 0 leaves their number to it"}},
        {"--low-memory", {nullptr, flag(a.load.low_memory), "keep only one phase's stages loaded"}},
        {"--vae-tile", {"N", small(a.load.vae_tile), "decode squares of N latents a side and blend them"}},
        {"--quiet", {nullptr, flag(a.quiet), "no progress"}},
        {"--times", {nullptr, flag(a.times), "show what each stage took"}},
    };
}

void show_help(const std::map<std::string, Option>& options) {
    std::cout << "usage: generate BUNDLE --prompt TEXT -o OUT [options]\n\n";
    for (const auto& [name, option] : options)
        std::cout << "  " << name << (option.value ? std::string(" ") + option.value : "") << "\n      "
                  << option.help << "\n";
}

/// False where only help was wanted.
bool parse(int argc, char** argv, Arguments& arguments) {
    arguments.options.max_latent_length = 0; // not given
    const auto options = options_of(arguments);
    for (int i = 1; i < argc; ++i) {
        std::string name = argv[i];
        if (name == "-h" || name == "--help") {
            show_help(options);
            return false;
        }
        if (name == "-o")
            name = "--output";
        const auto found = options.find(name);
        if (found == options.end()) {
            if (name.rfind("-", 0) == 0 || !arguments.bundle.empty())
                throw UsageError("unknown argument " + name + "; generate --help lists all");
            arguments.bundle = name;
        } else if (!found->second.value) {
            found->second.set(name, "");
        } else if (++i == argc) {
            throw UsageError(name + " needs a value");
        } else {
            found->second.set(name, argv[i]);
        }
    }
    if (arguments.bundle.empty() || arguments.output.empty())
        throw UsageError("a BUNDLE and -o OUT are needed; generate --help lists all options");
    return true;
}

/// name.mp4, or name-0.mp4, name-1.mp4, … for several samples.
std::string path_of(const std::string& output, std::int64_t sample, std::int64_t samples) {
    const auto dot = output.rfind('.');
    if (samples == 1 || dot == std::string::npos)
        return output;
    return output.substr(0, dot) + "-" + std::to_string(sample) + output.substr(dot);
}

void run(Arguments& arguments) {
    if (!arguments.device.empty())
        arguments.load.device = arguments.device.c_str();
    auto& options = arguments.options;
    nova_export::Pipeline pipeline(arguments.bundle, arguments.load);
    const nova_info info = pipeline.describe();
    if (!options.max_latent_length)
        options.max_latent_length = info.is_video ? info.latent_frames : 1;
    if (!arguments.image.empty())
        options.image = media::read_image(arguments.image);
    if (!arguments.quiet)
        options.on_step = [](const nova_step& step) {
            std::cerr << "\rframe " << step.frame + 1 << "/" << step.num_frames << ", step " << step.step + 1
                      << "/" << step.num_steps << "   " << std::flush;
            return true;
        };
    const auto prompts = static_cast<std::int64_t>(options.prompts.size() + options.class_ids.size());
    const auto samples = prompts * std::max<std::int64_t>(options.num_images_per_prompt, 0);
    std::vector<std::unique_ptr<media::Writer>> writers; // opened before the work: what cannot be written shows now
    for (std::int64_t sample = 0; sample < samples; ++sample)
        writers.push_back(media::open_writer(path_of(arguments.output, sample, samples), info.height, info.width,
                                             info.fps, arguments.ffmpeg));
    options.on_frame = [&](const nova_frame& frame) {
        for (std::int64_t sample = 0; sample < frame.samples; ++sample)
            writers[static_cast<std::size_t>(sample)]->write(frame.pixels +
                                                             sample * frame.height * frame.width * 3);
        return true;
    };
    const auto result = pipeline.generate(options);
    for (auto& writer : writers)
        writer->finish();
    if (!arguments.quiet)
        std::cerr << "\n";
    for (const auto& notice : result.notices())
        std::cerr << "note: " << notice << "\n";
    std::cerr << "seed " << result.seed() << ", " << result.seconds() << " s on " << info.device << "\n";
    if (arguments.times)
        for (const auto& time : result.stage_times())
            std::cerr << "  " << time.stage << ": " << time.calls << " calls, " << time.run_seconds
                      << " s, loading " << time.load_seconds << " s\n";
}

} // namespace

int main(int argc, char** argv) {
    try {
        Arguments arguments;
        if (parse(argc, argv, arguments))
            run(arguments);
        return 0;
    } catch (const UsageError& error) {
        std::cerr << error.what() << "\n";
        return usage_error;
    } catch (const media::Error& error) {
        std::cerr << "\n" << error.what() << "\n";
        return output_error;
    } catch (const nova_export::Error& error) {
        std::cerr << "\n" << error.what() << "\n";
        return static_cast<int>(error.status());
    } catch (const std::exception& error) {
        std::cerr << "\n" << error.what() << "\n";
        return NOVA_ERROR;
    }
}
