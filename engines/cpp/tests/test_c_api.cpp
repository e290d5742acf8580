#include <cstddef>
#include <cstring>

#include "check.hpp"
#include "nova_export.h"

namespace {

std::string error() {
    return nova_last_error();
}

bool says(const char* part) {
    return error().find(part) != std::string::npos;
}

} // namespace

TEST(versions_are_those_of_the_header) {
    CHECK_EQ(nova_abi_version(), static_cast<std::uint32_t>(NOVA_ABI_VERSION));
    CHECK(std::strlen(nova_version()) >= 5);
}

TEST(nothing_is_nothing) {
    nova_free(nullptr);
    nova_result_free(nullptr);
    nova_cancel(nullptr);
    nova_pipeline* pipeline = nullptr;
    nova_info info = NOVA_INFO_INIT;
    const nova_generate_options options = NOVA_GENERATE_OPTIONS_INIT;
    CHECK_EQ(nova_load(nullptr, nullptr, &pipeline), NOVA_USAGE_ERROR);
    CHECK_EQ(nova_load("x", nullptr, nullptr), NOVA_USAGE_ERROR);
    CHECK_EQ(nova_describe(nullptr, &info), NOVA_USAGE_ERROR);
    CHECK_EQ(nova_unload(nullptr), NOVA_USAGE_ERROR);
    CHECK_EQ(nova_generate(nullptr, &options, nullptr), NOVA_USAGE_ERROR);
    CHECK(says("nova_generate needs a pipeline"));
}

TEST(no_bundle_no_pipeline) {
    auto* pipeline = reinterpret_cast<nova_pipeline*>(1);
    CHECK_EQ(nova_load("no/such/folder", nullptr, &pipeline), NOVA_BUNDLE_ERROR);
    CHECK(pipeline == nullptr);
    CHECK(says("no/such/folder: no such bundle folder"));
}

TEST(sizes_of_structures_are_checked) {
    nova_pipeline* pipeline = nullptr;
    nova_load_options options = NOVA_LOAD_OPTIONS_INIT;
    options.size = 3;
    CHECK_EQ(nova_load("no/such/folder", &options, &pipeline), NOVA_USAGE_ERROR);
    options.size = sizeof options + 8; // of a newer header: it may want what this library does not know
    CHECK_EQ(nova_load("no/such/folder", &options, &pipeline), NOVA_USAGE_ERROR);
    CHECK(says("nova_load_options.size"));
    options.size = offsetof(nova_load_options, threads); // of an older one
    options.threads = -7;                                // which that does not have
    CHECK_EQ(nova_load("no/such/folder", &options, &pipeline), NOVA_BUNDLE_ERROR);
    options.size = sizeof options;
    CHECK_EQ(nova_load("no/such/folder", &options, &pipeline), NOVA_USAGE_ERROR);
    CHECK(says("threads is -7"));
}

int main() {
    return nova::test::run();
}
