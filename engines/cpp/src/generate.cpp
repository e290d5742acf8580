#include "generate.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "diffusion.hpp"
#include "tokens.hpp"

namespace nova {
namespace {

using Ints = std::vector<std::int64_t>;
using Floats = std::vector<float>;

/// `array` `times` times one behind the other, along the first axis.
Array tile(const Array& array, std::int64_t times) {
    if (times == 1)
        return array;
    Shape shape = array.shape();
    shape[0] *= times;
    Array made = Array::empty(array.dtype(), std::move(shape));
    auto* to = static_cast<std::byte*>(made.raw());
    for (std::int64_t i = 0; i < times; ++i, to += array.bytes())
        std::memcpy(to, array.raw(), array.bytes());
    return made;
}

/// What the temporal encoder keeps between frames: caches, how many rows are filled, frame 0's context.
struct TemporalState {
    Arrays caches;
    std::int64_t filled = 0;
    Array first_context, empty_text;

    explicit TemporalState(const Plan& plan) {
        const auto& config = plan.config;
        const auto width = config.temporal.width;
        const auto capacity = config.condition_tokens() + plan.num_frames * config.frame_tokens();
        for (const auto& name : cache_names(config))
            caches[name] = Array::zeros<float>({plan.rows(), capacity, width});
        empty_text = Array::zeros<float>({plan.rows(), 0, width});
        if (config.mixer_rank)
            first_context = Array::zeros<float>({plan.rows(), config.frame_tokens(), width});
    }
};

/// The loops of one video.
class Generation {
  public:
    Generation(const Plan& plan, Stages& stages, TorchGenerator& generator,
               const std::function<void(const Step&)>& on_step)
        : plan_(plan), config_(plan.config), stages_(stages), generator_(generator), on_step_(on_step),
          sizes_(set_sizes(config_.num_tokens(), plan.num_inference_steps)),
          positions_(token_positions(config_)), frequencies_(plan.schedule.frequencies()) {}

    void run(const Array& condition, const std::optional<Array>& first_frame) {
        TemporalState state(plan_);
        Array latents = Array::zeros<float>(frame_shape());
        for (std::int64_t frame = 0; frame < plan_.num_frames; ++frame) {
            // 1. What the frames before say about this one.
            const Array context = encode_frame(state, frame, condition, latents);
            if (frame == 0 && first_frame) {
                latents = *first_frame;
                continue;
            }
            // 2. One random order for the whole video, drawn at the first step of the first generated frame.
            if (order_.empty())
                draw_order();
            // 3. The frame, set by set.
            latents = generate_frame(context, frame);
        }
    }

  private:
    Shape frame_shape() const {
        return {plan_.batch, config_.latent_channels, config_.latent_size[0], config_.latent_size[1]};
    }

    void draw_order() {
        const auto tokens = static_cast<std::size_t>(config_.num_tokens());
        const Floats uniform = generator_.uniform(plan_.batch * config_.num_tokens());
        for (std::size_t sample = 0; sample < static_cast<std::size_t>(plan_.batch); ++sample) {
            const float* keys = uniform.data() + sample * tokens;
            Ints order(tokens);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return keys[a] < keys[b]; });
            order_.push_back(std::move(order));
        }
    }

    /// The frame's context (rows, M, D). Advances `state` by the rows that this call wrote to the caches.
    Array encode_frame(TemporalState& state, std::int64_t frame, const Array& condition,
                       const Array& previous) {
        const auto stretch = static_cast<double>(plan_.num_frames) / static_cast<double>(config_.base_frames);
        const float position = config_.rotary ? static_cast<float>(frame)
                                              : static_cast<float>(frame) / static_cast<float>(stretch);
        Array is_blank = Array::zeros<bool>({plan_.rows()});
        for (std::int64_t row = 0; row < plan_.rows(); ++row)
            is_blank.data<bool>()[row] = plan_.guidance.blanks()[static_cast<std::size_t>(row / plan_.batch)];
        const Array& text = frame == 0 ? condition : state.empty_text;
        Arrays inputs = state.caches;
        inputs["text"] = text;
        inputs["latents"] = tile(previous, plan_.guidance.passes());
        inputs["is_blank"] = is_blank;
        inputs["frame_position"] = Array::of<float>({1}, {position});
        inputs["cache_length"] = Array::of<std::int64_t>({1}, {state.filled});
        if (config_.mixer_rank)
            inputs["first_context"] = state.first_context;
        Arrays outputs = stages_.run("temporal_encoder", inputs, Place::device);
        for (auto& [name, cache] : state.caches)
            cache = outputs.at("new_" + name);
        state.filled += text.shape()[1] + config_.frame_tokens();
        if (frame == 0)
            state.first_context = outputs.at("context");
        return outputs.at("context");
    }

