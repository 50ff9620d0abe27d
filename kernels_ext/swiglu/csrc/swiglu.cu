// silu(gate) * up for the rows before the last offset, which is read on the device, and its gradient. Rows past it are
// neither read nor written: with fixed sizes most of the rows that there is room for may hold nothing.
//
// A thread takes 16 bytes of gate, the 16 bytes of up beside them and what they give, and goes on by the grid's stride, so
// that the grid need not know how many rows there are. Roundings are those of torch, which rounds silu(gate) before it
// multiplies. No shared memory, no order between threads.
//
// Legend: R rows, e offsets, I columns of gate and of up, U units of 16 bytes a row of I.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Read by kernels_ext/swiglu/cuda_impl.py, which makes the same structure of it.
struct Params {
    u64 gate_up;       // [R, 2I]
    u64 out;           // [R, I]: written forward
    u64 grad;          // [R, I]: read backward
    u64 grad_gate_up;  // [R, 2I]: written backward
    u64 offsets;       // int32 [e]
    u64 rows;          // R
    u64 units;         // U
    u64 num_offsets;   // e
};

#if MW_DTYPE == 0  // bf16: two in a word
constexpr int WIDTH = 8;
__device__ __forceinline__ float from_bits(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ u32 to_bits(float x) {
    const u32 bits = __float_as_uint(x);
    // To nearest, ties to even; a NaN stays one.
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
__device__ __forceinline__ float at(const u32* words, int i) { return from_bits(words[i / 2] >> i % 2 * 16 & 0xffffu); }
__device__ __forceinline__ void put(u32* words, int i, float x) {
    words[i / 2] = i % 2 ? words[i / 2] | to_bits(x) << 16 : to_bits(x);
}
__device__ __forceinline__ float rounded(float x) { return from_bits(to_bits(x)); }
#else  // float32
constexpr int WIDTH = 4;
__device__ __forceinline__ float at(const u32* words, int i) { return __uint_as_float(words[i]); }
__device__ __forceinline__ void put(u32* words, int i, float x) { words[i] = __float_as_uint(x); }
__device__ __forceinline__ float rounded(float x) { return x; }
#endif

union Unit {
    uint4 all;
    u32 words[4];
};

__device__ __forceinline__ Unit load(u64 base, u64 unit) {
    Unit value;
    value.all = ((const uint4*)base)[unit];
    return value;
}

__device__ __forceinline__ u64 units_to_do(const Params& p) {
    const int* offsets = (const int*)p.offsets;
    const u64 end = p.num_offsets ? (u64)offsets[p.num_offsets - 1] : 0;
    return (end < p.rows ? end : p.rows) * p.units;
}

extern "C" __global__ void moeweave_swiglu(const Params p) {
    const u64 count = units_to_do(p), stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const u64 gate_at = i + i / p.units * p.units;
        const Unit gate = load(p.gate_up, gate_at), up = load(p.gate_up, gate_at + p.units);
        Unit out;
        for (int j = 0; j < WIDTH; ++j) {
            const float x = at(gate.words, j);
            put(out.words, j, rounded(x / (1.0f + expf(-x))) * at(up.words, j));
        }
        ((uint4*)p.out)[i] = out.all;
    }
}

extern "C" __global__ void moeweave_swiglu_backward(const Params p) {
    const u64 count = units_to_do(p), stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const u64 gate_at = i + i / p.units * p.units;
        const Unit gate = load(p.gate_up, gate_at), up = load(p.gate_up, gate_at + p.units), grad = load(p.grad, i);
        Unit grad_gate, grad_up;
        for (int j = 0; j < WIDTH; ++j) {
            const float x = at(gate.words, j), dy = at(grad.words, j), sigmoid = 1.0f / (1.0f + expf(-x));
            put(grad_up.words, j, dy * rounded(x / (1.0f + expf(-x))));
            put(grad_gate.words, j, rounded(dy * at(up.words, j)) * sigmoid * (1.0f + x * (1.0f - sigmoid)));
        }
        ((uint4*)p.grad_gate_up)[gate_at] = grad_gate.all;
        ((uint4*)p.grad_gate_up)[gate_at + p.units] = grad_up.all;
    }
}
