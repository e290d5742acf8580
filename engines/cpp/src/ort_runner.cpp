#include "ort_runner.hpp"

#include <algorithm>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include "errors.hpp"

namespace nova {

class OrtRuntime {
  public:
    OrtRuntime() : env(ORT_LOGGING_LEVEL_ERROR, "nova") {}
    Ort::Env env;
};

namespace {

ONNXTensorElementDataType ort_type(DType dtype) {
    switch (dtype) {
    case DType::float32:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::int64:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case DType::boolean:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case DType::float16:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

const OrtApi* api_of_headers() {
    const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (!api)
        throw Error(ErrorCode::dependency,
                    std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                        " is older than the headers that this program was compiled with, of 1." +
                        std::to_string(ORT_API_VERSION) + "; install a newer libonnxruntime");
    return api;
}

void load_api() {
    static const bool loaded = (Ort::InitApi(api_of_headers()), true);
    static_cast<void>(loaded);
}

class OrtRunner : public Runner {
  public:
    OrtRunner(std::shared_ptr<OrtRuntime> runtime, const StageSpec& spec, const std::filesystem::path& graph,
              int threads, bool cuda)
        : runtime_(std::move(runtime)), spec_(spec), place_(cuda ? Place::device : Place::host) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(threads);
        options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
        // Threads of one stage would spin on into the next one's time.
        options.AddConfigEntry("session.intra_op.allow_spinning", "0");
        if (cuda)
            use_cuda(options);
        try {
            session_ = Ort::Session(runtime_->env, graph.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw Error(ErrorCode::bundle, graph.string() + ": ONNX Runtime " +
                                               OrtGetApiBase()->GetVersionString() +
                                               " cannot load it: " + error.what());
        }
    }

    const StageSpec& spec() const override { return spec_; }

    Arrays run(const Arrays& inputs, Place outputs) override {
        check_inputs(spec_, inputs);
        try {
            return run_bound(inputs, outputs);
        } catch (const Ort::Exception& error) {
            throw Error(ErrorCode::stage, "stage " + spec_.name + ": ONNX Runtime failed: " + error.what());
        }
    }

  private:
    void use_cuda(Ort::SessionOptions& options) {
        if (!ort_has_cuda())
            throw Error(ErrorCode::dependency, std::string("this ONNX Runtime ") +
                                                   OrtGetApiBase()->GetVersionString() +
                                                   " is not for CUDA: link the library of its GPU release");
        try {
            options.AppendExecutionProvider_CUDA(OrtCUDAProviderOptions{});
        } catch (const Ort::Exception& error) {
            throw Error(ErrorCode::stage, "stage " + spec_.name +
                                              ": ONNX Runtime cannot use the GPU: " + error.what() +
                                              "; `nova-export doctor` shows driver and versions, "
                                              "device cpu does without");
        }
    }

    Arrays run_bound(const Arrays& inputs, Place outputs) {
        Ort::IoBinding binding(session_);
        for (const auto& [name, array] : inputs)
            binding.BindInput(name.c_str(), value_of(array));
        std::vector<const Tensor*> made; // by ONNX Runtime, in this order
        Arrays results;
        for (const auto& tensor : spec_.outputs) {
            // Kernels that scatter into their input's own memory copy nothing.
            if (const auto found = inputs.find(tensor.alias); can_alias(found, inputs, outputs)) {
                binding.BindOutput(tensor.name.c_str(), value_of(found->second));
                results[tensor.name] = found->second;
            } else {
                binding.BindOutput(tensor.name.c_str(), outputs == Place::host ? host_ : own_memory());
            }
            made.push_back(&tensor);
        }
        session_.Run(Ort::RunOptions{nullptr}, binding);
        auto values = binding.GetOutputValues();
        for (std::size_t i = 0; i < made.size(); ++i)
            if (!results.count(made[i]->name))
                results[made[i]->name] = array_of(std::move(values[i]), *made[i], outputs);
        return results;
    }

    /// Where this session's memory is, and so is the caller's.
    bool can_alias(Arrays::const_iterator found, const Arrays& inputs, Place outputs) const {
        return found != inputs.end() && found->second.place() == place_ &&
               (place_ == Place::host || outputs == place_);
    }

    Ort::Value value_of(const Array& array) const {
        const auto& memory = array.place() == Place::host ? host_ : own_memory();
        return Ort::Value::CreateTensor(memory, array.raw(), array.bytes(), array.shape().data(),
                                        array.shape().size(), ort_type(array.dtype()));
    }

    Array array_of(Ort::Value value, const Tensor& tensor, Place place) const {
        auto owner = std::make_shared<Ort::Value>(std::move(value));
        auto shape = owner->GetTensorTypeAndShapeInfo().GetShape();
        void* data = owner->GetTensorMutableRawData();
        return {tensor.dtype, std::move(shape), data, std::move(owner),
                place_ == Place::host ? Place::host : place};
    }

    const Ort::MemoryInfo& own_memory() const { return place_ == Place::host ? host_ : device_; }

    std::shared_ptr<OrtRuntime> runtime_;
    StageSpec spec_;
    Place place_;
    Ort::MemoryInfo host_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::MemoryInfo device_{"Cuda", OrtArenaAllocator, 0, OrtMemTypeDefault};
    Ort::Session session_{nullptr};
};

} // namespace

std::shared_ptr<OrtRuntime> open_ort() {
    load_api();
    return std::make_shared<OrtRuntime>();
}

bool ort_has_cuda() {
    load_api();
    const auto providers = Ort::GetAvailableProviders();
    return std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") != providers.end();
}

std::unique_ptr<Runner> make_ort_runner(std::shared_ptr<OrtRuntime> runtime, const StageSpec& spec,
                                        const std::filesystem::path& graph, int threads, bool cuda) {
    return std::make_unique<OrtRunner>(std::move(runtime), spec, graph, threads, cuda);
}

} // namespace nova
