// Dispatch: rows of this rank's tokens into the windows of their experts' ranks, once a rank, and there, as they arrive,
// into expert-major order (by expert, then source rank, then route).
//
// Blocks [0, senders) send and publish chunk by chunk; the others expand. With CACHED the layout of an earlier dispatch is used again; with GRADIENT the rows are gradients of a combine's result: what is
// written is weight * gradient, and the product with the saved row goes back as the weight's gradient.

// Where an entry of `sent` puts its row: this rank's slot in the window of another.
DEVICE u64 slot_at(const Params& p, const u64* peers, int entry) {
    return peers[entry >> 24] + p.at_rows + ((u64)p.rank * p.max_tokens + (entry & 0xffffff)) * p.row_stride;
}

// One row into the windows of the token's ranks: read once, stored once a rank, the start rotated by this rank.
// `entries` holds sent[K] of the token in the first K lanes.
DEVICE void send_plain(const Params& p, const u64* peers, u64 source, int entries, int ranks, int first_rank, Span span) {
    constexpr int DEPTH = 8;
    for (int start = span.first; start < span.last; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < span.last) unit[d] = load16(source + (first + d * 32) * 16);
        for (int j = 0; j < ranks; ++j) {
            const u64 target = slot_at(p, peers, __shfl_sync(ALL, entries, (j + first_rank) % ranks));
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16(target + (first + d * 32) * 16, unit[d]);
        }
    }
}

// The same in a codec: the row's amax first (then a second read, from L1 or L2), or each group's as it is encoded.
DEVICE void send_coded(const Params& p, const u64* peers, u64 source, int entries, int ranks, int first_rank, Span span) {
    const int lane = threadIdx.x % 32;
    float most = 0.f, v[UNIT];
    if (!GROUP) {
#pragma unroll 4
        for (int unit = span.first + lane; unit < span.last; unit += 32)
            unpack(load16(source + unit * 16), v), most = amax_of_unit(v, most);
        most = amax_of_parts(amax(most), p.sender_parts);
    }
    for (int start = span.first; start < span.last; start += 32) {
        const int unit = start + lane;
        const bool here = unit < span.last;
        if (here) unpack(load16(source + unit * 16), v);
        const float scale = scale_of(GROUP ? amax(here ? amax_of_unit(v, 0.f) : 0.f) : most);
        for (int j = 0; j < ranks; ++j) {
            const u64 target = slot_at(p, peers, __shfl_sync(ALL, entries, (j + first_rank) % ranks));
            if (!here) continue;
            store_codes(target + unit * UNIT, v, scale);
            if (GROUP ? unit % (GROUP / UNIT) == 0 : unit == 0) store4(scale_at(target, p.dim, unit), __float_as_uint(scale));
        }
    }
}

// What travels beside a row: pairs of the routes to that rank (lanes 0 to 15), their weights (the others), the token.
DEVICE void send_meta(const Params& p, const u64* peers, const Layout& layout, int first, int token, int entries, int ranks, float weight) {
    const int lane = threadIdx.x % 32, k = lane % 16;
    const bool pairs = lane < 16;
    for (int j = 0; j < ranks; ++j) {
        const int entry = __shfl_sync(ALL, entries, j), rank = entry >> 24;
        const u64 target = peers[rank] + p.at_meta + ((u64)p.rank * p.max_tokens + (entry & 0xffffff)) * p.meta_stride;
        if (lane == 0) store4(target + K * 8, first + token);
        if (k >= K || (pairs && (p.flags & CACHED))) continue;
        const int id = p.flags & CACHED ? 0 : layout.id[token * K + k];
        const u32 pair = id < 0 || (p.flags & CACHED) || rank_of(p, id) != rank ? NONE : layout.pair[token * K + k];
        store4(target + (pairs ? k : K + k) * 4, pairs ? pair : __float_as_uint(weight));
    }
}

// Rows and meta of the tokens of a pass, `sender_parts` warps a row.
DEVICE void send_rows(const Params& p, const u64* peers, const Layout& layout, int first, int count) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = p.sender_parts;
    const Span span = span_of(p.dim, warp % parts, parts);
    const u64 row_bytes = (u64)(p.dim / UNIT) * 16;
    for (int token = warp / parts; token < count; token += warps() / parts) {
        int entries = -1;
        if (lane < K) entries = p.flags & CACHED ? ((const int*)p.sent)[(i64)(first + token) * K + lane] : layout.sent[token * K + lane];
        const u32 live = __ballot_sync(ALL, entries >= 0);
        const int ranks = __popc(live);
        if (ranks == 0) continue;
        const int after = __popc(__ballot_sync(ALL, entries >= 0 && entries >> 24 <= p.rank));
        const u64 source = p.x + (u64)(first + token) * row_bytes;
        const bool meta = warp % parts == 0 && !(p.flags & GRADIENT);
        float weight = 0.f;  // asked for before the row, so that it is here after it
        if (meta && lane >= 16 && lane - 16 < K) weight = load_weight(p.weights, (i64)(first + token) * K + lane - 16, p.weights_type);
        if (CODED)
            send_coded(p, peers, source, entries, ranks, after, span);
        else
            send_plain(p, peers, source, entries, ranks, after, span);
        if (meta) send_meta(p, peers, layout, first, token, entries, ranks, weight);
    }
}

// The cells of a pass's chunks. With a cached layout the receivers kept the ranges: only the epoch matters.
DEVICE void publish_pass(const Params& p, const u64* peers, const Layout& layout, int first, int count, u32 epoch) {
    const int chunks = (count + p.chunk - 1) / p.chunk;
    __syncthreads();
    for (int i = threadIdx.x; i < chunks * p.world; i += blockDim.x) {
        const int w = i % p.world, start = i / p.world * p.chunk;
        const u32 range = p.flags & CACHED ? 0 : slots_of_chunk(layout, start, min(start + p.chunk, count), w);
        publish(peers[w] + p.at_cells + ((u64)p.rank * p.num_chunks + first / p.chunk + i / p.world) * 8, epoch, range);
    }
}

