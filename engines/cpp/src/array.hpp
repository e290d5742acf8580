// A tensor as stages take and give it: contiguous, its memory shared, on the host or on a device.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "spec.hpp"

namespace nova {

inline std::int64_t size_of(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

/// Where memory is: the machine's own, or that of the device that a runner computes on.
enum class Place { host, device };

template <typename T>
constexpr DType dtype_for() {
    if constexpr (std::is_same_v<T, float>)
        return DType::float32;
    else if constexpr (std::is_same_v<T, std::int64_t>)
        return DType::int64;
    else {
        static_assert(std::is_same_v<T, bool>, "no stage takes this type");
        return DType::boolean;
    }
}

class Array {
  public:
    Array() = default;

    /// Somebody else's memory, kept alive by `owner`.
    Array(DType dtype, Shape shape, void* data, std::shared_ptr<void> owner, Place place = Place::host)
        : dtype_(dtype), shape_(std::move(shape)), data_(data), owner_(std::move(owner)), place_(place) {}

    /// New memory on the host, zeroed.
    static Array zeros(DType dtype, Shape shape) {
        Array made = empty(dtype, std::move(shape));
        if (made.bytes())
            std::memset(made.raw(), 0, made.bytes());
        return made;
    }

    /// New memory on the host, as it comes.
    static Array empty(DType dtype, Shape shape) {
        const auto bytes = static_cast<std::size_t>(nova::size_of(shape)) * nova::size_of(dtype);
        std::shared_ptr<std::byte[]> memory(new std::byte[bytes ? bytes : 1]);
        auto* data = memory.get();
        return {dtype, std::move(shape), data, std::shared_ptr<void>(std::move(memory), data)};
    }

    template <typename T>
    static Array zeros(Shape shape) {
        return zeros(dtype_for<T>(), std::move(shape));
    }
    template <typename T>
    static Array of(Shape shape, const std::vector<T>& values) {
        Array made = empty(dtype_for<T>(), std::move(shape));
        std::copy(values.begin(), values.end(), made.data<T>());
        return made;
    }

    DType dtype() const { return dtype_; }
    const Shape& shape() const { return shape_; }
    Place place() const { return place_; }
    std::int64_t size() const { return nova::size_of(shape_); }
    std::size_t bytes() const { return static_cast<std::size_t>(size()) * nova::size_of(dtype_); }
    void* raw() const { return data_; }

    /// The values; only of arrays on the host.
    template <typename T>
    T* data() const {
        return static_cast<T*>(data_);
    }

    /// The same memory in another shape of as many values.
    Array reshape(Shape shape) const { return {dtype_, std::move(shape), data_, owner_, place_}; }

    /// Rows `first`.. of the first axis, `count` of them; none is copied.
    Array rows(std::int64_t first, std::int64_t count) const {
        Shape shape = shape_;
        shape[0] = count;
        const auto row = shape_[0] ? bytes() / static_cast<std::size_t>(shape_[0]) : 0;
        auto* begin = static_cast<std::byte*>(data_) + static_cast<std::size_t>(first) * row;
        return {dtype_, std::move(shape), begin, owner_, place_};
    }

  private:
    DType dtype_ = DType::float32;
    Shape shape_;
    void* data_ = nullptr;
    std::shared_ptr<void> owner_;
    Place place_ = Place::host;
};

using Arrays = std::map<std::string, Array>;

} // namespace nova
