#include "tokenizer.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <optional>
#include <queue>
#include <unordered_map>
#include <unordered_set>

#include "json.hpp"
#include "text.hpp"

namespace nova {

namespace {

constexpr std::size_t max_tokenizer_bytes = std::size_t{256} << 20;
constexpr std::size_t shown_characters = 40; // of a prompt, in a notice
constexpr char32_t mapped_space = 0x120;     // what byte-level vocabularies write for a space

using Vocabulary = std::unordered_map<std::string_view, std::uint32_t>;

struct Range {
    char32_t first, last;
    CharacterClass kind;
};
constexpr Range ranges[] = {
#include "unicode_classes.inc"
};

/// A token, and the bytes of the text that it stands for.
struct Token {
    std::uint32_t id;
    std::size_t start, end;
    bool is_added;
};

struct AddedToken {
    std::string content;
    std::uint32_t id;
};

/// The character that byte-level vocabularies write for each byte: itself where it can be seen.
std::array<std::string, 256> byte_characters() {
    std::array<std::string, 256> characters;
    unsigned unseen = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
        const bool seen = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
        const unsigned point = seen ? byte : unseen++;
        if (point < 0x80) {
            characters[byte] = std::string(1, static_cast<char>(point));
        } else {
            characters[byte] = {static_cast<char>(0xc0 | (point >> 6)), static_cast<char>(0x80 | (point & 0x3f))};
        }
    }
    return characters;
}

std::uint32_t id_of(const Field& field) {
    const std::int64_t id = field.whole();
    if (id > std::numeric_limits<std::int32_t>::max()) field.wrong("a whole number of 31 bits");
    return static_cast<std::uint32_t>(id);
}

std::uint64_t pair_of(std::uint32_t left, std::uint32_t right) { return std::uint64_t{left} << 32 | right; }

[[noreturn]] void unknown(const Field& field, const std::string& what) {
    field.refuse(what + ", which the C++ library does not know; run this bundle with Python");
}

/// The type of a part of the tokenizer, empty for none; it must be one of those that are known.
std::string type_of(const Field& data, const char* part, std::initializer_list<std::string_view> known) {
    const auto field = data.find(part);
    const std::string type = !field || field->is_null() ? "" : field->at("type").text();
    if (std::find(known.begin(), known.end(), type) == known.end()) {
        unknown(data, std::string("its ") + part + " is " + (type.empty() ? "absent" : repr(type)));
    }
    return type;
}

/// That options which would change the tokens are not used.
void check_options(const Field& model) {
    const auto unused = [&](const char* name) {
        const auto field = model.find(name);
        if (!field || field->is_null() || field->json() == false || field->json() == "" || field->json() == 0) return;
        unknown(*field, "is " + field->json().dump());
    };
    for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"}) unused(name);
}

/// The two tokens that a merge joins: "a b", or a list of them.
std::pair<std::string_view, std::string_view> merge_of(const Json& merge) {
    if (merge.is_string()) {
        const std::string_view both = merge.get_ref<const std::string&>();
        const auto space = both.find(' ');
        if (space != both.npos && both.find(' ', space + 1) == both.npos) {
            return {both.substr(0, space), both.substr(space + 1)};
        }
    }
    const bool is_pair = merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
    if (!is_pair) Field(merge, "model.merges").wrong("two tokens");
    return {merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>()};
}

/// Where the word that begins at a character ends: the pattern of GPT-2,
/// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t word_end(const std::vector<char32_t>& points, std::size_t at, std::size_t last) {
    const auto is = [&](std::size_t place, char32_t point) { return place < last && points[place] == point; };
    if (is(at, '\'')) {
        for (const char32_t letter : {'s', 't', 'm', 'd'}) {
            if (is(at + 1, letter)) return at + 2;
        }
        const bool two = (is(at + 1, 'r') && is(at + 2, 'e')) || (is(at + 1, 'v') && is(at + 2, 'e')) ||
                         (is(at + 1, 'l') && is(at + 2, 'l'));
        if (two) return at + 3;
    }
    const auto run_end = [&](std::size_t place, CharacterClass kind) {
        while (place < last && class_of(points[place]) == kind) ++place;
        return place;
    };
    const std::size_t body = is(at, ' ') && at + 1 < last ? at + 1 : at;
    const CharacterClass kind = class_of(points[body]);
    if (kind != CharacterClass::space) return run_end(body, kind);
    const std::size_t end = run_end(at, kind);
    return end < last && end - at > 1 ? end - 1 : end; // the last space goes with the word behind it
}

} // namespace

