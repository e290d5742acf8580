#include "json.hpp"

#include <algorithm>
#include <fstream>
#include <stdexcept>

#include "text.hpp"

namespace nova {

namespace {

/// Builds a document as it is read, and refuses what JSON's grammar allows and a manifest does not have.
class Builder final : public nlohmann::json_sax<Json> {
  public:
    Json document;

    bool null() override { return add(nullptr); }
    bool boolean(bool value) override { return add(value); }
    bool number_integer(number_integer_t value) override { return add(value); }
    bool number_unsigned(number_unsigned_t value) override { return add(value); }
    bool number_float(number_float_t value, const string_t&) override { return add(value); }
    bool string(string_t& value) override { return add(std::move(value)); }
    bool binary(binary_t&) override { return false; }
    bool start_object(std::size_t) override { return open(Json::object()); }
    bool start_array(std::size_t) override { return open(Json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }

    bool key(string_t& name) override {
        const auto [place, is_new] = open_.back()->get_ref<Json::object_t&>().emplace(std::move(name), nullptr);
        if (!is_new) throw std::invalid_argument("has the key " + repr(place->first) + " twice");
        value_ = &place->second;
        return true;
    }

    bool parse_error(std::size_t, const std::string&, const Json::exception& error) override {
        std::string what = error.what(); // quotes the text, which need not be UTF-8
        if (!is_utf8(what)) what = "is not UTF-8";
        throw std::invalid_argument(what);
    }

  private:
    bool add(Json value) {
        if (open_.empty()) {
            value_ = &document;
        } else if (open_.back()->is_array()) {
            value_ = &open_.back()->emplace_back();
        }
        *value_ = std::move(value);
        return true;
    }

    bool open(Json value) {
        if (open_.size() == max_json_depth) {
            throw std::invalid_argument("deeper than " + std::to_string(max_json_depth) + " levels");
        }
        add(std::move(value));
        open_.push_back(value_);
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    std::vector<Json*> open_; // objects and lists that have not ended, the innermost last
    Json* value_ = nullptr;   // where the next value goes, or the last one went
};

/// How a key stands in a path of keys.
std::string step(const std::string& key) {
    constexpr std::string_view plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    return !key.empty() && key.find_first_not_of(plain) == std::string::npos ? key : repr(key);
}

} // namespace

std::string shown(const Json& value) {
    if (value.is_object()) return "an object";
    if (value.is_array()) return "a list";
    return value.dump();
}

Json parse_json(std::string_view text, const std::string& where, ErrorCode code) {
    try {
        if (text.substr(0, 3) == "\xef\xbb\xbf") throw std::invalid_argument("begins with a byte order mark");
        Builder builder;
        Json::sax_parse(text, &builder);
        return std::move(builder.document);
    } catch (const std::invalid_argument& error) {
        throw Error(code, where + ": cannot be read as JSON (" + error.what() + "); copy the bundle again");
    }
}

std::string read_file(const std::filesystem::path& path, std::size_t most) {
    std::error_code failed;
    const auto size = std::filesystem::file_size(path, failed);
    std::ifstream file(path, std::ios::binary);
    if (failed || !file) throw Error(ErrorCode::bundle, path.string() + ": cannot be read; copy the bundle again");
    if (size > most) {
        throw Error(ErrorCode::bundle, path.string() + ": has " + std::to_string(size) + " bytes, the most is " +
                                           std::to_string(most) + "; build the bundle again");
    }
    std::string text(static_cast<std::size_t>(size), '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(file.gcount()));
    return text;
}

Field Field::of(const std::string& key, const Json& value) const {
    return Field(value, where_.empty() ? step(key) : where_ + "." + step(key));
}

std::optional<Field> Field::find(const std::string& key) const {
    if (!value_->is_object()) wrong("an object");
    const auto found = value_->find(key);
    if (found == value_->end()) return std::nullopt;
    return of(key, *found);
}

Field Field::at(const std::string& key) const {
    if (auto field = find(key)) return *field;
    refuse("has no " + repr(key));
}

std::vector<std::pair<std::string, Field>> Field::entries() const {
    if (!value_->is_object()) wrong("an object");
    std::vector<std::pair<std::string, Field>> fields;
    for (const auto& [key, value] : value_->items()) fields.emplace_back(key, of(key, value));
    return fields;
}

std::vector<Field> Field::list(const char* wanted) const {
    if (!value_->is_array()) wrong(wanted);
    std::vector<Field> fields;
    for (const auto& value : *value_) fields.push_back(of(std::to_string(fields.size()), value));
    return fields;
}

std::vector<std::int64_t> Field::pair() const {
    const auto fields = list("a list of 2");
    if (fields.size() != 2) wrong("a list of 2");
    return {fields[0].whole(), fields[1].whole()};
}

std::vector<std::string> Field::texts() const {
    std::vector<std::string> values;
    for (const auto& field : list()) values.push_back(field.text());
    return values;
}

void Field::only(std::initializer_list<const char*> keys) const {
    for (const auto& entry : entries()) {
        if (std::none_of(keys.begin(), keys.end(), [&](const char* known) { return entry.first == known; })) {
            refuse("has " + repr(entry.first) + ", which is unknown");
        }
    }
}

std::int64_t Field::whole(const char* wanted) const {
    if (!value_->is_number_integer()) wrong(wanted);
    const bool fits = value_->is_number_unsigned() ? value_->get<std::uint64_t>() <= std::uint64_t{max_whole_number}
                                                   : value_->get<std::int64_t>() >= 0;
    if (!fits) refuse("is " + shown(*value_) + ", must be 0 to " + std::to_string(max_whole_number));
    return value_->get<std::int64_t>();
}

double Field::number() const {
    if (!value_->is_number()) wrong("a number");
    return value_->get<double>();
}

bool Field::boolean() const {
    if (!value_->is_boolean()) wrong("true or false");
    return value_->get<bool>();
}

std::string Field::text(const char* wanted) const {
    if (!value_->is_string()) wrong(wanted);
    return value_->get<std::string>();
}

void Field::refuse(const std::string& what) const {
    throw Error(ErrorCode::bundle, where_.empty() ? what : where_ + ": " + what);
}

void Field::wrong(const char* wanted) const { refuse("is " + shown(*value_) + ", must be " + wanted); }

} // namespace nova
