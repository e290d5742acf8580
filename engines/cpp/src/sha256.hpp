#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace nova {

std::string sha256(std::string_view data);                  ///< hex digest
std::string sha256_of(const std::filesystem::path& path);   ///< of a file, in pieces; Error(bundle)

} // namespace nova
