#include <thread>

#include "check.hpp"
#include "fakes.hpp"
#include "pipeline.hpp"

using namespace nova;
using nova::test::FakeStages;
using nova::test::small_config;

namespace {

Request request_of(std::int64_t frames, std::uint64_t seed = 1) {
    Request request;
    request.prompt.class_ids = {7};
    request.max_latent_length = frames;
    request.num_inference_steps = 3;
    request.num_diffusion_steps = 4;
    request.seed = seed;
    return request;
}

Output generate(const Config& config, const Request& request, const Listener& listener = {}) {
    FakeStages stages(config);
    return Pipeline(config, stages, std::nullopt, false, std::nullopt).generate(request, listener);
}

} // namespace

TEST(tiles_cover_all_latents) {
    for (std::int64_t overlap : {0, 1})
        for (std::int64_t count = 1; count < 30; ++count) {
            const Tiling tiling{5, overlap, 1, 4};
            std::int64_t frames = 0, covered = 0;
            for (const auto& tile : tiles(tiling, count)) {
                CHECK(tile.start <= covered && tile.stop > covered);
                CHECK(tile.stop - tile.start > 1 || count == 1);
                covered = tile.stop;
                frames += 1 + (tile.stop - tile.start - 1) * 4 - tile.drop;
            }
            CHECK_EQ(covered, count);
            if (overlap) // where tiles share a latent, no frame is lost and none comes twice
                CHECK_EQ(frames, 1 + (count - 1) * 4);
        }
}

TEST(streamed_frames_are_those_of_a_call) {
    const Config config = small_config();
    for (std::int64_t count : {1, 2, 5, 6, 9, 10}) {
        std::vector<std::uint8_t> streamed;
        Listener listener;
        listener.keep_frames = false;
        listener.on_frames = [&](const Frames& frames, std::int64_t first) {
            CHECK_EQ(first * frames.height * frames.width * 3, static_cast<std::int64_t>(streamed.size()));
            streamed.insert(streamed.end(), frames.pixels.begin(), frames.pixels.end());
        };
        CHECK(generate(config, request_of(count), listener).frames.pixels.empty());
        CHECK_EQ(streamed, generate(config, request_of(count)).frames.pixels);
    }
}

TEST(a_tile_is_decoded_before_later_latents_are_made) {
    const Config config = small_config();
    FakeStages stages(config);
    std::vector<std::int64_t> encoded; // latent frames begun when a tile came
    Listener listener;
    listener.on_frames = [&](const Frames&, std::int64_t) {
        encoded.push_back(std::count(stages.calls.begin(), stages.calls.end(), "temporal_encoder"));
    };
    Pipeline(config, stages, std::nullopt, false, std::nullopt).generate(request_of(9), listener);
    CHECK_EQ(encoded, (std::vector<std::int64_t>{5, 9}));
}

TEST(what_a_listener_throws_ends_the_run) {
    const Config config = small_config();
    Listener listener;
    int steps = 0;
    listener.on_step = [&](const Step&) {
        if (++steps == 4)
            throw Error(ErrorCode::cancelled, "enough");
    };
    CHECK_THROWS(generate(config, request_of(3), listener), ErrorCode::cancelled, "enough");
    CHECK_EQ(steps, 4);
}

TEST(latents_that_are_no_numbers_are_no_picture) {
    const Config config = small_config();
    FakeStages stages(config);
    const auto decoder = decoder_of(stages, config, false, std::nullopt);
    for (const float bad : {std::nanf(""), INFINITY}) {
        std::vector<Array> latents(2);
        for (auto& frame : latents)
            frame = Array::zeros<float>({1, 4, 8, 12});
        CHECK_EQ(decode_tile(decoder, latents, {0, 2, 0}).count, 5);
        latents[1].data<float>()[7] = bad;
        CHECK_EQ(decode_tile(decoder, latents, {0, 1, 0}).count, 1);
        CHECK_THROWS(decode_tile(decoder, latents, {0, 2, 0}), ErrorCode::stage,
                     "latent frames 1 to 2 hold NaN or infinity");
    }
}

TEST(lean_statistics_and_tiles_blend_to_the_whole) {
    // A decoder that works on each latent alone gives the same in squares as in one.
    const Config config = small_config();
    FakeStages stages(config);
    Array latents = Array::empty(DType::float32, {1, 4, 2, 8, 12});
    for (std::int64_t i = 0; i < latents.size(); ++i)
        latents.data<float>()[i] = static_cast<float>(i % 17) / 17;
    const auto decoder = decoder_of(stages, config, false, std::nullopt);
    const Array whole = decoder(latents), parts = decode_in_tiles(decoder, 5, latents);
    CHECK_EQ(parts.shape(), whole.shape());
    for (std::int64_t i = 0; i < whole.size(); ++i)
        CHECK(std::abs(whole.data<float>()[i] - parts.data<float>()[i]) < 1e-6f);
    CHECK(stages.calls.size() > 4);
}

TEST(short_vectors_keep_inner_products) {
    for (const std::int64_t values : {0, 3, 50}) {
        const std::int64_t count = 6, batch = 2;
        std::vector<float> noise = TorchGenerator(5).normal(count * batch * values);
        for (std::int64_t i = 0; i < batch * values; ++i)
            noise[static_cast<std::size_t>(3 * batch * values + i)] = 0; // a step that draws none
        const Array made = compress(noise, count, batch, values);
        const auto width = made.shape()[2];
        auto product = [&](const float* data, std::int64_t size, std::int64_t i, std::int64_t j,
                           std::int64_t sample) {
            double sum = 0;
            for (std::int64_t k = 0; k < size; ++k)
                sum += static_cast<double>(data[(i * batch + sample) * size + k]) *
                       static_cast<double>(data[(j * batch + sample) * size + k]);
            return sum;
        };
        for (std::int64_t sample = 0; sample < batch; ++sample)
            for (std::int64_t i = 0; i < count; ++i)
                for (std::int64_t j = 0; j < count; ++j)
                    CHECK(std::abs(product(made.data<float>(), width, i, j, sample) -
                                   product(noise.data(), values, i, j, sample)) < 1e-4);
    }
}

TEST(two_pipelines_in_two_threads_give_what_each_gives_alone) {
    const Config config = small_config();
    const Output alone[] = {generate(config, request_of(6, 1)), generate(config, request_of(6, 2))};
    Output together[2];
    {
        std::thread first([&] { together[0] = generate(config, request_of(6, 1)); });
        std::thread second([&] { together[1] = generate(config, request_of(6, 2)); });
        first.join();
        second.join();
    }
    CHECK(alone[0].frames.pixels != alone[1].frames.pixels);
    for (int i = 0; i < 2; ++i)
        CHECK_EQ(together[i].frames.pixels, alone[i].frames.pixels);
}

int main() {
    return nova::test::run();
}
