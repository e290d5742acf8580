#include "tensorrt_runner.hpp"

#include "errors.hpp"

#if __has_include(<NvInfer.h>) && __has_include(<cuda_runtime_api.h>)

#include <algorithm>
#include <fstream>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "text.hpp"

namespace nova {
namespace {

namespace trt = nvinfer1;

void check(cudaError_t status, const char* what) {
    if (status == cudaErrorMemoryAllocation)
        throw Error(ErrorCode::memory, std::string("the GPU has too little free memory to ") + what +
                                           "; load with low_memory, or a vae_tile");
    if (status != cudaSuccess)
        throw Error(ErrorCode::stage, std::string("CUDA cannot ") + what + ": " + cudaGetErrorString(status));
}

/// Keeps the last error: TensorRT's calls only say that they failed.
class Logger : public trt::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        try {
            if (severity <= Severity::kERROR)
                last_ = message;
        } catch (...) { // no memory for it
        }
    }
    std::string last() const { return last_.empty() ? "it does not say why" : last_; }

  private:
    std::string last_;
};

} // namespace

class TensorRt : public std::enable_shared_from_this<TensorRt> {
  public:
    TensorRt() : runtime(trt::createInferRuntime(logger)) {
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices || !runtime)
            throw Error(ErrorCode::dependency, "there is no GPU that TensorRT can use: " + logger.last() +
                                                   "; device cpu does without");
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
    }
    TensorRt(const TensorRt&) = delete;
    TensorRt& operator=(const TensorRt&) = delete;
    ~TensorRt() {
        cudaStreamSynchronize(stream);
        cudaFree(scratch_);
        cudaStreamDestroy(stream);
    }

    /// New memory on the GPU; freed behind what was put on the stream by then. Never null, also for no bytes.
    Array empty(DType dtype, Shape shape) {
        const auto bytes =
            std::max<std::size_t>(static_cast<std::size_t>(nova::size_of(shape)) * size_of(dtype), 1);
        void* data = nullptr;
        check(cudaMallocAsync(&data, bytes, stream), "hold a stage's tensors");
        auto free = [self = shared_from_this()](void* memory) { cudaFreeAsync(memory, self->stream); };
        return {dtype, std::move(shape), data, std::shared_ptr<void>(data, std::move(free)), Place::device};
    }

    Array upload(const Array& host) {
        Array made = empty(host.dtype(), host.shape());
        // Memory that is not pinned is read before the call returns.
        check(cudaMemcpyAsync(made.raw(), host.raw(), host.bytes(), cudaMemcpyHostToDevice, stream),
              "copy an input");
        return made;
    }

    /// Waits for what was put on the stream.
    Array download(const Array& device) {
        Array made = Array::empty(device.dtype(), device.shape());
        check(cudaMemcpyAsync(made.raw(), device.raw(), device.bytes(), cudaMemcpyDeviceToHost, stream),
              "copy an output");
        check(cudaStreamSynchronize(stream), "run a stage");
        return made;
    }

    /// Memory that all engines compute in, one after another.
    void* scratch(std::int64_t bytes) {
        if (bytes > scratch_bytes_) {
            check(cudaStreamSynchronize(stream), "run a stage");
            cudaFree(scratch_);
            scratch_ = nullptr, scratch_bytes_ = 0;
            check(cudaMalloc(&scratch_, static_cast<std::size_t>(bytes)), "hold a stage's scratch memory");
            scratch_bytes_ = bytes;
        }
        return scratch_;
    }

    Logger logger;
    std::unique_ptr<trt::IRuntime> runtime;
    cudaStream_t stream = nullptr;

  private:
    void* scratch_ = nullptr;
    std::int64_t scratch_bytes_ = 0;
};

