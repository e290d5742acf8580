#include "tensorrt_runner.hpp"

#include "errors.hpp"

namespace nova {

bool has_tensorrt() {
    return false;
}

std::shared_ptr<TensorRt> open_tensorrt() {
    throw Error(ErrorCode::dependency, "this library was compiled without TensorRT's headers, so it runs no engines; "
                                       "compile it where NvInfer.h is found, or use device cpu or cuda");
}

std::unique_ptr<Runner> make_tensorrt_runner(std::shared_ptr<TensorRt>, const StageSpec&,
                                             const std::filesystem::path&) {
    open_tensorrt();
    return nullptr;
}

} // namespace nova
