// Dispatch: rows of this rank's tokens into the windows of their experts' ranks, once a rank, and there, as they arrive,
// into expert-major order (by expert, then source rank, then route).
//
// Blocks [0, senders) send and publish chunk by chunk (send.cu); the others expand. With CACHED the layout of an earlier
// dispatch is used again; with GRADIENT the rows are gradients of a combine's result: what is written is weight * gradient,
// and the product with the saved row goes back as the weight's gradient.

// What came with a slot: in the first K lanes the pair and the weight of a route, in lane 0 the token. All is asked for at
// once, before anything is used.
struct Meta {
    u32 pair, weight, token;
};

DEVICE Meta load_meta(const Params& p, u64 slot) {
    const int k = threadIdx.x % 32;
    const u64 at = p.window + p.at_meta + slot * p.meta_stride;
    Meta meta = {NONE, 0, 0};
    if (k >= K || p.flags & GRADIENT) return meta;
    if (!(p.flags & CACHED)) meta.pair = load4(at + k * 4);
    meta.weight = load4(at + (K + k) * 4);
    if (k == 0) meta.token = load4(at + K * 8);
    return meta;
}

// Row of each route of a slot, in the first K lanes; -1 not of this rank, -2 dropped for lack of room.
DEVICE int row_of(const Params& p, const int* base_EW, int source, u64 slot, const Meta& meta) {
    const int k = threadIdx.x % 32;
    if (k >= K) return -1;
    if (p.flags & CACHED) return ((const int*)p.route_row)[slot * K + k];
    if (meta.pair == NONE) return -1;
    const i64 row = base_EW[(meta.pair >> 22) * p.world + source] + (i64)(meta.pair & 0x3fffff);
    return row < p.capacity ? (int)row : -2;
}

// What later operations need of a slot, out of the window: rows and weights of its routes, its token.
DEVICE void keep_slot(const Params& p, u64 slot, int row, const Meta& meta, u32* dropped) {
    const int k = threadIdx.x % 32;
    if (p.flags & GRADIENT) return;
    if (k < K && row >= 0) ((u32*)p.row_weights)[row] = meta.weight;
    if (p.flags & CACHED) return;
    if (k < K) ((int*)p.route_row)[slot * K + k] = row;
    if (k == 0) ((int*)p.tokens)[slot] = (int)meta.token;
    if (row == -2) atomicAdd(dropped, 1u);
}

// A row as it is (or its codes, with RAW) to the rows of its routes. `find_rows` is called once the first loads are out.
template <typename FindRows>
DEVICE void expand_bytes(u64 source, u64 rows, int units, Span span, FindRows find_rows) {
    constexpr int DEPTH = MW_EXPAND_DEPTH;
    int row = -1;
    for (int start = span.first; start < span.last || start == span.first; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < span.last) unit[d] = load16_once(source + (first + d * 32) * 16);
        if (start == span.first) row = find_rows();
        for (u32 left = __ballot_sync(ALL, row >= 0); left; left &= left - 1) {
            const u64 target = rows + (u64)__shfl_sync(ALL, row, __ffs(left) - 1) * units * 16;
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16_once(target + (first + d * 32) * 16, unit[d]);
        }
    }
}

DEVICE float load_scale(u64 source, int dim, int unit) { return __uint_as_float(load4(scale_at(source, dim, unit))); }

DEVICE void expand_decoded(const Params& p, u64 source, int row, Span span) {
    constexpr int DEPTH = MW_DECODE_DEPTH;
    const u32 routes = __ballot_sync(ALL, row >= 0);
    const float of_row = GROUP ? 0.f : load_scale(source, p.dim, 0);
    for (int start = span.first; start < span.last; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            float v[UNIT];
            const int at = first + d * 32;
            if (at >= span.last) continue;
            decode(load_codes(source + at * UNIT), GROUP ? load_scale(source, p.dim, at) : of_row, v);
            unit[d] = pack(v);
        }
        for (u32 left = routes; left; left &= left - 1) {
            const u64 target = p.rows + (u64)__shfl_sync(ALL, row, __ffs(left) - 1) * (p.dim / UNIT) * 16;
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16_once(target + (first + d * 32) * 16, unit[d]);
        }
    }
}

