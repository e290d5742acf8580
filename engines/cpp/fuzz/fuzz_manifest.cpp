/// A manifest of any bytes is read or refused with an Error(bundle), and so is what a graph names.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string_view>

#include "bundle.hpp"
#include "onnx_files.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        nova::Manifest::parse(text, "bundle/manifest.json").config.tiling();
    } catch (const nova::Error& error) {
        if (error.code() != nova::ErrorCode::bundle) throw;
    }
    try {
        nova::external_files(text);
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
