// nova_noise SEED (uniform SIZE | normal SIZE | steps SIZE STEPS)...: draws one after another, as float32 to
// stdout.
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <string>

#include "noise.hpp"

int main(int argc, char** argv) {
    if (argc < 2)
        return 2;
    nova::TorchGenerator generator(static_cast<std::uint64_t>(std::stoll(argv[1])));
    for (int i = 2; i + 1 < argc; i += 2) {
        const std::string kind = argv[i];
        const auto size = std::atoll(argv[i + 1]);
        std::vector<float> values;
        if (kind == "uniform") {
            values = generator.uniform(size);
        } else if (kind == "normal") {
            values = generator.normal(size);
        } else { // every third value of each step
            const auto steps = std::atoll(argv[++i + 1]);
            std::vector<std::int64_t> indices;
            for (std::int64_t at = 0; at < size; at += 3)
                indices.push_back(at);
            values.resize(indices.size() * static_cast<std::size_t>(steps));
            generator.normal_steps(size, steps, indices, values.data());
        }
        std::cout.write(reinterpret_cast<const char*>(values.data()),
                        static_cast<std::streamsize>(values.size() * sizeof(float)));
    }
    return 0;
}
