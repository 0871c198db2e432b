#include "crc32c.hpp"

#include <algorithm>
#include <array>

#include "isal.hpp"

namespace ckptd::crc32c {

namespace {

using Function = unsigned int (*)(unsigned char* buffer, int length, unsigned int initial);

Function compute = nullptr;

constexpr std::size_t longest_call = std::size_t{1} << 30;  // ISA-L takes an int

constexpr std::uint32_t polynomial = 0x82F63B78;  // reflected: bit 31 is x^0
constexpr std::uint32_t one = 0x80000000;

// The product of two polynomials over GF(2) modulo the CRC's.
constexpr std::uint32_t multiply(std::uint32_t left, std::uint32_t right) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = one; bit != 0; bit >>= 1) {
        if (left & bit) product ^= right;
        right = (right & 1) ? (right >> 1) ^ polynomial : right >> 1;
    }
    return product;
}

// powers[k] = x^(8 * 2^k): appending 2^k zero bytes multiplies by it.
constexpr std::array<std::uint32_t, 64> make_powers() {
    std::array<std::uint32_t, 64> powers{};
    std::uint32_t power = one >> 8;
    for (std::uint32_t& entry : powers) {
        entry = power;
        power = multiply(power, power);
    }
    return powers;
}

constexpr std::array<std::uint32_t, 64> powers = make_powers();

}  // namespace

void prepare() {
    compute = reinterpret_cast<Function>(isal::function("crc32_iscsi"));
}

bool ready() {
    return compute != nullptr;
}

std::uint32_t extend(std::uint32_t crc, const void* data, std::size_t size) {
    auto* at = const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
    std::uint32_t state = ~crc;
    while (size > 0) {
        const std::size_t length = std::min(size, longest_call);
        state = compute(at, static_cast<int>(length), state);
        at += length;
        size -= length;
    }
    return ~state;
}

std::uint32_t combine(std::uint32_t first, std::uint32_t second, std::uint64_t second_bytes) {
    for (std::size_t k = 0; second_bytes != 0; ++k, second_bytes >>= 1) {
        if (second_bytes & 1) first = multiply(powers[k], first);
    }
    return first ^ second;
}

}  // namespace ckptd::crc32c