    /// A frame starts from zero latents with all N tokens masked. Returns its latents (B, C, h, w).
    Array generate_frame(const Array& context, std::int64_t frame) {
        const auto passes = plan_.guidance.passes(), dim = config_.token_dim();
        Floats tokens(static_cast<std::size_t>(plan_.batch * config_.num_tokens() * dim));
        const auto steps = static_cast<std::int64_t>(sizes_.size());
        std::int64_t known = 0;
        Array latents;
        for (std::int64_t index = 0; index < steps; ++index) {
            const auto size = sizes_[static_cast<std::size_t>(index)];
            // 1. z of the next K tokens, from the P known ones.
            Arrays outputs = stages_.run("spatial_encoder",
                                         {{"context", context},
                                          {"tokens", tile(take(tokens, known), passes)},
                                          {"predicted_ids", tile(ids(0, known), passes)},
                                          {"next_ids", tile(ids(known, size), passes)}},
                                         Place::device);
            const Array& z = outputs.at("z");
            // 2. All diffusion steps of these tokens.
            Arrays inputs = draw_noise(known, size);
            inputs["z"] = z.reshape({passes, plan_.batch, size, z.shape()[2]});
            add_tables(inputs, static_cast<double>(index + 1) / static_cast<double>(steps));
            const Array denoised = denoise(stages_, std::move(inputs));
            // 3. Into the frame.
            put(denoised, tokens, known, size);
            known += size;
            latents = unpatchify(tokens, plan_.batch, config_);
            on_step_({frame, plan_.num_frames, index, steps, latents});
        }
        return latents;
    }

    /// Ids (B, count) of the tokens `first`.. in each sample's order.
    Array ids(std::int64_t first, std::int64_t count) const {
        Array made = Array::empty(DType::int64, {plan_.batch, count});
        auto* to = made.data<std::int64_t>();
        for (const auto& order : order_)
            to = std::copy_n(order.begin() + first, count, to);
        return made;
    }

    /// The first `count` tokens of each sample's order: (B, count, d).
    Array take(const Floats& tokens, std::int64_t count) const {
        const auto dim = config_.token_dim();
        Array made = Array::empty(DType::float32, {plan_.batch, count, dim});
        float* to = made.data<float>();
        for (std::int64_t sample = 0; sample < plan_.batch; ++sample)
            for (std::int64_t i = 0; i < count; ++i)
                to = std::copy_n(tokens.begin() + token_at(sample, i) * dim, dim, to);
        return made;
    }

    void put(const Array& values, Floats& tokens, std::int64_t first, std::int64_t count) const {
        const auto dim = config_.token_dim();
        const float* from = values.data<float>();
        for (std::int64_t sample = 0; sample < plan_.batch; ++sample)
            for (std::int64_t i = first; i < first + count; ++i, from += dim)
                std::copy_n(from, dim, tokens.begin() + token_at(sample, i) * dim);
    }

    /// Where the i-th token in a sample's order stands among all samples' tokens.
    std::int64_t token_at(std::int64_t sample, std::int64_t i) const {
        return sample * config_.num_tokens() +
               order_[static_cast<std::size_t>(sample)][static_cast<std::size_t>(i)];
    }

    void add_tables(Arrays& inputs, double progress) const {
        const auto weights = plan_.guidance.weights(progress, plan_.schedule.timesteps);
        inputs["step_coefficients"] = plan_.schedule.coefficients;
        inputs["step_frequencies"] = frequencies_;
        inputs["step_guidance"] = weights.under;
        inputs["step_extra_guidance"] = weights.behind;
        inputs["step_renorm"] = weights.renorm;
    }

    /// Noise as the published pipeline draws it: of the full latent shape, though only K chosen tokens use
    /// it.
    ///
    /// `rest` and `step_rest_noise` stand for all other tokens' noise, where guidance_renorm takes their
    /// norm.
    Arrays draw_noise(std::int64_t known, std::int64_t count) {
        const auto steps = static_cast<std::int64_t>(plan_.schedule.timesteps.size()), batch = plan_.batch;
        const bool needs_rest = plan_.guidance.passes() > 1 && plan_.guidance.renorm < 1;
        const auto used = batch * count * config_.token_dim();
        const auto rest = needs_rest ? batch * (config_.num_tokens() - count) * config_.token_dim() : 0;
        const Floats draws = draw_steps(noise_positions(known, count, needs_rest), steps);

        Array noise = Array::empty(DType::float32, {steps + 1, batch, count, config_.token_dim()});
        Floats rest_noise(static_cast<std::size_t>((steps + 1) * rest));
        const float* from = draws.data();
        float *to = noise.data<float>(), *to_rest = rest_noise.data();
        for (std::int64_t step = 0; step <= steps; ++step, from += used + rest) {
            to = std::copy_n(from, used, to);
            to_rest = std::copy_n(from + used, rest, to_rest);
        }
        const Array short_rest = needs_rest ? compress(rest_noise, steps + 1, batch, rest / batch)
                                            : Array::zeros<float>({steps + 1, batch, 1});
        const auto width = short_rest.shape()[2];
        return {
            {"noise", noise.rows(0, 1).reshape({batch, count, config_.token_dim()})},
            {"step_noise", noise.rows(1, steps)},
            {"rest", short_rest.rows(0, 1).reshape({batch, width})},
            {"step_rest_noise", short_rest.rows(1, steps)},
        };
    }

