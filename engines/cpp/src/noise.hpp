// The draws of torch's CPU generator: same seed, same noise as the Python runtime, bit for bit.
// What the streams are: nova_export/runtime/noise.py.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace nova {

/// MT19937, seeded and drawn as std::mt19937, many draws at once.
class MersenneTwister {
  public:
    explicit MersenneTwister(std::uint32_t seed);
    void draw(std::uint32_t* out, std::size_t count);

  private:
    static constexpr std::size_t length = 624, shift = 397;
    void refill();
    std::array<std::uint32_t, length> state_;
    std::size_t next_ = length;
};

/// `torch.Generator("cpu").manual_seed(seed)`. MT19937 uses the low 32 bits of a seed.
class TorchGenerator {
  public:
    explicit TorchGenerator(std::uint64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}

    /// `torch.rand(size)`.
    std::vector<float> uniform(std::int64_t size);
    /// `torch.randn(size)`.
    std::vector<float> normal(std::int64_t size);
    /// Of each of `steps` normals of `size` values drawn one after another the values at `indices`, row by
    /// row to `out`; only those are transformed. Every index must be 0 to size - 1.
    void normal_steps(std::int64_t size, std::int64_t steps, const std::vector<std::int64_t>& indices,
                      float* out);

  private:
    double scalar_normal();
    MersenneTwister twister_;
    std::optional<double> second_; // the waiting half of a scalar Box-Muller pair
};

} // namespace nova
