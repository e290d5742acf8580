#include "onnx_files.hpp"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "text.hpp"

namespace nova {

namespace {

enum class Message { model, training, graph, function, node, attribute, sparse, tensor, entry };

/// A field that leads to tensors (numbers as in onnx.proto3), and what it holds.
struct Way {
    Message from;
    std::uint64_t number;
    Message to;
};

constexpr Way ways[] = {
    {Message::model, 7, Message::graph},          {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},      {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},       {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},         {Message::graph, 15, Message::sparse},
    {Message::function, 7, Message::node},        {Message::function, 11, Message::attribute},
    {Message::node, 5, Message::attribute},       {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},      {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},     {Message::attribute, 22, Message::sparse},
    {Message::attribute, 23, Message::sparse},    {Message::sparse, 1, Message::tensor},
    {Message::sparse, 2, Message::tensor},        {Message::tensor, 13, Message::entry},
};
constexpr std::uint64_t key = 1, value = 2; // of an entry
constexpr unsigned varint = 0, fixed64 = 1, with_length = 2, fixed32 = 5;

/// The fields of a message, one after the other.
class Fields {
  public:
    explicit Fields(std::string_view data) : data_(data) {}

    /// The next that has a length; false at the end. Numbers and fixed sizes are skipped.
    bool next(std::uint64_t& number, std::string_view& content) {
        while (at_ < data_.size()) {
            const std::uint64_t tag = number_here();
            if (tag >> 32) throw std::invalid_argument("a field's tag is too large at byte " + std::to_string(at_));
            const unsigned wire = tag & 7;
            if (wire == varint) {
                number_here();
                continue;
            }
            if (wire != with_length && wire != fixed64 && wire != fixed32) {
                throw std::invalid_argument("protobuf wire type " + std::to_string(wire) + " at byte " +
                                            std::to_string(at_));
            }
            const std::uint64_t size = wire == with_length ? number_here() : wire == fixed64 ? 8 : 4;
            if (size > data_.size() - at_) {
                throw std::invalid_argument("a field of " + std::to_string(size) + " bytes at byte " +
                                            std::to_string(at_) + " of " + std::to_string(data_.size()));
            }
            number = tag >> 3;
            content = data_.substr(at_, size);
            at_ += size;
            if (wire == with_length) return true;
        }
        return false;
    }

  private:
    /// 7 bits a byte, the lowest first.
    std::uint64_t number_here() {
        std::uint64_t number = 0;
        for (unsigned shift = 0; shift < 70 && at_ < data_.size(); shift += 7) {
            const auto byte = static_cast<std::uint8_t>(data_[at_++]);
            if (shift == 63 && byte > 1) break;
            number |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return number;
        }
        throw std::invalid_argument("a number without end at byte " + std::to_string(at_));
    }

    std::string_view data_;
    std::size_t at_ = 0;
};

std::string location_of(std::string_view location) {
    if (!is_utf8(location)) throw std::invalid_argument("a location of external data is not UTF-8");
    return std::string(location);
}

} // namespace

std::set<std::string> external_files(std::string_view model) {
    std::set<std::string> locations;
    std::vector<std::pair<Message, std::string_view>> waiting{{Message::model, model}};
    while (!waiting.empty()) {
        const auto [message, data] = waiting.back();
        waiting.pop_back();
        Fields fields(data);
        std::uint64_t number = 0;
        std::string_view content, name, location;
        while (fields.next(number, content)) {
            if (message == Message::entry) {
                if (number == key) name = content;
                if (number == value) location = content;
            }
            for (const Way& way : ways) {
                if (way.from == message && way.number == number) waiting.emplace_back(way.to, content);
            }
        }
        if (message == Message::entry && name == "location") locations.insert(location_of(location));
    }
    return locations;
}

} // namespace nova
