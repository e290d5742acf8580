/// The bundle: a folder with a manifest and the files it names; checked as nova_export/bundle.py does.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config.hpp"
#include "spec.hpp"

namespace nova {

struct FileEntry {
    std::uint64_t size = 0;
    std::string sha256;
};

struct StageEntry {
    StageSpec spec;
    std::string graph;
    std::vector<std::string> files;
    std::string precision;
};

/// A compiled stage; bytes are those of weights and scratch memory, where TensorRT says them.
struct EngineEntry {
    std::string file;
    StageSpec spec;
    std::map<std::string, std::string> made_of;
    std::string attention; ///< empty for none
    std::optional<std::int64_t> activation_bytes, weight_bytes;
};

/// What a manifest says. Nothing of it has been compared with the folder.
struct Manifest {
    Config config;
    std::string target;
    std::map<std::string, StageEntry> stages;
    std::map<std::string, std::map<std::string, EngineEntry>> engines; ///< by target, then by stage
    std::string tokenizer;                                             ///< empty for none
    std::string lean_decode;                                           ///< a number type; empty for none
    std::optional<std::int64_t> head_steps; ///< diffusion steps in a call of the head; none for a loop
    std::map<std::string, FileEntry> files;

    /// Error(bundle). file: what messages call it.
    static Manifest parse(std::string_view text, const std::string& file);
};

/// An opened bundle; never changed afterwards, so threads may share it. `check` what you are about to use.
class Bundle : public Manifest {
  public:
    std::filesystem::path folder;

    /// Read the manifest and make sure that its files are there, in full length. Error(bundle), as Python's.
    static Bundle open(const std::filesystem::path& folder);

    const StageEntry& stage(const std::string& name) const;
    std::filesystem::path path(const std::string& name) const;

    void check(const std::string& path) const;       ///< a file's sha256; Error(bundle)
    void check_stage(const std::string& name) const; ///< its files, and that its graph reads no others
    void check_all() const;

  private:
    explicit Bundle(Manifest manifest) : Manifest(std::move(manifest)) {}
};

bool is_inside(std::string_view path); ///< whether a manifest's path is relative and never leaves the folder

} // namespace nova
