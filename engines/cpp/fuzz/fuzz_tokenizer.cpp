/// Any bytes: as a prompt, they become tokens of a known tokenizer that cover all of it, or an Error(input). With a
/// NUL in them, what stands before it is a tokenizer.json of its own, and the rest the prompt. NOVA_FUZZ_TOKENIZER: the path of the
/// known one.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "errors.hpp"
#include "text.hpp"
#include "tokenizer.hpp"

namespace {

void encode(const nova::Tokenizer& tokenizer, std::string_view prompt) {
    try {
        const auto ids = tokenizer.encode(prompt).ids;
        if (ids.empty() != prompt.empty() || !nova::is_utf8(prompt)) std::abort();
    } catch (const nova::Error& error) {
        if (error.code() != nova::ErrorCode::input || nova::is_utf8(prompt)) std::abort();
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const nova::Tokenizer known(std::filesystem::path(NOVA_FUZZ_TOKENIZER), 8);
    const std::string_view input(reinterpret_cast<const char*>(data), size);
    const auto nul = input.find('\0');
    if (nul == std::string_view::npos) {
        encode(known, input);
        return 0;
    }
    try {
        encode(nova::Tokenizer(input.substr(0, nul), 4, "fuzzed"), input.substr(nul + 1));
    } catch (const nova::Error& error) {
        if (error.code() != nova::ErrorCode::bundle) std::abort();
    }
    return 0;
}