CharacterClass class_of(char32_t point) {
    const auto* range = std::lower_bound(std::begin(ranges), std::end(ranges), point,
                                         [](const Range& each, char32_t value) { return each.last < value; });
    return range != std::end(ranges) && range->first <= point ? range->kind : CharacterClass::other;
}

struct Tokenizer::Model {
    struct Merge {
        std::uint32_t rank, made;
    };

    std::array<std::uint32_t, 256> bytes{};
    std::unordered_map<std::uint64_t, Merge> merges; // by the ids of both tokens
    std::vector<AddedToken> added, added_normalized; // two sets: the first is looked for before the second
    bool trim_offsets = false;

    explicit Model(const Field& data);
    Vocabulary read_vocabulary(const Field& field);
    void read_merges(const Field& field, const Vocabulary& vocabulary);
    void read_added(const Field& field, const Vocabulary& vocabulary);

    std::vector<Token> tokens(std::string_view text, const Characters& characters) const;
    const Merge* find(std::uint32_t left, std::uint32_t right) const;
    std::string notice(std::string_view text, const Characters& characters, const std::vector<Token>& tokens,
                       std::size_t max_length) const;
};

Tokenizer::Model::Model(const Field& data) {
    if (const auto version = data.find("version"); version && version->text() != "1.0") version->wrong("1.0");
    type_of(data, "normalizer", {""});
    type_of(data, "pre_tokenizer", {"ByteLevel"});
    const Field words = data.at("pre_tokenizer"), model = data.at("model");
    if (words.at("add_prefix_space").boolean()) unknown(words, "has add_prefix_space");
    if (const auto pattern = words.find("use_regex"); pattern && !pattern->boolean()) unknown(words, "has no use_regex");
    const auto processor = type_of(data, "post_processor", {"", "ByteLevel", "TemplateProcessing"});
    trim_offsets = processor == "ByteLevel" && data.at("post_processor").at("trim_offsets").boolean();
    type_of(data, "model", {"BPE"});
    check_options(model);
    const Vocabulary vocabulary = read_vocabulary(model.at("vocab"));
    read_merges(model.at("merges"), vocabulary);
    if (const auto tokens = data.find("added_tokens")) read_added(*tokens, vocabulary);
}

Vocabulary Tokenizer::Model::read_vocabulary(const Field& field) {
    if (!field.json().is_object()) field.wrong("an object");
    Vocabulary vocabulary;
    vocabulary.reserve(field.json().size());
    std::vector<std::uint32_t> ids;
    for (auto token = field.json().begin(); token != field.json().end(); ++token) {
        ids.push_back(id_of(Field(token.value(), "model.vocab")));
        vocabulary.emplace(token.key(), ids.back());
    }
    std::sort(ids.begin(), ids.end());
    const auto twice = std::adjacent_find(ids.begin(), ids.end());
    if (twice != ids.end()) field.refuse("has the id " + std::to_string(*twice) + " twice");
    const auto characters = byte_characters();
    for (std::size_t byte = 0; byte < characters.size(); ++byte) {
        const auto found = vocabulary.find(characters[byte]);
        if (found == vocabulary.end()) unknown(field, "has no token for the byte " + std::to_string(byte));
        bytes[byte] = found->second;
    }
    return vocabulary;
}

void Tokenizer::Model::read_merges(const Field& field, const Vocabulary& vocabulary) {
    const auto token = [&](std::string_view text) {
        const auto found = vocabulary.find(text);
        if (found == vocabulary.end()) field.refuse("has " + repr(text) + ", which is not in the vocab");
        return found->second;
    };
    if (!field.json().is_array()) field.wrong("a list");
    merges.reserve(field.json().size());
    std::uint32_t rank = 0;
    std::string joined;
    for (const Json& each : field.json()) {
        if (each.is_string() && each.get_ref<const std::string&>().rfind("#version", 0) == 0) continue;
        const auto [left, right] = merge_of(each);
        joined.assign(left).append(right);
        merges[pair_of(token(left), token(right))] = {rank++, token(joined)};
    }
}

