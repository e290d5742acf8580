/// A stage's graph in ONNX Runtime, on its CPU or its CUDA provider.
#pragma once

#include <filesystem>
#include <memory>

#include "runner.hpp"

namespace nova {

class OrtRuntime;

/// ONNX Runtime itself, loaded once and shared by runners. Error(dependency): the library is older than its
/// headers.
std::shared_ptr<OrtRuntime> open_ort();
bool ort_has_cuda();

/// cuda: on the first GPU, where outputs stay if asked for. threads: of one stage; 0 leaves their number to
/// ONNX Runtime. Error(bundle): it cannot load the graph. Error(dependency): it has no CUDA provider.
std::unique_ptr<Runner> make_ort_runner(std::shared_ptr<OrtRuntime> runtime, const StageSpec& spec,
                                        const std::filesystem::path& graph, int threads, bool cuda);

} // namespace nova