// Gradients: weight * gradient to each row, and <saved row, gradient> back to the token's rank. One warp a row, so that
// the order of the sum is fixed.
static __device__ __noinline__ void expand_gradient(const Params& p, u64 source_row, int row, int source, u64 slot) {
    const int lane = threadIdx.x % 32, units = p.dim / UNIT;
    const float weight = row >= 0 ? ((const float*)p.row_weights)[row] : 0.f;
    float dot = 0.f;
    for (u32 left = __ballot_sync(ALL, row >= 0); left; left &= left - 1) {
        const int k = __ffs(left) - 1;
        const float scale = __shfl_sync(ALL, weight, k);
        const u64 at = (u64)__shfl_sync(ALL, row, k) * units * 16;
        float sum = 0.f;
#pragma unroll 2
        for (int unit = lane; unit < units; unit += 32) {
            float gradient[UNIT], saved[UNIT];
            load_wire(source_row, p.dim, unit, gradient);
            unpack(load16_once(p.saved + at + unit * 16), saved);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) sum += gradient[i] * saved[i], gradient[i] *= scale;
            store16_once(p.rows + at + unit * 16, pack(gradient));
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        if (lane == k) dot = sum;
    }
    const u64 home = peer(p, source) + p.at_dots + ((u64)p.rank * p.max_tokens + slot % p.max_tokens) * K * 4;
    if (row >= 0) store4(home + lane * 4, __float_as_uint(dot));
    if (row == -2) store4(home + lane * 4, 0);
}

// Codes and scales as they came, for a low-precision grouped GEMM. Codes are a byte an element: a warp takes a row whole.
template <typename FindRows>
DEVICE void expand_codes(const Params& p, u64 source, FindRows find_rows) {
    const int groups = GROUP ? p.dim / GROUP : 1, lane = threadIdx.x % 32;
    const int row = find_rows();
    expand_bytes(source, p.rows, p.dim / 16, {0, p.dim / 16}, [=] { return row; });
    for (u32 left = __ballot_sync(ALL, row >= 0); left; left &= left - 1) {
        const u64 target = p.scales + (u64)__shfl_sync(ALL, row, __ffs(left) - 1) * groups * 4;
        for (int g = lane; g < groups; g += 32) store4(target + g * 4, load4(source + p.dim + g * 4));
    }
}

// Where the row of a slot is: in the window, or with this rank's tokens.
DEVICE u64 row_source(const Params& p, int source, u64 slot, const Meta& meta) {
    if (!EXPAND_HOME || source != p.rank) return p.window + p.at_rows + slot * p.row_stride;
    const u32 token = p.flags & CACHED ? ((const u32*)p.tokens)[slot] : __shfl_sync(ALL, meta.token, 0);
    return p.x + (u64)token * (p.dim / UNIT) * 16;
}

DEVICE void expand_slot(const Params& p, const int* base_EW, int source, int slot_of_source, int part, u32* dropped) {
    const u64 slot = (u64)source * p.max_tokens + slot_of_source;
    const Meta meta = load_meta(p, slot);
    const u64 row_at = row_source(p, source, slot, meta);
    auto find_rows = [&] {
        const int row = row_of(p, base_EW, source, slot, meta);
        if (part == 0) keep_slot(p, slot, row, meta, dropped);
        return row;
    };
    const Span span = span_of(p.dim, part, p.receiver_parts);
    if (p.flags & GRADIENT)
        expand_gradient(p, row_at, find_rows(), source, slot);
    else if (!CODED)
        expand_bytes(row_at, p.rows, p.dim / UNIT, span, find_rows);
    else if (!(p.flags & RAW))
        expand_decoded(p, row_at, find_rows(), span);
    else if (part == 0)
        expand_codes(p, row_at, find_rows);
}

// Rows between an expert's last row and its aligned end are zeros: a grouped GEMM reads them.
DEVICE void zero_padding(const Params& p, const int* base_EW, int block) {
    if (p.align == 1) return;
    const u64 row_bytes = p.flags & RAW ? (u64)p.dim : (u64)(p.dim / UNIT) * 16;
    for (int e = block; e < p.num_local; e += p.receivers) {
        const int last = e * p.world + p.world - 1;
        const i64 end = base_EW[last] + (i64)load4(p.window + p.at_counts + ((u64)(p.world - 1) * p.num_local + e) * 4);
        const i64 first = base_EW[e * p.world], padded = first + (end - first + p.align - 1) / p.align * p.align;
        const u64 from = (u64)min(end, p.capacity) * row_bytes, to = (u64)min(padded, p.capacity) * row_bytes;
        for (u64 at = from + threadIdx.x * 16; at < to; at += blockDim.x * 16) store16(p.rows + at, {0, 0, 0, 0});
        if (p.row_weights)
            for (i64 r = min(end, p.capacity) + threadIdx.x; r < min(padded, p.capacity); r += blockDim.x) ((float*)p.row_weights)[r] = 0.f;
    }
}