// Counts of my routes to each rank's experts, by the last blocks: they count nearly all tokens anyway, and where tokens
// are few they have no rows to send.
DEVICE void send_counts(const Params& p, const u64* peers, const int* total_E, u32 epoch) {
    for (int i = p.senders - 1 - blockIdx.x; i < p.world; i += p.senders) {
        const int w = (i + p.rank + 1) % p.world;
        const u64 target = peers[w] + p.at_counts + (u64)p.rank * p.num_local * 4;
        for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) store4(target + e * 4, total_E[w * p.num_local + e]);
        __syncthreads();
        if (threadIdx.x == 0) publish(peers[w] + p.at_flags + p.rank * 8, epoch, 0);
    }
}

// Chunks past the last token are published empty, so that no cell keeps an old epoch.
DEVICE void publish_empty_chunks(const Params& p, const u64* peers, u32 epoch) {
    const int unused = p.num_chunks - chunks_of(p);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < unused * p.world; i += p.senders * blockDim.x) {
        const int chunk = chunks_of(p) + i / p.world;
        publish(peers[i % p.world] + p.at_cells + ((u64)p.rank * p.num_chunks + chunk) * 8, epoch, 0);
    }
}

DEVICE void send_tokens(const Params& p, int* shared, const Round& round) {
    __shared__ Layout layout;
    __shared__ u64 peers[MAX_RANKS];
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) peers[w] = peer(p, w);
    const int share = share_of(p) * p.chunk, pass = max(warps() / p.sender_parts / p.chunk, 1) * p.chunk;
    const int begin = min(blockIdx.x * share, p.num_tokens), end = min(begin + share, p.num_tokens);
    const bool cached = p.flags & CACHED, counts = !cached && p.senders - 1 - blockIdx.x < p.world;
    int *before_E = shared, *total_E = counts ? shared + p.num_experts : shared;
    const int first_token = begin < end ? begin : 0;
    int id[K] = {};
    if (!cached) {
        if (threadIdx.x < (counts ? p.num_tokens : first_token)) load_experts(p, threadIdx.x, id);
        load_pass(p, layout, begin, min(pass, end - begin));
        clear_counts(p, layout, before_E, total_E);
    }
    __syncthreads();
    const u32 epoch = round.epoch;
    // Rows of the round before must have been read by every rank that I am about to write to.
    const bool free = !round.dead && is_acknowledged(p, epoch - 1);
    if (!cached) count_before(p, layout, before_E, total_E, first_token, id);
    if (__syncthreads_or(!free)) return;
    if (counts) send_counts(p, peers, total_E, epoch);
    for (int first = begin; first < end; first += pass) {
        const int count = min(pass, end - first);
        if (!cached && first > begin) {
            __syncthreads();
            advance(p, layout, before_E, pass);
            __syncthreads();
            load_pass(p, layout, first, count);
            __syncthreads();
        }
        if (!cached) lay_out(p, layout, before_E, first, count);
        send_rows(p, peers, layout, first, count);
        publish_pass(p, peers, layout, first, count, epoch);
    }
    publish_empty_chunks(p, peers, epoch);
}

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
    constexpr int DEPTH = 8;
    int row = -1;
    for (int start = span.first; start < span.last || start == span.first; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < span.last) unit[d] = load16(source + (first + d * 32) * 16);
        if (start == span.first) row = find_rows();
        for (u32 left = __ballot_sync(ALL, row >= 0); left; left &= left - 1) {
            const u64 target = rows + (u64)__shfl_sync(ALL, row, __ffs(left) - 1) * units * 16;
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16(target + (first + d * 32) * 16, unit[d]);
        }
    }
}

DEVICE void expand_decoded(const Params& p, u64 source, int row, Span span) {
    constexpr int DEPTH = 4;
    const u32 routes = __ballot_sync(ALL, row >= 0);
    for (int start = span.first; start < span.last; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            float v[UNIT];
            if (first + d * 32 >= span.last) continue;
            load_wire(source, p.dim, first + d * 32, v);
            unit[d] = pack(v);
        }
        for (u32 left = routes; left; left &= left - 1) {
            const u64 target = p.rows + (u64)__shfl_sync(ALL, row, __ffs(left) - 1) * (p.dim / UNIT) * 16;
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16(target + (first + d * 32) * 16, unit[d]);
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
            unpack(load16(p.saved + at + unit * 16), saved);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) sum += gradient[i] * saved[i], gradient[i] *= scale;
            store16(p.rows + at + unit * 16, pack(gradient));
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

DEVICE void expand_slot(const Params& p, const int* base_EW, int source, int slot_of_source, int part, u32* dropped) {
    const u64 slot = (u64)source * p.max_tokens + slot_of_source, row_at = p.window + p.at_rows + slot * p.row_stride;
    const Meta meta = load_meta(p, slot);
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
        const bool here = lane != 0 || wait_for(p, cell, epoch, WAIT_ROWS, source, &value);
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
        send_tokens(p, shared, round);
        return end(p, SENT, blockIdx.x, round.epoch);
    }
    const int block = blockIdx.x - p.senders;
    if (threadIdx.x == 0) dropped = 0;
    begin(p, round, RECEIVED, block);
    const bool bad = __syncthreads_or(!receive_tokens(p, shared, block, round, &dropped));
    if (threadIdx.x == 0 && dropped) report_dropped(p, block, dropped);
    end(p, RECEIVED, block, round.epoch);
    if (bad) spoil_rows(p, round.epoch);
}
