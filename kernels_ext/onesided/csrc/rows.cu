// Rows, 16 bytes of the model's dtype at a time (a unit), and the formats they travel in.
//
// Wire rows are those of comm/codec.py: D codes, then one f32 scale a token or a group of 128 columns, padded to 16 bytes;
// without a codec, the row. Codes are what kernels_ext/quantize_rows/reference.py defines, bit for bit: true divisions,
// round to nearest even.
//
// Compiled for one dtype (0 bf16, 1 f16, 2 f32), one codec (0 none, 1 int8, 2 e4m3, 3 e5m2) and one scale group.

constexpr int UNIT = MW_DTYPE == 2 ? 4 : 8, K = MW_TOPK, GROUP = MW_GROUP;
constexpr bool CODED = MW_CODEC != 0;
// Rows between tokens and experts of one rank do not pass through its window. Coded ones do: the code rounds them.
constexpr bool EXPAND_HOME = MW_EXPAND_HOME && !CODED, SUM_HOME = MW_SUM_HOME && !CODED;
constexpr float MOST = MW_CODEC == 1 ? 127.f : MW_CODEC == 2 ? 448.f : 57344.f;

DEVICE void unpack(uint4 unit, float* v) {
    const u32 words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        if (MW_DTYPE == 0) v[i] = __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        if (MW_DTYPE == 1) v[i] = from_half(words[i / 2], i & 1);
        if (MW_DTYPE == 2) v[i] = __uint_as_float(words[i]);
    }
}

DEVICE u32 pack_pair(float low, float high) {
    return MW_DTYPE == 0 ? to_bf16x2(low, high) : to_f16x2(low, high);
}

DEVICE uint4 pack(const float* v) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = MW_DTYPE == 2 ? __float_as_uint(v[i]) : pack_pair(v[2 * i % UNIT], v[(2 * i + 1) % UNIT]);
    return {words[0], words[1], words[2], words[3]};
}

DEVICE u32 encode_pair(float low, float high) {
    if (MW_CODEC == 1) return (round_to_int(low) & 255) | (round_to_int(high) & 255) << 8;
    return MW_CODEC == 2 ? to_e4m3x2(low, high) : to_e5m2x2(low, high);
}

DEVICE void decode_pair(u32 codes, float* v) {
    if (MW_CODEC == 1) {
        v[0] = (float)(signed char)(codes & 255), v[1] = (float)(signed char)(codes >> 8 & 255);
        return;
    }
    const u32 halves = MW_CODEC == 2 ? from_e4m3x2(codes) : from_e5m2x2(codes);
    v[0] = from_half(halves, 0), v[1] = from_half(halves, 1);
}

DEVICE float clamp(float v) { return v > MOST ? MOST : v < -MOST ? -MOST : v; }

// UNIT codes of v / scale, to `at` (UNIT bytes, aligned to UNIT).
DEVICE void store_codes(u64 at, const float* v, float scale) {
    u32 words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < UNIT; i += 2)
        words[i / 4] |= encode_pair(clamp(v[i] / scale), clamp(v[i + 1] / scale)) << (i & 2) * 8;
    if (scale != scale) words[0] = words[1] = 0;
    if (UNIT == 8)
        store8(at, {words[0], words[1]});
    else
        store4(at, words[0]);
}

DEVICE uint2 load_codes(u64 at) {
    if (UNIT == 8) return load8(at);
    return {load4(at), 0};
}

DEVICE void decode(uint2 words, float scale, float* v) {
#pragma unroll
    for (int i = 0; i < UNIT; i += 2) decode_pair((i < 4 ? words.x : words.y) >> (i & 2) * 8 & 0xffff, v + i);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) v[i] *= scale;
}

// Largest magnitude over the warp, or over the lanes that share a group of 128 columns; NaN stays NaN.
DEVICE float amax(float most) {
#pragma unroll
    for (int step = (GROUP ? GROUP / UNIT : 32) / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(ALL, most, step);
        most = other > most || other != other ? other : most;
    }
    return most;
}

// Largest of what the warps of a row found, by a barrier of these warps alone. They are neighbours, and come together.
DEVICE float amax_of_parts(float most, int parts) {
    __shared__ float found[32];
    if (parts == 1) return most;
    const int warp = threadIdx.x / 32, first = warp / parts * parts, barrier = 1 + warp / parts;
    if (threadIdx.x % 32 == 0) found[warp] = most;
    barrier_of(barrier, parts * 32);
    for (int i = first; i < first + parts; ++i) most = found[i] > most || found[i] != found[i] ? found[i] : most;
    barrier_of(barrier, parts * 32);
    return most;
}

DEVICE float amax_of_unit(const float* v, float most) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        float size = fabsf(v[i]);
        most = size > most || size != size ? size : most;
    }
    return most;
}

// Never below the smallest normal number; NaN where a value is not finite, and all of the row decodes to NaN.
DEVICE float scale_of(float most) {
    const float tiny = 1.17549435e-38f, scale = most / MOST;
    if (!(most <= 3.402823466e38f)) return __uint_as_float(0x7fc00000u);
    return scale < tiny ? tiny : scale;
}

DEVICE u64 scale_at(u64 row, int dim, int unit) { return row + dim + (GROUP ? unit * UNIT / GROUP * 4 : 0); }

// A unit of a row as it lies in a window (or in any buffer of wire rows).
DEVICE void load_wire(u64 row, int dim, int unit, float* v) {
    if (CODED)
        decode(load_codes(row + unit * UNIT), __uint_as_float(load4(scale_at(row, dim, unit))), v);
    else
        unpack(load16(row + unit * 16), v);
}

// The units of a row that one of `parts` warps handles: [first, last), whole groups, `lane` apart.
struct Span {
    int first, last;
};

DEVICE Span span_of(int dim, int part, int parts) {
    const int units = dim / UNIT, length = ((units + parts - 1) / parts + 31) / 32 * 32;
    const int first = part * length, last = first + length;
    return {first < units ? first : units, last < units ? last : units};
}

DEVICE float load_weight(u64 weights, i64 i, int type) {
    if (type == 0) return __uint_as_float(load4(weights + i * 4));
    const u32 half = load2(weights + i * 2);
    return type == 1 ? __uint_as_float(half << 16) : from_half(half, 0);
}
