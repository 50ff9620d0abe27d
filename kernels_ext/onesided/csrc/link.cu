// Memory that ranks share, and the signals in it.
//
// Every rank owns one window, laid out the same everywhere, and holds the addresses of all windows. A rank stores into
// a peer's window with plain 16-byte stores, then publishes with a system-scope release of a cell:
//
//     cell (u64) = epoch << 32 | value      __syncthreads, fence.acq_rel.sys, st.relaxed.sys   ...   ld.acquire.sys
//
// Epochs are counted on the device, by every block for itself (see State), and compared for equality, so they may wrap. A
// window is written again only after its reader acknowledged the round before: a launch acknowledges what earlier ones
// have received, since it comes after their end, and no launch has to wait for its own last block. Every wait has a
// deadline.
//
// Legend: W ranks, K routes a token, e experts of a rank, D width of a row.

constexpr int MAX_RANKS = 64;

// Read by kernels_ext/onesided/__init__.py, which makes the same structure of it. Addresses are of this rank's memory, `at_*` are offsets
// into any rank's window.
struct Params {
    u64 peers;       // u64 [W]: addresses of the windows
    u64 window;      // address of this rank's
    u64 state;       // u32 [STATE_WORDS]: counters of this rank, see State
    u64 report;      // u64 [8 + MAX_BLOCKS] in pinned host memory: what failed, see fail(); rows that each block dropped
    u64 deadline;    // nanoseconds that one wait may take
    u64 at_abort;    // u64: a peer failed, and this is what it waited for
    u64 at_acks;     // u64 [kinds, W]: round of mine that rank w has consumed
    u64 at_flags;    // u64 [W]: rank w's counts (or weight gradients) are here
    u64 at_cells;    // u64 [W, chunks]: rows of rank w's chunk are here
    u64 at_counts;   // u32 [W, e]: routes of rank w to my experts
    u64 at_meta;     // [W, max_tokens] records: u32 pair [K], f32 weight [K], u32 token
    u64 at_rows;     // [W, max_tokens] rows (exact combine: [max_tokens, K])
    u64 at_dots;     // f32 [W, max_tokens, K]: gradients of weights, on their way home
    u64 row_stride, meta_stride;
    u64 x;           // rows of this rank's tokens [T, D]: sent by dispatch, written by combine
    u64 ids;         // [T, K] int32 or int64
    u64 weights;     // [T, K] f32, bf16 or f16
    u64 sent;        // i32 [T, K]: rank << 24 | slot of the ranks a token goes to, by rank, then -1
    u64 rows;        // expert-major rows [capacity, D]
    u64 scales;      // f32 [capacity, groups] where rows stay encoded
    u64 row_weights; // f32 [capacity]
    u64 offsets;     // i32 [e]
    u64 route_row;   // i32 [W, max_tokens, K]: row of a route; -1 not of this rank, -2 dropped
    u64 chunks;      // i32 [W, chunks]: start << 8 | count of the slots that a chunk filled
    u64 tokens;      // i32 [W, max_tokens]: token of a slot
    u64 saved;       // rows [capacity, D] whose products with the gradients are the weights' gradients
    u64 grad_weights;// f32 [T, K]
    i64 capacity;
    int rank, world, num_experts, num_local, magic, num_tokens, max_tokens, chunk, num_chunks, dim;
    int senders, receivers, sender_parts, receiver_parts, align;
    int kind, flags, ids_wide, weights_type, stash;
};

enum Flag { CACHED = 1, RAW = 2, GRADIENT = 4, EXACT = 8, WEIGHTED = 16 };
enum Wait { WAIT_ACK = 1, WAIT_COUNTS = 2, WAIT_ROWS = 3, WAIT_DOTS = 4 };

