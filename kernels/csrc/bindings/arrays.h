// Arrays that Python hands over: numpy's or torch's, checked by nanobind for dtype, dimensions,
// order and device. Every argument is bound with `.noconvert()`, so that nothing is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "core/constants.h"

namespace elastic_moe {

// Row-major, in main memory. A const T takes read-only arrays, too.
template <class T, int Dimensions>
using Array =
    nanobind::ndarray<T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

typedef Array<const uint8_t, 1> Bytes;  // packed weights
typedef Array<const float, 1> Floats;

// Bfloat16 or float32, row-major. numpy has no bfloat16: its bits as uint16 are taken for it.
template <int Dimensions>
using Numbers =
    nanobind::ndarray<nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

// The same in any order: who takes it checks the strides.
template <int Dimensions>
using StridedNumbers = nanobind::ndarray<nanobind::ndim<Dimensions>, nanobind::device::cpu>;

// Raise ValueError unless `right`: what Python's own checks let pass, before an address is used.
inline void require(bool right, const std::string& message) {
    if (!right) throw nanobind::value_error(message.c_str());
}

template <class Array>
bool is_bf16(const Array& array) {
    const nanobind::dlpack::dtype type = array.dtype();
    const bool bits = type.code == static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat) ||
                      type.code == static_cast<uint8_t>(nanobind::dlpack::dtype_code::UInt);
    const bool bf16 = bits && type.bits == 16 && type.lanes == 1;
    require(bf16 || type == nanobind::dtype<float>(), "numbers must be bfloat16 or float32.");
    return bf16;
}

// Raise ValueError unless a packed matrix of these sizes has so many bytes.
inline void require_bytes(const char* name, const Bytes& data, int64_t bytes) {
    require(static_cast<int64_t>(data.shape(0)) == bytes,
            std::string(name) + " must have " + std::to_string(bytes) + " bytes, got " +
                std::to_string(data.shape(0)) + ".");
}

inline void require_size(const char* name, const Floats& data, int64_t size) {
    require(static_cast<int64_t>(data.shape(0)) == size,
            std::string(name) + " must have " + std::to_string(size) + " numbers, got " +
                std::to_string(data.shape(0)) + ".");
}

template <class ArrayOrNone>
auto data_or_null(const ArrayOrNone& array) -> decltype(array.data()) {
    return array.is_valid() ? array.data() : nullptr;
}

inline int64_t packed_matrix_bytes(int64_t outputs, int64_t inputs, bool bf16) {
    const int64_t depth = bf16 ? 2 : 1;
    return round_up(outputs, kPanel) / kPanel * (round_up(inputs, depth) / depth) * kStepBytes;
}

inline int64_t packed_expert_bytes(int64_t hidden, int64_t channels, bool bf16) {
    return 2 * packed_matrix_bytes(channels, hidden, bf16) +
           packed_matrix_bytes(hidden, channels, bf16);
}

}  // namespace elastic_moe
