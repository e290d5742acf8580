// A tensor of the decoder's last blocks takes gigabytes, and a decoder in one graph holds several. Here the
// frames of a layer stand apart, and are freed as soon as those of the next are made of them.
#include <algorithm>
#include <deque>

#include "decode.hpp"

namespace nova {
namespace {

using FrameList = std::deque<Array>;

/// Mean and variance (groups,) over all frames from each one's own. Empty where a piece makes none.
class Statistics {
  public:
    void add(const Arrays& outputs) {
        const auto mean = outputs.find("next_mean");
        if (mean == outputs.end())
            return;
        const auto& variance = outputs.at("next_variance");
        means_.emplace_back(mean->second.data<float>(), mean->second.data<float>() + mean->second.size());
        variances_.emplace_back(variance.data<float>(), variance.data<float>() + variance.size());
    }

    Arrays over_frames() const {
        if (means_.empty())
            return {};
        const auto groups = means_.front().size();
        const auto count = static_cast<double>(means_.size());
        Array mean = Array::zeros<float>({static_cast<std::int64_t>(groups)}),
              variance = Array::zeros<float>(mean.shape());
        for (std::size_t group = 0; group < groups; ++group) {
            double middle = 0, spread = 0;
            for (const auto& each : means_)
                middle += each[group] / count;
            for (std::size_t i = 0; i < means_.size(); ++i)
                spread += (variances_[i][group] + (means_[i][group] - middle) * (means_[i][group] - middle)) /
                          count;
            mean.data<float>()[group] = static_cast<float>(middle);
            variance.data<float>()[group] = static_cast<float>(spread);
        }
        return {{"mean", mean}, {"variance", variance}};
    }

  private:
    std::vector<std::vector<double>> means_, variances_; // by frame
};

/// One piece at work on all frames of a tile.
class Piece {
  public:
    Piece(Stages& stages, const std::string& name, const Arrays& statistics)
        : stages_(stages), spec_(stages.spec(name)), statistics_(statistics) {}

    bool takes(const std::string& input) const {
        return std::any_of(spec_.inputs.begin(), spec_.inputs.end(),
                           [&](const Tensor& tensor) { return tensor.name == input; });
    }

    /// Every frame with the two before it and the block's own; none is kept longer than it is needed.
    void in_order(FrameList& frames, FrameList block) {
        Array past_1 = frames.front(), past_2 = past_1; // in time, the first frame is repeated in front
        while (!frames.empty()) {
            const Array frame = std::move(frames.front());
            frames.pop_front();
            Arrays inputs{{"frame", frame}, {"past_1", past_1}, {"past_2", past_2}};
            if (!block.empty()) {
                inputs["residual"] = std::move(block.front());
                block.pop_front();
            }
            run(std::move(inputs));
            past_2 = past_1;
            past_1 = frame;
        }
    }

    /// All frames but the first doubled, each half nearer to its own than to the neighbour on its side.
    void between(const FrameList& frames) {
        const auto last = frames.size() - 1;
        std::vector<std::pair<std::size_t, std::size_t>> pairs{{0, 0}};
        for (std::size_t here = 1; here <= last; ++here) {
            pairs.emplace_back(here, std::max<std::size_t>(here - 1, 1));
            pairs.emplace_back(here, std::min(here + 1, last));
        }
        static const char* const suffixes[] = {"", "_1", "_2"};
        for (std::size_t index = 0; index < pairs.size(); ++index) {
            Arrays inputs;
            for (std::size_t past = 0; past < 3; ++past) {
                const auto [here, near] = pairs[index - std::min(past, index)];
                inputs[std::string("here") + suffixes[past]] = frames[here];
                inputs[std::string("near") + suffixes[past]] = frames[near];
            }
            run(std::move(inputs));
        }
    }

    FrameList made;
    Statistics statistics;

  private:
    void run(Arrays inputs) {
        inputs.insert(statistics_.begin(), statistics_.end());
        for (auto it = inputs.begin(); it != inputs.end();)
            it = takes(it->first) ? std::next(it) : inputs.erase(it);
        Arrays outputs = stages_.run(spec_.name, inputs, Place::host);
        made.push_back(outputs.at(spec_.outputs.front().name));
        statistics.add(outputs);
    }

    Stages& stages_;
    const StageSpec& spec_;
    const Arrays& statistics_; // of the frames that it is given
};

/// (1, 3, H, W) each to (1, 3, F, H, W).
Array join(const FrameList& frames) {
    const Shape& shape = frames.front().shape();
    const auto colours = shape[1], area = shape[2] * shape[3],
               count = static_cast<std::int64_t>(frames.size());
    Array made = Array::empty(DType::float32, {1, colours, count, shape[2], shape[3]});
    float* to = made.data<float>();
    for (std::int64_t colour = 0; colour < colours; ++colour)
        for (const auto& frame : frames)
            to = std::copy_n(frame.data<float>() + colour * area, area, to);
    return made;
}

} // namespace

Array decode_lean(Stages& stages, const std::vector<std::string>& pieces, const Array& latents) {
    Arrays start = stages.run(pieces.front(), {{"latents", latents}}, Place::host);
    const Array& all = start.at("next_frames");
    FrameList frames, block; // block: the frames that the residual block at work got
    for (std::int64_t frame = 0; frame < all.shape()[0]; ++frame)
        frames.push_back(all.rows(frame, 1));
    Statistics first;
    first.add(start);
    Arrays statistics = first.over_frames();
    start.clear();
    for (auto name = pieces.begin() + 1; name != pieces.end(); ++name) {
        Piece piece(stages, *name, statistics);
        const bool ends = piece.takes("residual");
        if (!ends)
            block = frames;
        if (piece.takes("here"))
            piece.between(frames);
        else
            piece.in_order(frames, ends ? std::exchange(block, {}) : FrameList{});
        frames = std::move(piece.made);
        Arrays made = piece.statistics.over_frames();
        statistics = std::move(made);
    }
    return join(frames);
}

} // namespace nova
