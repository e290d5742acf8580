#include "decode.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"

namespace nova {
namespace {

constexpr std::int64_t overlap = 4; // neighbours share at least the side divided by this

/// [-1, 1] to a byte, truncated as the published pipeline does.
std::uint8_t to_byte(float pixel) {
    const float scaled = pixel * 127.5f + 127.5f;
    return static_cast<std::uint8_t>(scaled > 0 ? std::min(scaled, 255.0f) : 0.0f);
}

/// Error(stage) for what are no numbers: they would be black frames.
void check_numbers(const std::vector<Array>& latents, const Tile& tile) {
    for (auto frame = tile.start; frame < tile.stop; ++frame) {
        const Array& array = latents[static_cast<std::size_t>(frame)];
        const float* values = array.data<float>();
        if (!std::all_of(values, values + array.size(), [](float value) { return std::isfinite(value); }))
            throw Error(ErrorCode::stage,
                        "latent frames " + std::to_string(tile.start + 1) + " to " +
                            std::to_string(tile.stop) +
                            " hold NaN or infinity: lower guidance_scale and other numbers "
                            "given, or build the bundle in a precision that does not overflow");
    }
}

/// Weights of pixels along a side: they rise over `ramp` pixels from either end.
std::vector<float> tent(std::int64_t size, std::int64_t ramp) {
    std::vector<float> weights;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto index = static_cast<float>(i) + 0.5f;
        weights.push_back(std::min(
            {index, static_cast<float>(size) - index, static_cast<float>(std::max<std::int64_t>(ramp, 1))}));
    }
    return weights;
}

/// Latents (1, C, l, h, w) cut to (1, C, l, tall, wide).
Array crop(const Array& latents, std::int64_t top, std::int64_t left, std::int64_t side) {
    const Shape& shape = latents.shape();
    const auto height = shape[3], width = shape[4];
    const auto tall = std::min(side, height - top), wide = std::min(side, width - left);
    Array made = Array::empty(DType::float32, {shape[0], shape[1], shape[2], tall, wide});
    float* to = made.data<float>();
    const auto planes = shape[0] * shape[1] * shape[2];
    for (std::int64_t plane = 0; plane < planes; ++plane)
        for (std::int64_t row = 0; row < tall; ++row)
            to = std::copy_n(latents.data<float>() + (plane * height + top + row) * width + left, wide, to);
    return made;
}

} // namespace

std::vector<Tile> tiles(const Tiling& tiling, std::int64_t num_latents) {
    std::vector<Tile> made;
    for (std::int64_t start = 0;; start += tiling.latent_frames - tiling.overlap) {
        const auto stop = std::min(start + tiling.latent_frames, num_latents);
        if (start && tiling.drop && stop - start == 1)
            --start;
        made.push_back({start, stop, start ? tiling.drop : 0});
        if (stop == num_latents)
            return made;
    }
}

Decoder decoder_of(Stages& stages, const Config& config, bool lean_decode,
                   std::optional<std::int64_t> vae_tile) {
    Decoder decoder = [&stages](const Array& latents) {
        return stages.run("vae_decoder", {{"latents", latents}}, Place::host).at("pixels");
    };
    if (lean_decode)
        decoder = [&stages, pieces = lean_pieces(config)](const Array& latents) {
            return decode_lean(stages, pieces, latents);
        };
    if (!vae_tile)
        return decoder;
    return
        [decoder, side = *vae_tile](const Array& latents) { return decode_in_tiles(decoder, side, latents); };
}

Frames decode_tile(const Decoder& decoder, const std::vector<Array>& latents, const Tile& tile) {
    const Shape& shape = latents.front().shape(); // (B, C, h, w)
    const auto batch = shape[0], channels = shape[1], plane = shape[2] * shape[3],
               length = tile.stop - tile.start;
    check_numbers(latents, tile);
    Frames frames;
    frames.batch = batch;
    for (std::int64_t sample = 0; sample < batch; ++sample) {
        Array input = Array::empty(DType::float32, {1, channels, length, shape[2], shape[3]});
        float* to = input.data<float>();
        for (std::int64_t channel = 0; channel < channels; ++channel)
            for (auto frame = tile.start; frame < tile.stop; ++frame)
                to = std::copy_n(latents[static_cast<std::size_t>(frame)].data<float>() +
                                     (sample * channels + channel) * plane,
                                 plane, to);
        const Array pixels = decoder(input); // (1, 3, F, H, W)
        frames.count = pixels.shape()[2] - tile.drop;
        frames.height = pixels.shape()[3];
        frames.width = pixels.shape()[4];
        const auto area = frames.height * frames.width, colour = pixels.shape()[2] * area;
        frames.pixels.reserve(static_cast<std::size_t>(batch * frames.count * area * 3));
        const float* from = pixels.data<float>() + tile.drop * area;
        for (std::int64_t at = 0; at < frames.count * area; ++at)
            for (std::int64_t channel = 0; channel < 3; ++channel)
                frames.pixels.push_back(to_byte(from[channel * colour + at]));
    }
    return frames;
}

std::vector<std::int64_t> tile_starts(std::int64_t size, std::int64_t side) {
    if (size <= side)
        return {0};
    const auto stride = std::max<std::int64_t>(1, side - std::max<std::int64_t>(1, side / overlap));
    const auto count = (size - side + stride - 1) / stride + 1;
    std::vector<std::int64_t> starts;
    for (std::int64_t i = 0; i < count; ++i) // half to even, as Python rounds
        starts.push_back(static_cast<std::int64_t>(
            std::nearbyint(static_cast<double>(i * (size - side)) / static_cast<double>(count - 1))));
    return starts;
}

Array decode_in_tiles(const Decoder& decoder, std::int64_t side, const Array& latents) {
    const auto height = latents.shape()[3], width = latents.shape()[4];
    if (side >= std::max(height, width))
        return decoder(latents);
    Array pixels;
    std::vector<float> weights;
    for (const auto top : tile_starts(height, side))
        for (const auto left : tile_starts(width, side)) {
            const Array part = decoder(crop(latents, top, left, side));
            const auto planes = part.shape()[1] * part.shape()[2], tall = part.shape()[3],
                       wide = part.shape()[4];
            const auto scale = tall / std::min(side, height), full = width * scale;
            if (weights.empty()) {
                pixels = Array::zeros<float>({1, part.shape()[1], part.shape()[2], height * scale, full});
                weights.resize(static_cast<std::size_t>(height * scale * full));
            }
            const auto down = tent(tall, side * scale / overlap), across = tent(wide, side * scale / overlap);
            for (std::int64_t y = 0; y < tall; ++y)
                for (std::int64_t x = 0; x < wide; ++x) {
                    const float weight =
                        down[static_cast<std::size_t>(y)] * across[static_cast<std::size_t>(x)];
                    const auto at = (top * scale + y) * full + left * scale + x;
                    weights[static_cast<std::size_t>(at)] += weight;
                    for (std::int64_t plane = 0; plane < planes; ++plane)
                        pixels.data<float>()[plane * height * scale * full + at] +=
                            part.data<float>()[(plane * tall + y) * wide + x] * weight;
                }
        }
    for (std::int64_t at = 0; at < pixels.size(); ++at)
        pixels.data<float>()[at] /= weights[static_cast<std::size_t>(at) % weights.size()];
    return pixels;
}

} // namespace nova
