#include "image.hpp"

#include <algorithm>
#include <cmath>

namespace nova {
namespace {

constexpr int precision_bits = 22; // of weights in whole numbers: 32 bits less 8 of a pixel and 2 of headroom

/// Which pixels of a line make one of the resized line, and by which weights.
struct Taps {
    std::int64_t first;
    std::vector<std::int32_t> weights;
};

/// A triangle as wide as the step between resized pixels, so that shrinking averages.
std::vector<Taps> triangle_taps(std::int64_t from, std::int64_t to) {
    const double scale = static_cast<double>(from) / static_cast<double>(to), support = std::max(scale, 1.0);
    std::vector<Taps> taps;
    for (std::int64_t at = 0; at < to; ++at) {
        const double centre = (static_cast<double>(at) + 0.5) * scale;
        const auto first = std::max<std::int64_t>(static_cast<std::int64_t>(centre - support + 0.5), 0);
        const auto last = std::min(static_cast<std::int64_t>(centre + support + 0.5), from);
        std::vector<double> weights;
        double sum = 0;
        for (auto x = first; x < last; ++x) {
            const double distance = std::abs((static_cast<double>(x) - centre + 0.5) * (1.0 / support));
            weights.push_back(distance < 1 ? 1 - distance : 0);
            sum += weights.back();
        }
        Taps made{first, {}};
        for (const double weight : weights)
            made.weights.push_back(static_cast<std::int32_t>(0.5 + weight / sum * (1 << precision_bits)));
        taps.push_back(std::move(made));
    }
    return taps;
}

/// Along one axis: lines of `from` values, `stride` apart, to lines of `to`.
std::vector<std::uint8_t> resize_axis(const std::vector<std::uint8_t>& pixels, std::int64_t outer,
                                      std::int64_t from, std::int64_t to, std::int64_t stride) {
    const auto taps = triangle_taps(from, to);
    std::vector<std::uint8_t> made;
    made.reserve(static_cast<std::size_t>(outer * to * stride));
    for (std::int64_t line = 0; line < outer; ++line)
        for (const auto& tap : taps)
            for (std::int64_t inner = 0; inner < stride; ++inner) {
                std::int32_t sum = 1 << (precision_bits - 1);
                for (std::size_t i = 0; i < tap.weights.size(); ++i) {
                    const auto x = tap.first + static_cast<std::int64_t>(i);
                    sum +=
                        tap.weights[i] * pixels[static_cast<std::size_t>((line * from + x) * stride + inner)];
                }
                made.push_back(static_cast<std::uint8_t>(std::clamp(sum >> precision_bits, 0, 255)));
            }
    return made;
}

Image crop(const Image& image, std::int64_t top, std::int64_t left, std::int64_t height, std::int64_t width) {
    Image made{height, width, {}};
    for (auto row = top; row < top + height; ++row) {
        const auto begin = image.pixels.begin() + (row * image.width + left) * 3;
        made.pixels.insert(made.pixels.end(), begin, begin + width * 3);
    }
    return made;
}

/// a * b / c, half to even as Python rounds.
std::int64_t rounded(std::int64_t a, std::int64_t b, std::int64_t c) {
    return static_cast<std::int64_t>(
        std::nearbyint(static_cast<double>(a) * static_cast<double>(b) / static_cast<double>(c)));
}

std::string show_size(std::int64_t height, std::int64_t width) {
    return std::to_string(width) + "x" + std::to_string(height);
}

} // namespace

Fitted fit(const Image& image, std::int64_t height, std::int64_t width) {
    const auto wide = std::min(image.width, std::max<std::int64_t>(1, rounded(image.height, width, height)));
    const auto tall = std::min(image.height, std::max<std::int64_t>(1, rounded(image.width, height, width)));
    Fitted made{image, ""};
    std::string done;
    if (tall != image.height || wide != image.width) {
        made.image = crop(image, (image.height - tall) / 2, (image.width - wide) / 2, tall, wide);
        done = "cropped around its centre to " + show_size(tall, wide);
    }
    if (tall != height || wide != width) {
        auto& pixels = made.image.pixels;
        if (wide != width)
            pixels = resize_axis(pixels, tall, wide, width, 3);
        if (tall != height)
            pixels = resize_axis(pixels, 1, tall, height, width * 3);
        made.image.height = height;
        made.image.width = width;
        done += (done.empty() ? "" : " and ") + ("resized to " + show_size(height, width));
    }
    if (!done.empty())
        made.notice = "the image is " + show_size(image.height, image.width) + " pixels: " + done;
    return made;
}

} // namespace nova
