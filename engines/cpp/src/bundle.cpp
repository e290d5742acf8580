#include "bundle.hpp"

#include <algorithm>
#include <fstream>
#include <set>
#include <stdexcept>

#include "onnx_files.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace nova {

namespace fs = std::filesystem;

namespace {

constexpr std::int64_t format_version = 1;
constexpr const char* manifest_name = "manifest.json";
constexpr std::size_t max_manifest_bytes = std::size_t{64} << 20;
constexpr std::size_t max_graph_bytes = std::size_t{2} << 30; // of any protobuf

[[noreturn]] void refuse(const std::string& text) { throw Error(ErrorCode::bundle, text); }

void check_format(const Json& data, const std::string& file) {
    const Json version = data.is_object() ? data.value("format", Json()) : Json();
    if (version.is_number_integer() && version == format_version) return;
    const bool newer = version.is_number_integer() && version > format_version;
    const std::string found = version.is_null()     ? "None"
                              : version.is_string() ? repr(version.get<std::string>())
                                                    : shown(version);
    refuse(file + ": has format " + found + "; this nova-export reads format " + std::to_string(format_version) +
           ": " + (newer ? "update nova-export" : "build it again"));
}

std::map<std::string, std::string> text_map(const Field& data) {
    std::map<std::string, std::string> texts;
    for (const auto& [name, text] : data.entries()) texts[name] = text.text();
    return texts;
}

FileEntry file_of(const Field& data) {
    FileEntry entry;
    entry.size = static_cast<std::uint64_t>(data.at("size").whole());
    const Field digest = data.at("sha256");
    entry.sha256 = digest.text();
    if (entry.sha256.size() != 64 || entry.sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
        digest.wrong("64 hexadecimal digits");
    }
    return entry;
}

StageEntry stage_of(const std::string& name, const Field& data) {
    StageEntry entry{stage_spec_of(data.at("spec")), data.at("graph").text(), data.at("files").texts(),
                     data.at("precision").text()};
    if (const Field verified = data.at("verified"); !verified.is_null() && !verified.json().is_object()) {
        verified.wrong("an object or null");
    }
    if (entry.spec.name != name) data.refuse("its spec is that of " + repr(entry.spec.name));
    return entry;
}

std::optional<std::int64_t> whole_or_null(const Field& data) {
    if (data.is_null()) return std::nullopt;
    return data.whole("a whole number or null");
}

EngineEntry engine_of(const std::string& name, const Field& data) {
    data.only({"file", "spec", "made_of", "attention", "activation_bytes", "weight_bytes", "peak_bytes", "seconds",
               "layers"});
    EngineEntry entry;
    entry.file = data.at("file").text();
    entry.spec = stage_spec_of(data.at("spec"));
    entry.made_of = text_map(data.at("made_of"));
    if (const Field attention = data.at("attention"); !attention.is_null()) {
        entry.attention = attention.text("text or null");
    }
    entry.activation_bytes = whole_or_null(data.at("activation_bytes"));
    entry.weight_bytes = whole_or_null(data.at("weight_bytes"));
    data.at("peak_bytes").whole();
    data.at("seconds").number();
    if (const auto layers = data.find("layers")) {
        for (const Field& layer : layers->list()) layer.entries();
    }
    if (entry.spec.name != name) data.refuse("its spec is that of " + repr(entry.spec.name));
    return entry;
}

Manifest read_manifest(const Field& data) {
    Manifest manifest;
    manifest.config = config_of(data.at("config"));
    manifest.target = data.at("target").text();
    data.at("source").at("name").text();
    text_map(data.at("tools"));
    for (const auto& [name, entry] : data.at("stages").entries()) manifest.stages[name] = stage_of(name, entry);
    if (const Field tokenizer = data.at("tokenizer"); !tokenizer.is_null()) {
        manifest.tokenizer = tokenizer.text("text or null");
    }
    for (const auto& [path, entry] : data.at("files").entries()) manifest.files[path] = file_of(entry);
    if (const auto targets = data.find("engines")) {
        for (const auto& [target, engines] : targets->entries()) {
            auto& of_target = manifest.engines[target];
            for (const auto& [name, entry] : engines.entries()) of_target[name] = engine_of(name, entry);
        }
    }
    if (const auto type = data.find("lean_decode"); type && !type->is_null()) {
        manifest.lean_decode = type->text("text or null");
        if (manifest.lean_decode != "float32" && manifest.lean_decode != "float16") {
            type->wrong("float32, float16 or null");
        }
    }
    if (const auto steps = data.find("head_steps")) manifest.head_steps = whole_or_null(*steps);
    return manifest;
}

void check_complete(const Manifest& manifest, const std::string& file) {
    const auto names = stage_names(manifest.config, !manifest.lean_decode.empty());
    for (const auto& name : std::set<std::string>(names.begin(), names.end())) {
        if (!manifest.stages.count(name)) refuse(file + ": has no stage " + repr(name) + "; build the bundle again");
    }
    if (!manifest.config.is_class_conditional() && manifest.tokenizer.empty()) {
        refuse(file + ": names no tokenizer; build the bundle again");
    }
    const auto listed = [&](const std::string& path) {
        if (manifest.files.count(path)) return;
        refuse(file + ": uses " + repr(path) + " without listing it; build the bundle again");
    };
    for (const auto& [name, stage] : manifest.stages) {
        listed(stage.graph);
        std::for_each(stage.files.begin(), stage.files.end(), listed);
    }
    for (const auto& [target, engines] : manifest.engines) {
        for (const auto& [name, engine] : engines) listed(engine.file);
    }
    if (!manifest.tokenizer.empty()) listed(manifest.tokenizer);
}

bool starts_with(const fs::path& path, const fs::path& root) {
    return std::mismatch(root.begin(), root.end(), path.begin(), path.end()).first == root.end();
}

/// `name` beside the file at `path`, without the "." and "//" that Python's PurePosixPath leaves out too.
std::string beside(const std::string& path, const std::string& name) {
    if (!name.empty() && name[0] == '/') return name;
    const auto slash = path.rfind('/');
    const std::string joined = (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + name;
    std::string plain;
    for (std::size_t at = 0; at <= joined.size();) {
        const std::size_t end = std::min(joined.find('/', at), joined.size());
        const std::string part = joined.substr(at, end - at);
        if (!part.empty() && part != ".") plain += (plain.empty() ? "" : "/") + part;
        at = end + 1;
    }
    return plain.empty() ? "." : plain;
}

void check_file(const fs::path& folder, const fs::path& root, const std::string& path, const FileEntry& entry) {
    std::error_code failed;
    const std::string plain = beside("", path);
    const fs::path place = plain == "." ? folder : folder / plain;
    if (is_inside(path) && !starts_with(fs::weakly_canonical(place, failed), root) && !failed) {
        refuse(folder.string() + ": the manifest names " + repr(path) + ", outside the bundle; do not trust it");
    }
    const bool is_file = !failed && fs::is_regular_file(place, failed);
    const auto size = is_file ? fs::file_size(place, failed) : 0;
    if (!is_file || failed) refuse(place.string() + ": missing; copy the bundle again or build it again");
    if (size != entry.size) {
        refuse(place.string() + ": has " + std::to_string(size) + " bytes, must have " + std::to_string(entry.size) +
               "; copy or build it again");
    }
}

} // namespace

bool is_inside(std::string_view path) {
    if (path.empty() || path[0] == '/' || path.find_first_of(std::string_view("\\:\0", 3)) != path.npos) return false;
    for (std::size_t at = 0; at <= path.size();) {
        const std::size_t end = std::min(path.find('/', at), path.size());
        if (path.substr(at, end - at) == "..") return false;
        at = end + 1;
    }
    return true;
}

Manifest Manifest::parse(std::string_view text, const std::string& file) {
    const Json data = parse_json(text, file);
    check_format(data, file);
    Manifest manifest;
    try {
        manifest = read_manifest(Field(data));
        if (!manifest.lean_decode.empty()) lean_pieces(manifest.config);
    } catch (const Error& error) {
        refuse(file + ": is damaged (" + error.what() + "); build it again");
    }
    const auto folder = fs::path(file).parent_path().string();
    for (const auto& [path, entry] : manifest.files) {
        if (is_inside(path)) continue;
        refuse(folder + ": the manifest names " + repr(path) + ", outside the bundle; do not trust it");
    }
    check_complete(manifest, file);
    return manifest;
}

Bundle Bundle::open(const fs::path& folder) {
    std::error_code failed;
    if (!fs::is_directory(folder, failed)) {
        refuse(folder.string() + ": no such bundle folder; `nova-export build CHECKPOINT -o " + folder.string() +
               "` makes one");
    }
    const fs::path file = folder / manifest_name;
    if (!fs::exists(file, failed)) {
        refuse(folder.string() + ": has no " + manifest_name + ", so it is no bundle; `nova-export build` makes one");
    }
    Bundle bundle(Manifest::parse(read_file(file, max_manifest_bytes), file.string()));
    bundle.folder = folder;
    const fs::path root = fs::canonical(folder, failed);
    for (const auto& [path, entry] : bundle.files) check_file(folder, root, path, entry);
    return bundle;
}

const StageEntry& Bundle::stage(const std::string& name) const {
    const auto found = stages.find(name);
    if (found != stages.end()) return found->second;
    refuse((folder / manifest_name).string() + ": has no stage " + repr(name) + "; build the bundle again");
}

fs::path Bundle::path(const std::string& name) const { return folder / name; }

void Bundle::check(const std::string& path) const {
    const auto found = files.find(path);
    if (found == files.end()) {
        refuse((folder / manifest_name).string() + ": uses " + repr(path) +
               " without listing it; build the bundle again");
    }
    if (sha256_of(folder / path) != found->second.sha256) {
        refuse((folder / path).string() + ": was changed after it was built (sha256 differs); build it again");
    }
}

void Bundle::check_stage(const std::string& name) const {
    const StageEntry& entry = stage(name);
    check(entry.graph);
    for (const auto& file : entry.files) {
        if (file != entry.graph) check(file);
    }
    const fs::path graph = folder / entry.graph;
    std::set<std::string> read;
    try {
        for (const auto& file : external_files(read_file(graph, max_graph_bytes))) {
            read.insert(beside(entry.graph, file));
        }
    } catch (const std::invalid_argument& error) {
        refuse(graph.string() + ": is no ONNX graph (" + error.what() + "); build the bundle again");
    }
    for (const auto& file : read) {
        if (std::find(entry.files.begin(), entry.files.end(), file) != entry.files.end()) continue;
        refuse(graph.string() + ": reads " + repr(file) +
               ", which the manifest does not list for it; do not trust it");
    }
}

void Bundle::check_all() const {
    std::set<std::string> checked;
    for (const auto& [name, entry] : stages) {
        check_stage(name);
        checked.insert(entry.files.begin(), entry.files.end());
    }
    for (const auto& [path, entry] : files) {
        if (!checked.count(path)) check(path);
    }
}

} // namespace nova
