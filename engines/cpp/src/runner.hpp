// What the loops ask of ONNX Runtime, TensorRT or a fake: stages that take arrays by name and give arrays
// back.
#pragma once

#include <memory>
#include <string>

#include "array.hpp"
#include "spec.hpp"

namespace nova {

/// One stage, ready to run. Aliased outputs may be written into the inputs that they alias.
class Runner {
  public:
    Runner() = default;
    Runner(const Runner&) = delete;
    Runner& operator=(const Runner&) = delete;
    virtual ~Runner() = default;

    virtual const StageSpec& spec() const = 0;

    /// Outputs by name. `outputs`: where the caller wants them; a device keeps there what other stages read.
    /// Error(stage): wrong inputs, or the backend failed.
    virtual Arrays run(const Arrays& inputs, Place outputs) = 0;
};

/// Error(stage) where a stage does not take these.
inline void check_inputs(const StageSpec& spec, const Arrays& inputs) {
    std::map<std::string, Given> given;
    for (const auto& [name, array] : inputs)
        given[name] = {array.dtype(), array.shape()};
    spec.bind(given);
}

/// All stages of a bundle, by name.
class Stages {
  public:
    Stages() = default;
    Stages(const Stages&) = delete;
    Stages& operator=(const Stages&) = delete;
    virtual ~Stages() = default;

    virtual const StageSpec& spec(const std::string& stage) const = 0;
    virtual Arrays run(const std::string& stage, const Arrays& inputs, Place outputs) = 0;
};

} // namespace nova
