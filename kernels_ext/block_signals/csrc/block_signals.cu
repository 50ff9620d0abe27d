// The signals of blocks that peers write: when an area may be written again, and when all of it has come. Comes after
// link.cu of the one-sided kernels, whose windows, waits and failures these are.
//
// A channel is one name of exchange on one plane; its rounds are counted in the state, which only launches on this plane's
// stream touch. An exchange is three steps on that stream: open, the writes (of another kernel or of copy engines), close.
// One block each, so that a spin takes one place on one multiprocessor.
//
//     kind    the channel                      flags      a bit a channel of this plane whose last round has been read
//     at_acks, at_cells  u64 [channels, W]     rows, capacity   what comes: address and bytes

DEVICE u32* round_of(const Params& p, int channel) { return (u32*)p.state + EPOCHS + channel; }

// Says what was read here, and waits until what this rank sent last has been read everywhere.
extern "C" __global__ void moeweave_blocks_open(const Params p) {
    const u32 dead = failed(p);
    for (int i = threadIdx.x; i < 32 * p.world && !dead; i += blockDim.x) {
        const int channel = i / p.world, w = i % p.world;
        if ((u32)p.flags >> channel & 1)
            publish(peer(p, w) + p.at_acks + (channel * p.world + p.rank) * 8, *round_of(p, channel), 0);
    }
    is_acknowledged(p, *round_of(p, p.kind));
}

// Says that this rank's blocks are there, and waits for those of the others; fills what never came with bytes of 255, NaN in
// every floating format.
extern "C" __global__ void moeweave_blocks_close(const Params p) {
    const u32 round = *round_of(p, p.kind) + 1, dead = failed(p);
    for (int w = threadIdx.x; w < p.world && !dead; w += blockDim.x)
        publish(peer(p, w) + p.at_cells + (p.kind * p.world + p.rank) * 8, round, 0);
    bool ok = wait_for_ranks(p, p.window + p.at_cells + p.kind * p.world * 8, round, WAIT_ROWS);
    ok = !__syncthreads_or(!ok || failed(p));
    if (threadIdx.x == 0) *round_of(p, p.kind) = round;
    for (u32 piece = 0; piece < PIECES && !ok; ++piece) fill_nan(p.rows, p.capacity, piece);
}
