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

DEVICE int expert_id(const Params& p, i64 route) {
    i64 id = p.ids_wide ? ((const i64*)p.ids)[route] : ((const int*)p.ids)[route];
    return id < 0 || id >= p.num_experts ? -1 : (int)id;
}

// id / num_local: exact for ids below 65536; magic is 0 for one expert a rank.
DEVICE int rank_of(const Params& p, int id) { return p.magic ? __umulhi((u32)id, (u32)p.magic) : id; }

// Counts of the tokens before `first_token`: routes to each expert, tokens to each rank. `total_E`, if it is another array,
// counts all tokens.
DEVICE void count_before(const Params& p, Layout& layout, int* before_E, int* total_E, int first_token) {
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) before_E[i] = 0, total_E[i] = 0;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) layout.before_w[w] = 0;
    __syncthreads();
    const int end = total_E == before_E ? first_token : p.num_tokens;
    for (int start = 0; start < end; start += blockDim.x) {
        const int token = start + threadIdx.x;
        u64 mask = 0;
        int id[K];
#pragma unroll
        for (int k = 0; k < K; ++k) id[k] = token < end ? expert_id(p, (i64)token * K + k) : -1;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (id[k] < 0) continue;
            if (token < first_token) atomicAdd(&before_E[id[k]], 1), mask |= 1ull << rank_of(p, id[k]);
            if (total_E != before_E) atomicAdd(&total_E[id[k]], 1);
        }
        for (int w = 0; w < p.world && start < first_token; ++w) {
            const int here = __popc(__ballot_sync(ALL, mask >> w & 1));
            if (threadIdx.x % 32 == 0 && here) atomicAdd(&layout.before_w[w], here);
        }
    }
    __syncthreads();
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

// Layout of the next tokens, given the counts before them. Every thread of the block calls it.
DEVICE void lay_out(const Params& p, Layout& layout, const int* before_E, int first, int count) {
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
        u64 mask = 0;
        int id[K];
#pragma unroll
        for (int k = 0; k < K; ++k) id[k] = expert_id(p, (i64)(first + t) * K + k);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            layout.id[t * K + k] = id[k];
            if (id[k] >= 0) mask |= 1ull << rank_of(p, id[k]);
        }
        layout.mask[t] = mask;
    }
    __syncthreads();
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

// After a pass: its routes are before the next one. Every thread of the block calls it, after the pass was published.
DEVICE void advance(const Params& p, Layout& layout, int* before_E, int count) {
    for (int i = threadIdx.x; i < count * K; i += blockDim.x)
        if (layout.id[i] >= 0) atomicAdd(&before_E[layout.id[i]], 1);
    for (int w = threadIdx.x; w < p.world; w += blockDim.x)
        for (int t = 0; t < count; ++t) layout.before_w[w] += (int)(layout.mask[t] >> w & 1);
    __syncthreads();
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
    int before = 0;
    for (int start = 0; start < p.num_local; start += blockDim.x) {
        const int expert = start + threadIdx.x;
        int rows = 0;
        if (expert < p.num_local)
            for (int w = 0; w < p.world; ++w) {
                base_EW[expert * p.world + w] = rows;
                rows += (int)load4(counts_at + ((u64)w * p.num_local + expert) * 4);
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
