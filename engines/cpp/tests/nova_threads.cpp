// nova_threads BUNDLE: two pipelines in two threads; 0 if each gives what it gives alone, and one of them can
// be cancelled without harm to the other.
#include <algorithm>
#include <iostream>
#include <thread>
#include <vector>

#include <nova_export.hpp>

namespace {

nova_export::Options options_of(std::uint64_t seed) {
    nova_export::Options options;
    options.prompts = {"a red circle moving right"};
    options.max_latent_length = 2;
    options.num_inference_steps = 3;
    options.num_diffusion_steps = 3;
    options.seed = seed;
    return options;
}

std::vector<std::uint8_t> frames_of(const std::string& bundle, std::uint64_t seed) {
    nova_load_options load = NOVA_LOAD_OPTIONS_INIT;
    load.threads = 1;
    nova_export::Pipeline pipeline(bundle, load);
    const auto result = pipeline.generate(options_of(seed));
    return {result.frames().begin(), result.frames().end()};
}

/// Cancelled from another thread, in its first step.
nova_status cancelled(const std::string& bundle) {
    nova_export::Pipeline pipeline(bundle);
    auto options = options_of(3);
    options.on_step = [&](const nova_step&) {
        std::thread([&] { pipeline.cancel(); }).join();
        return true;
    };
    try {
        pipeline.generate(options);
    } catch (const nova_export::Error& error) {
        return error.status();
    }
    return NOVA_OK;
}

} // namespace

int main(int argc, char** argv) {
    if (argc != 2)
        return 2;
    const std::string bundle = argv[1];
    const auto first = frames_of(bundle, 1), second = frames_of(bundle, 2);
    std::vector<std::uint8_t> together[2];
    nova_status status = NOVA_OK;
    std::thread threads[] = {
        std::thread([&] { together[0] = frames_of(bundle, 1); }),
        std::thread([&] { together[1] = frames_of(bundle, 2); }),
        std::thread([&] { status = cancelled(bundle); }),
    };
    for (auto& thread : threads)
        thread.join();
    if (first == second || together[0] != first || together[1] != second || status != NOVA_CANCELLED) {
        std::cerr << "frames differ, or status " << status << " is not that of a cancelled call\n";
        return 1;
    }
    return 0;
}
