// Dispatch's sending side: rows of this rank's tokens, and what travels beside them, into the windows of other ranks.

// Where an entry of `sent` puts its row: this rank's slot in the window of another.
DEVICE u64 slot_at(const Params& p, const u64* peers, int entry) {
    return peers[entry >> 24] + p.at_rows + ((u64)p.rank * p.max_tokens + (entry & 0xffffff)) * p.row_stride;
}

// One row into the windows of the token's ranks: read once, stored once a rank, the start rotated by this rank, which so
// comes last and is left out with EXPAND_HOME. `entries` holds sent[K] of the token in the first K lanes, of them `stores` get it.
DEVICE void send_plain(const Params& p, const u64* peers, u64 source, int entries, int ranks, int first_rank, int stores, Span span) {
    constexpr int DEPTH = 8;
    if (stores == 0) return;
    for (int start = span.first; start < span.last; start += DEPTH * 32) {
        const int first = start + threadIdx.x % 32;
        uint4 unit[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (first + d * 32 < span.last) unit[d] = load16(source + (first + d * 32) * 16);
        for (int j = 0; j < stores; ++j) {
            const u64 target = slot_at(p, peers, __shfl_sync(ALL, entries, (j + first_rank) % ranks));
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (first + d * 32 < span.last) store16(target + (first + d * 32) * 16, unit[d]);
        }
    }
}

// The same in a codec: the row's amax first (then a second read, from L1 or L2), or each group's as it is encoded.
DEVICE void send_coded(const Params& p, const u64* peers, u64 source, int entries, int ranks, int first_rank, Span span) {
    constexpr int DEPTH = MW_ENCODE_DEPTH;
    const int lane = threadIdx.x % 32;
    float most = 0.f, v[UNIT];
    if (!GROUP) {
#pragma unroll 4
        for (int unit = span.first + lane; unit < span.last; unit += 32)
            unpack(load16(source + unit * 16), v), most = amax_of_unit(v, most);
        most = amax_of_parts(amax(most), p.sender_parts);
    }
    for (int start = span.first; start < span.last; start += DEPTH * 32) {
        uint4 units[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (start + d * 32 + lane < span.last) units[d] = load16(source + (start + d * 32 + lane) * 16);
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int unit = start + d * 32 + lane;
            const bool here = unit < span.last;
            if (here) unpack(units[d], v);
            const float scale = scale_of(GROUP ? amax(here ? amax_of_unit(v, 0.f) : 0.f) : most);
            for (int j = 0; j < ranks; ++j) {
                const u64 target = slot_at(p, peers, __shfl_sync(ALL, entries, (j + first_rank) % ranks));
                if (!here) continue;
                store_codes(target + unit * UNIT, v, scale);
                if (GROUP ? unit % (GROUP / UNIT) == 0 : unit == 0) store4(scale_at(target, p.dim, unit), __float_as_uint(scale));
            }
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
        const int own = EXPAND_HOME && __ballot_sync(ALL, entries >= 0 && entries >> 24 == p.rank) ? 1 : 0;
        const u64 source = p.x + (u64)(first + token) * row_bytes;
        const bool meta = warp % parts == 0 && !(p.flags & GRADIENT);
        float weight = 0.f;  // asked for before the row, so that it is here after it
        if (meta && lane >= 16 && lane - 16 < K) weight = load_weight(p.weights, (i64)(first + token) * K + lane - 16, p.weights_type);
        if (CODED)
            send_coded(p, peers, source, entries, ranks, after, span);
        else
            send_plain(p, peers, source, entries, ranks, after, ranks - own, span);
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

// False after a failure, on all threads of the block.
DEVICE bool send_tokens(const Params& p, int* shared, const Round& round) {
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
    if (__syncthreads_or(!free)) return false;
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
    return true;
}