// u32 words of a rank: whether it failed, a ticket (two words, see next_piece), then for each kind of operation and role an
// epoch a block, and for each block the rows it dropped. A block alone reads and writes its words, at its start and its end.
enum State { FAILED = 0, TICKET = 2, EPOCHS = 8 };
enum Role { SENT = 0, RECEIVED = 1 };
constexpr int KINDS = 3, PLAN = 2, MAX_BLOCKS = 512, DROPPED = EPOCHS + KINDS * 2 * MAX_BLOCKS, STATE_WORDS = DROPPED + MAX_BLOCKS;

DEVICE u32* epoch_of(const Params& p, int kind, Role role, int block) {
    return (u32*)p.state + EPOCHS + (kind * 2 + role) * MAX_BLOCKS + block;
}
DEVICE u64 peer(const Params& p, int rank) { return ((const u64*)p.peers)[rank]; }
DEVICE int warps() { return blockDim.x / 32; }

// The first failure of a rank is the one reported: kind of operation, wait, the rank waited for, and who says so.
static __device__ __noinline__ void fail(const Params& p, u32 kind, u32 wait, u32 awaited, u32 reporter, bool broadcast) {
    if (atomicCAS((u32*)p.state + FAILED, 0u, 1u) != 0) return;
    volatile u64* report = (volatile u64*)p.report;
    report[1] = kind, report[2] = wait, report[3] = awaited, report[4] = reporter;
    fence_system();
    report[0] = 1;
    if (!broadcast) return;
    for (int w = 0; w < p.world; ++w)
        if (w != p.rank) publish(peer(p, w) + p.at_abort, 1, kind << 24 | wait << 16 | awaited << 8 | reporter);
}

// Did this rank fail?
DEVICE bool failed(const Params& p) { return load_relaxed((u32*)p.state + FAILED) != 0; }

// The rarely taken part of a wait: false after the deadline, or when this rank or a peer has failed. Who waits for what a
// peer sends waits an eighth longer: that peer may itself wait for the acknowledgement of a dead one, which it then names.
static __device__ __noinline__ bool may_go_on(const Params& p, u64* started, u32 wait, u32 awaited) {
    u64 told = load_acquire(p.window + p.at_abort);
    if (told != 0) fail(p, told >> 24 & 255, told >> 16 & 255, told >> 8 & 255, told & 255, false);
    if (told != 0 || failed(p)) return false;
    if (*started == 0) *started = now();
    if (now() - *started < p.deadline + (wait == WAIT_ACK ? 0 : p.deadline / 8)) return true;
    fail(p, p.kind, wait, awaited, p.rank, true);
    return false;
}

// Spin until the cell holds this epoch. Returns false when there is no hope that it will.
DEVICE bool wait_for(const Params& p, u64 cell, u32 epoch, Wait wait, int awaited, u64* value) {
    u64 started = 0;
    for (u32 spins = 1;; ++spins) {
        *value = load_acquire(cell);
        if ((u32)(*value >> 32) == epoch) return true;
        if (spins % 128 == 0 && !may_go_on(p, &started, wait, awaited)) return false;
    }
}

// One block waits for a cell of each rank.
DEVICE bool wait_for_ranks(const Params& p, u64 cells, u32 epoch, Wait wait) {
    bool ok = true;
    u64 value;
    for (int w = threadIdx.x; w < p.world; w += blockDim.x) ok &= wait_for(p, cells + w * 8, epoch, wait, w, &value);
    return !__syncthreads_or(!ok);
}

// Has every rank read what I sent in `epoch`? One cell a thread, from the last thread on: the first ones have tokens. The
// caller joins the threads.
DEVICE bool is_acknowledged(const Params& p, u32 epoch) {
    bool ok = true;
    u64 value;
    for (int w = blockDim.x - 1 - threadIdx.x; w < p.world; w += blockDim.x)
        ok &= wait_for(p, p.window + p.at_acks + (p.kind * p.world + w) * 8, epoch, WAIT_ACK, w, &value);
    return ok;
}

