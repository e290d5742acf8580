/// Text: UTF-8, and values as Python shows them in messages.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace nova {

/// Code points of valid UTF-8, and where each begins; one more start for the end. Valid is as Python has it.
struct Characters {
    std::vector<char32_t> points;
    std::vector<std::size_t> starts;
};

/// False where the bytes are no UTF-8: cut short, too long, surrogates, above U+10FFFF.
bool decode_utf8(std::string_view bytes, Characters& into);
bool is_utf8(std::string_view bytes);

/// A text in quotes, as Python's repr shows it (but what is not ASCII stays as it is).
std::string repr(std::string_view text);

} // namespace nova