    /// Where the values of the chosen tokens stand in flat latents (B, C, h, w), then, if wanted, of all
    /// others.
    Ints noise_positions(std::int64_t known, std::int64_t count, bool with_rest) const {
        const auto dim = config_.token_dim(), tokens = config_.num_tokens();
        Ints made;
        auto add = [&](bool chosen) {
            for (std::int64_t sample = 0; sample < plan_.batch; ++sample)
                for (std::int64_t i = 0; i < tokens; ++i) {
                    if ((known <= i && i < known + count) != chosen)
                        continue;
                    const auto token = order_[static_cast<std::size_t>(sample)][static_cast<std::size_t>(i)];
                    const auto first = positions_.begin() + token * dim;
                    std::transform(first, first + dim, std::back_inserter(made),
                                   [&](auto position) { return sample * tokens * dim + position; });
                }
        };
        add(true);
        if (with_rest)
            add(false);
        return made;
    }

    /// Row 0: the start; then one row a diffusion step, zero where the schedule draws none.
    Floats draw_steps(const Ints& positions, std::int64_t steps) {
        const auto size = plan_.batch * config_.num_tokens() * config_.token_dim();
        Floats draws(static_cast<std::size_t>(steps + 1) * positions.size());
        float* row = draws.data();
        generator_.normal_steps(size, 1, positions, row);
        for (const bool draws_noise : plan_.schedule.draws_noise) {
            row += positions.size();
            if (draws_noise)
                generator_.normal_steps(size, 1, positions, row);
        }
        return draws;
    }

    const Plan& plan_;
    const Config& config_;
    Stages& stages_;
    TorchGenerator& generator_;
    const std::function<void(const Step&)>& on_step_;
    const Ints sizes_, positions_;
    const Array frequencies_;
    std::vector<Ints> order_; // of each sample's tokens
};

/// L (n, n), lower, with L L^T = gram, which has no negative eigenvalue; in place.
void cholesky(std::vector<double>& gram, std::size_t n) {
    for (std::size_t column = 0; column < n; ++column) {
        double* pivot_row = gram.data() + column * n;
        const double before = pivot_row[column];
        double pivot = before;
        for (std::size_t k = 0; k < column; ++k)
            pivot -= pivot_row[k] * pivot_row[k];
        // A vector that those before it span leaves nothing of its own.
        const double root = pivot > 1e-12 * before ? std::sqrt(pivot) : 0.0;
        pivot_row[column] = root;
        for (std::size_t row = column + 1; row < n; ++row) {
            double* at = gram.data() + row * n;
            double value = at[column];
            for (std::size_t k = 0; k < column; ++k)
                value -= at[k] * pivot_row[k];
            at[column] = root > 0 ? value / root : 0.0;
        }
    }
}

} // namespace

Array compress(const Floats& noise, std::int64_t count, std::int64_t batch, std::int64_t values) {
    const auto n = static_cast<std::size_t>(count), wide = static_cast<std::size_t>(values);
    const auto samples = static_cast<std::size_t>(batch), width = std::max<std::size_t>(std::min(n, wide), 1);
    Array made = Array::zeros<float>({count, batch, static_cast<std::int64_t>(width)});
    if (wide <= n) { // as short already
        std::copy(noise.begin(), noise.end(), made.data<float>());
        return made;
    }
    for (std::size_t sample = 0; sample < samples; ++sample) {
        auto row = [&](std::size_t i) { return noise.data() + (i * samples + sample) * wide; };
        std::vector<double> gram(n * n);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j)
                gram[i * n + j] = std::inner_product(row(i), row(i) + wide, row(j), 0.0, std::plus<>(),
                                                     [](float a, float b) { return double{a} * double{b}; });
        cholesky(gram, n);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j)
                made.data<float>()[(i * samples + sample) * width + j] = static_cast<float>(gram[i * n + j]);
    }
    return made;
}

void generate_latents(const Plan& plan, Stages& stages, const Array& condition, TorchGenerator& generator,
                      const std::optional<Array>& first_frame,
                      const std::function<void(const Step&)>& on_step) {
    Generation(plan, stages, generator, on_step).run(condition, first_frame);
}

} // namespace nova
