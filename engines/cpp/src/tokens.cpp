#include "tokens.hpp"

#include <cmath>

namespace nova {

std::vector<std::int64_t> set_sizes(std::int64_t num_tokens, std::int64_t num_steps) {
    constexpr double pi = 3.14159265358979323846;
    auto left = [&](std::int64_t step) { // half to even, as numpy rounds
        const double cosine = std::cos(0.5 * pi * static_cast<double>(step) / static_cast<double>(num_steps));
        return static_cast<std::int64_t>(std::nearbyint(cosine * static_cast<double>(num_tokens)));
    };
    std::vector<std::int64_t> sizes;
    for (std::int64_t step = 0; step < num_steps; ++step)
        if (const auto size = left(step) - left(step + 1); size > 0)
            sizes.push_back(size);
    return sizes;
}

std::vector<std::int64_t> token_positions(const Config& config) {
    const auto [rows, columns] = config.token_grid();
    const auto [height, width] = config.latent_size;
    const auto patch = config.patch;
    std::vector<std::int64_t> positions;
    positions.reserve(static_cast<std::size_t>(config.num_tokens() * config.token_dim()));
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column)
            for (std::int64_t y = row * patch; y < (row + 1) * patch; ++y)
                for (std::int64_t x = column * patch; x < (column + 1) * patch; ++x)
                    for (std::int64_t channel = 0; channel < config.latent_channels; ++channel)
                        positions.push_back((channel * height + y) * width + x);
    return positions;
}

Array unpatchify(const std::vector<float>& tokens, std::int64_t batch, const Config& config) {
    const auto [height, width] = config.latent_size;
    const auto positions = token_positions(config);
    Array latents = Array::empty(DType::float32, {batch, config.latent_channels, height, width});
    const float* token = tokens.data();
    for (std::int64_t sample = 0; sample < batch; ++sample) {
        float* to = latents.data<float>() + static_cast<std::size_t>(sample) * positions.size();
        for (const auto position : positions)
            to[position] = *token++;
    }
    return latents;
}

} // namespace nova
