#include "sha256.hpp"

#include <array>
#include <cstdint>
#include <fstream>
#include <memory>
#include <vector>

#include <openssl/evp.h>

#include "errors.hpp"

namespace nova {

namespace {

constexpr std::size_t piece_size = std::size_t{1} << 20;

class Digest {
  public:
    Digest() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        need(context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr));
    }

    void add(std::string_view data) { need(EVP_DigestUpdate(context_.get(), data.data(), data.size())); }

    std::string hex() {
        std::array<std::uint8_t, EVP_MAX_MD_SIZE> bytes{};
        unsigned int size = 0;
        need(EVP_DigestFinal_ex(context_.get(), bytes.data(), &size));
        std::string text;
        for (unsigned int i = 0; i < size; ++i) {
            constexpr char digits[] = "0123456789abcdef";
            text += {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
        }
        return text;
    }

  private:
    static void need(bool done) {
        if (!done) throw Error(ErrorCode::dependency, "OpenSSL makes no SHA-256; is it there in a FIPS-only form?");
    }

    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

} // namespace

std::string sha256(std::string_view data) {
    Digest digest;
    digest.add(data);
    return digest.hex();
}

std::string sha256_of(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    Digest digest;
    std::vector<char> piece(piece_size);
    while (file) {
        file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
        digest.add({piece.data(), static_cast<std::size_t>(file.gcount())});
    }
    if (!file.eof()) throw Error(ErrorCode::bundle, path.string() + ": cannot be read; copy the bundle again");
    return digest.hex();
}

} // namespace nova
