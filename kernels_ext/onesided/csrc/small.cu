// The small kernels beside dispatch and combine: gradients of weights as they come home, and the exchange of counts alone.

// All products have reached the tokens' ranks: the dispatch that sent them has ended.
DEVICE void publish_dots(const Params& p, u32 epoch) {
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) publish(peer(p, w) + p.at_flags + p.rank * 8, epoch, 0);
}

// After a dispatch with GRADIENT: the products that came home -> grad_weights [T, K], zeros where not routed.
extern "C" __global__ void __launch_bounds__(512) moeweave_weight_gradients(const __grid_constant__ Params p) {
    const u32 epoch = *epoch_of(p, p.kind, RECEIVED, 0);
    if (blockIdx.x == 0 && !failed(p)) publish_dots(p, epoch);
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
    int* shared = (int*)dynamic_shared;
    __shared__ Layout layout;
    __shared__ u64 peers[MAX_RANKS];
    const u32 epoch = *epoch_of(p, p.kind, SENT, 0) + 1;
    int id[K] = {};
    if (threadIdx.x < p.num_tokens) load_experts(p, threadIdx.x, id);
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) peers[w] = peer(p, w);
    clear_counts(p, layout, shared, shared);
    __syncthreads();
    count_before(p, layout, shared, shared, p.num_tokens, id);
    bool good = !__syncthreads_or(failed(p));
    if (good) acknowledge(p);
    good = good && !__syncthreads_or(!is_acknowledged(p, epoch - 1));
    if (good) send_counts(p, peers, shared, epoch);
    good = good && wait_for_ranks(p, p.window + p.at_flags, epoch, WAIT_COUNTS);
    if (good) expert_bases(p, shared, p.window + p.at_counts, true);
    __syncthreads();
    if (threadIdx.x == 0) ((volatile u64*)p.report)[6] = good ? ((int*)p.offsets)[p.num_local - 1] : 0;
    end(p, SENT, 0, epoch);
    end(p, RECEIVED, 0, epoch);
}
