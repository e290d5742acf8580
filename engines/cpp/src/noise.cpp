#include "noise.hpp"

#include <cmath>
#include <cstring>
#include <numeric>

namespace nova {
namespace {

constexpr std::int64_t block = 16; // values that torch's vector kernel makes together
constexpr double pi = 3.14159265358979323846;

/// Where the two draws of a value are, and which half of the pair it is.
struct Position {
    std::int64_t radius, angle;
    bool is_sine;
};

Position position_of(std::int64_t index, std::int64_t size) {
    // The last partial block: values size - 16 .. size - 1 come from draws size .. size + 15.
    const bool redrawn = size % block != 0 && index >= size - block;
    const auto lane = redrawn ? index - (size - block) : index % block;
    const auto first = redrawn ? size : index - lane;
    const auto radius = first + lane % (block / 2);
    return {radius, radius + block / 2, lane >= block / 2};
}

std::int64_t draws_of(std::int64_t size) {
    return size % block == 0 ? size : size + block;
}

float unit(std::uint32_t draw) {
    return static_cast<float>(draw & 0xFFFFFF) * 0x1p-24f;
}

// torch's vector kernel takes ln, sin and cos from the single-precision polynomials of Cephes (S. Moshier:
// logf.c, sinf.c), multiply-adds fused. In double a product of two float32s is exact.
float fma32(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}

/// ln x for x in (0, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1.
float log32(float x) {
    static constexpr float terms[] = {
        7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
        -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f,
    };
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int exponent = static_cast<int>(bits >> 23) - 126;
    bits = (bits & 0x7FFFFF) | 0x3F000000;
    float mantissa; // in [1/2, 1)
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    const bool small = mantissa < 0.70710678118654752440f;
    const auto e = static_cast<float>(exponent - small);
    const float m = (mantissa - 1.0f) + (small ? mantissa : 0.0f);
    const float square = m * m;
    float y = fma32(m, terms[0], terms[1]);
    for (std::size_t i = 2; i < std::size(terms); ++i)
        y = fma32(y, m, terms[i]);
    y = fma32(y * m, square, e * -2.12194440e-4f);
    y = fma32(square, -0.5f, y);
    return fma32(e, 0.693359375f, m + y);
}

/// sin or cos of an angle in [0, 2 pi): x = angle - q pi / 2, q the nearest, picks polynomial and sign.
float sine_or_cosine(float angle, bool is_sine) {
    const int quarter = (static_cast<int>(angle * static_cast<float>(4.0 / pi)) + 1) >> 1;
    const auto eighths = static_cast<float>(2 * quarter);
    float x = fma32(eighths, -0.78515625f, angle);
    x = fma32(eighths, -2.4187564849853515625e-4f, x);
    x = fma32(eighths, -3.77489497744594108e-8f, x);
    const float square = x * x;
    const int turn = quarter + !is_sine; // cos(a) = sin(a + pi / 2)
    float value;
    if (turn & 1) {
        value = fma32(fma32(square, 2.443315711809948e-5f, -1.388731625493765e-3f), square,
                      4.166664568298827e-2f);
        value = fma32(value * square, square, -0.5f * square) + 1.0f;
    } else {
        value = fma32(fma32(square, -1.9515295891e-4f, 8.3321608736e-3f), square, -1.6666654611e-1f);
        value = fma32(value * square, x, x);
    }
    return turn & 2 ? -value : value;
}

float box_muller(std::uint32_t radius, std::uint32_t angle, bool is_sine) {
    const float length = std::sqrt(-2.0f * log32(1.0f - unit(radius)));
    return length * sine_or_cosine(static_cast<float>(2.0 * pi) * unit(angle), is_sine);
}

} // namespace

MersenneTwister::MersenneTwister(std::uint32_t seed) {
    state_[0] = seed;
    for (std::uint32_t i = 1; i < length; ++i)
        state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
}

void MersenneTwister::refill() {
    auto mixed = [](std::uint32_t high, std::uint32_t low) {
        const std::uint32_t y = (high & 0x80000000u) | (low & 0x7FFFFFFFu);
        return (y >> 1) ^ ((0u - (y & 1u)) & 0x9908B0DFu);
    };
    auto* s = state_.data();
    for (std::size_t i = 0; i < length - shift; ++i)
        s[i] = s[i + shift] ^ mixed(s[i], s[i + 1]);
    for (std::size_t i = length - shift; i < length - 1; ++i)
        s[i] = s[i + shift - length] ^ mixed(s[i], s[i + 1]);
    s[length - 1] = s[shift - 1] ^ mixed(s[length - 1], s[0]);
    next_ = 0;
}

void MersenneTwister::draw(std::uint32_t* out, std::size_t count) {
    while (count) {
        if (next_ == length)
            refill();
        const auto here = std::min(count, length - next_);
        for (std::size_t i = 0; i < here; ++i) {
            auto y = state_[next_ + i];
            y ^= y >> 11;
            y ^= (y << 7) & 0x9D2C5680u;
            y ^= (y << 15) & 0xEFC60000u;
            out[i] = y ^ (y >> 18);
        }
        next_ += here;
        out += here;
        count -= here;
    }
}

std::vector<float> TorchGenerator::uniform(std::int64_t size) {
    std::vector<std::uint32_t> draws(static_cast<std::size_t>(size));
    twister_.draw(draws.data(), draws.size());
    std::vector<float> values(draws.size());
    for (std::size_t i = 0; i < draws.size(); ++i)
        values[i] = unit(draws[i]);
    return values;
}

std::vector<float> TorchGenerator::normal(std::int64_t size) {
    std::vector<std::int64_t> all(static_cast<std::size_t>(size));
    std::iota(all.begin(), all.end(), 0);
    std::vector<float> values(all.size());
    normal_steps(size, 1, all, values.data());
    return values;
}

void TorchGenerator::normal_steps(std::int64_t size, std::int64_t steps,
                                  const std::vector<std::int64_t>& indices, float* out) {
    if (size < block) { // made one by one
        std::vector<float> values(static_cast<std::size_t>(size));
        for (std::int64_t step = 0; step < steps; ++step) {
            for (auto& value : values)
                value = static_cast<float>(scalar_normal());
            for (const auto index : indices)
                *out++ = values[static_cast<std::size_t>(index)];
        }
        return;
    }
    std::vector<Position> positions;
    positions.reserve(indices.size());
    for (const auto index : indices)
        positions.push_back(position_of(index, size));
    std::vector<std::uint32_t> draws(static_cast<std::size_t>(draws_of(size)));
    for (std::int64_t step = 0; step < steps; ++step) {
        twister_.draw(draws.data(), draws.size());
        for (const auto& at : positions)
            *out++ = box_muller(draws[static_cast<std::size_t>(at.radius)],
                                draws[static_cast<std::size_t>(at.angle)], at.is_sine);
    }
}

double TorchGenerator::scalar_normal() {
    if (second_) {
        const double value = *second_;
        second_.reset();
        return value;
    }
    std::uint32_t words[4]; // (high, low) of the angle, then of the radius
    twister_.draw(words, 4);
    auto uniform = [&](int first) {
        const auto both = static_cast<std::uint64_t>(words[first]) << 32 | words[first + 1];
        return static_cast<double>(both & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
    };
    const double angle = 2.0 * pi * uniform(0), length = std::sqrt(-2.0 * std::log1p(-uniform(2)));
    second_ = length * std::sin(angle);
    return length * std::cos(angle);
}

} // namespace nova
