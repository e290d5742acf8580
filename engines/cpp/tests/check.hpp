/// The least of a test framework: tests that run in order, checks that say where, and a program that fails with them.
///
///     TEST(what_it_does) { CHECK_EQ(1 + 1, 2); }
///     int main() { return nova::test::run(); }
#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace nova::test {

struct Failure {
    std::string text;
};

inline std::vector<std::pair<const char*, std::function<void()>>>& tests() {
    static std::vector<std::pair<const char*, std::function<void()>>> all;
    return all;
}

struct Registered {
    Registered(const char* name, std::function<void()> test) { tests().emplace_back(name, std::move(test)); }
};

template <typename T, typename = void>
struct Shown {
    static std::string of(const T&) { return "(a value)"; }
};
template <typename T>
struct Shown<T, std::void_t<decltype(std::declval<std::ostream&>() << std::declval<const T&>())>> {
    static std::string of(const T& value) {
        std::ostringstream text;
        text.precision(9);
        text << value;
        return text.str();
    }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& text) {
    throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + text};
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
    if (!(a == b))
        fail(file, line, std::string(text) + ": " + Shown<A>::of(a) + " is not " + Shown<B>::of(b));
}

inline void check_throws(const std::function<void()>& call, ErrorCode code, const std::string& part, const char* file,
                         int line) {
    try {
        call();
    } catch (const Error& error) {
        if (error.code() != code || std::string(error.what()).find(part) == std::string::npos)
            fail(file, line, "threw " + std::to_string(static_cast<int>(error.code())) + ": " + error.what());
        return;
    }
    fail(file, line, "threw nothing; expected: " + part);
}

/// The number of tests that failed, as an exit status.
inline int run() {
    int failed = 0;
    for (const auto& [name, test] : tests()) {
        try {
            test();
        } catch (const Failure& failure) {
            ++failed;
            std::cerr << "FAILED " << name << ": " << failure.text << "\n";
        } catch (const std::exception& error) {
            ++failed;
            std::cerr << "FAILED " << name << ": threw " << error.what() << "\n";
        }
    }
    std::cerr << tests().size() - static_cast<std::size_t>(failed) << " of " << tests().size() << " passed\n";
    return failed ? 1 : 0;
}

} // namespace nova::test

#define TEST(name)                                                                                                     \
    static void name();                                                                                                \
    static const nova::test::Registered name##_registered(#name, name);                                                \
    static void name()
#define CHECK(...) ((__VA_ARGS__) ? void() : nova::test::fail(__FILE__, __LINE__, #__VA_ARGS__ " does not hold"))
#define CHECK_EQ(a, b) nova::test::check_equal((a), (b), #a, __FILE__, __LINE__)
#define CHECK_THROWS(expression, code, part)                                                                           \
    nova::test::check_throws([&] { static_cast<void>(expression); }, (code), (part), __FILE__, __LINE__)
