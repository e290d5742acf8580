#pragma once

#include <stdexcept>
#include <string>

namespace nova {

/// The exit codes of nova_export/errors.py.
enum class ErrorCode {
    other = 1,
    usage = 2,
    checkpoint = 3,
    bundle = 4,
    input = 5,
    output = 6,
    exporting = 7,
    stage = 8,
    dependency = 9,
    memory = 10,
    cancelled = 130,
};

/// Every failure that a user can meet: its text names the cause, the wrong value and the way out.
class Error : public std::runtime_error {
  public:
    Error(ErrorCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
    ErrorCode code() const noexcept { return code_; }

  private:
    ErrorCode code_;
};

} // namespace nova
