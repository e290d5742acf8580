/// The stages of a bundle on a device: their runners, opened when first asked for, their files checked then.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "bundle.hpp"
#include "runner.hpp"

namespace nova {

class OrtRuntime;
class TensorRt;

/// What a stage took of a run: loading (checks of files among it), and its calls.
struct StageTime {
    std::int64_t calls = 0;
    double load_seconds = 0, run_seconds = 0;
};

struct DeviceOptions {
    std::string device;      ///< "cpu", "cuda", or a target that the bundle has engines for; "" chooses
    int threads = 0;         ///< of ONNX Runtime; 0 leaves their number to it
    bool low_memory = false; ///< only the stages of one phase are open at a time
};

/// Error(memory), before any weights are read, where graphs do not fit into so many bytes; nullopt: nobody knows.
/// name: what the message calls the bundle.
void check_memory(const Manifest& manifest, const std::string& name, bool low_memory,
                  std::optional<std::int64_t> there);

/// Bytes that programs can still have, swap too, by Linux's own account.
std::optional<std::int64_t> available_memory(const std::string& meminfo = "/proc/meminfo");

class BundleStages : public Stages {
  public:
    /// Error(usage): a device that the bundle does not run on. Error(dependency): one that this library does
    /// not. Error(memory): less than the graphs take.
    BundleStages(const Bundle& bundle, const DeviceOptions& options);
    ~BundleStages() override;

    const StageSpec& spec(const std::string& stage) const override;
    Arrays run(const std::string& stage, const Arrays& inputs, Place outputs) override;

    /// The largest side of what the decoder takes, in latents, where whole frames are larger.
    std::optional<std::int64_t> vae_tile() const;
    const std::string& device() const { return device_; }

    /// Of every stage used since the last call of `restart_clock`.
    const std::map<std::string, StageTime>& times() const { return times_; }
    void restart_clock() { times_.clear(); }

    /// Free every open stage, but those of one phase if it is named.
    void close(const std::string& keep_phase = "");

  private:
    bool on_graphs() const { return device_ == "cpu" || device_ == "cuda"; }
    Runner& open(const std::string& stage);
    std::unique_ptr<Runner> make(const std::string& stage);

    const Bundle& bundle_;
    DeviceOptions options_;
    std::string device_;
    std::shared_ptr<OrtRuntime> ort_;
    std::shared_ptr<TensorRt> tensorrt_;
    std::map<std::string, std::unique_ptr<Runner>> open_;
    std::set<std::string> checked_;
    std::map<std::string, StageTime> times_;
};

} // namespace nova
