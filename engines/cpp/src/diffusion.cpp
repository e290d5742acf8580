#include "diffusion.hpp"

#include <algorithm>

namespace nova {
namespace {

constexpr const char* head = "diffusion_head";
constexpr float keep[] = {1, 0, 0}; // a, b, s of x' = a x + b eps + s noise

bool is_table(const Tensor& tensor) {
    const auto* axis = tensor.shape.empty() ? nullptr : std::get_if<std::string>(&tensor.shape[0]);
    return axis && *axis == "steps";
}

/// Rows `first`.. of a table, `steps` of them: those that it lacks predict as the last one, and take nothing of
/// it.
Array part_of(const std::string& name, const Array& table, std::int64_t first, std::int64_t steps) {
    const auto there = std::min(steps, table.shape()[0] - first);
    if (there == steps)
        return table.rows(first, steps);
    Shape shape = table.shape();
    shape[0] = steps;
    Array made = Array::zeros(table.dtype(), shape); // of noise, nothing is added
    const auto width = table.size() / table.shape()[0];
    const float* rows = table.rows(first, there).data<float>();
    float* to = std::copy_n(rows, there * width, made.data<float>());
    const bool is_noise = name == "step_noise" || name == "step_rest_noise";
    for (auto row = there; row < steps && !is_noise; ++row)
        to = std::copy_n(name == "step_coefficients" ? keep : rows + (there - 1) * width, width, to);
    return made;
}

} // namespace

Array denoise(Stages& stages, Arrays inputs) {
    const StageSpec& spec = stages.spec(head);
    const Axis& axis = spec.axis("steps");
    if (axis.min < axis.max)
        return stages.run(head, inputs, Place::host).at("denoised");
    const Arrays whole = inputs;
    const auto steps = whole.at("step_coefficients").shape()[0];
    for (std::int64_t first = 0; first < steps; first += axis.max) {
        for (const Tensor& tensor : spec.inputs)
            if (is_table(tensor))
                inputs[tensor.name] = part_of(tensor.name, whole.at(tensor.name), first, axis.max);
        Arrays outputs = stages.run(head, inputs, Place::host);
        inputs["noise"] = outputs.at("denoised");
        inputs["rest"] = outputs.at("next_rest");
    }
    return inputs.at("noise");
}

} // namespace nova