// Every warp takes rows (or parts of rows) in the order in which they are expected to arrive, and waits for each chunk.
// Neighbouring parts go to different blocks: few rows are then written by many multiprocessors.
DEVICE bool receive_rows(const Params& p, const int* base_EW, int block, u32 epoch, u32* dropped) {
    const int lane = threadIdx.x % 32, parts = p.receiver_parts, share = share_of(p);
    const int per_cell = p.chunk * parts, work = max(p.num_chunks, p.senders * share) * p.world * per_cell;
    for (int i = threadIdx.x / 32 * p.receivers + block; i < work; i += p.receivers * warps()) {
        const int cell_in_order = i / per_cell, nth = i % per_cell / parts, part = i % per_cell % parts;
        const int chunk = chunk_in_order(cell_in_order / p.world, p.senders, share);
        if (chunk >= p.num_chunks) continue;
        const int source = (cell_in_order + p.rank) % p.world;
        u64 value = 0;
        const u64 cell = p.window + p.at_cells + ((u64)source * p.num_chunks + chunk) * 8;
        // Gradients of this rank's own tokens are where they were: nothing comes.
        const bool at_home = EXPAND_HOME && p.flags & GRADIENT && source == p.rank;
        const bool here = at_home || lane != 0 || wait_for(p, cell, epoch, WAIT_ROWS, source, &value);
        if (!__shfl_sync(ALL, here, 0)) return false;
        __syncwarp();  // what lane 0 acquired is now visible to the warp; a shuffle alone orders no memory
        int* kept = (int*)p.chunks + (i64)source * p.num_chunks + chunk;
        const int range = p.flags & CACHED ? *kept : (int)__shfl_sync(ALL, (u32)value, 0);
        if (!(p.flags & CACHED) && lane == 0 && nth == 0 && part == 0) *kept = range;
        if (nth < (range & 255)) expand_slot(p, base_EW, source, (range >> 8) + nth, part, dropped);
    }
    return true;
}

DEVICE bool receive_tokens(const Params& p, int* base_EW, int block, const Round& round, u32* dropped) {
    __syncthreads();
    if (round.dead) return false;
    if (block == 0) acknowledge(p);
    if (!(p.flags & CACHED)) {
        if (!wait_for_ranks(p, p.window + p.at_flags, round.epoch, WAIT_COUNTS)) return false;
        expert_bases(p, base_EW, p.window + p.at_counts, block == 0);
        zero_padding(p, base_EW, block);
    }
    return receive_rows(p, base_EW, block, round.epoch, dropped);
}

DEVICE void spoil_rows(const Params& p, u32 epoch) {
    const u64 row_bytes = p.flags & RAW ? (u64)p.dim : (u64)(p.dim / UNIT) * 16;
    spoil(p, epoch, [&](u32 piece) {
        fill_nan(p.rows, (u64)p.capacity * row_bytes, piece);
        if (p.row_weights && !(p.flags & GRADIENT)) fill_nan(p.row_weights, (u64)p.capacity * 4, piece);
        if (p.scales) fill_nan(p.scales, (u64)p.capacity * 4 * (GROUP ? p.dim / GROUP : 1), piece);
    });
}

// Rows that this block dropped, added to those of earlier launches, and told to the host.
DEVICE void report_dropped(const Params& p, int block, u32 dropped) {
    u32* total = (u32*)p.state + DROPPED + block;
    ((volatile u64*)p.report)[8 + block] = *total += dropped;
}

extern "C" __global__ void __launch_bounds__(384, 2) moeweave_dispatch(const __grid_constant__ Params p) {
    int* shared = (int*)dynamic_shared;
    __shared__ Round round;
    __shared__ u32 dropped;
    if (blockIdx.x < p.senders) {
        begin(p, round, SENT, blockIdx.x);
        const bool good = send_tokens(p, shared, round);
        end(p, SENT, blockIdx.x, round.epoch);
        if (!good) spoil_rows(p, round.epoch);
        return;
    }
    const int block = blockIdx.x - p.senders;
    if (threadIdx.x == 0) dropped = 0;
    begin(p, round, RECEIVED, block);
    const bool bad = __syncthreads_or(!receive_tokens(p, shared, block, round, &dropped));
    if (threadIdx.x == 0 && dropped) report_dropped(p, block, dropped);
    end(p, RECEIVED, block, round.epoch);
    if (bad) spoil_rows(p, round.epoch);
}
