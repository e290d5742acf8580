/// What the library reads, as JSON, for tests that compare it with Python: one answer a line of standard input.
///
///     nova_inspect bundle | classes | external | sha256 | bind | tokens TOKENIZER.json MAX_LENGTH
///
/// An answer is {"ok": what was read}, or {"error": text, "code": exit code}. Lines are JSON: folders (bundle, and
/// {"check": folder} compares every file), files (external, sha256), {"spec", "inputs"} (bind), texts (tokens).
/// `classes` reads nothing and prints every range of the table.
#include <functional>
#include <iostream>
#include <string>

#include "bundle.hpp"
#include "onnx_files.hpp"
#include "sha256.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

using namespace nova;

namespace {

Json shown(const StageSpec& spec) {
    const auto tensors = [](const std::vector<Tensor>& all) {
        Json list = Json::array();
        for (const auto& tensor : all) {
            Json shape = Json::array();
            for (const auto& size : tensor.shape) std::visit([&](const auto& value) { shape.push_back(value); }, size);
            const Json alias = tensor.alias.empty() ? Json() : Json(tensor.alias);
            list.push_back({{"name", tensor.name}, {"dtype", name_of(tensor.dtype)}, {"shape", shape}, {"alias", alias}});
        }
        return list;
    };
    Json axes = Json::array();
    for (const auto& axis : spec.axes) {
        axes.push_back({{"name", axis.name}, {"min", axis.min}, {"opt", axis.opt}, {"max", axis.max}});
    }
    return {{"name", spec.name}, {"phase", spec.phase}, {"inputs", tensors(spec.inputs)},
            {"outputs", tensors(spec.outputs)}, {"axes", axes}};
}

Json shown(const Config& config) {
    const auto tiling = config.tiling();
    return {{"temporal", {config.temporal.depth, config.temporal.width}},
            {"spatial", {config.spatial.depth, config.spatial.width}},
            {"head", {config.head.depth, config.head.width}},
            {"latent_channels", config.latent_channels},
            {"latent_size", config.latent_size},
            {"image_size", config.image_size},
            {"patch", config.patch},
            {"text_dim", config.text_dim ? Json(*config.text_dim) : Json()},
            {"text_len", config.text_len},
            {"base_frames", config.base_frames},
            {"mixer_rank", config.mixer_rank ? Json(*config.mixer_rank) : Json()},
            {"rotary", config.rotary},
            {"vae", config.vae},
            {"scheduler", config.scheduler},
            {"guidance_scale", config.guidance_scale},
            {"tiling", {tiling.latent_frames, tiling.overlap, tiling.drop, tiling.frames_per_latent}},
            {"video_length", config.video_length()},
            {"num_tokens", config.num_tokens()},
            {"frame_tokens", config.frame_tokens()},
            {"token_dim", config.token_dim()},
            {"condition_tokens", config.condition_tokens()},
            {"cache_names", cache_names(config)}};
}

Json shown(const Bundle& bundle) {
    Json stages, engines = Json::object(), files = Json::object();
    for (const auto& [name, stage] : bundle.stages) {
        stages[name] = {{"spec", shown(stage.spec)}, {"graph", stage.graph}, {"files", stage.files},
                        {"precision", stage.precision}};
    }
    for (const auto& [target, of_target] : bundle.engines) {
        engines[target] = Json::object();
        for (const auto& [name, engine] : of_target) {
            engines[target][name] = {{"file", engine.file}, {"spec", shown(engine.spec)}, {"made_of", engine.made_of}};
        }
    }
    for (const auto& [path, file] : bundle.files) files[path] = {file.size, file.sha256};
    return {{"config", shown(bundle.config)},
            {"target", bundle.target},
            {"stages", stages},
            {"stage_names", stage_names(bundle.config, !bundle.lean_decode.empty())},
            {"engines", engines},
            {"tokenizer", bundle.tokenizer},
            {"lean_decode", bundle.lean_decode},
            {"head_steps", bundle.head_steps ? Json(*bundle.head_steps) : Json()},
            {"files", files}};
}

Json open_bundle(const Json& line) {
    const bool check = line.is_object();
    const Bundle bundle = Bundle::open((check ? line.at("check") : line).get<std::string>());
    if (check) bundle.check_all();
    return shown(bundle);
}

Json bind(const Json& line) {
    std::map<std::string, Given> inputs;
    for (const auto& [name, input] : line.at("inputs").items()) {
        inputs[name] = {dtype_of(input.at(0).get<std::string>()), input.at(1).get<Shape>()};
    }
    return stage_spec_of(Field(line.at("spec"))).bind(inputs);
}

Json classes() {
    Json ranges = Json::array();
    char32_t first = 0;
    for (char32_t point = 1; point <= 0x110000; ++point) {
        if (point < 0x110000 && class_of(point) == class_of(first)) continue;
        ranges.push_back({first, point - 1, static_cast<int>(class_of(first))});
        first = point;
    }
    return ranges;
}

void answer(const std::function<Json()>& work) {
    try {
        std::cout << Json{{"ok", work()}}.dump() << "\n";
    } catch (const Error& error) {
        std::cout << Json{{"error", error.what()}, {"code", static_cast<int>(error.code())}}.dump() << "\n";
    }
}

int run(const std::vector<std::string>& arguments) {
    const std::string command = arguments.empty() ? "" : arguments[0];
    std::function<Json(const Json&)> work;
    std::optional<Tokenizer> tokenizer;
    if (command == "bundle") work = open_bundle;
    if (command == "bind") work = bind;
    if (command == "sha256") work = [](const Json& line) { return sha256_of(line.get<std::string>()); };
    if (command == "external") {
        work = [](const Json& line) {
            try {
                return Json(external_files(read_file(line.get<std::string>(), std::size_t{1} << 31)));
            } catch (const std::invalid_argument& error) {
                throw Error(ErrorCode::bundle, error.what());
            }
        };
    }
    if (command == "tokens" && arguments.size() == 3) {
        try {
            tokenizer.emplace(arguments[1], std::stoll(arguments[2]));
        } catch (const Error& error) {
            answer([&]() -> Json { throw error; });
            return static_cast<int>(error.code());
        }
        work = [&](const Json& line) {
            const auto encoded = tokenizer->encode(line.get<std::string>());
            return Json{encoded.ids, encoded.notice};
        };
    }
    if (command == "classes") {
        answer(classes);
        return 0;
    }
    if (!work) {
        std::cerr << "usage: nova_inspect bundle | classes | external | sha256 | bind | tokens TOKENIZER MAX_LENGTH\n";
        return static_cast<int>(ErrorCode::usage);
    }
    for (std::string line; std::getline(std::cin, line);) {
        answer([&] { return work(Json::parse(line)); });
    }
    return 0;
}

} // namespace

int main(int count, char** values) { return run({values + 1, values + count}); }
