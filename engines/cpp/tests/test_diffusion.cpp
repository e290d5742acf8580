#include "check.hpp"
#include "diffusion.hpp"

using namespace nova;

namespace {

/// Its state after a step: a x + noise of the step, of the tokens and of the rest.
class Head : public Stages {
  public:
    explicit Head(Axis steps) {
        spec_.inputs = {{"noise", DType::float32, {"samples"}, ""},
                        {"rest", DType::float32, {"samples"}, ""},
                        {"step_coefficients", DType::float32, {"steps", 3}, ""},
                        {"step_noise", DType::float32, {"steps", "samples"}, ""},
                        {"step_rest_noise", DType::float32, {"steps", "samples"}, ""},
                        {"step_frequencies", DType::float32, {"steps", 1}, ""}};
        spec_.axes = {steps, {"samples", 1, 1, 8}};
    }

    const StageSpec& spec(const std::string&) const override { return spec_; }

    Arrays run(const std::string&, const Arrays& inputs, Place) override {
        check_inputs(spec_, inputs);
        const auto steps = inputs.at("step_coefficients").shape()[0];
        calls.push_back(steps);
        Array x = Array::of<float>({1}, {inputs.at("noise").data<float>()[0]});
        Array rest = Array::of<float>({1}, {inputs.at("rest").data<float>()[0]});
        for (std::int64_t i = 0; i < steps; ++i) {
            const float* row = inputs.at("step_coefficients").data<float>() + i * 3;
            const float eps = inputs.at("step_frequencies").data<float>()[i];
            x.data<float>()[0] = row[0] * x.data<float>()[0] + row[1] * eps +
                                 row[2] * inputs.at("step_noise").data<float>()[i];
            rest.data<float>()[0] = row[0] * rest.data<float>()[0] +
                                    inputs.at("step_rest_noise").data<float>()[i];
            last_eps = eps;
        }
        return {{"denoised", x}, {"next_rest", rest}};
    }

    std::vector<std::int64_t> calls;
    float last_eps = 0;

  private:
    StageSpec spec_;
};

Arrays inputs_of(std::int64_t steps) {
    std::vector<float> coefficients, noise, frequencies;
    for (std::int64_t i = 0; i < steps; ++i) {
        const auto at = static_cast<float>(i);
        coefficients.insert(coefficients.end(), {0.5F + at / 16, 0.25F, 1});
        noise.push_back(1 - at / 4);
        frequencies.push_back(2 + at);
    }
    return {{"noise", Array::of<float>({1}, {3})},
            {"rest", Array::of<float>({1}, {5})},
            {"step_coefficients", Array::of<float>({steps, 3}, coefficients)},
            {"step_noise", Array::of<float>({steps, 1}, noise)},
            {"step_rest_noise", Array::of<float>({steps, 1}, noise)},
            {"step_frequencies", Array::of<float>({steps, 1}, frequencies)}};
}

} // namespace

TEST(an_unrolled_head_does_what_a_loop_does) {
    for (std::int64_t steps : {1, 4, 5, 7, 10}) {
        Head loop({"steps", 1, 25, 1000}), unrolled({"steps", 5, 5, 5});
        const float wanted = denoise(loop, inputs_of(steps)).data<float>()[0];
        CHECK_EQ(loop.calls, std::vector<std::int64_t>{steps});
        CHECK_EQ(denoise(unrolled, inputs_of(steps)).data<float>()[0], wanted);
        CHECK_EQ(unrolled.calls, std::vector<std::int64_t>(static_cast<std::size_t>((steps + 4) / 5), 5));
        CHECK_EQ(unrolled.last_eps, loop.last_eps); // steps that fill up ask for what the last one did
    }
}

TEST(what_the_caller_gave_is_as_it_was) {
    Head unrolled({"steps", 2, 2, 2});
    const Arrays inputs = inputs_of(3);
    denoise(unrolled, inputs);
    CHECK_EQ(inputs.at("noise").data<float>()[0], 3.0F);
    CHECK_EQ(inputs.at("step_noise").shape()[0], 3);
}

int main() {
    return nova::test::run();
}
