#include <cstdio>
#include <filesystem>
#include <fstream>
#include <tuple>
#include <unistd.h>

#include "bundle_stages.hpp"
#include "check.hpp"
#include "errors.hpp"

using namespace nova;

namespace {

constexpr std::int64_t GB = 1000000000;

/// Two stages of a step with 3 and 2 GB, one that decodes with 4; 6 GB belong to no stage.
Manifest manifest() {
    Manifest made;
    for (const auto& [name, phase, size] :
         {std::tuple{"spatial", "step", 3}, {"head", "step", 2}, {"decoder", "decode", 4}}) {
        auto& stage = made.stages[name];
        stage.spec.phase = phase;
        stage.files = {name};
        made.files[name].size = static_cast<std::uint64_t>(size * GB);
    }
    made.files["engine"].size = static_cast<std::uint64_t>(6 * GB);
    return made;
}

std::string refusal(bool low_memory, std::optional<std::int64_t> there) {
    try {
        check_memory(manifest(), "a bundle", low_memory, there);
    } catch (const Error& error) {
        CHECK(error.code() == ErrorCode::memory);
        return error.what();
    }
    return "";
}

} // namespace

TEST(graphs_that_do_not_fit_are_refused) {
    CHECK_EQ(refusal(false, 9 * GB), "");
    CHECK_EQ(refusal(true, 5 * GB), "");
    CHECK_EQ(refusal(false, std::nullopt), "");
    CHECK_EQ(refusal(false, 9 * GB - 1),
             "a bundle: its weights take 9.0 GB, and 9.0 GB of memory are free; --low-memory needs 5.0 GB");
    CHECK_EQ(refusal(false, 4 * GB), "a bundle: its weights take 9.0 GB, and 4.0 GB of memory are free; build it "
                                     "in fp16 or int8, or with --lean-decode");
    CHECK_EQ(refusal(true, 4 * GB), "a bundle: its weights take 5.0 GB, and 4.0 GB of memory are free; build it "
                                    "in fp16 or int8, or with --lean-decode");
}

TEST(free_memory_is_what_linux_says) {
    CHECK(available_memory().value_or(0) > 0);
    CHECK(!available_memory("/nowhere"));
    const auto name = (std::filesystem::temp_directory_path() / ("meminfo" + std::to_string(getpid()))).string();
    std::ofstream(name) << "MemTotal:       16 kB\nMemAvailable:    3 kB\nHugePages_Total: 0\nSwapFree: 2 kB\n";
    CHECK_EQ(available_memory(name).value_or(0), 5 * 1024);
    std::ofstream(name) << "MemTotal:       16 kB\n";
    CHECK(!available_memory(name));
    std::remove(name.c_str());
}

int main() {
    return nova::test::run();
}
