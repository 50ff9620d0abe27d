// Where rows go: slots by prefix sums over the expert ids, so two runs are bit-identical.
//
// Every sending block computes what it needs itself, from the ids in L2, instead of meeting the others at a grid
// barrier: it counts the routes before its first token, then walks its tokens in order. A token goes once to each rank
// that holds one of its experts (a slot of that rank's window, numbered in token order); with the row travels, for each
// route, a pair: expert << 22 | place among this rank's routes to that expert.
//
// Worked example, 2 ranks of 2 experts, top-2, rank 0 has ids [[3, 0], [0, 2], [1, 0]]:
//     sent   [[rank 0 slot 0, rank 1 slot 0], [rank 0 slot 1, rank 1 slot 1], [rank 0 slot 2, none]]
//     pairs to rank 0: token 0 (-, expert 0 place 0), token 1 (expert 0 place 1, -), token 2 (expert 1 place 0, expert 0 place 2)

constexpr int MAX_PASS = 32;  // tokens that a block lays out and sends together: a chunk, or several short ones
constexpr u32 NONE = 0xffffffff;

// Of the tokens of a pass, in shared memory.
struct Layout {
    int before_w[MAX_RANKS];  // tokens before these that go to each rank
    u64 mask[MAX_PASS];       // ranks of each token
    int id[MAX_PASS * K];     // expert of each route, or -1
    u32 pair[MAX_PASS * K];
    int sent[MAX_PASS * K];
};

DEVICE int expert_or_none(const Params& p, i64 id) { return (u64)id < (u64)p.num_experts ? (int)id : -1; }

DEVICE int expert_id(const Params& p, i64 route) {
    return expert_or_none(p, p.ids_wide ? ((const i64*)p.ids)[route] : ((const int*)p.ids)[route]);
}

// Experts of a token's routes. All loads are out before the first is used: behind a branch each, one would wait for the other.
DEVICE void load_experts(const Params& p, int token, int* id) {
    const i64 first = (i64)token * K;
    i64 wide[K];
    if (p.ids_wide) {
#pragma unroll
        for (int k = 0; k < K; ++k) wide[k] = ((const i64*)p.ids)[first + k];
    } else {
#pragma unroll
        for (int k = 0; k < K; ++k) wide[k] = ((const int*)p.ids)[first + k];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) id[k] = expert_or_none(p, wide[k]);
}

// id / num_local: exact for ids below 65536; magic is 0 for one expert a rank.
DEVICE int rank_of(const Params& p, int id) { return p.magic ? __umulhi((u32)id, (u32)p.magic) : id; }

DEVICE u64 ranks_of(const Params& p, const int* id) {
    u64 mask = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) mask |= id[k] < 0 ? 0 : 1ull << rank_of(p, id[k]);
    return mask;
}

DEVICE void clear_counts(const Params& p, Layout& layout, int* before_E, int* total_E) {
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) before_E[i] = 0, total_E[i] = 0;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) layout.before_w[w] = 0;
}

// Counts of the tokens before `first_token`: routes to each expert, tokens to each rank. `total_E`, if it is another array,
// counts all tokens. `id` holds the experts of token threadIdx.x, if there is one: they were asked for earlier. Every thread
// of the block calls it between barriers.
DEVICE void count_before(const Params& p, Layout& layout, int* before_E, int* total_E, int first_token, int* id) {
    const bool all = total_E != before_E;
    const int end = all ? p.num_tokens : first_token;
    for (int start = 0; start < end; start += blockDim.x) {
        const int token = start + threadIdx.x;
        if (start > 0 && token < end) load_experts(p, token, id);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const bool routed = token < end && id[k] >= 0;
            if (routed && token < first_token) atomicAdd(&before_E[id[k]], 1);
            if (routed && all) atomicAdd(&total_E[id[k]], 1);
        }
        if (start + (int)threadIdx.x / 32 * 32 >= first_token) continue;
        const u64 mask = token < first_token ? ranks_of(p, id) : 0;
        for (int w = 0; w < p.world; ++w) {
            const int here = __popc(__ballot_sync(ALL, mask >> w & 1));
            if (threadIdx.x % 32 == 0 && here) atomicAdd(&layout.before_w[w], here);
        }
    }
}

// Experts and ranks of the next tokens, one a thread, from the last thread on: the first ones count.
DEVICE void load_pass(const Params& p, Layout& layout, int first, int count) {
    const int t = blockDim.x - 1 - threadIdx.x;
    if (t >= count) return;
    int id[K];
    load_experts(p, first + t, id);
#pragma unroll
    for (int k = 0; k < K; ++k) layout.id[t * K + k] = id[k];
    layout.mask[t] = ranks_of(p, id);
}