/// Added tokens get the ids that the package gives them: of the vocabulary, else the next free one.
void Tokenizer::Model::read_added(const Field& field, const Vocabulary& vocabulary) {
    std::unordered_set<std::string> given;
    auto next = static_cast<std::uint32_t>(vocabulary.size());
    for (const Field& token : field.list()) {
        const std::string content = token.at("content").text();
        id_of(token.at("id"));
        token.at("special").boolean();
        for (const char* name : {"single_word", "lstrip", "rstrip"}) {
            if (token.at(name).boolean()) unknown(token, std::string("has ") + name);
        }
        auto& into = token.at("normalized").boolean() ? added_normalized : added;
        if (content.empty()) continue;
        if (!given.insert(content).second) token.refuse("is there twice: " + repr(content));
        const auto known = vocabulary.find(content);
        into.push_back({content, known != vocabulary.end() ? known->second : next});
        next = std::max(next, into.back().id + 1);
    }
}

const Tokenizer::Model::Merge* Tokenizer::Model::find(std::uint32_t left, std::uint32_t right) const {
    const auto found = merges.find(pair_of(left, right));
    return found == merges.end() ? nullptr : &found->second;
}

namespace {

/// Joins the bytes of words to tokens: of all pairs that stand side by side the one learned first, then the leftmost.
template <typename Model> class Merger {
  public:
    explicit Merger(const Model& model) : model_(model) {}

    /// start: where the word stands in the text.
    void merge(std::string_view word, std::size_t start, std::vector<Token>& into) {
        symbols_.clear();
        for (std::size_t at = 0; at < word.size(); ++at) {
            symbols_.push_back({model_.bytes[static_cast<std::uint8_t>(word[at])], 1, at - 1, at + 1});
        }
        for (std::size_t at = 0; at + 1 < word.size(); ++at) propose(at);
        while (!queue_.empty()) {
            const Candidate best = queue_.top();
            queue_.pop();
            join(best);
        }
        for (const Symbol& symbol : symbols_) {
            if (symbol.length == 0) continue;
            into.push_back({symbol.id, start, start + symbol.length, false});
            start += symbol.length;
        }
    }

  private:
    /// Length 0: joined to the one before it. Neighbours outside the word are beyond its last symbol.
    struct Symbol {
        std::uint32_t id;
        std::size_t length, before, after;
    };
    struct Candidate {
        std::uint32_t rank, made;
        std::size_t at;
        bool operator>(const Candidate& other) const {
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };

    void propose(std::size_t at) {
        if (at >= symbols_.size() || symbols_[at].after >= symbols_.size()) return;
        if (const auto* merge = model_.find(symbols_[at].id, symbols_[symbols_[at].after].id)) {
            queue_.push({merge->rank, merge->made, at});
        }
    }

    void join(const Candidate& best) {
        Symbol& left = symbols_[best.at];
        if (left.length == 0 || left.after >= symbols_.size()) return;
        Symbol& right = symbols_[left.after];
        const auto* merge = model_.find(left.id, right.id);
        if (!merge || merge->made != best.made) return; // the pair has changed since it was proposed
        left.id = best.made;
        left.length += right.length;
        left.after = right.after;
        right.length = 0;
        if (left.after < symbols_.size()) symbols_[left.after].before = best.at;
        propose(left.before);
        propose(best.at);
    }

    const Model& model_;
    std::vector<Symbol> symbols_;
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue_;
};

/// A part of the text that is not yet tokens, or one added token.
struct Part {
    std::size_t start, end;
    std::optional<std::uint32_t> id;
};

/// The longest added token that the text has at a place.
const AddedToken* added_at(std::string_view text, const std::vector<AddedToken>& tokens) {
    const AddedToken* longest = nullptr;
    for (const auto& token : tokens) {
        const bool is_here = text.substr(0, token.content.size()) == token.content;
        if (is_here && (!longest || token.content.size() > longest->content.size())) longest = &token;
    }
    return longest;
}

std::vector<Part> without_added(std::string_view text, const std::vector<Part>& parts,
                                const std::vector<AddedToken>& tokens) {
    std::array<bool, 256> begins{};
    for (const auto& token : tokens) begins[static_cast<std::uint8_t>(token.content[0])] = true;
    std::vector<Part> made;
    for (const Part& part : parts) {
        std::size_t start = part.start;
        for (std::size_t at = part.start; !part.id && at < part.end;) {
            const bool may_be = begins[static_cast<std::uint8_t>(text[at])];
            const auto* token = may_be ? added_at(text.substr(at, part.end - at), tokens) : nullptr;
            if (!token) {
                ++at;
                continue;
            }
            if (start < at) made.push_back({start, at, std::nullopt});
            start = at + token->content.size();
            made.push_back({at, start, token->id});
            at = start;
        }
        if (start < part.end) made.push_back({start, part.end, part.id});
    }
    return made;
}

/// The character that a byte of the text belongs to.
std::size_t character_at(const Characters& characters, std::size_t byte) {
    const auto next = std::upper_bound(characters.starts.begin(), characters.starts.end(), byte);
    return static_cast<std::size_t>(next - characters.starts.begin()) - 1;
}

} // namespace

std::vector<Token> Tokenizer::Model::tokens(std::string_view text, const Characters& characters) const {
    std::vector<Part> parts{{0, text.size(), std::nullopt}};
    for (const auto* set : {&added, &added_normalized}) parts = without_added(text, parts, *set);
    std::vector<Token> made;
    Merger<Model> merger(*this);
    for (const Part& part : parts) {
        if (part.id) {
            made.push_back({*part.id, part.start, part.end, true});
            continue;
        }
        const auto last = character_at(characters, part.end);
        for (auto at = character_at(characters, part.start); at < last;) {
            const std::size_t end = word_end(characters.points, at, last);
            const std::size_t start = characters.starts[at];
            merger.merge(text.substr(start, characters.starts[end] - start), start, made);
            at = end;
        }
    }
    return made;
}

/// Where a prompt of too many tokens was cut, in whole characters; the package may leave spaces around tokens out.
std::string Tokenizer::Model::notice(std::string_view text, const Characters& characters,
                                     const std::vector<Token>& tokens, std::size_t max_length) const {
    const Token& last = tokens[max_length - 1];
    const std::size_t start = character_at(characters, last.start);
    std::size_t end = character_at(characters, last.end - 1) + 1;
    if (trim_offsets) {
        const auto is_space = [&](std::size_t at) {
            const char32_t point = characters.points[at];
            return point == ' ' || (last.is_added && (point == mapped_space || class_of(point) == CharacterClass::space));
        };
        std::size_t first = start;
        while (first < end && is_space(first)) ++first;
        while (end > first && is_space(end - 1)) --end;
    }
    const std::size_t count = characters.points.size();
    const auto part = [&](std::size_t from, std::size_t to) {
        return repr(text.substr(characters.starts[from], characters.starts[to] - characters.starts[from]));
    };
    const std::size_t shown = end - std::min(end, shown_characters), left = std::min(count, end + shown_characters);
    return "prompt has " + std::to_string(tokens.size()) + " tokens, the model takes " + std::to_string(max_length) +
           ": cut after " + part(shown, end) + ", leaving out " + part(end, left) + (left < count ? "…" : "");
}

Tokenizer::Tokenizer(const std::filesystem::path& file, std::int64_t max_length)
    : Tokenizer(read_file(file, max_tokenizer_bytes), max_length, file.string()) {}

Tokenizer::Tokenizer(std::string_view json, std::int64_t max_length, const std::string& file)
    : max_length_(static_cast<std::size_t>(std::max<std::int64_t>(max_length, 1))) {
    const Json data = parse_json(json, file);
    try {
        model_ = std::make_shared<const Model>(Field(data));
    } catch (const Error& error) {
        throw Error(ErrorCode::bundle, file + ": is no tokenizer (" + error.what() + ")");
    }
}

Tokenizer::Encoded Tokenizer::encode(std::string_view utf8) const {
    Characters characters;
    if (!decode_utf8(utf8, characters)) {
        throw Error(ErrorCode::input, "prompt is no text: it has bytes that are not UTF-8");
    }
    const auto tokens = model_->tokens(utf8, characters);
    Encoded encoded;
    for (std::size_t i = 0; i < std::min(tokens.size(), max_length_); ++i) encoded.ids.push_back(tokens[i].id);
    if (tokens.size() > max_length_) encoded.notice = model_->notice(utf8, characters, tokens, max_length_);
    return encoded;
}

} // namespace nova
