/// A stage's engine on TensorRT. Where its headers were missing when this library was compiled, all of it
/// refuses.
#pragma once

#include <filesystem>
#include <memory>

#include "runner.hpp"

namespace nova {

/// TensorRT's runtime, a stream, and scratch memory that all stages share.
class TensorRt;

/// Error(dependency): compiled without TensorRT, or there is no GPU.
std::shared_ptr<TensorRt> open_tensorrt();
bool has_tensorrt(); ///< whether this library was compiled with it

/// spec: the stage within the engine's limits. Error(bundle): TensorRT cannot load the engine.
std::unique_ptr<Runner> make_tensorrt_runner(std::shared_ptr<TensorRt> tensorrt, const StageSpec& spec,
                                             const std::filesystem::path& engine);

} // namespace nova
