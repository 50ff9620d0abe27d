// Runs grids of CUDA threads as fibers of one host thread, warps in a random order that a seed repeats.
//
// A warp runs until its lanes wait for one another, for a barrier, or for memory. The blocks of all grids that have been
// started run by turns, as on GPUs whose blocks are all resident. Time moves on when nobody gets anywhere else.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "cuda.hpp"

Thread* self;
uint4* dynamic_shared;

namespace {

constexpr size_t STACK = 128 << 10;
constexpr int PATIENCE = 200;
constexpr unsigned long long STEP = 1000, IDLE_STEP = 200'000, HOUR = 3'600'000'000'000ull;

struct Module {
    char *start, *end;  // its static shared memory
    struct Block* inside = nullptr;
};

struct Meeting {
    unsigned count = 0, generation = 0;
    bool any[2] = {};
};

struct Fiber {
    Thread thread;
    struct Warp* warp;
    char* stack;
    const volatile unsigned* awaited = nullptr;  // a generation, which has to differ from `seen`
    unsigned seen = 0;
    bool spins = false, ended = false;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    bool ready() const { return !ended && (!awaited || *awaited != seen); }
};

struct Warp {
    struct Block* block;
    std::vector<Fiber> lanes{32};
    unsigned long long brought[2][32];
    unsigned count = 0, generation = 0;
    Operation operation;
    bool ended() const {
        return std::all_of(lanes.begin(), lanes.end(), [](const Fiber& lane) { return lane.ended; });
    }
    bool ready() const {
        return std::any_of(lanes.begin(), lanes.end(), [](const Fiber& lane) { return lane.ready(); });
    }
};

struct Block {
    struct Grid* grid;
    std::vector<char> kept;  // its static shared memory while another block of the module runs
    std::vector<uint4> dynamic;
    std::vector<std::unique_ptr<Warp>> warps;
    Meeting all, named[16];
    unsigned live, pace;  // it runs in one of so many rounds: some blocks fall far behind others
};

struct Grid {
    int name;
    Module* module;
    void (*kernel)(const void*);
    std::vector<char> params;
    std::vector<std::unique_ptr<Block>> blocks;
    bool ended() const {
        for (const auto& block : blocks)
            if (block->live) return false;
        return true;
    }
};

std::vector<std::unique_ptr<Grid>> grids;
std::vector<std::unique_ptr<Module>> modules;
std::vector<char*> stacks;
std::mt19937_64 generator;
Fiber* current;
unsigned long long progress, time_ns;
bool interrupted;
std::string wrong;

#if defined(__x86_64__)
// Swaps stacks: the registers that a call keeps, then those of the other side. 40 times as fast as swapcontext, which calls
// the kernel.
extern "C" void switch_stack(void** kept, void* next);
asm(R"(
.text
switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
void* scheduler;
void to_scheduler() { switch_stack(&current->stack_pointer, scheduler); }
void to_fiber(Fiber& fiber) { switch_stack(&scheduler, fiber.stack_pointer); }
#else
ucontext_t scheduler;
void to_scheduler() { swapcontext(&current->context, &scheduler); }
void to_fiber(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
#endif

void leave(Meeting& meeting, unsigned expected) {
    if (meeting.count < expected || meeting.count == 0) return;
    meeting.count = 0, meeting.any[(meeting.generation + 1) % 2] = false, ++meeting.generation, ++progress;
}

void run_thread() {
    Block& block = *current->warp->block;
    block.grid->kernel(block.grid->params.data());
    current->ended = true, --block.live, ++progress;
    leave(block.all, block.live);  // a barrier is of the threads that are still there
    to_scheduler();
    abort();
}

void prepare(Fiber& fiber) {
    if (stacks.empty()) stacks.push_back((char*)malloc(STACK));
    fiber.stack = stacks.back(), stacks.pop_back();
#if defined(__x86_64__)
    void** top = (void**)(fiber.stack + STACK - 64);
    top[0] = (void*)run_thread, top[1] = nullptr;
    fiber.stack_pointer = top - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, run_thread, 0);
#endif
}

void wait_until_changes(const volatile unsigned& generation, unsigned seen) {
    current->awaited = &generation, current->seen = seen;
    to_scheduler();
    current->awaited = nullptr;
}

void enter(Block& block) {
    Module& module = *block.grid->module;
    if (module.inside == &block) return;
    const size_t size = module.end - module.start;
    if (module.inside) memcpy(module.inside->kept.data(), module.start, size);
    memcpy(module.start, block.kept.data(), size);
    module.inside = &block;
}

// Lanes in a random order, again and again while one of them gets further than to another wait for memory.
void visit(Warp& warp) {
    enter(*warp.block);
    dynamic_shared = warp.block->dynamic.data();
    for (Fiber& lane : warp.lanes) lane.spins = false;
    for (bool again = true; again && generator() % 8;) {
        again = false;
        const unsigned start = generator() % 32, step = generator() % 2 ? 1 : 31;
        for (unsigned i = 0; i < 32; ++i) {
            Fiber& lane = warp.lanes[(start + i * step) % 32];
            if (lane.spins || !lane.ready()) continue;
            current = &lane, self = &lane.thread;
            to_fiber(lane);
            again |= !lane.spins;
            if (std::exchange(interrupted, false)) return;
        }
    }
}

void release(Grid& grid) {
    for (auto& block : grid.blocks) {
        if (grid.module->inside == block.get()) grid.module->inside = nullptr;
        for (auto& warp : block->warps)
            for (Fiber& lane : warp->lanes) stacks.push_back(lane.stack);
    }
}

// Index of a grid that has ended, or -1.
int ended_grid() {
    for (size_t i = 0; i < grids.size(); ++i)
        if (grids[i]->ended()) return (int)i;
    return -1;
}

}  // namespace

const unsigned long long* meet_warp(Operation operation, unsigned long long mine) {
    Warp& warp = *current->warp;
    const unsigned generation = warp.generation;
    if (warp.count == 0) warp.operation = operation;
    if (warp.operation != operation) wrong = "lanes of a warp meet in different operations";
    unsigned long long* brought = warp.brought[generation % 2];
    brought[threadIdx.x % 32] = mine;
    if (++warp.count == 32)
        warp.count = 0, ++warp.generation, ++progress;
    else
        wait_until_changes(warp.generation, generation);
    return brought;
}

static bool meet(Meeting& meeting, unsigned expected, bool mine) {
    const unsigned generation = meeting.generation;
    meeting.any[generation % 2] |= mine, ++meeting.count;
    leave(meeting, expected);
    if (meeting.generation == generation) wait_until_changes(meeting.generation, generation);
    return meeting.any[generation % 2];
}

bool meet_block(bool mine) { return meet(current->warp->block->all, current->warp->block->live, mine); }
void meet_named(int name, int threads) { meet(current->warp->block->named[name], threads, false); }

void let_others_run() {
    current->spins = true;
    to_scheduler();
}

void after_signal() {
    if (generator() % 4) return;
    interrupted = true;
    let_others_run();
}

void note_progress() { ++progress; }
unsigned long long nanoseconds() { return time_ns; }

void bad_address(unsigned long long at, int bytes) {
    wrong = "access of " + std::to_string(bytes) + " bytes at " + std::to_string(at);
    for (;;) let_others_run();
}

extern "C" {

// A module's static shared memory lies from `start` to `end`.
void* add_module(char* start, char* end) {
    modules.push_back(std::make_unique<Module>(Module{start, end}));
    return modules.back().get();
}

void set_seed(unsigned long long seed) { generator.seed(seed), time_ns = 0; }

// Put a grid beside those that run. Shared memory starts as noise.
void start_grid(int name, void* module, void (*kernel)(const void*), int num_blocks, int threads, const char* params,
                int params_bytes, int shared_bytes) {
    auto grid = std::make_unique<Grid>();
    grid->name = name, grid->module = (Module*)module, grid->kernel = kernel;
    grid->params.assign(params, params + params_bytes);
    for (int b = 0; b < num_blocks; ++b) {
        auto block = std::make_unique<Block>();
        block->grid = grid.get(), block->live = threads, block->pace = 1u << generator() % 4 * 2;
        block->kept.assign(grid->module->end - grid->module->start, (char)0xa5);
        block->dynamic.assign(shared_bytes / 16 + 1, uint4{0xa5a5a5a5, 0xa5a5a5a5, 0xa5a5a5a5, 0xa5a5a5a5});
        for (int w = 0; w < threads / 32; ++w) {
            block->warps.push_back(std::make_unique<Warp>());
            Warp& warp = *block->warps.back();
            warp.block = block.get();
            for (unsigned lane = 0; lane < 32; ++lane) {
                Fiber& fiber = warp.lanes[lane];
                fiber.thread = {{w * 32 + lane}, {(unsigned)b}, {(unsigned)threads}, {(unsigned)num_blocks}};
                fiber.warp = &warp;
                prepare(fiber);
            }
        }
        grid->blocks.push_back(std::move(block));
    }
    grids.push_back(std::move(grid));
}

// Run until a grid has ended: its name, or -1 with the reason in `said`.
int run_until_one_ends(char* said, int room) {
    wrong.clear();
    for (int idle = 0; ended_grid() < 0;) {
        std::vector<Warp*> ready;
        for (auto& grid : grids)
            for (auto& block : grid->blocks)
                for (auto& warp : block->warps)
                    if (warp->ready()) ready.push_back(warp.get());
        std::shuffle(ready.begin(), ready.end(), generator);
        const unsigned long long before = progress;
        for (Warp* warp : ready)
            if (idle > PATIENCE || generator() % warp->block->pace == 0) visit(*warp);
        if (ready.empty()) wrong = "threads wait at a barrier or a warp operation that others have left or never reach";
        idle = progress == before ? idle + 1 : 0;
        // A few rounds may have passed by chance who could go on; after many, only time can help.
        time_ns += idle > PATIENCE ? IDLE_STEP : STEP;
        if (time_ns > HOUR) wrong = "threads wait for ever: no deadline has ended it in an hour";
        if (!wrong.empty()) {
            snprintf(said, room, "%s", wrong.c_str());
            for (auto& grid : grids) release(*grid);
            grids.clear();
            return -1;
        }
    }
    const int at = ended_grid(), name = grids[at]->name;
    release(*grids[at]);
    grids.erase(grids.begin() + at);
    return name;
}
}
