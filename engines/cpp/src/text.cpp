#include "text.hpp"

#include <cstdint>

namespace nova {

namespace {

/// The length of the character that `bytes` begin with, and its code point; 0 where they begin with none.
std::size_t decode_one(std::string_view bytes, char32_t& point) {
    const auto at = [&](std::size_t i) { return static_cast<std::uint8_t>(bytes[i]); };
    const std::uint8_t first = at(0);
    if (first < 0x80) {
        point = first;
        return 1;
    }
    const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || bytes.size() < length) return 0;
    point = first & (0x7fu >> length);
    for (std::size_t i = 1; i < length; ++i) {
        if ((at(i) & 0xc0) != 0x80) return 0;
        point = (point << 6) | (at(i) & 0x3fu);
    }
    const bool too_long = (length == 3 && point < 0x800) || (length == 4 && point < 0x10000);
    const bool none = point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff);
    return too_long || none ? 0 : length;
}

} // namespace

bool decode_utf8(std::string_view bytes, Characters& into) {
    into.points.clear();
    into.starts.clear();
    into.points.reserve(bytes.size());
    into.starts.reserve(bytes.size() + 1);
    for (std::size_t at = 0; at < bytes.size();) {
        char32_t point = 0;
        const std::size_t length = decode_one(bytes.substr(at), point);
        if (length == 0) return false;
        into.points.push_back(point);
        into.starts.push_back(at);
        at += length;
    }
    into.starts.push_back(bytes.size());
    return true;
}

bool is_utf8(std::string_view bytes) {
    Characters characters;
    return decode_utf8(bytes, characters);
}

std::string repr(std::string_view text) {
    const bool has_single = text.find('\'') != std::string_view::npos;
    const char mark = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
    std::string shown(1, mark);
    for (const char c : text) {
        const auto byte = static_cast<std::uint8_t>(c);
        if (c == mark || c == '\\') {
            shown += {'\\', c};
        } else if (c == '\n' || c == '\r' || c == '\t') {
            shown += {'\\', c == '\n' ? 'n' : c == '\r' ? 'r' : 't'};
        } else if (byte < 0x20 || byte == 0x7f) {
            constexpr char digits[] = "0123456789abcdef";
            shown += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
        } else {
            shown += c;
        }
    }
    return shown + mark;
}

} // namespace nova
