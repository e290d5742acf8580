#include "media.hpp"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include <csignal>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef HAVE_PNG
#include <png.h>
#endif

extern char** environ;

namespace media {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

[[noreturn]] void fail(const std::string& path, const std::string& why) {
    throw Error("cannot write " + path + ": " + why);
}

struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

/// A file that gets its name when it is whole.
class WholeFile {
  public:
    explicit WholeFile(std::string path)
        : path_(std::move(path)), temporary_(path_ + ".part"), file_(std::fopen(temporary_.c_str(), "wb")) {
        if (!file_)
            fail(path_, std::strerror(errno));
    }
    WholeFile(const WholeFile&) = delete;
    WholeFile& operator=(const WholeFile&) = delete;
    ~WholeFile() {
        if (file_)
            std::remove(temporary_.c_str());
    }

    void write(const void* data, std::size_t size) {
        if (std::fwrite(data, 1, size, file_.get()) != size)
            fail(path_, std::strerror(errno));
    }
    void finish() {
        const bool flushed = std::fflush(file_.get()) == 0;
        if (!flushed || std::rename(temporary_.c_str(), path_.c_str()) != 0)
            fail(path_, std::strerror(errno));
        file_.reset();
    }
    std::FILE* get() const { return file_.get(); }
    const std::string& path() const { return path_; }

  private:
    std::string path_, temporary_;
    File file_;
};

/// The first frame alone.
class ImageWriter : public Writer {
  public:
    ImageWriter(const std::string& path, std::int64_t height, std::int64_t width)
        : file_(path), height_(height), width_(width), is_png_(ends_with(path, ".png")) {
#ifndef HAVE_PNG
        if (is_png_)
            fail(path, "this program was compiled without libpng; write a .ppm");
#endif
    }

    void write(const std::uint8_t* rgb) override {
        if (written_)
            return;
        written_ = true;
        if (is_png_)
            return write_png(rgb);
        const std::string header =
            "P6\n" + std::to_string(width_) + " " + std::to_string(height_) + "\n255\n";
        file_.write(header.data(), header.size());
        file_.write(rgb, static_cast<std::size_t>(height_ * width_ * 3));
    }
    void finish() override { file_.finish(); }

  private:
    void write_png([[maybe_unused]] const std::uint8_t* rgb) {
#ifdef HAVE_PNG
        png_image image{};
        image.version = PNG_IMAGE_VERSION;
        image.height = static_cast<png_uint_32>(height_);
        image.width = static_cast<png_uint_32>(width_);
        image.format = PNG_FORMAT_RGB;
        if (!png_image_write_to_stdio(&image, file_.get(), 0, rgb, 0, nullptr))
            fail(file_.path(), image.message);
#endif
    }

    WholeFile file_;
    std::int64_t height_, width_;
    bool is_png_, written_ = false;
};

std::uint8_t to_byte(double value) {
    return static_cast<std::uint8_t>(std::clamp(std::lround(value), 0L, 255L));
}

/// YUV4MPEG2: BT.709, limited range, no subsampling.
class Y4mWriter : public Writer {
  public:
    Y4mWriter(const std::string& path, std::int64_t height, std::int64_t width, double fps)
        : pixels_(static_cast<std::size_t>(height * width)) {
        if (path != "-")
            file_ = std::make_unique<WholeFile>(path);
        put("YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" +
            std::to_string(std::lround(fps * 1000)) + ":1000 Ip A1:1 C444 XCOLORRANGE=LIMITED\n");
    }

    void write(const std::uint8_t* rgb) override {
        std::vector<std::uint8_t> planes(3 * pixels_);
        for (std::size_t i = 0; i < pixels_; ++i) {
            const double r = rgb[3 * i], g = rgb[3 * i + 1], b = rgb[3 * i + 2];
            const double luma = 0.2126 * r + 0.7152 * g + 0.0722 * b;
            planes[i] = to_byte(16 + luma * 219 / 255);
            planes[pixels_ + i] = to_byte(128 + (b - luma) / 1.8556 * 224 / 255);
            planes[2 * pixels_ + i] = to_byte(128 + (r - luma) / 1.5748 * 224 / 255);
        }
        put("FRAME\n");
        put({reinterpret_cast<const char*>(planes.data()), planes.size()});
    }

    void finish() override {
        if (file_)
            file_->finish();
        else if (std::fflush(stdout) != 0)
            fail("standard output", std::strerror(errno));
    }

  private:
    void put(const std::string& bytes) {
        if (file_)
            file_->write(bytes.data(), bytes.size());
        else if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size())
            fail("standard output", std::strerror(errno));
    }

    std::size_t pixels_;
    std::unique_ptr<WholeFile> file_;
};

