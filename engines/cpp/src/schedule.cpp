#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "config.hpp"
#include "errors.hpp"
#include "numbers.hpp"

namespace nova {
namespace {

using Floats = std::vector<float>;

constexpr double pi = 3.14159265358979323846;
constexpr const char* file = "scheduler_config.json: ";

std::optional<Field> find(const Json& config, const char* key) {
    auto field = Field(config, "scheduler_config.json").find(key);
    return field && field->is_null() ? std::nullopt : field;
}

double number(const Json& config, const char* key, double fallback) {
    const auto field = find(config, key);
    return field ? field->number() : fallback;
}

std::string text(const Json& config, const char* key, const char* fallback) {
    const auto field = find(config, key);
    return field ? field->text() : fallback;
}

bool flag(const Json& config, const char* key) {
    const auto field = find(config, key);
    return field && field->boolean();
}

[[noreturn]] void unusable_scheduler(const std::string& what) {
    throw Error(ErrorCode::checkpoint, file + what);
}

std::vector<double> linspace(double first, double last, std::int64_t count) {
    std::vector<double> values(static_cast<std::size_t>(count), first);
    const double step = (last - first) / static_cast<double>(std::max<std::int64_t>(count - 1, 1));
    for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = static_cast<double>(i) * step + first;
    if (count > 1)
        values.back() = last;
    return values;
}

Floats rounded(const std::vector<double>& values) {
    return {values.begin(), values.end()};
}

/// Cumulative products of 1 - beta, accumulated in double as torch does.
Floats cumulative(const Floats& betas) {
    Floats products;
    double product = 1;
    for (const float beta : betas)
        products.push_back(static_cast<float>(product *= static_cast<double>(1.0f - beta)));
    return products;
}

/// 1 - abar(t + 1) / abar(t) of abar = cos^2, capped at 0.999.
Floats cosine_betas(std::int64_t trained) {
    auto alpha_bar = [](double t) {
        const double root = std::cos((t + 0.008) / 1.008 * pi / 2);
        return root * root;
    };
    Floats betas;
    const auto all = static_cast<double>(trained);
    for (double i = 0; i < all; ++i)
        betas.push_back(
            static_cast<float>(std::min(1 - alpha_bar((i + 1) / all) / alpha_bar(i / all), 0.999)));
    return betas;
}

/// arXiv 2305.08891, algorithm 1.
Floats zero_terminal_snr(const Floats& betas) {
    Floats roots = cumulative(betas);
    for (auto& root : roots)
        root = std::sqrt(root);
    const float first = roots.front(), last = roots.back();
    Floats made;
    float before = 1;
    for (const float root : roots) {
        const float scaled = (root - last) * (first / (first - last)), bar = scaled * scaled;
        made.push_back(1.0f - (made.empty() ? bar : bar / before));
        before = bar;
    }
    return made;
}

Floats betas_of(const Json& config, std::int64_t trained) {
    const double first = number(config, "beta_start", 1e-4), last = number(config, "beta_end", 0.02);
    const std::string kind = text(config, "beta_schedule", "linear");
    Floats betas;
    if (const auto given = find(config, "trained_betas")) {
        for (const Field& beta : given->list())
            betas.push_back(static_cast<float>(beta.number()));
        if (static_cast<std::int64_t>(betas.size()) < trained)
            unusable_scheduler("trained_betas has " + std::to_string(betas.size()) + " values for " +
                               std::to_string(trained) + " steps");
    } else if (kind == "linear") {
        betas = rounded(linspace(first, last, trained));
    } else if (kind == "scaled_linear") {
        betas = rounded(linspace(std::sqrt(first), std::sqrt(last), trained));
        for (auto& beta : betas)
            beta *= beta;
    } else if (kind == "squaredcos_cap_v2") {
        betas = cosine_betas(trained);
    } else if (kind == "sigmoid") {
        for (const double x : linspace(-6, 6, trained))
            betas.push_back(static_cast<float>(1 / (1 + std::exp(-x))) * static_cast<float>(last - first) +
                            static_cast<float>(first));
    } else {
        unusable_scheduler("beta_schedule '" + kind + "' is unknown");
    }
    return flag(config, "rescale_betas_zero_snr") ? zero_terminal_snr(betas) : betas;
}

/// Table 2 of arXiv 2305.08891, highest first.
std::vector<std::int64_t> timesteps_of(const Json& config, std::int64_t trained, std::int64_t num_steps) {
    const std::string spacing = text(config, "timestep_spacing", "leading");
    std::vector<std::int64_t> steps;
    const auto most = static_cast<double>(trained);
    if (spacing == "linspace") {
        for (const double step : linspace(0, most - 1, num_steps))
            steps.push_back(static_cast<std::int64_t>(std::nearbyint(step)));
        std::reverse(steps.begin(), steps.end());
    } else if (spacing == "leading") {
        const auto offset = static_cast<std::int64_t>(number(config, "steps_offset", 0));
        for (std::int64_t i = num_steps - 1; i >= 0; --i)
            steps.push_back(i * (trained / num_steps) + offset);
    } else if (spacing == "trailing") {
        // The step as numpy's arange comes by it.
        const double step = (most - most / static_cast<double>(num_steps)) - most;
        for (std::int64_t i = 0; i < num_steps; ++i)
            steps.push_back(static_cast<std::int64_t>(std::nearbyint(most + static_cast<double>(i) * step)) -
                            1);
    } else {
        unusable_scheduler("timestep_spacing '" + spacing + "' is none of linspace, leading, trailing");
    }
    if (*std::max_element(steps.begin(), steps.end()) >= trained)
        throw Error(ErrorCode::usage, std::to_string(num_steps) + " diffusion steps with steps_offset " +
                                          show_number(number(config, "steps_offset", 0)) + " pass step " +
                                          std::to_string(trained));
    return steps;
}

double noise_scale(const Json& config, double variance, double step_beta) {
    const std::string kind = text(config, "variance_type", "fixed_small");
    if (kind != "fixed_small" && kind != "fixed_small_log" && kind != "fixed_large")
        unusable_scheduler("variance_type '" + kind + "' " +
                           (kind == "fixed_large_log" ? "is the root of a negative number"
                                                      : "needs a head that predicts it") +
                           "; use one of fixed_small, fixed_small_log, fixed_large");
    return std::sqrt(kind == "fixed_large" ? step_beta : variance);
}

/// (a, b, s) of one step, from alphas' cumulative products (arXiv 2006.11239 eq. 7, x_0 from the prediction).
void ddpm_step(const Json& config, const Floats& alphas, std::int64_t t, std::int64_t previous_t,
               float* row) {
    const float alpha = alphas[static_cast<std::size_t>(t)];
    const float previous = previous_t >= 0 ? alphas[static_cast<std::size_t>(previous_t)] : 1.0f;
    const float beta = 1.0f - alpha, step_alpha = alpha / previous, step_beta = 1.0f - step_alpha;
    const float to_sample = std::sqrt(previous) * step_beta / beta;
    const float keep = std::sqrt(step_alpha) * (1.0f - previous) / beta;
    const std::string kind = text(config, "prediction_type", "epsilon");
    if (kind == "epsilon") {
        if (!(alpha > 0))
            unusable_scheduler("rescale_betas_zero_snr leaves no signal at timestep " + std::to_string(t) +
                               ", where an epsilon prediction says nothing about the sample; it needs v_prediction, or "
                               "timestep_spacing 'leading'");
        row[0] = to_sample / std::sqrt(alpha) + keep;
        row[1] = -to_sample * std::sqrt(beta) / std::sqrt(alpha);
    } else if (kind == "sample") {
        row[0] = keep;
        row[1] = to_sample;
    } else if (kind == "v_prediction") {
        row[0] = to_sample * std::sqrt(alpha) + keep;
        row[1] = -to_sample * std::sqrt(beta);
    } else {
        unusable_scheduler("prediction_type '" + kind + "' is none of epsilon, sample, v_prediction");
    }
    const auto variance = std::max(static_cast<double>((1.0f - previous) / beta * step_beta), 1e-20);
    row[2] = t > 0 ? static_cast<float>(noise_scale(config, variance, static_cast<double>(step_beta))) : 0.0f;
}

Schedule ddpm(const Json& config, std::int64_t trained, std::int64_t num_steps) {
    const Floats alphas = cumulative(betas_of(config, trained));
    Schedule schedule{{}, Array::empty(DType::float32, {num_steps, 3}), {}};
    float* row = schedule.coefficients.data<float>();
    for (const auto t : timesteps_of(config, trained, num_steps)) {
        ddpm_step(config, alphas, t, t - trained / num_steps, row);
        row += 3;
        schedule.timesteps.push_back(static_cast<float>(t));
        schedule.draws_noise.push_back(t > 0);
    }
    return schedule;
}

float shifted(float sigma, double shift) {
    return static_cast<float>(shift) * sigma / (1 + static_cast<float>(shift - 1) * sigma);
}

/// Sigmas from 1 to sigma_min, shifted, then 0; x' = x + (next sigma - sigma) * velocity.
Schedule flow_matching(const Json& config, std::int64_t trained, std::int64_t num_steps, double shift) {
    if (flag(config, "use_dynamic_shifting"))
        throw Error(ErrorCode::checkpoint,
                    "scheduler_config.json has use_dynamic_shifting, which NOVA's pipeline "
                    "gives no size for");
    const auto all = static_cast<float>(trained);
    const double trained_shift = number(config, "shift", 1.0);
    auto bound = [&](float step) { return static_cast<double>(shifted(step / all, trained_shift) * all); };
    Floats sigmas = rounded(linspace(bound(all), bound(1), num_steps));
    for (auto& sigma : sigmas)
        sigma = shifted(sigma / all, shift > 0 ? shift : trained_shift);
    Schedule schedule{{}, Array::zeros<float>({num_steps, 3}), std::vector<bool>(sigmas.size(), false)};
    for (std::size_t i = 0; i < sigmas.size(); ++i) {
        float* row = schedule.coefficients.data<float>() + 3 * i;
        row[0] = 1;
        row[1] = (i + 1 < sigmas.size() ? sigmas[i + 1] : 0.0f) - sigmas[i];
        schedule.timesteps.push_back(sigmas[i] * all);
    }
    return schedule;
}

} // namespace

Schedule make_schedule(const Json& config, std::int64_t num_steps, std::optional<double> flow_shift) {
    const auto trained = static_cast<std::int64_t>(number(config, "num_train_timesteps", 1000));
    if (num_steps < 1 || num_steps > trained)
        throw Error(ErrorCode::usage, "num_diffusion_steps is " + std::to_string(num_steps) +
                                          "; it must be 1 to " + std::to_string(trained));
    if (flow_shift && !(std::isfinite(*flow_shift) && *flow_shift >= 0))
        throw Error(ErrorCode::usage, "flow_shift is " + show_number(*flow_shift) +
                                          "; it must be above 0, or 0 for the checkpoint's own");
    const std::string kind = text(config, "_class_name", "None");
    if (kind.rfind("FlowMatchEulerDiscrete", 0) == 0)
        return flow_matching(config, trained, num_steps, flow_shift.value_or(0));
    if (kind != "DDPMScheduler")
        throw Error(ErrorCode::checkpoint, "scheduler '" + kind +
                                               "' is unknown; NOVA has DDPMScheduler and "
                                               "FlowMatchEulerDiscreteScheduler");
    if (flow_shift && *flow_shift > 0)
        throw Error(ErrorCode::usage,
                    "flow_shift is for flow-matching checkpoints; this one has a DDPM scheduler");
    return ddpm(config, trained, num_steps);
}

Array Schedule::frequencies() const {
    constexpr std::int64_t half = nova::frequencies / 2;
    const auto step = static_cast<float>(-std::log(10000.0) / static_cast<double>(half));
    Array made = Array::empty(DType::float32, {static_cast<std::int64_t>(timesteps.size()), 2 * half});
    float* row = made.data<float>();
    for (const float timestep : timesteps) {
        for (std::int64_t i = 0; i < half; ++i) {
            // Rounded at the points where the published code rounds; exact in between.
            const auto frequency =
                static_cast<float>(std::exp(static_cast<double>(static_cast<float>(i) * step)));
            const auto angle = static_cast<double>(timestep * frequency);
            row[i] = static_cast<float>(std::cos(angle));
            row[half + i] = static_cast<float>(std::sin(angle));
        }
        row += 2 * half;
    }
    return made;
}

} // namespace nova