namespace {

std::vector<char> bytes_of(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    if (!file || bytes.empty())
        throw Error(ErrorCode::bundle, path.string() + ": cannot be read");
    return bytes;
}

class TensorRtRunner : public Runner {
  public:
    TensorRtRunner(std::shared_ptr<TensorRt> tensorrt, const StageSpec& spec,
                   const std::filesystem::path& path)
        : tensorrt_(std::move(tensorrt)), spec_(spec) {
        const auto bytes = bytes_of(path);
        engine_.reset(tensorrt_->runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
        if (engine_)
            context_.reset(
                engine_->createExecutionContext(trt::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!context_)
            throw Error(ErrorCode::bundle,
                        path.string() + ": TensorRT cannot load it: " + tensorrt_->logger.last() +
                            "; `nova-export engines BUNDLE` compiles it again, device cpu does "
                            "without");
    }
    ~TensorRtRunner() override { cudaStreamSynchronize(tensorrt_->stream); }

    const StageSpec& spec() const override { return spec_; }

    Arrays run(const Arrays& inputs, Place outputs) override {
        check_inputs(spec_, inputs);
        Arrays placed;
        for (const auto& [name, array] : inputs)
            placed[name] = bind_input(name, array);
        Arrays made;
        for (const auto& tensor : spec_.outputs)
            made[tensor.name] = bind_output(tensor, placed);
        const auto scratch = engine_->getDeviceMemorySizeV2();
        context_->setDeviceMemoryV2(tensorrt_->scratch(scratch), scratch);
        if (!context_->enqueueV3(tensorrt_->stream))
            fail("failed");
        if (outputs == Place::host)
            for (auto& [name, array] : made)
                array = tensorrt_->download(array);
        return made;
    }

  private:
    /// The input where the engine reads it. Few are read on the host: sizes of others.
    Array bind_input(const std::string& name, const Array& array) {
        const bool on_host = engine_->getTensorLocation(name.c_str()) == trt::TensorLocation::kHOST;
        const Array place = on_host || array.place() == Place::device ? array : tensorrt_->upload(array);
        trt::Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(array.shape().size());
        std::copy(array.shape().begin(), array.shape().end(), dims.d);
        if (!context_->setInputShape(name.c_str(), dims) ||
            !context_->setTensorAddress(name.c_str(), place.raw()))
            fail("does not take input " + repr(name) + " of shape " + show(array.shape()));
        return place;
    }

    /// Graphs write aliased outputs in place; engines only where they say so themselves.
    Array bind_output(const Tensor& tensor, const Arrays& placed) {
        const char* alias = nullptr;
#if NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 15)
        alias = engine_->getAliasedInputTensor(tensor.name.c_str());
#endif
        const auto dims = context_->getTensorShape(tensor.name.c_str());
        const Array made =
            alias ? placed.at(alias)
                  : tensorrt_->empty(tensor.dtype, Shape(dims.d, dims.d + std::max(dims.nbDims, 0)));
        if (dims.nbDims < 0 || !context_->setTensorAddress(tensor.name.c_str(), made.raw()))
            fail("gives no output " + repr(tensor.name));
        return made;
    }

    [[noreturn]] void fail(const std::string& how) const {
        throw Error(ErrorCode::stage,
                    "stage " + spec_.name + ": TensorRT " + how + ": " + tensorrt_->logger.last());
    }

    std::shared_ptr<TensorRt> tensorrt_;
    StageSpec spec_;
    std::unique_ptr<trt::ICudaEngine> engine_;
    std::unique_ptr<trt::IExecutionContext> context_;
};

} // namespace

bool has_tensorrt() {
    return true;
}

std::shared_ptr<TensorRt> open_tensorrt() {
    return std::make_shared<TensorRt>();
}

std::unique_ptr<Runner> make_tensorrt_runner(std::shared_ptr<TensorRt> tensorrt, const StageSpec& spec,
                                             const std::filesystem::path& engine) {
    return std::make_unique<TensorRtRunner>(std::move(tensorrt), spec, engine);
}

} // namespace nova

#else

namespace nova {

bool has_tensorrt() {
    return false;
}

std::shared_ptr<TensorRt> open_tensorrt() {
    throw Error(ErrorCode::dependency,
                "this library was compiled without TensorRT's headers, so it runs no engines; "
                "compile it where NvInfer.h is found, or use device cpu or cuda");
}

std::unique_ptr<Runner> make_tensorrt_runner(std::shared_ptr<TensorRt>, const StageSpec&,
                                             const std::filesystem::path&) {
    open_tensorrt();
    return nullptr;
}

} // namespace nova

#endif