/// H.264 in mp4, yuv420p, BT.709: frames go to ffmpeg's standard input.
class FfmpegWriter : public Writer {
  public:
    FfmpegWriter(std::string path, std::int64_t height, std::int64_t width, double fps,
                 const std::string& ffmpeg)
        : path_(std::move(path)), temporary_(path_ + ".part"),
          size_(static_cast<std::size_t>(height * width * 3)) {
        std::signal(SIGPIPE, SIG_IGN); // its end shows as a failed write
        const std::string shape = std::to_string(width) + "x" + std::to_string(height);
        start({ffmpeg,
               "-hide_banner",
               "-loglevel",
               "error",
               "-y",
               "-f",
               "rawvideo",
               "-pixel_format",
               "rgb24",
               "-video_size",
               shape,
               "-framerate",
               std::to_string(fps),
               "-i",
               "pipe:0",
               "-vf",
               "scale=out_color_matrix=bt709:out_range=tv,pad=ceil(iw/2)*2:ceil(ih/2)*2",
               "-c:v",
               "libx264",
               "-crf",
               "18",
               "-bf",
               "0",
               "-pix_fmt",
               "yuv420p",
               "-colorspace",
               "bt709",
               "-color_primaries",
               "bt709",
               "-color_trc",
               "bt709",
               "-color_range",
               "tv",
               "-movflags",
               "+faststart",
               "-f",
               "mp4",
               "file:" + temporary_});
    }
    FfmpegWriter(const FfmpegWriter&) = delete;
    FfmpegWriter& operator=(const FfmpegWriter&) = delete;
    ~FfmpegWriter() override {
        if (process_ > 0) {
            end();
            std::remove(temporary_.c_str());
        }
    }

    void write(const std::uint8_t* rgb) override {
        if (std::fwrite(rgb, 1, size_, pipe_.get()) != size_)
            fail(path_, "ffmpeg stopped; it says why above");
    }

    void finish() override {
        const int status = end();
        if (status != 0)
            fail(path_, "ffmpeg failed; it says why above");
        if (std::rename(temporary_.c_str(), path_.c_str()) != 0)
            fail(path_, std::strerror(errno));
    }

  private:
    void start(std::vector<std::string> command) {
        int ends[2];
        if (pipe(ends) != 0)
            fail(path_, std::strerror(errno));
        for (const int end : ends) // or the next ffmpeg would hold this one's pipe open
            fcntl(end, F_SETFD, FD_CLOEXEC);
        std::vector<char*> arguments;
        for (auto& argument : command)
            arguments.push_back(argument.data());
        arguments.push_back(nullptr);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
        const int failed =
            posix_spawnp(&process_, arguments[0], &actions, nullptr, arguments.data(), environ);
        posix_spawn_file_actions_destroy(&actions);
        close(ends[0]);
        pipe_.reset(fdopen(ends[1], "wb"));
        if (failed) {
            process_ = 0;
            fail(path_, "cannot start " + command[0] + " (" + std::strerror(failed) +
                            "); install ffmpeg, name it with --ffmpeg, or write a .y4m");
        }
    }

    /// Its exit status.
    int end() {
        pipe_.reset();
        int status = -1;
        while (waitpid(process_, &status, 0) < 0 && errno == EINTR) {
        }
        process_ = 0;
        return status;
    }

    std::string path_, temporary_;
    std::size_t size_;
    pid_t process_ = 0;
    File pipe_;
};

nova_export::Image read_ppm(const std::string& path, std::FILE* file) {
    nova_export::Image image;
    int height = 0, width = 0, most = 0;
    char space = 0;
    const bool read = std::fscanf(file, "P6 %d %d %d%c", &width, &height, &most, &space) == 4;
    if (!read || most != 255 || height < 1 || width < 1 || height > 65536 || width > 65536)
        throw Error("cannot read image " + path + ": it is no binary PPM of 8 bits");
    image.height = height;
    image.width = width;
    image.pixels.resize(static_cast<std::size_t>(image.height * image.width * 3));
    if (std::fread(image.pixels.data(), 1, image.pixels.size(), file) != image.pixels.size())
        throw Error("cannot read image " + path + ": it is cut short");
    return image;
}

} // namespace

std::unique_ptr<Writer> open_writer(const std::string& path, std::int64_t height, std::int64_t width,
                                    double fps, const std::string& ffmpeg) {
    if (path == "-" || ends_with(path, ".y4m"))
        return std::make_unique<Y4mWriter>(path, height, width, fps);
    if (ends_with(path, ".mp4"))
        return std::make_unique<FfmpegWriter>(path, height, width, fps, ffmpeg);
    if (ends_with(path, ".png") || ends_with(path, ".ppm"))
        return std::make_unique<ImageWriter>(path, height, width);
    fail(path, "its name must end in one of .mp4, .y4m, .png, .ppm");
}

nova_export::Image read_image(const std::string& path) {
    const File file(std::fopen(path.c_str(), "rb"));
    if (!file)
        throw Error("cannot read image " + path + ": " + std::strerror(errno));
    if (!ends_with(path, ".png"))
        return read_ppm(path, file.get());
#ifdef HAVE_PNG
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_stdio(&image, file.get()))
        throw Error("cannot read image " + path + ": " + image.message);
    image.format = PNG_FORMAT_RGB;
    nova_export::Image made;
    made.height = image.height;
    made.width = image.width;
    made.pixels.resize(PNG_IMAGE_SIZE(image));
    const png_color white{255, 255, 255}; // under what is transparent
    if (!png_image_finish_read(&image, &white, made.pixels.data(), 0, nullptr))
        throw Error("cannot read image " + path + ": " + image.message);
    return made;
#else
    throw Error("cannot read image " + path + ": this program was compiled without libpng; give a .ppm");
#endif
}

} // namespace media
