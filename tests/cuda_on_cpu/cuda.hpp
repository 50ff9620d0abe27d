// CUDA C++ as a host compiler sees it: what kernels call, each thread a fiber of fibers.cpp.
//
// Included before a source whose file of PTX is replaced by ptx.hpp; the rest is compiled as it stands.
// Only whole warps take part in warp operations, as the mask of all lanes says. Memory is that of one host thread, so a
// missing fence is not found here; a missing barrier, a wrong order of signals and a wrong address are.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x;
};

// Of the fiber that runs.
struct Thread {
    Index thread, block, block_size, grid_size;
};
extern Thread* self;
extern uint4* dynamic_shared;

enum Operation { SHUFFLE = 1, BALLOT, SYNC_WARP };
const unsigned long long* meet_warp(Operation operation, unsigned long long mine);  // what each lane brought
bool meet_block(bool mine);                                                         // did any thread bring true?
void meet_named(int name, int threads);
void let_others_run();  // from a loop that waits for another thread
void after_signal();    // others may act on it before this warp does anything else
void note_progress();   // something was stored that a waiting thread may see
unsigned long long nanoseconds();
void bad_address(unsigned long long at, int bytes);  // the GPU would refuse it

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
// One copy in the module, exchanged when another block runs. Not in templates, where g++ takes no notice of the section.
#define __shared__ static __attribute__((section("shared_memory")))

#define threadIdx (self->thread)
#define blockIdx (self->block)
#define blockDim (self->block_size)
#define gridDim (self->grid_size)

template <typename A, typename B>
auto min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)b < (C)a ? (C)b : (C)a;
}
template <typename A, typename B>
auto max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a < (C)b ? (C)b : (C)a;
}

inline float __uint_as_float(unsigned bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline unsigned __float_as_uint(float v) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

template <typename T>
T atomicAdd(T* at, T v) {
    const T old = *at;
    *at = old + v;
    note_progress();
    return old;
}
template <typename T>
T atomicSub(T* at, T v) {
    return atomicAdd(at, (T)-v);
}
template <typename T>
T atomicCAS(T* at, T expected, T v) {
    const T old = *at;
    if (old == expected) *at = v;
    note_progress();
    return old;
}

// The compiler, which sees that nobody else has a static's address, must not keep shared memory in registers here.
inline void settle_memory() { asm volatile("" ::: "memory"); }

inline int __syncthreads_or(int v) {
    settle_memory();
    const bool any = meet_block(v != 0);
    settle_memory();
    return any;
}
inline void __syncthreads() { __syncthreads_or(0); }

inline const unsigned long long* meet(Operation operation, unsigned long long mine) {
    settle_memory();
    const unsigned long long* brought = meet_warp(operation, mine);
    settle_memory();
    return brought;
}
inline void __syncwarp() { meet(SYNC_WARP, 0); }

template <typename T>
T from_lane(T v, int lane) {
    unsigned long long bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = meet(SHUFFLE, bits)[lane];
    memcpy(&v, &bits, sizeof v);
    return v;
}
template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
    return from_lane(v, lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
    return from_lane(v, (threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int step) {
    const int lane = threadIdx.x % 32;
    return from_lane(v, lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, int vote) {
    const unsigned long long* votes = meet(BALLOT, vote != 0);
    unsigned word = 0;
    for (int lane = 0; lane < 32; ++lane) word |= (unsigned)votes[lane] << lane;
    return word;
}
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
