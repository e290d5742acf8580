/// An image that becomes the first frame, cut and resized as Python's runtime does (Pillow's bilinear).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nova {

/// 8-bit RGB, row by row: height * width * 3 bytes.
struct Image {
    std::int64_t height = 0, width = 0;
    std::vector<std::uint8_t> pixels;
};

struct Fitted {
    Image image;
    std::string notice; ///< what was done to make it fit; empty if nothing
};

/// Cropped around its centre to the target's aspect ratio, then resized.
Fitted fit(const Image& image, std::int64_t height, std::int64_t width);

} // namespace nova
