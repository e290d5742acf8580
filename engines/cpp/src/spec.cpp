#include "spec.hpp"

#include <algorithm>
#include <set>

#include "text.hpp"

namespace nova {

namespace {

constexpr std::int64_t max_size = (std::int64_t{1} << 31) - 1; // of one dimension
constexpr DType all_types[] = {DType::float32, DType::int64, DType::boolean, DType::float16};

Tensor tensor_of(const Field& data) {
    data.only({"name", "dtype", "shape", "alias"});
    Tensor tensor;
    tensor.name = data.at("name").text();
    const Field dtype = data.at("dtype");
    const auto known = [&](DType type) { return dtype.text() == name_of(type); };
    const auto* type = std::find_if(std::begin(all_types), std::end(all_types), known);
    if (type == std::end(all_types)) dtype.wrong("float32, int64, bool or float16");
    tensor.dtype = *type;
    for (const Field& size : data.at("shape").list()) {
        if (size.is_text()) {
            tensor.shape.emplace_back(size.text());
        } else {
            const std::int64_t number = size.whole("a whole number or text");
            if (number > max_size) size.wrong(("0 to " + std::to_string(max_size)).c_str());
            tensor.shape.emplace_back(number);
        }
    }
    const auto alias = data.find("alias");
    if (alias && !alias->is_null()) tensor.alias = alias->text("text or null");
    return tensor;
}

Axis axis_of(const Field& data) {
    data.only({"name", "min", "opt", "max"});
    Axis axis{data.at("name").text(), data.at("min").whole(), data.at("opt").whole(), data.at("max").whole()};
    if (!(axis.min <= axis.opt && axis.opt <= axis.max)) {
        data.refuse("axis " + axis.name + ": need 0 <= min <= opt <= max, not " + std::to_string(axis.min) + ", " +
                    std::to_string(axis.opt) + ", " + std::to_string(axis.max));
    }
    if (axis.max > max_size) data.at("max").wrong(("0 to " + std::to_string(max_size)).c_str());
    return axis;
}

template <typename Named> std::set<std::string> names_of(const Field& data, const std::vector<Named>& all) {
    std::set<std::string> names;
    for (const auto& each : all) {
        if (!names.insert(each.name).second) data.refuse("has " + repr(each.name) + " twice");
    }
    return names;
}

void check_there(const Field& data, const std::set<std::string>& wanted, const std::set<std::string>& names) {
    for (const auto& name : wanted) {
        if (!names.count(name)) data.refuse("has no " + repr(name));
    }
}

/// That names are used once, and those that shapes and aliases use are there.
void check_names(const Field& data, const StageSpec& stage) {
    const auto axes = names_of(data.at("axes"), stage.axes);
    const auto inputs = names_of(data.at("inputs"), stage.inputs);
    names_of(data.at("outputs"), stage.outputs);
    std::set<std::string> used, aliases;
    for (const auto& tensor : stage.inputs) {
        for (const auto& size : tensor.shape) {
            if (const auto* axis = std::get_if<std::string>(&size)) used.insert(*axis);
        }
    }
    for (const auto& tensor : stage.outputs) {
        if (!tensor.alias.empty()) aliases.insert(tensor.alias);
    }
    check_there(data.at("axes"), used, axes);
    check_there(data.at("inputs"), aliases, inputs);
}

std::string show_sizes(const std::vector<Size>& shape) {
    std::string text = "(";
    for (const auto& size : shape) {
        if (text.size() > 1) text += ", ";
        const auto* axis = std::get_if<std::string>(&size);
        text += axis ? *axis : std::to_string(std::get<std::int64_t>(size));
    }
    return text + ")";
}

void bind_one(const StageSpec& stage, const Tensor& tensor, const Given& given,
              std::map<std::string, std::int64_t>& sizes) {
    const auto refuse = [&](const std::string& what) {
        throw Error(ErrorCode::stage, "stage " + stage.name + ", input " + repr(tensor.name) + ": " + what);
    };
    if (given.dtype != tensor.dtype) {
        refuse(std::string("is ") + name_of(given.dtype) + ", must be " + name_of(tensor.dtype));
    }
    const auto wrong_shape = [&] { refuse("has shape " + show(given.shape) + ", must be " + show_sizes(tensor.shape)); };
    if (given.shape.size() != tensor.shape.size()) wrong_shape();
    for (std::size_t i = 0; i < given.shape.size(); ++i) {
        const std::int64_t size = given.shape[i];
        const auto* name = std::get_if<std::string>(&tensor.shape[i]);
        if (!name) {
            if (size != std::get<std::int64_t>(tensor.shape[i])) wrong_shape();
            continue;
        }
        const Axis& axis = stage.axis(*name);
        if (size < axis.min || size > axis.max) {
            refuse(axis.name + " is " + std::to_string(size) + ", must be " + std::to_string(axis.min) + " to " +
                   std::to_string(axis.max) + " (shape " + show(given.shape) + ")");
        }
        const std::int64_t before = sizes.emplace(axis.name, size).first->second;
        if (before != size) {
            refuse(axis.name + " is " + std::to_string(size) + ", but " + std::to_string(before) +
                   " in another input");
        }
    }
}

} // namespace

std::size_t size_of(DType type) {
    switch (type) {
    case DType::float32: return 4;
    case DType::int64: return 8;
    case DType::float16: return 2;
    case DType::boolean: break;
    }
    return 1;
}

const char* name_of(DType type) {
    switch (type) {
    case DType::float32: return "float32";
    case DType::int64: return "int64";
    case DType::float16: return "float16";
    case DType::boolean: break;
    }
    return "bool";
}

DType dtype_of(const std::string& name) {
    for (const DType type : all_types) {
        if (name == name_of(type)) return type;
    }
    throw Error(ErrorCode::bundle, "dtype " + repr(name) + " is unknown; build the bundle again");
}

std::string show(const Shape& shape) {
    std::string text = "(";
    for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + (shape.size() == 1 ? ",)" : ")");
}

const Axis& StageSpec::axis(const std::string& wanted) const {
    const auto found = std::find_if(axes.begin(), axes.end(), [&](const Axis& axis) { return axis.name == wanted; });
    if (found == axes.end()) throw Error(ErrorCode::stage, "stage " + name + ": has no axis " + repr(wanted));
    return *found;
}

std::map<std::string, std::int64_t> StageSpec::bind(const std::map<std::string, Given>& given) const {
    std::set<std::string> wanted;
    for (const auto& tensor : inputs) wanted.insert(tensor.name);
    for (const auto& input : wanted) {
        if (!given.count(input)) {
            throw Error(ErrorCode::stage, "stage " + name + ": input " + repr(input) + " is missing");
        }
    }
    for (const auto& [input, unused] : given) {
        if (wanted.count(input)) continue;
        std::string takes;
        for (const auto& each : wanted) takes += (takes.empty() ? "" : ", ") + each;
        throw Error(ErrorCode::stage, "stage " + name + ": has no input " + repr(input) + "; it takes " + takes);
    }
    std::map<std::string, std::int64_t> sizes;
    for (const auto& tensor : inputs) bind_one(*this, tensor, given.at(tensor.name), sizes);
    return sizes;
}

StageSpec stage_spec_of(const Field& data) {
    data.only({"name", "module", "part", "prefixes", "phase", "inputs", "outputs", "axes", "arguments"});
    StageSpec stage;
    stage.name = data.at("name").text();
    data.at("module").text();
    data.at("part").text();
    data.at("prefixes").texts();
    stage.phase = data.at("phase").text();
    for (const Field& tensor : data.at("inputs").list()) stage.inputs.push_back(tensor_of(tensor));
    for (const Field& tensor : data.at("outputs").list()) stage.outputs.push_back(tensor_of(tensor));
    for (const Field& axis : data.at("axes").list()) stage.axes.push_back(axis_of(axis));
    if (const auto arguments = data.find("arguments")) arguments->texts();
    check_names(data, stage);
    return stage;
}

} // namespace nova
