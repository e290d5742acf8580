/// JSON as nova_export/typed.py reads it: strict text, then values of known types. nlohmann-json does the parsing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "errors.hpp"

namespace nova {

using Json = nlohmann::json;

constexpr std::size_t max_json_depth = 100;
constexpr std::int64_t max_whole_number = std::int64_t{1} << 53;

/// Parse a whole text. Error: no JSON, a key twice in an object, lists in lists deeper than max_json_depth.
Json parse_json(std::string_view text, const std::string& where, ErrorCode code = ErrorCode::bundle);

/// All of a file. Error(bundle) where it cannot be read, or has more than `most` bytes.
std::string read_file(const std::filesystem::path& path, std::size_t most);

std::string shown(const Json& value); ///< as JSON; of lists and objects only that they are

/// A value within a document, and where it stands. Its Error(bundle)s say both; texts are those of typed.py.
class Field {
  public:
    explicit Field(const Json& value, std::string where = "") : value_(&value), where_(std::move(where)) {}

    const Json& json() const { return *value_; }
    bool is_null() const { return value_->is_null(); }
    bool is_text() const { return value_->is_string(); }

    Field at(const std::string& key) const;                  ///< of an object; it must be there
    std::optional<Field> find(const std::string& key) const; ///< of an object, if it is there
    std::vector<std::pair<std::string, Field>> entries() const;
    std::vector<Field> list(const char* wanted = "a list") const;
    std::vector<std::int64_t> pair() const; ///< a list of 2 whole numbers
    std::vector<std::string> texts() const;
    void only(std::initializer_list<const char*> keys) const; ///< an object with no others

    std::int64_t whole(const char* wanted = "a whole number") const; ///< 0 to max_whole_number
    double number() const;
    bool boolean() const;
    std::string text(const char* wanted = "text") const;

    [[noreturn]] void refuse(const std::string& what) const;
    [[noreturn]] void wrong(const char* wanted) const; ///< "is VALUE, must be WANTED"

  private:
    Field of(const std::string& key, const Json& value) const;

    const Json* value_;
    std::string where_;
};

} // namespace nova