// Where a route goes, given the routes before it: its pair, and the entry of `sent` it writes if it is the token's first
// to that rank.
DEVICE void place_route(const Params& p, Layout& layout, const int* before_E, int i) {
    const int id = layout.id[i], token = i / K, k = i % K;
    const u64 mask = layout.mask[token];
    if (k >= __popcll(mask)) layout.sent[i] = -1;
    if (id < 0) {
        layout.pair[i] = NONE;
        return;
    }
    const int rank = rank_of(p, id);
    int place = before_E[id], slot = layout.before_w[rank];
    for (int j = 0; j < i; ++j) place += layout.id[j] == id;
    for (int t = 0; t < token; ++t) slot += (int)(layout.mask[t] >> rank & 1);
    layout.pair[i] = (u32)(id - rank * p.num_local) << 22 | (u32)place;
    layout.sent[token * K + __popcll(mask & ((1ull << rank) - 1))] = rank << 24 | slot;
}

// Layout of the tokens that load_pass brought, given the counts before them. Every thread of the block calls it.
DEVICE void lay_out(const Params& p, Layout& layout, const int* before_E, int first, int count) {
    for (int i = threadIdx.x; i < count * K; i += blockDim.x) place_route(p, layout, before_E, i);
    __syncthreads();
    int* sent = (int*)p.sent + (i64)first * K;
    for (int i = threadIdx.x; i < count * K; i += blockDim.x) sent[i] = layout.sent[i];
}

// Slots that the chunk of tokens [first, last) of a pass fills at a rank: start << 8 | count.
DEVICE u32 slots_of_chunk(const Layout& layout, int first, int last, int rank) {
    int start = layout.before_w[rank], count = 0;
    for (int t = 0; t < first; ++t) start += (int)(layout.mask[t] >> rank & 1);
    for (int t = first; t < last; ++t) count += (int)(layout.mask[t] >> rank & 1);
    return (u32)start << 8 | (u32)count;
}

// After a pass: its routes are before the next one. Every thread of the block calls it between barriers.
DEVICE void advance(const Params& p, Layout& layout, int* before_E, int count) {
    for (int i = threadIdx.x; i < count * K; i += blockDim.x)
        if (layout.id[i] >= 0) atomicAdd(&before_E[layout.id[i]], 1);
    for (int w = threadIdx.x; w < p.world; w += blockDim.x)
        for (int t = 0; t < count; ++t) layout.before_w[w] += (int)(layout.mask[t] >> w & 1);
}

// The chunk of tokens that is `i`-th to be sent, if each of `blocks` blocks sends `share` neighbouring ones.
DEVICE int chunk_in_order(int i, int blocks, int share) { return i < blocks * share ? i % blocks * share + i / blocks : i; }

DEVICE int chunks_of(const Params& p) { return (p.num_tokens + p.chunk - 1) / p.chunk; }
DEVICE int share_of(const Params& p) { return (chunks_of(p) + p.senders - 1) / p.senders; }

// First row of (expert, source rank) in expert-major order, and each expert's end rounded up to `align`.
// base_EW is shared, [e, W]. Counts must have arrived; one caller writes the ends to `offsets`.
DEVICE void expert_bases(const Params& p, int* base_EW, u64 counts_at, bool writes) {
    __shared__ int sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // All counts at once; then everything is in shared memory.
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x)
        base_EW[i % p.num_local * p.world + i / p.num_local] = (int)load4(counts_at + (u64)i * 4);
    __syncthreads();
    int before = 0;
    for (int start = 0; start < p.num_local; start += blockDim.x) {
        const int expert = start + threadIdx.x;
        int rows = 0;
        if (expert < p.num_local)
            for (int w = 0; w < p.world; ++w) {
                const int count = base_EW[expert * p.world + w];
                base_EW[expert * p.world + w] = rows;
                rows += count;
            }
        const int padded = (rows + p.align - 1) / p.align * p.align;
        int end = padded;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int left = __shfl_up_sync(ALL, end, step);
            if (lane >= step) end += left;
        }
        if (lane == 31) sums[warp] = end;
        __syncthreads();
        for (int i = 0; i < warp; ++i) end += sums[i];
        end += before;
        if (expert < p.num_local) {
            for (int w = 0; w < p.world; ++w) base_EW[expert * p.world + w] += end - padded;
            if (writes) ((int*)p.offsets)[expert] = (int)min((i64)end, p.capacity);
        }
        for (int i = 0; i < warps(); ++i) before += sums[i];
        __syncthreads();
    }
}
