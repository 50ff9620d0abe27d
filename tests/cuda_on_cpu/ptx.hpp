// kernels_ext/onesided/csrc/ptx.cu for a host: the same functions in plain C++.
#pragma once

#include "cuda.hpp"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static inline

constexpr u32 ALL = 0xffffffff;

// A thread that reads the same again is in a loop that waits.
template <typename T>
DEVICE T load_again(const volatile T* at) {
    static const volatile void* last_at;
    static Thread* last_self;
    static T last;
    T value = *at;
    settle_memory();
    if (last_self == self && last_at == at && last == value) let_others_run(), value = *at;
    settle_memory();
    last_self = self, last_at = at, last = value;
    return value;
}

template <typename T>
DEVICE T load_as(u64 at) {
    if (at % sizeof(T)) bad_address(at, sizeof(T));
    T v;
    memcpy(&v, (const void*)at, sizeof v);
    return v;
}

template <typename T>
DEVICE void store_as(u64 at, T v) {
    if (at % sizeof(T)) bad_address(at, sizeof(T));
    memcpy((void*)at, &v, sizeof v);
    note_progress();
}

DEVICE u64 load_acquire(u64 at) { return load_again((const volatile u64*)at); }
DEVICE u32 load_relaxed(const u32* at) { return load_again(at); }
DEVICE void publish(u64 at, u32 epoch, u32 value) {
    settle_memory();
    store_as(at, (u64)epoch << 32 | value);
    after_signal();
    settle_memory();
}
DEVICE uint4 load16(u64 at) { return load_as<uint4>(at); }
DEVICE void store16(u64 at, uint4 v) { store_as(at, v); }
DEVICE void store16_once(u64 at, uint4 v) { store_as(at, v); }
DEVICE uint4 load16_once(u64 at) { return load_as<uint4>(at); }
DEVICE u32 load4(u64 at) { return load_as<u32>(at); }
DEVICE void store4(u64 at, u32 v) { store_as(at, v); }
DEVICE void store8(u64 at, uint2 v) { store_as(at, v); }
DEVICE uint2 load8(u64 at) { return load_as<uint2>(at); }
DEVICE u32 load2(u64 at) { return load_as<unsigned short>(at); }
DEVICE u64 now() { return nanoseconds(); }
DEVICE void store_relaxed(u32* at, u32 v) { store_as((u64)at, v); }
DEVICE void fence_block() { settle_memory(); }
DEVICE void fence_device() { settle_memory(); }
DEVICE void fence_system() { settle_memory(); }
DEVICE void barrier_of(int name, int threads) { settle_memory(), meet_named(name, threads), settle_memory(); }

// A float with fewer bits, to nearest, ties to even: EXPONENT and MANTISSA bits below the sign. FINITE: too large a number
// becomes the largest; e4m3 has no infinity, and one NaN.
template <int EXPONENT, int MANTISSA, bool FINITE>
DEVICE u32 narrow(float v) {
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, SIGN = EXPONENT + MANTISSA;
    constexpr bool ALL_FINITE = EXPONENT == 4;
    constexpr u32 NAN_CODE = (1u << SIGN) - 1, INFINITE = ((1u << EXPONENT) - 1) << MANTISSA;
    constexpr u32 MOST = ALL_FINITE ? NAN_CODE - 1 : FINITE ? INFINITE - 1 : INFINITE;
    const u32 sign = (__float_as_uint(v) >> 31) << SIGN;
    if (v != v) return NAN_CODE;
    const float size = fabsf(v);
    if (std::isinf(size)) return sign | MOST;
    int exponent = size == 0.f ? -1000 : ilogbf(size);
    if (exponent < 1 - BIAS) exponent = 1 - BIAS;
    // In units of the last place; a carry into the next power of two comes out right by itself.
    const u32 steps = (u32)nearbyintf(ldexpf(size, MANTISSA - exponent));
    const u32 code = steps + ((u32)(exponent + BIAS - 1) << MANTISSA);
    return sign | (code > MOST ? MOST : code);
}

template <int EXPONENT, int MANTISSA>
DEVICE float widen(u32 code) {
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
    const u32 fraction = code & ((1u << MANTISSA) - 1), exponent = code >> MANTISSA & ((1u << EXPONENT) - 1);
    const float sign = code >> (EXPONENT + MANTISSA) & 1 ? -1.f : 1.f;
    const bool top = exponent == (1u << EXPONENT) - 1;
    if (EXPONENT == 4 ? top && fraction == 7 : top && fraction) return NAN;
    if (EXPONENT != 4 && top) return sign * INFINITY;
    if (exponent == 0) return sign * ldexpf((float)fraction, 1 - BIAS - MANTISSA);
    return sign * ldexpf((float)(fraction | 1u << MANTISSA), (int)exponent - BIAS - MANTISSA);
}

DEVICE u32 to_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
DEVICE u32 to_f16x2(float low, float high) { return narrow<5, 10, false>(low) | narrow<5, 10, false>(high) << 16; }
DEVICE u32 to_e4m3x2(float low, float high) { return narrow<4, 3, true>(low) | narrow<4, 3, true>(high) << 8; }
DEVICE u32 to_e5m2x2(float low, float high) { return narrow<5, 2, true>(low) | narrow<5, 2, true>(high) << 8; }
DEVICE int round_to_int(float v) { return v != v ? 0 : (int)nearbyintf(v); }
DEVICE float from_half(u32 bits, int high) { return widen<5, 10>(high ? bits >> 16 : bits); }

template <int EXPONENT, int MANTISSA>
DEVICE u32 pair_to_f16(u32 codes) {
    return to_f16x2(widen<EXPONENT, MANTISSA>(codes), widen<EXPONENT, MANTISSA>(codes >> 8));
}
DEVICE u32 from_e4m3x2(u32 codes) { return pair_to_f16<4, 3>(codes); }
DEVICE u32 from_e5m2x2(u32 codes) { return pair_to_f16<5, 2>(codes); }
