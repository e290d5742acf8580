/// Latents to frames: video VAEs decode tiles of latent frames, each as soon as its latents are there.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "array.hpp"
#include "config.hpp"
#include "runner.hpp"

namespace nova {

/// Latent frames start..stop, of whose output the first `drop` frames belong to the tile before.
struct Tile {
    std::int64_t start, stop, drop;
};

/// Tiles that cover all latents. A last tile of one latent would lose its only frame to `drop`: it takes the
/// latent before it along.
std::vector<Tile> tiles(const Tiling& tiling, std::int64_t num_latents);

/// Of one tile: latents (1, C, l, h, w) -> pixels (1, 3, F, H, W) in [-1, 1].
using Decoder = std::function<Array(const Array& latents)>;

/// In one stage, or in the pieces of a lean decode. vae_tile: over squares of so many latents a side,
/// blended; none, and exact, over whole frames.
Decoder decoder_of(Stages& stages, const Config& config, bool lean_decode,
                   std::optional<std::int64_t> vae_tile);

/// A tile's frames, uint8 (B, F, H, W, 3), F of them; samples one by one, for decoding is what needs memory.
struct Frames {
    std::int64_t batch = 0, count = 0, height = 0, width = 0;
    std::vector<std::uint8_t> pixels;
};

/// latents: one (B, C, h, w) for each latent frame made so far.
Frames decode_tile(const Decoder& decoder, const std::vector<Array>& latents, const Tile& tile);

/// A decoder over parts of the frame, blended where they overlap; not exact: a group norm's statistics are
/// those of a part.
Array decode_in_tiles(const Decoder& decoder, std::int64_t side, const Array& latents);
std::vector<std::int64_t> tile_starts(std::int64_t size, std::int64_t side);

/// A tile decoded layer by layer, frame by frame. pieces: names of stages, in order. Frames wait in the
/// machine's own memory.
Array decode_lean(Stages& stages, const std::vector<std::string>& pieces, const Array& latents);

} // namespace nova
