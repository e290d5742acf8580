#include <random>

#include "check.hpp"
#include "noise.hpp"

using nova::MersenneTwister;
using nova::TorchGenerator;

TEST(draws_are_those_of_the_standard_library) {
    for (const std::uint32_t seed : {0u, 1u, 5489u, 0xFFFFFFFFu}) {
        std::mt19937 standard(seed);
        MersenneTwister own(seed);
        for (const std::size_t count : {1u, 623u, 1u, 2000u, 17u}) { // within a block, across, many
            std::vector<std::uint32_t> draws(count);
            own.draw(draws.data(), count);
            for (const auto draw : draws)
                CHECK_EQ(draw, standard());
        }
    }
}

TEST(values_at_indices_are_those_of_the_whole_tensor) {
    for (const std::int64_t size :
         {5, 16, 40, 96}) { // one by one, a block, a partial last block, whole blocks
        TorchGenerator whole(3), part(3);
        const std::vector<std::int64_t> indices{size - 1, 0, size / 2, size - 4};
        std::vector<float> drawn(3 * indices.size());
        part.normal_steps(size, 3, indices, drawn.data());
        for (std::size_t step = 0; step < 3; ++step) {
            const auto values = whole.normal(size);
            for (std::size_t i = 0; i < indices.size(); ++i)
                CHECK_EQ(drawn[step * indices.size() + i], values[static_cast<std::size_t>(indices[i])]);
        }
        CHECK_EQ(part.uniform(7), whole.uniform(7)); // both have drawn as much
    }
}

TEST(only_the_low_32_bits_of_a_seed_count) {
    CHECK_EQ(TorchGenerator(7).normal(20), TorchGenerator((std::uint64_t{9} << 32) + 7).normal(20));
}

int main() {
    return nova::test::run();
}
