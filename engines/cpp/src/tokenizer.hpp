/// Prompts to token ids as nova_export/runtime/tokenizer.py makes them: byte-level BPE, no special tokens, cut.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace nova {

/// Letters, numbers and white space as the `tokenizers` package has them; all else is `other`.
enum class CharacterClass { other, letter, number, space };
CharacterClass class_of(char32_t point);

/// A tokenizer.json; never changed after it is made, so threads may share it.
class Tokenizer {
  public:
    /// max_length: the most tokens that `encode` gives. Error(bundle): no tokenizer, or one of another kind.
    Tokenizer(const std::filesystem::path& file, std::int64_t max_length);
    static Tokenizer parse(std::string_view json, std::int64_t max_length, const std::string& file);

    struct Encoded {
        std::vector<std::int64_t> ids;
        std::string notice; ///< where the prompt was cut; empty if it was not
    };
    Encoded encode(std::string_view utf8) const; ///< Error(input) on bytes that are no UTF-8

  private:
    struct Merge {
        std::uint32_t rank, made;
    };
    struct Added {
        std::string content;
        std::uint32_t id;
    };
    struct Piece;
    struct Token;

    Tokenizer() = default;
    void read_model(const class Field& model, std::unordered_map<std::string_view, std::uint32_t>& vocabulary);
    void read_added(const class Field& tokens, const std::unordered_map<std::string_view, std::uint32_t>& vocabulary);
    void split(std::string_view text, const struct Characters& characters, Piece piece, const std::vector<Added>& added,
               bool last, std::vector<Token>& into) const;
    void words(std::string_view text, const struct Characters& characters, Piece piece, std::vector<Token>& into) const;
    void merge(std::string_view word, std::size_t start, std::vector<Token>& into) const;
    std::string cut(std::string_view text, const struct Characters& characters, const std::vector<Token>& tokens) const;

    std::size_t max_length_ = 0;
    bool trim_offsets_ = false;
    std::array<std::uint32_t, 256> bytes_{};
    std::unordered_map<std::uint64_t, Merge> merges_; ///< by the ids of the pair
    std::vector<Added> added_, added_normalized_;
};

} // namespace nova
