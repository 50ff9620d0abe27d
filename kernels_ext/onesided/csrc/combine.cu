// Combine: the rows that experts made, summed with their weights, back on the tokens' ranks.
//
// Prereduced: the experts' rank sums a token's rows in fp32 in increasing k and pushes one row back into the slot the
// token came in; the token's rank sums the ranks' rows in fp32 by rank. With EXACT a row a route travels, unweighted, and
// the token's rank sums all of them in increasing k. Without WEIGHTED the weights are ones (the backward of dispatch).
// With SUM_HOME the rows of this rank's own experts are summed where the ranks' rows are, and rounded as if they had travelled.
// Products and sums are rounded one by one, as PyTorch's are. Blocks [0, senders) push, the others sum as rows arrive.

struct CodedUnit {
    uint2 codes;
    float scale;
};

// Rows of the model's dtype, or wire rows: what a lane holds of one before it is unpacked.
template <bool WIRE>
struct Source {
    using Unit = uint4;
    static __device__ __forceinline__ uint4 load(u64 row, int dim, int unit) { return WIRE ? load16(row + unit * 16) : load16_once(row + unit * 16); }
    static __device__ __forceinline__ void values(uint4 unit, float* v) { unpack(unit, v); }
};

#if MW_CODEC
template <>
struct Source<true> {
    using Unit = CodedUnit;
    static __device__ __forceinline__ CodedUnit load(u64 row, int dim, int unit) {
        return {load_codes(row + unit * UNIT), __uint_as_float(load4(scale_at(row, dim, unit)))};
    }
    static __device__ __forceinline__ void values(CodedUnit unit, float* v) { decode(unit.codes, unit.scale, v); }
};
#endif

template <bool WIRE>
DEVICE void add_unit(float* sum, typename Source<WIRE>::Unit unit, float scale) {
    float v[UNIT];
    Source<WIRE>::values(unit, v);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(scale, v[i]));
}

template <int DEPTH>
DEVICE void clear(float (*sum)[UNIT]) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sum[d][i] = 0.f;
}

// Add the weighted rows that lanes name: `live` lanes, `row` index of each, from wire rows or model rows at `base`.
// Units first, first + 32, ... of DEPTH.
template <int DEPTH, bool WIRE>
DEVICE void add_rows(u64 base, u64 stride, u32 live, int row, float weight, int dim, int first, int last, float (*sum)[UNIT]) {
    // Two rows at a time: twice the loads in flight.
    while (live) {
        const int one = __ffs(live) - 1;
        live &= live - 1;
        const int two = live ? __ffs(live) - 1 : one;
        const bool pair = live != 0;
        live &= live - 1;
        const u64 at1 = base + (u64)(u32)__shfl_sync(ALL, row, one) * stride;
        const u64 at2 = base + (u64)(u32)__shfl_sync(ALL, row, two) * stride;
        typename Source<WIRE>::Unit unit1[DEPTH], unit2[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < last) unit1[d] = Source<WIRE>::load(at1, dim, first + d * 32);
        if (pair)
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < last) unit2[d] = Source<WIRE>::load(at2, dim, first + d * 32);
        // Weights are loads of their own: they are waited for when the rows are under way.
        const float scale1 = __shfl_sync(ALL, weight, one), scale2 = __shfl_sync(ALL, weight, two);
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < last) add_unit<WIRE>(sum[d], unit1[d], scale1);
        if (pair)
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < last) add_unit<WIRE>(sum[d], unit2[d], scale2);
    }
}

template <int DEPTH, bool WIRE>
DEVICE void sum_rows(u64 base, u64 stride, u32 live, int row, float weight, int dim, int first, int last, float (*sum)[UNIT]) {
    clear<DEPTH>(sum);
    add_rows<DEPTH, WIRE>(base, stride, live, row, weight, dim, first, last, sum);
}

// Units that a lane sums at a time.
constexpr int SUM_DEPTH = CODED ? 2 : MW_SUM_DEPTH;

// A sum as a row of the model's dtype has it: what is encoded is what would travel without a codec.
DEVICE void round_unit(float* v) { unpack(pack(v), v); }

