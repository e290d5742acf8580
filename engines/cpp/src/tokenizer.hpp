/// Prompts to token ids as nova_export/runtime/tokenizer.py makes them: byte-level BPE, no special tokens, cut.
///
/// Knows what checkpoints of NOVA have (Phi's tokenizer). What a tokenizer.json asks for beyond that is refused by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace nova {

/// Letters, numbers and white space as the `tokenizers` package has them; all else is `other`.
enum class CharacterClass { other, letter, number, space };
CharacterClass class_of(char32_t point);

/// A tokenizer.json; never changed after it is made, so threads may share it.
class Tokenizer {
  public:
    /// max_length: the most tokens that `encode` gives, at least 1. Error(bundle): no tokenizer, or of another kind.
    Tokenizer(const std::filesystem::path& file, std::int64_t max_length);
    Tokenizer(std::string_view json, std::int64_t max_length, const std::string& file);

    struct Encoded {
        std::vector<std::int64_t> ids;
        std::string notice; ///< where the prompt was cut; empty if it was not
    };
    Encoded encode(std::string_view utf8) const; ///< Error(input) on bytes that are no UTF-8

  private:
    struct Model;

    std::shared_ptr<const Model> model_;
    std::size_t max_length_;
};

} // namespace nova
