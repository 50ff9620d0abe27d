// Instructions of the GPU that CUDA C++ has no words for, one function each.
//
// The only file with inline PTX, and with what a host has to do in another way: the others are C++ and CUDA's own functions.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__

constexpr u32 ALL = 0xffffffff;

extern __shared__ uint4 dynamic_shared[];

DEVICE u64 load_acquire(u64 at) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

DEVICE u32 load_relaxed(const u32* at) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// A release: the fence and the store behind it. Call after __syncthreads, and it covers the stores of the whole block, not
// only this thread's. (`st.release` instead would bring a second fence.)
DEVICE void publish(u64 at, u32 epoch, u32 value) {
    asm volatile("fence.acq_rel.sys;\n\tst.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"((u64)epoch << 32 | value)
                 : "memory");
}

// 16 bytes, not kept in L1: windows are written by peers, and rows are read once. Never `.nc`: windows change.
DEVICE uint4 load16(u64 at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

DEVICE void store16(u64 at, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

#if MW_ROW_STORE == 2 || MW_ROW_LOAD == 1
DEVICE u64 evicted_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

// Rows that a whole launch writes and never reads: they should leave L2 before what it is still to read.
DEVICE void store16_once(u64 at, uint4 v) {
#if MW_ROW_STORE == 1
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#elif MW_ROW_STORE == 2
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
                 "l"(evicted_first()) : "memory");
#else
    store16(at, v);
#endif
}

// Rows that a launch reads once and for the last time.
DEVICE uint4 load16_once(u64 at) {
#if MW_ROW_LOAD == 1
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at), "l"(evicted_first()) : "memory");
    return v;
#else
    return load16(at);
#endif
}

DEVICE u32 load4(u64 at) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

DEVICE void store4(u64 at, u32 v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }

DEVICE void store8(u64 at, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory");
}

DEVICE uint2 load8(u64 at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

DEVICE u32 load2(u64 at) {
    unsigned short v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
    return v;
}

DEVICE u64 now() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

DEVICE void store_relaxed(u32* at, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }

DEVICE void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// A barrier of the warps that name it, of so many threads together; 0 is __syncthreads.
DEVICE void barrier_of(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// Pairs of numbers in a word, the first in its lower half. To nearest, ties to even; fp8 stays at its largest number.
DEVICE u32 to_bf16x2(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

DEVICE u32 to_f16x2(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

DEVICE u32 to_e4m3x2(float low, float high) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

DEVICE u32 to_e5m2x2(float low, float high) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

// Two f16 in a word.
DEVICE u32 from_e4m3x2(u32 codes) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)codes));
    return halves;
}

DEVICE u32 from_e5m2x2(u32 codes) {
    u32 halves;
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)codes));
    return halves;
}

DEVICE int round_to_int(float v) {
    int number;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(number) : "f"(v));
    return number;
}

DEVICE float from_half(u32 bits, int high) {
    float value;
    asm("{.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %1;\n\tcvt.f32.f16 %0, lo;}" : "=f"(value) : "r"(high ? bits >> 16 : bits));
    return value;
}