// The largest magnitude of the sum of `live` rows. With room (`stash`, of this warp) the sum is kept there, else it is made
// again when it is encoded.
DEVICE float amax_of_sum(const Params& p, u32 live, int row, float weight, Span span, uint4* stash) {
    const int lane = threadIdx.x % 32, units = p.dim / UNIT;
    float most = 0.f, sum[SUM_DEPTH][UNIT];
    for (int start = span.first; start < span.last; start += SUM_DEPTH * 32) {
        sum_rows<SUM_DEPTH, false>(p.rows, units * 16, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
        for (int d = 0; d < SUM_DEPTH; ++d) {
            const int unit = start + lane + d * 32;
            round_unit(sum[d]), most = amax_of_unit(sum[d], most);
            if (p.stash && unit < span.last) stash[unit - span.first] = pack(sum[d]);
        }
    }
    return amax_of_parts(amax(most), p.sender_parts);
}

// A unit of a sum, encoded, to `target`.
DEVICE void push_coded(const Params& p, u64 target, const float* v, int unit, bool here, float most) {
    const float scale = scale_of(GROUP ? amax(amax_of_unit(v, 0.f)) : most);
    if (!here) return;
    store_codes(target + unit * UNIT, v, scale);
    if (GROUP ? unit % (GROUP / UNIT) == 0 : unit == 0) store4(scale_at(target, p.dim, unit), __float_as_uint(scale));
}

// The sum of `live` rows, encoded, to `target`.
DEVICE void push_sum(const Params& p, u64 target, u32 live, int row, float weight, Span span, uint4* stash) {
    const int lane = threadIdx.x % 32, units = p.dim / UNIT;
    float most = 0.f, sum[SUM_DEPTH][UNIT];
    if (CODED && !GROUP) {
        most = amax_of_sum(p, live, row, weight, span, stash);
        for (int unit = span.first + lane; p.stash && unit < span.last; unit += 32) {
            unpack(stash[unit - span.first], sum[0]);
            push_coded(p, target, sum[0], unit, true, most);
        }
        if (p.stash) return;
    }
    for (int start = span.first; start < span.last; start += SUM_DEPTH * 32) {
        sum_rows<SUM_DEPTH, false>(p.rows, units * 16, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
        for (int d = 0; d < SUM_DEPTH; ++d) {
            const int unit = start + lane + d * 32;
            if (CODED)
                round_unit(sum[d]), push_coded(p, target, sum[d], unit, unit < span.last, most);
            else if (unit < span.last)
                store16(target + unit * 16, pack(sum[d]));
        }
    }
}

DEVICE void push_slot(const Params& p, u64 home, int source, int slot_of_source, Span span, uint4* stash) {
    const int lane = threadIdx.x % 32;
    const u64 slot = (u64)source * p.max_tokens + slot_of_source;
    const int row = lane < K ? ((const int*)p.route_row)[slot * K + lane] : -1;
    const u32 live = __ballot_sync(ALL, row >= 0);
    if (!(p.flags & EXACT)) {
        const float weight = row >= 0 && p.flags & WEIGHTED ? ((const float*)p.row_weights)[row] : 1.f;
        const u64 target = home + p.at_rows + ((u64)p.rank * p.max_tokens + slot_of_source) * p.row_stride;
        return push_sum(p, target, live, row, weight, span, stash);
    }
    // A dropped route (-2) sends zeros: the token's rank cannot know that it was dropped.
    const u64 first = (u64)((const int*)p.tokens)[slot] * K;
    for (u32 left = __ballot_sync(ALL, row != -1); left; left &= left - 1) {
        const int k = __ffs(left) - 1;
        push_sum(p, home + p.at_rows + (first + k) * p.row_stride, live & 1u << k, row, 1.f, span, stash);
    }
}

constexpr int MAX_BATCH = 64;

// Chunks that a block pushes together: their slots, and how many of their rows (or parts) are still to be stored.
struct Batch {
    int range[MAX_BATCH], end[MAX_BATCH], left[MAX_BATCH];
};

// The n-th chunk that this block pushes, and the rank it goes to. The ranks of a chunk are neighbours, in an order that
// differs between chunks: else a block would have the same rank each time, and the blocks of this rank's own no link to wait
// for. This rank is the last of `homes`, or not among them.
struct Destination {
    int chunk, home;
    u64 cell;
};

// Ranks that rows are pushed to.
DEVICE int homes(const Params& p) { return SUM_HOME && !(p.flags & EXACT) ? p.world - 1 : p.world; }

DEVICE int home_of(const Params& p, int i, int chunk) {
    return (int)((i + ((u32)chunk * 0x9e3779b1u >> 24)) % homes(p) + p.rank + 1) % p.world;
}

DEVICE Destination destination(const Params& p, const u64* peers, int n) {
    const int i = blockIdx.x + n * p.senders, chunk = i / homes(p), home = home_of(p, i, chunk);
    return {chunk, home, peers[home] + p.at_cells + ((u64)p.rank * p.num_chunks + chunk) * 8};
}

DEVICE int range_of(const Params& p, int n) {
    const int i = blockIdx.x + n * p.senders, chunk = i / homes(p);
    return ((const int*)p.chunks)[(i64)home_of(p, i, chunk) * p.num_chunks + chunk];
}

// Ranges of the chunks of a batch, `mine` in thread i < count that of chunk i. A barrier must follow.
DEVICE void set_batch(const Params& p, Batch& batch, int count, int mine) {
    const int i = threadIdx.x;
    if (i < count) batch.range[i] = mine, batch.left[i] = (mine & 255) * p.sender_parts;
}

// Where each chunk's rows end in the batch; chunks without rows are published at once. Between barriers.
DEVICE void open_batch(const Params& p, const u64* peers, Batch& batch, int first, int count, u32 epoch) {
    const int i = threadIdx.x;
    if (i >= count) return;
    int end = 0;
    for (int j = 0; j <= i; ++j) end += batch.range[j] & 255;
    batch.end[i] = end;
    if ((batch.range[i] & 255) == 0) publish(destination(p, peers, first + i).cell, epoch, 0);
}

// A warp has stored its part of a row. Whoever stores a chunk's last publishes it: the counter in shared memory orders
// the other warps' stores before the release, as a block barrier would.
DEVICE void close_row(int* left, u64 cell, u32 epoch) {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    fence_block();
    if (atomicSub(left, 1) == 1) publish(cell, epoch, 0);
}

// False after a failure, on all threads of the block.
DEVICE bool push_results(const Params& p, uint4* shared, const Round& round) {
    __shared__ u64 peers[MAX_RANKS];
    __shared__ Batch batch;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) peers[w] = peer(p, w);
    const int warp = threadIdx.x / 32, parts = p.sender_parts;
    const int mine = (p.num_chunks * homes(p) - (int)blockIdx.x + p.senders - 1) / p.senders;
    const Span span = span_of(p.dim, warp % parts, parts);
    if (mine <= 0) return true;
    int count = min(MAX_BATCH, mine);
    set_batch(p, batch, count, threadIdx.x < count ? range_of(p, threadIdx.x) : 0);
    __syncthreads();
    const u32 epoch = round.epoch;
    if (__syncthreads_or(round.dead || !is_acknowledged(p, epoch - 1))) return false;
    for (int first = 0;;) {
        open_batch(p, peers, batch, first, count, epoch);
        __syncthreads();
        for (int row = warp / parts, i = 0; row < batch.end[count - 1]; row += warps() / parts) {
            while (row >= batch.end[i]) ++i;
            const int nth = row - (batch.end[i] - (batch.range[i] & 255));
            const Destination to = destination(p, peers, first + i);
            push_slot(p, peers[to.home], to.home, (batch.range[i] >> 8) + nth, span, shared + warp * (p.stash / 16));
            close_row(&batch.left[i], to.cell, epoch);
        }
        first += MAX_BATCH;
        if (first >= mine) return true;
        __syncthreads();
        count = min(MAX_BATCH, mine - first);
        set_batch(p, batch, count, threadIdx.x < count ? range_of(p, first + threadIdx.x) : 0);
        __syncthreads();
    }
}

// The rows that this rank's own experts made of a token: in the first K lanes row and weight of a route.
struct OwnRows {
    u32 live;
    int row;
    float weight;
};

// `own` is the lane whose entry names this rank.
DEVICE OwnRows own_rows(const Params& p, int entry, int own) {
    const int lane = threadIdx.x % 32, slot = __shfl_sync(ALL, entry, own) & 0xffffff;
    const int row = lane < K ? ((const int*)p.route_row)[((i64)p.rank * p.max_tokens + slot) * K + lane] : -1;
    return {__ballot_sync(ALL, row >= 0), row, row >= 0 && p.flags & WEIGHTED ? ((const float*)p.row_weights)[row] : 1.f};
}

// Sum of the ranks' rows in increasing rank; `own` is the lane of this rank, whose row is made here.
DEVICE void sum_with_own(const Params& p, const OwnRows& mine, u32 live, int own, int row, int first, int last, float (*sum)[UNIT]) {
    uint4 made[SUM_DEPTH];
    sum_rows<SUM_DEPTH, false>(p.rows, p.dim / UNIT * 16, mine.live, mine.row, mine.weight, p.dim, first, last, sum);
#pragma unroll
    for (int d = 0; d < SUM_DEPTH; ++d) made[d] = pack(sum[d]);
    const u32 before = live & ((1u << own) - 1);
    const u64 base = p.window + p.at_rows;
    sum_rows<SUM_DEPTH, true>(base, p.row_stride, before, row, 1.f, p.dim, first, last, sum);
#pragma unroll
    for (int d = 0; d < SUM_DEPTH; ++d) {
        float v[UNIT];
        unpack(made[d], v);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sum[d][i] = __fadd_rn(sum[d][i], v[i]);
    }
    add_rows<SUM_DEPTH, true>(base, p.row_stride, live & ~before & ~(1u << own), row, 1.f, p.dim, first, last, sum);
}

// Does each rank's chunk with a row of the token have come? In its first K lanes the token's `sent`.
DEVICE bool rows_are_here(const Params& p, int chunk, int entry, bool comes, u32 epoch) {
    u64 value;
    const u64 cell = p.window + p.at_cells + ((u64)(entry >> 24) * p.num_chunks + chunk) * 8;
    const bool here = !comes || wait_for(p, cell, epoch, WAIT_ROWS, entry >> 24, &value);
    const bool all = __all_sync(ALL, here);
    __syncwarp();  // what each lane acquired is now visible to the warp; a vote alone orders no memory
    return all;
}

// Part of a token's result. Lanes hold its ranks (or with EXACT its routes); waits for the chunk of each of its ranks.
DEVICE bool sum_token(const Params& p, int chunk, int token, int part, u32 epoch) {
    const int lane = threadIdx.x % 32;
    const int entry = lane < K ? ((const int*)p.sent)[(i64)token * K + lane] : -1;
    const bool at_home = SUM_HOME && !(p.flags & EXACT) && entry >= 0 && entry >> 24 == p.rank;
    const int own = __ffs(__ballot_sync(ALL, at_home)) - 1;
    OwnRows mine = {};
    if (SUM_HOME && own >= 0) mine = own_rows(p, entry, own);
    if (!rows_are_here(p, chunk, entry, entry >= 0 && !at_home, epoch)) return false;
    bool routed = entry >= 0;
    int row = (entry >> 24) * p.max_tokens + (entry & 0xffffff);
    float weight = 1.f;
    if (p.flags & EXACT) {
        routed = lane < K && expert_id(p, (i64)token * K + lane) >= 0, row = token * K + lane;
        if (routed && p.flags & WEIGHTED) weight = load_weight(p.weights, (i64)token * K + lane, p.weights_type);
    }
    const u32 live = __ballot_sync(ALL, routed);
    const Span span = span_of(p.dim, part, p.receiver_parts);
    for (int start = span.first; start < span.last; start += SUM_DEPTH * 32) {
        float sum[SUM_DEPTH][UNIT];
        if (SUM_HOME && own >= 0)
            sum_with_own(p, mine, live, own, row, start + lane, span.last, sum);
        else
            sum_rows<SUM_DEPTH, true>(p.window + p.at_rows, p.row_stride, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
        for (int d = 0; d < SUM_DEPTH; ++d)
            if (start + lane + d * 32 < span.last)
                store16(p.x + ((u64)token * (p.dim / UNIT) + start + lane + d * 32) * 16, pack(sum[d]));
    }
    return true;
}

// Only the ranks that a token needs are waited for: a chunk without rows for this rank tells it nothing.
DEVICE bool sum_results(const Params& p, int block, const Round& round) {
    __syncthreads();
    if (round.dead) return false;
    if (block == 0) acknowledge(p);
    const int parts = p.receiver_parts;
    for (int i = threadIdx.x / 32 * p.receivers + block; i < p.num_tokens * parts; i += p.receivers * warps())
        if (!sum_token(p, i / parts / p.chunk, i / parts, i % parts, round.epoch)) return false;
    return true;
}

DEVICE void spoil_sums(const Params& p, u32 epoch) {
    spoil(p, epoch, [&](u32 piece) { fill_nan(p.x, (u64)p.num_tokens * (p.dim / UNIT) * 16, piece); });
}

extern "C" __global__ void __launch_bounds__(384, 2) moeweave_combine(const __grid_constant__ Params p) {
    __shared__ Round round;
    if (blockIdx.x < p.senders) {
        begin(p, round, SENT, blockIdx.x);
        const bool good = push_results(p, dynamic_shared, round);
        end(p, SENT, blockIdx.x, round.epoch);
        if (!good) spoil_sums(p, round.epoch);
        return;
    }
    const int block = blockIdx.x - p.senders;
    begin(p, round, RECEIVED, block);
    const bool bad = __syncthreads_or(!sum_results(p, block, round));
    end(p, RECEIVED, block, round.epoch);
    if (bad) spoil_sums(p, round.epoch);
}
