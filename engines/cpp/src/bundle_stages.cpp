#include "bundle_stages.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "errors.hpp"
#include "ort_runner.hpp"
#include "tensorrt_runner.hpp"
#include "text.hpp"

namespace nova {
namespace {

class Stopwatch {
  public:
    explicit Stopwatch(double& seconds) : seconds_(seconds), start_(Clock::now()) {}
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;
    ~Stopwatch() { seconds_ += std::chrono::duration<double>(Clock::now() - start_).count(); }

  private:
    using Clock = std::chrono::steady_clock;
    double& seconds_;
    Clock::time_point start_;
};

/// Where a bundle runs if nobody says: where it was built for, if this library can; else on the CPU.
std::string choose_device(const Bundle& bundle) {
    if (bundle.engines.size() == 1 && has_tensorrt())
        return bundle.engines.begin()->first;
    return bundle.target == "cuda" && ort_has_cuda() ? "cuda" : "cpu";
}

std::string devices_of(const Bundle& bundle) {
    std::string names = "cpu, cuda, rtx-ep";
    for (const auto& [target, engines] : bundle.engines)
        names += ", " + target;
    return names;
}

std::string gigabytes(std::int64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f GB", static_cast<double>(bytes) / 1e9);
    return text;
}

} // namespace

void check_memory(const Manifest& manifest, const std::string& name, bool low_memory,
                  std::optional<std::int64_t> there) {
    std::map<std::string, std::int64_t> phases;
    for (const auto& stage : manifest.stages)
        for (const auto& path : stage.second.files)
            phases[stage.second.spec.phase] += static_cast<std::int64_t>(manifest.files.at(path).size);
    std::int64_t all = 0, least = 0;
    for (const auto& [phase, bytes] : phases) {
        all += bytes;
        least = std::max(least, bytes);
    }
    const auto needed = low_memory ? least : all;
    if (!there || needed <= *there)
        return;
    const std::string way = least <= *there && !low_memory
                                ? "--low-memory needs " + gigabytes(least)
                                : "build it in fp16 or int8, or with --lean-decode";
    throw Error(ErrorCode::memory, name + ": its weights take " + gigabytes(needed) + ", and " + gigabytes(*there) +
                                       " of memory are free; " + way);
}

std::optional<std::int64_t> available_memory(const std::string& meminfo) {
    std::ifstream file(meminfo);
    std::optional<std::int64_t> available;
    std::int64_t swap = 0;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string name;
        std::int64_t kilobytes = 0;
        if (!(words >> name >> kilobytes))
            continue;
        if (name == "MemAvailable:")
            available = kilobytes * 1024;
        if (name == "SwapFree:")
            swap = kilobytes * 1024;
    }
    return available ? std::optional(*available + swap) : std::nullopt;
}

BundleStages::BundleStages(const Bundle& bundle, const DeviceOptions& options)
    : bundle_(bundle), options_(options),
      device_(options.device.empty() ? choose_device(bundle) : options.device) {
    if (on_graphs()) {
        check_memory(bundle, bundle.folder.string(), options.low_memory, available_memory());
        ort_ = open_ort();
    } else if (device_ == "rtx-ep")
        throw Error(ErrorCode::dependency, "device 'rtx-ep': only the Python runtime has it; name cuda, or a "
                                           "target that the bundle has engines for");
    else if (!bundle.engines.count(device_))
        throw Error(ErrorCode::usage, "device " + repr(device_) + ": this bundle runs on " +
                                          devices_of(bundle) + "; `nova-export engines " +
                                          bundle.folder.string() + " --target TARGET` adds others");
    else
        tensorrt_ = open_tensorrt();
}

BundleStages::~BundleStages() = default;

const StageSpec& BundleStages::spec(const std::string& stage) const {
    if (on_graphs())
        return bundle_.stage(stage).spec;
    const auto& engines = bundle_.engines.at(device_);
    const auto found = engines.find(stage);
    if (found == engines.end())
        throw Error(ErrorCode::bundle, bundle_.folder.string() + ": has no engine of " + repr(stage) +
                                           " for " + device_ + "; `nova-export engines` compiles it");
    return found->second.spec;
}

Arrays BundleStages::run(const std::string& stage, const Arrays& inputs, Place outputs) {
    auto& time = times_[stage];
    Runner& runner = open(stage);
    const Stopwatch watch(time.run_seconds);
    ++time.calls;
    return runner.run(inputs, outputs);
}

std::optional<std::int64_t> BundleStages::vae_tile() const {
    const auto names = stage_names(bundle_.config, !bundle_.lean_decode.empty());
    const auto first = std::find_if(names.begin(), names.end(), [](const std::string& name) {
        return name.rfind("vae_decoder", 0) == 0;
    });
    const StageSpec& decoder = spec(*first);
    const auto side = std::max(decoder.axis("latent_height").max, decoder.axis("latent_width").max);
    const auto& size = bundle_.config.latent_size;
    return side < std::max(size[0], size[1]) ? std::optional(side) : std::nullopt;
}

void BundleStages::close(const std::string& keep_phase) {
    for (auto it = open_.begin(); it != open_.end();)
        it = it->second->spec().phase != keep_phase ? open_.erase(it) : std::next(it);
}

Runner& BundleStages::open(const std::string& stage) {
    if (const auto found = open_.find(stage); found != open_.end())
        return *found->second;
    const Stopwatch watch(times_[stage].load_seconds);
    if (options_.low_memory)
        close(spec(stage).phase);
    return *(open_[stage] = make(stage));
}

std::unique_ptr<Runner> BundleStages::make(const std::string& stage) {
    const auto& entry = bundle_.stage(stage);
    const bool checked = checked_.count(stage);
    if (on_graphs()) {
        if (!checked)
            bundle_.check_stage(stage);
        checked_.insert(stage);
        return make_ort_runner(ort_, entry.spec, bundle_.path(entry.graph), options_.threads,
                               device_ == "cuda");
    }
    const StageSpec& limited = spec(stage);
    const auto& engine = bundle_.engines.at(device_).at(stage);
    if (!checked)
        bundle_.check(engine.file);
    checked_.insert(stage);
    return make_tensorrt_runner(tensorrt_, limited, bundle_.path(engine.file));
}

} // namespace nova
