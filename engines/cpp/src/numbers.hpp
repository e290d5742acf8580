/// Numbers as error texts show them.
#pragma once

#include <cstdio>
#include <string>

namespace nova {

/// As Python's `:g`.
inline std::string show_number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

} // namespace nova
