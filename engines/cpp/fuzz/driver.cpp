/// What stands in for libFuzzer where the compiler has none (GCC): inputs of a corpus, mutated blindly.
///
///     fuzz_x -runs=N [-seed=S] FOLDER...
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t limit) { return limit ? random() % limit : 0; }

/// One change: a bit, a byte, a part left out, doubled, or taken from another input.
void mutate(std::string& input, const std::vector<std::string>& corpus, Random& random) {
    const std::size_t at = below(random, input.size()), length = below(random, std::min<std::size_t>(input.size() - at, 64));
    const std::string& other = corpus[below(random, corpus.size())];
    switch (below(random, 6)) {
    case 0:
        if (!input.empty()) input[at] = static_cast<char>(input[at] ^ (1 << below(random, 8)));
        break;
    case 1:
        if (!input.empty()) input[at] = static_cast<char>(random());
        break;
    case 2: input.erase(at, length); break;
    case 3: input.insert(at, input.substr(at, length)); break;
    case 4: input.insert(at, 1, "\"{}[],:-0e.\\ntfu"[below(random, 16)]); break;
    default: input.replace(at, length, other.substr(below(random, other.size()), below(random, 64)));
    }
}

} // namespace

int main(int count, char** values) {
    std::size_t runs = 0;
    Random::result_type seed = 1;
    std::vector<std::string> corpus{""};
    for (const std::string argument : std::vector<std::string>(values + 1, values + count)) {
        if (argument.rfind("-runs=", 0) == 0) {
            runs = std::stoull(argument.substr(6));
        } else if (argument.rfind("-seed=", 0) == 0) {
            seed = std::stoull(argument.substr(6));
        } else if (argument[0] != '-') {
            for (const auto& entry : std::filesystem::directory_iterator(argument)) {
                std::ifstream file(entry.path(), std::ios::binary);
                corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            }
        }
    }
    Random random(seed);
    for (std::size_t run = 0; run < runs; ++run) {
        std::string input = corpus[below(random, corpus.size())];
        if (run >= corpus.size()) {
            for (std::size_t changes = 1 + below(random, 4); changes; --changes) mutate(input, corpus, random);
        }
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
    }
    std::cerr << "Done " << runs << " runs over " << corpus.size() << " inputs\n";
    return 0;
}
