#include "guidance.hpp"

#include <cmath>
#include <string>

#include "errors.hpp"
#include "numbers.hpp"

namespace nova {

void Guidance::check() const {
    const std::pair<const char*, double> given[] = {
        {"guidance_scale", scale},
        {"min_guidance_scale", min_scale.value_or(1.0)},
        {"guidance_trunc", trunc},
        {"guidance_renorm", renorm},
        {"image_guidance_scale", image_scale},
        {"spatiotemporal_guidance_scale", spatiotemporal_scale},
    };
    for (const auto& [name, value] : given)
        if (!std::isfinite(value) || value < 0)
            throw Error(ErrorCode::usage, std::string(name) + " is " + show_number(value) +
                                              "; it must be a number, at least 0");
    if (image_scale > 0 && spatiotemporal_scale > 0)
        throw Error(ErrorCode::usage, "image_guidance_scale and spatiotemporal_guidance_scale both need the "
                                      "third pass; give one");
    if ((image_scale > 0 || spatiotemporal_scale > 0) && scale <= 1)
        throw Error(ErrorCode::usage,
                    "a third guidance pass needs guidance_scale above 1, not " + show_number(scale));
    if (min_scale && *min_scale < 1)
        throw Error(ErrorCode::usage,
                    "min_guidance_scale is " + show_number(*min_scale) + "; it must be at least 1");
    if (renorm > 1)
        throw Error(ErrorCode::usage, "guidance_renorm is " + show_number(renorm) + "; it must be 0 to 1");
}

std::int64_t Guidance::passes() const {
    if (scale <= 1)
        return 1;
    return image_scale > 0 || spatiotemporal_scale > 0 ? 3 : 2;
}

std::vector<int> Guidance::texts() const {
    std::vector<int> which{0, 1, image_scale > 0 ? 1 : 0};
    which.resize(static_cast<std::size_t>(passes()));
    return which;
}

std::vector<bool> Guidance::blanks() const {
    std::vector<bool> which{false, image_scale > 0, false};
    which.resize(static_cast<std::size_t>(passes()));
    return which;
}

double Guidance::scale_at(double progress) const {
    const double least = min_scale.value_or(scale);
    return (scale - least) * progress + least;
}

// Plain: u + g (c - u). Image: u + g (c - i), then + image_scale (i - u), i the pass with neither text nor
// start token. Spatiotemporal: plain, then + scale (c - p). Below `trunc` the conditional pass alone counts.
Guidance::Weights Guidance::weights(double progress, const std::vector<float>& timesteps) const {
    const double g = scale_at(progress);
    std::vector<double> under{g, 1.0 - g}, behind{0.0, 0.0};
    if (passes() == 1) {
        under = {1.0}, behind = {0.0};
    } else if (image_scale > 0) {
        under = {g, 1.0, -g}, behind = {0.0, -image_scale, image_scale};
    } else if (spatiotemporal_scale > 0) {
        under = {g, 1.0 - g, 0.0}, behind = {spatiotemporal_scale, 0.0, -spatiotemporal_scale};
    }
    const auto steps = static_cast<std::int64_t>(timesteps.size());
    Weights made{Array::zeros<float>({steps, passes()}), Array::zeros<float>({steps, passes()}),
                 Array::zeros<float>({steps, 1})};
    const auto width = under.size();
    for (std::size_t t = 0; t < timesteps.size(); ++t) {
        float *row = made.under.data<float>() + t * width, *extra = made.behind.data<float>() + t * width;
        if (width > 1 && static_cast<double>(timesteps[t]) < trunc) {
            row[0] = 1;
            made.renorm.data<float>()[t] = 1;
            continue;
        }
        for (std::size_t pass = 0; pass < width; ++pass) {
            row[pass] = static_cast<float>(under[pass]);
            extra[pass] = static_cast<float>(behind[pass]);
        }
        made.renorm.data<float>()[t] = width > 1 ? static_cast<float>(renorm) : 1.0f;
    }
    return made;
}

} // namespace nova
