/// Frames to files, frame by frame as they are made: PNG, PPM, Y4M, and mp4 through a pipe to ffmpeg. Images
/// from files.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include <nova_export.hpp>

namespace media {

/// A file that cannot be read or written; the text says which, why, and what to do.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Writer {
  public:
    virtual ~Writer() = default;
    virtual void write(const std::uint8_t* rgb) = 0; ///< one frame: height * width * 3 bytes
    virtual void finish() = 0;                       ///< the file is whole when this returns
};

/// By the path's suffix: .png and .ppm hold the first frame, .y4m and .mp4 all. "-" is Y4M on standard
/// output.
std::unique_ptr<Writer> open_writer(const std::string& path, std::int64_t height, std::int64_t width,
                                    double fps, const std::string& ffmpeg);

/// A .png or .ppm.
nova_export::Image read_image(const std::string& path);

} // namespace media
