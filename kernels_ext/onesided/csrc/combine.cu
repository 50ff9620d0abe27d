// Combine: the rows that experts made, summed with their weights, back on the tokens' ranks.
//
// Prereduced: the experts' rank sums a token's rows in fp32 in increasing k and pushes one row back into the slot the
// token came in; the token's rank sums the ranks' rows in fp32 by rank. With EXACT a row a route travels, unweighted, and
// the token's rank sums all of them in increasing k. Without WEIGHTED the weights are ones (the backward of dispatch).
// Products and sums are rounded one by one, as PyTorch's are. Blocks [0, senders) push, the others sum as rows arrive.

struct CodedUnit {
    uint2 codes;
    float scale;
};

// Rows of the model's dtype, or wire rows: what a lane holds of one before it is unpacked.
template <bool WIRE>
struct Source {
    using Unit = uint4;
    static __device__ __forceinline__ uint4 load(u64 row, int dim, int unit) { return load16(row + unit * 16); }
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

// Weighted sum of the rows that lanes name: `live` lanes, `row` index of each, from wire rows or model rows at `base`.
// Units first, first + 32, ... of DEPTH.
template <int DEPTH, bool WIRE>
DEVICE void sum_rows(u64 base, u64 stride, u32 live, int row, float weight, int dim, int first, int last, float (*sum)[UNIT]) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sum[d][i] = 0.f;
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

constexpr int SUM_DEPTH = CODED ? 2 : 3;

// A sum as a row of the model's dtype has it: what is encoded is what would travel without a codec.
DEVICE void round_unit(float* v) { unpack(pack(v), v); }

// The sum of `live` rows, encoded, to `target`.
DEVICE void push_sum(const Params& p, u64 target, u32 live, int row, float weight, Span span) {
    const int lane = threadIdx.x % 32, units = p.dim / UNIT;
    float most = 0.f, sum[SUM_DEPTH][UNIT];
    if (CODED && !GROUP) {
        for (int start = span.first; start < span.last; start += SUM_DEPTH * 32) {
            sum_rows<SUM_DEPTH, false>(p.rows, units * 16, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
            for (int d = 0; d < SUM_DEPTH; ++d) round_unit(sum[d]), most = amax_of_unit(sum[d], most);
        }
        most = amax_of_parts(amax(most), p.sender_parts);
    }
    for (int start = span.first; start < span.last; start += SUM_DEPTH * 32) {
        sum_rows<SUM_DEPTH, false>(p.rows, units * 16, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
        for (int d = 0; d < SUM_DEPTH; ++d) {
            const int unit = start + lane + d * 32;
            if (CODED) round_unit(sum[d]);
            const float scale = CODED ? scale_of(GROUP ? amax(amax_of_unit(sum[d], 0.f)) : most) : 1.f;
            if (unit >= span.last) continue;
            if (!CODED) {
                store16(target + unit * 16, pack(sum[d]));
                continue;
            }
            store_codes(target + unit * UNIT, sum[d], scale);
            if (GROUP ? unit % (GROUP / UNIT) == 0 : unit == 0) store4(scale_at(target, p.dim, unit), __float_as_uint(scale));
        }
    }
}

DEVICE void push_slot(const Params& p, u64 home, int source, int slot_of_source, Span span) {
    const int lane = threadIdx.x % 32;
    const u64 slot = (u64)source * p.max_tokens + slot_of_source;
    const int row = lane < K ? ((const int*)p.route_row)[slot * K + lane] : -1;
    const u32 live = __ballot_sync(ALL, row >= 0);
    if (!(p.flags & EXACT)) {
        const float weight = row >= 0 && p.flags & WEIGHTED ? ((const float*)p.row_weights)[row] : 1.f;
        const u64 target = home + p.at_rows + ((u64)p.rank * p.max_tokens + slot_of_source) * p.row_stride;
        return push_sum(p, target, live, row, weight, span);
    }
    // A dropped route (-2) sends zeros: the token's rank cannot know that it was dropped.
    const u64 first = (u64)((const int*)p.tokens)[slot] * K;
    for (u32 left = __ballot_sync(ALL, row != -1); left; left &= left - 1) {
        const int k = __ffs(left) - 1;
        push_sum(p, home + p.at_rows + (first + k) * p.row_stride, live & 1u << k, row, 1.f, span);
    }
}

constexpr int MAX_BATCH = 64;

// Chunks that a block pushes together: their slots, and how many of their rows (or parts) are still to be stored.
struct Batch {
    int range[MAX_BATCH], end[MAX_BATCH], left[MAX_BATCH];
};

// The n-th chunk that this block pushes, and the rank it goes to: all blocks go round the ranks, from different ones.
struct Destination {
    int chunk, home;
    u64 cell;
};

DEVICE Destination destination(const Params& p, const u64* peers, int n) {
    const int i = blockIdx.x + n * p.senders, home = (i + p.rank + 1) % p.world;
    return {i / p.world, home, peers[home] + p.at_cells + ((u64)p.rank * p.num_chunks + i / p.world) * 8};
}

// Ranges of the chunks first, first + 1, ...; chunks without rows are published at once.
DEVICE void open_batch(const Params& p, const u64* peers, Batch& batch, int first, int count, u32 epoch) {
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const Destination to = destination(p, peers, first + i);
        batch.range[i] = ((const int*)p.chunks)[(i64)to.home * p.num_chunks + to.chunk];
        batch.left[i] = (batch.range[i] & 255) * p.sender_parts;
        if (batch.left[i] == 0) publish(to.cell, epoch, 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int end = 0;
        for (int j = 0; j <= i; ++j) end += batch.range[j] & 255;
        batch.end[i] = end;
    }
    __syncthreads();
}

// A warp has stored its part of a row. Whoever stores a chunk's last publishes it: the counter in shared memory orders
// the other warps' stores before the release, as a block barrier would.
DEVICE void close_row(int* left, u64 cell, u32 epoch) {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    asm volatile("fence.acq_rel.cta;" ::: "memory");
    if (atomicSub(left, 1) == 1) publish(cell, epoch, 0);
}

DEVICE void push_results(const Params& p, u32 epoch) {
    __shared__ u64 peers[MAX_RANKS];
    __shared__ Batch batch;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) peers[w] = peer(p, w);
    if (__syncthreads_or(!is_acknowledged(p, epoch - 1))) return;
    const int warp = threadIdx.x / 32, parts = p.sender_parts;
    const int mine = (p.num_chunks * p.world - (int)blockIdx.x + p.senders - 1) / p.senders;
    const Span span = span_of(p.dim, warp % parts, parts);
    for (int first = 0; first < mine; first += MAX_BATCH) {
        const int count = min(MAX_BATCH, mine - first);
        open_batch(p, peers, batch, first, count, epoch);
        for (int row = warp / parts, i = 0; row < batch.end[count - 1]; row += warps() / parts) {
            while (row >= batch.end[i]) ++i;
            const int nth = row - (batch.end[i] - (batch.range[i] & 255));
            const Destination to = destination(p, peers, first + i);
            push_slot(p, peers[to.home], to.home, (batch.range[i] >> 8) + nth, span);
            close_row(&batch.left[i], to.cell, epoch);
        }
    }
}

// Part of a token's result. Lanes hold its ranks (or with EXACT its routes); waits for the chunk of each of its ranks.
DEVICE bool sum_token(const Params& p, int chunk, int token, int part, u32 epoch) {
    const int lane = threadIdx.x % 32;
    const int entry = lane < K ? ((const int*)p.sent)[(i64)token * K + lane] : -1;
    u64 value;
    const u64 cell = p.window + p.at_cells + ((u64)(entry >> 24) * p.num_chunks + chunk) * 8;
    const bool here = entry < 0 || wait_for(p, cell, epoch, WAIT_ROWS, entry >> 24, &value);
    if (!__all_sync(ALL, here)) return false;
    __syncwarp();  // what each lane acquired is now visible to the warp; a vote alone orders no memory
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
        sum_rows<SUM_DEPTH, true>(p.window + p.at_rows, p.row_stride, live, row, weight, p.dim, start + lane, span.last, sum);
#pragma unroll
        for (int d = 0; d < SUM_DEPTH; ++d)
            if (start + lane + d * 32 < span.last)
                store16(p.x + ((u64)token * (p.dim / UNIT) + start + lane + d * 32) * 16, pack(sum[d]));
    }
    return true;
}

DEVICE void sum_results(const Params& p, u32 epoch) {
    const int block = blockIdx.x - (p.roles & SEND ? p.senders : 0), parts = p.receiver_parts;
    for (int i = block * warps() + threadIdx.x / 32; i < p.num_tokens * parts; i += p.receivers * warps())
        if (!sum_token(p, i / parts / p.chunk, i / parts, i % parts, epoch)) return;
}

// Ranks that a token does not need are waited for here, so that the acknowledgement means: their rows have all come.
DEVICE void finish_combine(const Params& p, u32 epoch) {
    if (!is_last_block(p, RECEIVERS_DONE, p.receivers)) return;
    bool good = !failed(p);
    u64 value;
    for (int i = threadIdx.x; good && i < p.world * p.num_chunks; i += blockDim.x)
        good = wait_for(p, p.window + p.at_cells + (u64)i * 8, epoch, WAIT_ROWS, i / p.num_chunks, &value);
    good = !__syncthreads_or(!good);
    if (!good) fill_nan(p.x, (u64)p.num_tokens * (p.dim / UNIT) * 16);
    end_receive(p, epoch, good);
}

extern "C" __global__ void __launch_bounds__(384, 2) moeweave_combine(const __grid_constant__ Params p) {
    const bool sends = p.roles & SEND && blockIdx.x < p.senders;
    const u32 epoch = *counter(p, sends ? SENT : RECEIVED) + 1;
    const bool dead = __syncthreads_or(failed(p));
    if (sends) {
        if (!dead) push_results(p, epoch);
        end_send(p, epoch);
    } else {
        if (!dead) sum_results(p, epoch);
        finish_combine(p, epoch);
    }
}

// After a dispatch with GRADIENT: the products that came home -> grad_weights [T, K], zeros where not routed.
extern "C" __global__ void __launch_bounds__(512) moeweave_weight_gradients(const __grid_constant__ Params p) {
    const u32 epoch = *counter(p, RECEIVED);
    const bool good = !__syncthreads_or(failed(p)) && wait_for_ranks(p, p.window + p.at_flags, epoch, WAIT_DOTS);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.num_tokens * K; i += gridDim.x * blockDim.x) {
        const int id = expert_id(p, i), rank = id < 0 ? -1 : rank_of(p, id);
        u32 gradient = good ? 0 : ALL;
        for (int j = 0; good && rank >= 0 && j < K; ++j) {
            const int entry = ((const int*)p.sent)[(i64)(i / K) * K + j];
            if (entry >= 0 && entry >> 24 == rank)
                gradient = load4(p.window + p.at_dots + (((u64)rank * p.max_tokens + (entry & 0xffffff)) * K + i % K) * 4);
        }
        store4(p.grad_weights + (u64)i * 4, gradient);
    }
}

// Exchange of counts alone, one block: `offsets`, and the number of rows that will arrive to the host (report[6]).
extern "C" __global__ void __launch_bounds__(512) moeweave_plan(const __grid_constant__ Params p) {
    extern __shared__ int shared[];
    __shared__ Layout layout;
    __shared__ u64 peers[MAX_RANKS];
    const u32 epoch = *counter(p, SENT) + 1;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) peers[w] = peer(p, w);
    count_before(p, layout, shared, shared, p.num_tokens);
    bool good = !__syncthreads_or(failed(p)) && wait_for_ranks(p, p.window + p.at_acks, epoch - 1, WAIT_ACK);
    if (good) send_counts(p, peers, shared, epoch);
    good = good && wait_for_ranks(p, p.window + p.at_flags, epoch, WAIT_COUNTS);
    if (good) expert_bases(p, shared, p.window + p.at_counts, true);
    __syncthreads();
    if (threadIdx.x == 0) ((volatile u64*)p.report)[6] = good ? ((int*)p.offsets)[p.num_local - 1] : 0;
    if (threadIdx.x == 0) *counter(p, SENT) = epoch;
    end_receive(p, epoch, good);
}
