#include "config.hpp"

#include <algorithm>
#include <cmath>

#include "text.hpp"

namespace nova {

namespace {

constexpr std::int64_t max_size = 1 << 20; // of anything in a config
constexpr std::size_t max_blocks = 16;     // of an autoencoder
constexpr std::int64_t max_layers = 64;    // of one of its blocks
constexpr std::size_t lean_blocks = 2;     // as in nova_export/lean_stages.py
constexpr const char* lean_family = "AutoencoderKLOpenSora";

struct Family {
    const char* name;
    std::int64_t latent_frames, overlap, drop;
};
constexpr Family families[] = {
    {"AutoencoderKL", 1, 0, 0},
    {"AutoencoderKLOpenSora", 5, 1, 1},
    {"AutoencoderKLCogVideoX", 5, 0, 1},
    {"AutoencoderKLLTXVideo", 32, 0, 1},
};

std::string pair_of(std::int64_t first, std::int64_t second) {
    return "(" + std::to_string(first) + ", " + std::to_string(second) + ")";
}

/// A whole number of a config.
std::int64_t size_of(const Field& field, std::int64_t least = 0) {
    const std::int64_t size = field.whole();
    if (size < least || size > max_size) {
        field.wrong((std::to_string(least) + " to " + std::to_string(max_size)).c_str());
    }
    return size;
}

std::array<std::int64_t, 2> sizes_of(const Field& field) {
    const auto pair = field.pair();
    const auto fields = field.list();
    for (const Field& each : fields) size_of(each, 1);
    return {pair[0], pair[1]};
}

std::optional<std::int64_t> optional_size(const Field& field, std::int64_t least) {
    if (field.is_null()) return std::nullopt;
    field.whole("a whole number or null");
    return size_of(field, least);
}

Vit arch_of(const Field& field) {
    const auto values = sizes_of(field);
    return {values[0], values[1]};
}

/// How many blocks the autoencoder has.
std::size_t blocks_of(const Json& vae) {
    const auto found = vae.find("block_out_channels");
    return found == vae.end() ? 4 : found->size();
}

void check_vae(const Field& vae, const Config& config) {
    const auto family = vae.find("_class_name");
    const auto known = [&](const Family& each) { return family && family->json() == each.name; };
    if (std::none_of(std::begin(families), std::end(families), known)) {
        std::string names;
        for (const Family& each : families) names += (names.empty() ? "" : ", ") + std::string(each.name);
        const std::string is = family && family->is_text() ? repr(family->text()) : "none of them";
        vae.refuse("_class_name is " + is + "; known are " + names);
    }
    if (const auto blocks = vae.find("block_out_channels")) {
        const auto widths = blocks->list();
        for (const Field& width : widths) size_of(width, 1);
        if (widths.empty() || widths.size() > max_blocks) {
            blocks->refuse("has " + std::to_string(widths.size()) + " blocks, must have 1 to " +
                           std::to_string(max_blocks));
        }
    }
    if (const auto layers = vae.find("layers_per_block"); layers && size_of(*layers) > max_layers) {
        layers->wrong(("0 to " + std::to_string(max_layers)).c_str());
    }
    if (const auto colours = vae.find("out_channels")) size_of(*colours, 1);
    if (const auto channels = vae.find("latent_channels"); channels && size_of(*channels, 1) != config.latent_channels) {
        channels->refuse("is " + channels->json().dump() + ", but the transformer's latents have " +
                         std::to_string(config.latent_channels) + " channels");
    }
    if (const auto variance = vae.find("double_z")) variance->boolean();
}

void check_sizes(const Field& data, const Config& config) {
    for (const Vit& arch : {config.temporal, config.spatial}) {
        if (arch.width % 64) {
            data.refuse("vit_d" + std::to_string(arch.depth) + "w" + std::to_string(arch.width) +
                        ": width must be a multiple of 64");
        }
    }
    if (config.text_dim && config.text_len < 1) data.at("text_len").wrong("at least 1 where there is a text_dim");
    const auto [height, width] = config.latent_size;
    if (height % (2 * config.patch) || width % (2 * config.patch)) {
        data.refuse("latents of " + pair_of(height, width) + " cannot be cut into patches of " +
                    std::to_string(2 * config.patch));
    }
    const auto& image = config.image_size;
    if (image[0] < height || image[1] < width || image[1] < image[0] / height) {
        data.refuse("image_size " + pair_of(image[0], image[1]) + " is too small for latents of " +
                    pair_of(height, width));
    }
    if (config.temporal.width != config.spatial.width) {
        data.refuse("temporal width " + std::to_string(config.temporal.width) + " and spatial " +
                    std::to_string(config.spatial.width) + " differ");
    }
}

} // namespace

bool Config::is_video() const { return base_frames > 1; }

bool Config::is_class_conditional() const { return !text_dim; }

std::int64_t Config::video_length() const { return std::min<std::int64_t>(base_frames, 9); }

Tiling Config::tiling() const {
    const auto name = vae.value("_class_name", "");
    const auto* family = std::find_if(std::begin(families), std::end(families),
                                      [&](const Family& each) { return name == each.name; });
    const auto layers = static_cast<std::int64_t>(blocks_of(vae)) - 1;
    std::int64_t doublings = 0;
    if (name == "AutoencoderKLOpenSora") doublings = std::max<std::int64_t>(layers - 1, 0);
    if (name == "AutoencoderKLCogVideoX") doublings = std::min<std::int64_t>(layers, 2);
    if (name == "AutoencoderKLLTXVideo") doublings = 3;
    return {family->latent_frames, family->overlap, family->drop, std::int64_t{1} << doublings};
}

std::array<std::int64_t, 2> Config::token_grid() const { return {latent_size[0] / patch, latent_size[1] / patch}; }

std::int64_t Config::num_tokens() const { return token_grid()[0] * token_grid()[1]; }

std::int64_t Config::frame_tokens() const {
    return (latent_size[0] / (2 * patch)) * (latent_size[1] / (2 * patch));
}

std::int64_t Config::token_dim() const { return patch * patch * latent_channels; }

std::int64_t Config::condition_tokens() const {
    if (is_class_conditional()) return 1;
    return text_len + (is_video() ? motion_tokens : 0);
}

Config config_of(const Field& data) {
    data.only({"temporal", "spatial", "head", "latent_channels", "latent_size", "image_size", "patch", "text_dim",
               "text_len", "base_frames", "mixer_rank", "rotary", "text_encoder", "vae", "scheduler",
               "guidance_scale"});
    Config config;
    config.temporal = arch_of(data.at("temporal"));
    config.spatial = arch_of(data.at("spatial"));
    config.head = arch_of(data.at("head"));
    config.latent_channels = size_of(data.at("latent_channels"), 1);
    config.latent_size = sizes_of(data.at("latent_size"));
    config.image_size = sizes_of(data.at("image_size"));
    config.patch = size_of(data.at("patch"), 1);
    config.text_dim = optional_size(data.at("text_dim"), 1);
    config.text_len = size_of(data.at("text_len"));
    config.base_frames = size_of(data.at("base_frames"), 1);
    config.mixer_rank = optional_size(data.at("mixer_rank"), 0);
    config.rotary = data.at("rotary").boolean();
    if (const Field encoder = data.at("text_encoder"); !encoder.is_null() && !encoder.json().is_object()) {
        encoder.wrong("an object or null");
    }
    const Field vae = data.at("vae"), scheduler = data.at("scheduler");
    check_vae(vae, config);
    config.vae = vae.json();
    if (!scheduler.json().is_object()) scheduler.wrong("an object");
    config.scheduler = scheduler.json();
    if (const auto scale = data.find("guidance_scale")) {
        config.guidance_scale = scale->number();
        if (!(config.guidance_scale >= 0)) {
            scale->refuse("is " + Json(config.guidance_scale).dump() + ", must be a number, at least 0");
        }
    }
    check_sizes(data, config);
    return config;
}

std::vector<std::string> cache_names(const Config& config) {
    std::vector<std::string> names;
    for (std::int64_t layer = 0; layer < config.temporal.depth; ++layer) {
        names.push_back("key_cache_" + std::to_string(layer));
        names.push_back("value_cache_" + std::to_string(layer));
    }
    return names;
}

std::vector<std::string> lean_pieces(const Config& config) {
    const auto family = config.vae.value("_class_name", "");
    const std::size_t blocks = blocks_of(config.vae);
    if (family != lean_family || blocks <= lean_blocks) {
        throw Error(ErrorCode::bundle, std::string("a lean decode cuts an ") + lean_family + " of at least " +
                                           std::to_string(lean_blocks + 1) +
                                           " blocks; this checkpoint's autoencoder is an " + family + " of " +
                                           std::to_string(blocks));
    }
    const std::size_t first = blocks - lean_blocks;
    const auto upsampler = [](std::size_t block) {
        return "vae_decoder_up_blocks_" + std::to_string(block) + "_upsamplers_0_conv";
    };
    std::vector<std::string> names{"vae_decoder_start", upsampler(first - 1)};
    const auto layers = config.vae.value("layers_per_block", std::int64_t{2});
    for (std::size_t block = first; block < blocks; ++block) {
        for (std::int64_t resnet = 0; resnet <= layers; ++resnet) {
            const auto where = "vae_decoder_up_blocks_" + std::to_string(block) + "_resnets_" + std::to_string(resnet);
            names.push_back(where + "_conv1");
            names.push_back(where + "_conv2");
        }
        if (block + 1 < blocks) names.push_back(upsampler(block));
    }
    names.push_back("vae_decoder_conv_out");
    return names;
}

std::vector<std::string> stage_names(const Config& config, bool lean_decode) {
    std::vector<std::string> names{"condition", "temporal_encoder", "spatial_encoder", "diffusion_head"};
    if (!config.is_class_conditional()) names.insert(names.begin(), "text_encoder");
    if (config.is_video()) names.push_back("vae_encoder");
    const auto pieces = lean_decode ? lean_pieces(config) : std::vector<std::string>{"vae_decoder"};
    names.insert(names.end(), pieces.begin(), pieces.end());
    return names;
}

} // namespace nova
