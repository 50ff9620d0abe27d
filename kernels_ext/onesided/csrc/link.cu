// Memory that ranks share, and the signals in it.
//
// Every rank owns one window, laid out the same everywhere, and holds the addresses of all windows. A rank stores into
// a peer's window with plain 16-byte stores, then publishes with a system-scope release of a cell:
//
//     cell (u64) = epoch << 32 | value      __syncthreads, fence.acq_rel.sys, st.relaxed.sys   ...   ld.acquire.sys
//
// Epochs are counted on the device, one counter per role and kind of operation, and compared for equality, so they may
// wrap. A window is written again only after its reader acknowledged the round before. Every wait has a deadline.
//
// Legend: W ranks, K routes a token, e experts of a rank, D width of a row.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__

constexpr int MAX_RANKS = 64;
constexpr u32 ALL = 0xffffffff;

// Read by kernels_ext/onesided/__init__.py, which makes the same structure of it. Addresses are of this rank's memory, `at_*` are offsets
// into any rank's window.
struct Params {
    u64 peers;       // u64 [W]: addresses of the windows
    u64 window;      // address of this rank's
    u64 state;       // u32 [32]: counters of this rank, see State
    u64 report;      // u64 [8] in pinned host memory: what failed, see fail()
    u64 deadline;    // nanoseconds that one wait may take
    u64 at_abort;    // u64: a peer failed, and this is what it waited for
    u64 at_acks;     // u64 [W]: round of mine that rank w has consumed
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
    int kind, roles, flags, ids_wide, weights_type;
};

enum Role { SEND = 1, RECEIVE = 2 };
enum Flag { CACHED = 1, RAW = 2, GRADIENT = 4, EXACT = 8, WEIGHTED = 16 };
enum Wait { WAIT_ACK = 1, WAIT_COUNTS = 2, WAIT_ROWS = 3, WAIT_DOTS = 4 };

// u32 counters of a rank: two for all operations, then four per kind of operation.
enum State { FAILED = 0, DROPPED = 1, KINDS = 8, SENT = 0, RECEIVED = 1, SENDERS_DONE = 2, RECEIVERS_DONE = 3 };

DEVICE u32* counter(const Params& p, int which) { return (u32*)p.state + KINDS + 4 * p.kind + which; }
DEVICE u64 peer(const Params& p, int rank) { return ((const u64*)p.peers)[rank]; }
DEVICE int warps() { return blockDim.x / 32; }

DEVICE u64 load_acquire(u64 at) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
}

DEVICE u32 load_relaxed(const u32* at) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// A release: the fence and the store behind it. Call after __syncthreads, and it covers the stores of the whole block, not
// only this thread's. (`st.release` instead would bring a second fence.)
DEVICE void publish(u64 at, u32 epoch, u32 value) {
    asm volatile("fence.acq_rel.sys;\n\tst.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"((u64)epoch << 32 | value)
                 : "memory");
}

// 16 bytes, not kept in L1: windows are written by peers, and rows are read once. Never `.nc`: windows change.
DEVICE uint4 load16(u64 at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

DEVICE void store16(u64 at, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE u32 load4(u64 at) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

DEVICE void store4(u64 at, u32 v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }

DEVICE u64 now() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// The first failure of a rank is the one reported: kind of operation, wait, the rank waited for, and who says so.
static __device__ __noinline__ void fail(const Params& p, u32 kind, u32 wait, u32 awaited, u32 reporter, bool broadcast) {
    if (atomicCAS((u32*)p.state + FAILED, 0u, 1u) != 0) return;
    volatile u64* report = (volatile u64*)p.report;
    report[1] = kind, report[2] = wait, report[3] = awaited, report[4] = reporter;
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    report[0] = 1;
    if (!broadcast) return;
    for (int w = 0; w < p.world; ++w)
        if (w != p.rank) publish(peer(p, w) + p.at_abort, 1, kind << 24 | wait << 16 | awaited << 8 | reporter);
}

// Did this rank fail?
DEVICE bool failed(const Params& p) { return load_relaxed((u32*)p.state + FAILED) != 0; }

// The rarely taken part of a wait: false after the deadline, or when this rank or a peer has failed.
static __device__ __noinline__ bool may_go_on(const Params& p, u64* started, u32 wait, u32 awaited) {
    u64 told = load_acquire(p.window + p.at_abort);
    if (told != 0) fail(p, told >> 24 & 255, told >> 16 & 255, told >> 8 & 255, told & 255, false);
    if (told != 0 || failed(p)) return false;
    if (*started == 0) *started = now();
    if (now() - *started < p.deadline) return true;
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
        ok &= wait_for(p, p.window + p.at_acks + w * 8, epoch, WAIT_ACK, w, &value);
    return ok;
}

// The block that ends a role last, after all blocks of the role have finished their reads and stores.
DEVICE bool is_last_block(const Params& p, int done, int blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        last = atomicAdd(counter(p, done), 1u) == (u32)blocks - 1;
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncthreads();
    return last;
}

// By the last sending block: the next launch sends the next epoch.
DEVICE void end_send(const Params& p, u32 epoch) {
    if (!is_last_block(p, SENDERS_DONE, p.senders) || threadIdx.x != 0) return;
    *counter(p, SENT) = epoch, *counter(p, SENDERS_DONE) = 0;
}

// By the last receiving block: senders may write this rank's window again.
DEVICE void end_receive(const Params& p, u32 epoch, bool good) {
    if (good)
        for (int w = threadIdx.x; w < p.world; w += blockDim.x) publish(peer(p, w) + p.at_acks + p.rank * 8, epoch, 0);
    if (threadIdx.x == 0) *counter(p, RECEIVED) = epoch, *counter(p, RECEIVERS_DONE) = 0;
}

// After a failure: results that nobody may take for numbers.
static __device__ __noinline__ void fill_nan(u64 at, u64 bytes) {
    const uint4 nan = {ALL, ALL, ALL, ALL};
    for (u64 i = threadIdx.x * 16; i + 16 <= bytes; i += blockDim.x * 16) store16(at + i, nan);
    for (u64 i = bytes / 16 * 16 + threadIdx.x * 4; i + 4 <= bytes; i += blockDim.x * 4) store4(at + i, ALL);
}