// By the first receiving block of a launch: what earlier launches received, of all kinds, has been read. Of its own kind the
// earlier launch has ended. Another kind may be under way on another stream, its blocks not all of one epoch: it is left to
// its own next launch. Two steps, for one fence.
DEVICE void acknowledge(const Params& p) {
    __shared__ int mixed[KINDS];
    if (threadIdx.x < KINDS) mixed[threadIdx.x] = 0;
    const int kind = threadIdx.x / p.world, w = threadIdx.x % p.world;
    u32 epoch = kind < KINDS ? load_relaxed(epoch_of(p, kind, RECEIVED, 0)) : 0;
    if (kind == p.kind) publish(peer(p, w) + p.at_acks + (kind * p.world + p.rank) * 8, epoch, 0);
    __syncthreads();
    for (int other = 0; other < KINDS; ++other)
        for (int block = threadIdx.x; other != p.kind && other != PLAN && block < p.receivers; block += blockDim.x)
            if (load_relaxed(epoch_of(p, other, RECEIVED, block)) != load_relaxed(epoch_of(p, other, RECEIVED, 0))) mixed[other] = 1;
    __syncthreads();
    if (kind < KINDS && kind != p.kind && !mixed[kind])
        publish(peer(p, w) + p.at_acks + (kind * p.world + p.rank) * 8, epoch, 0);
}

// What a block is told at its start, in shared memory. One thread asks: at one address, all of them would queue.
struct Round {
    u32 epoch;
    bool dead;
};

DEVICE void begin(const Params& p, Round& round, Role role, int block) {
    if (threadIdx.x != 0) return;
    const u32 dead = failed(p);
    round.epoch = *epoch_of(p, p.kind, role, block) + 1, round.dead = dead;
}

// The next launch is of the next epoch. The fence is for spoil(): who reads the epoch there comes after this block's stores.
DEVICE void end(const Params& p, Role role, int block, u32 epoch) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (role == RECEIVED) fence_device();
    store_relaxed(epoch_of(p, p.kind, role, block), epoch);
}

constexpr int PIECES = 1024;

// Pieces of this launch's results, each to one of the blocks that failed.
DEVICE u32 next_piece(const Params& p, u32 epoch) {
    u64* ticket = (u64*)((u32*)p.state + TICKET);
    const u64 launch = (u64)(epoch << 2 | (u32)p.kind) << 32;  // a dispatch and a combine have the same epochs
    for (u64 seen = *(volatile u64*)ticket;;) {
        const u64 mine = seen >> 32 == launch >> 32 ? seen : launch, found = atomicCAS(ticket, seen, mine + 1);
        if (found == seen) return (u32)mine;
        seen = found;
    }
}

// The same for all threads of a block.
DEVICE u32 piece_of_block(const Params& p, u32 epoch) {
    __shared__ u32 piece;
    __syncthreads();
    if (threadIdx.x == 0) piece = next_piece(p, epoch);
    __syncthreads();
    return piece;
}

DEVICE void fill_nan(u64 at, u64 bytes, u32 piece) {
    const uint4 nan = {ALL, ALL, ALL, ALL};
    const u64 units = bytes / 16, last = units * (piece + 1) / PIECES;
    for (u64 i = units * piece / PIECES + threadIdx.x; i < last; i += blockDim.x) store16(at + i * 16, nan);
    if (piece == PIECES - 1)
        for (u64 i = units * 16 + threadIdx.x * 4; i + 4 <= bytes; i += blockDim.x * 4) store4(at + i, ALL);
}

// By the blocks that failed, senders too, after the receivers have ended (each within its own deadline): results that nobody may take for
// numbers. `fill(piece)` is called with every piece once.
template <typename Fill>
DEVICE void spoil(const Params& p, u32 epoch, Fill fill) {
    for (int block = threadIdx.x; block < p.receivers; block += blockDim.x)
        while (load_relaxed(epoch_of(p, p.kind, RECEIVED, block)) != epoch) {}
    fence_device();
    for (;;) {
        const u32 piece = piece_of_block(p, epoch);
        if (piece >= PIECES) return;
        fill(piece);
    }
}
