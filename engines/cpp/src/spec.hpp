/// Axis, Tensor and StageSpec: what a stage takes and gives, as nova_export/spec.py has it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "json.hpp"

namespace nova {

using Shape = std::vector<std::int64_t>;

enum class DType { float32, int64, boolean, float16 };

std::size_t size_of(DType type); ///< bytes
const char* name_of(DType type);
DType dtype_of(const std::string& name); ///< Error(bundle)

/// A symbolic size: its bounds, and the usual size. 0 <= min <= opt <= max.
struct Axis {
    std::string name;
    std::int64_t min = 0, opt = 0, max = 0;
};

using Size = std::variant<std::int64_t, std::string>; ///< a number, or the name of an axis

/// A named input or output. alias: the input whose memory an output may share; empty for none.
struct Tensor {
    std::string name;
    DType dtype = DType::float32;
    std::vector<Size> shape;
    std::string alias;
};

/// What a caller has for an input.
struct Given {
    DType dtype = DType::float32;
    Shape shape;
};

std::string show(const Shape& shape); ///< "(1, 2)"; "(1,)"

struct StageSpec {
    std::string name, phase;
    std::vector<Tensor> inputs, outputs;
    std::vector<Axis> axes;

    const Axis& axis(const std::string& name) const; ///< Error(stage) where there is none

    /// Check inputs by name, dtype and shape; the size of every axis. Error(stage), texts as Stage.bind's.
    std::map<std::string, std::int64_t> bind(const std::map<std::string, Given>& inputs) const;
};

StageSpec stage_spec_of(const Field& data); ///< Error(bundle)

} // namespace nova
