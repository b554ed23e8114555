// A CUDA device with one multiprocessor that runs one thread block at a time, and one thread of it at a time.
//
// Every thread of a block is a fiber. One warp runs as far as it can, to its next barrier of the block, before another
// begins: whoever relies on warps keeping step gets wrong numbers. Within a warp one lane runs to the next collective
// instruction, then the next lane; the last to arrive does the work of all, and runs on. The order of blocks, of warps
// and of lanes is random, and a new one after each barrier.
#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "machine_state.h"

namespace simulator {

Machine machine;

namespace {

const char* const POINT_NAMES[] = {
    "__syncwarp",
    "a shuffle",
    "load_matrices",
    "load_matrices_transposed",
    "multiply_16x8x16 of half_t",
    "multiply_16x8x16 of bfloat16_t",
    "multiply_16x8x8",
    "multiply_8x8x4_by_columns",
    "multiply_8x8x4_by_rows",
    "__syncthreads",
    "__syncthreads_or",
};

// -------------------------------------------------------------------------------------------------------------- errors

void set_message_of(const char* format, va_list list) {
  char* message = machine.message;
  const int size = sizeof machine.message;
  int length = vsnprintf(message, size, format, list);
  const Index block = machine.block;
  if (length < size)
    length += snprintf(message + length, size - length, " (block %u, %u, %u", block.x, block.y, block.z);
  if (length < size && running.stack)
    length += snprintf(message + length, size - length, ", thread %u: warp %u, lane %u", running.thread,
                       running.thread / 32, running.thread % 32);
  if (length < size) snprintf(message + length, size - length, ")");
  machine.has_failed = true;
}

// Of the scheduler, which returns by itself.
__attribute__((format(printf, 1, 2))) void set_message(const char* format, ...) {
  va_list list;
  va_start(list, format);
  set_message_of(format, list);
  va_end(list);
}

// ------------------------------------------------------------------------------------------------------------ switches

void switch_to_next_lane(bool this_one_ends) {
  Thread& from = *machine.thread;
  Warp& warp = *machine.warp;
  if (warp.num_arrived + warp.num_finished == 32) {  // all at a barrier of the block, or at the end
    Fiber::switch_between(from.fiber, machine.scheduler, this_one_ends);
    return;
  }
  warp.position = (warp.position + 1) % 32;
  Thread& to = machine.threads[warp.first_thread + warp.order[warp.position]];
  become(to);
  Fiber::switch_between(from.fiber, to.fiber, this_one_ends);
}

void finish_thread() {
  Thread& thread = *machine.thread;
  Warp& warp = *machine.warp;
  if (!thread.copies.empty())
    fail("the thread ends with %zu asynchronous copies that it has not waited for, the first [+0x%x]",
         thread.copies.size(), thread.copies[0].site);
  if (warp.num_arrived)
    fail("the thread ends while %d lanes of its warp wait at %s", warp.num_arrived, name_of(warp.point));
  ++warp.num_finished;
  switch_to_next_lane(true);
  abort();
}

void run_thread() {
  machine.thread->fiber.arrived();
  if (!machine.is_scheduler_known) machine.scheduler.learn_stack_from(machine.thread->fiber);
  machine.is_scheduler_known = true;
  machine.kernel->call(machine.launch->arguments);
  finish_thread();
}

// -------------------------------------------------------------------------------------------------------------- blocks

void prepare_block(const Stacks& stacks) {
  const int count = machine.launch->threads;
  ++machine.last_time;
  running.block_time = machine.last_time;
  for (int i = 0; i < count; ++i) {
    Thread& thread = machine.threads[i];
    thread.index = i;
    thread.stack = stacks[i];
    thread.copies.clear();
    thread.groups_committed = 0;
    // Stacks that begin at the same offset within a page would compete for the same few places in the cache.
    thread.fiber.prepare(stacks[i], Stacks::BYTES, i % 16 * 256, run_thread);
  }
  for (int w = 0; w < count / 32; ++w) {
    Warp& warp = machine.warps[w];
    warp.first_thread = 32 * w;
    for (int lane = 0; lane < 32; ++lane) warp.order[lane] = lane;
    warp.num_arrived = warp.num_finished = 0;
    begin_time(warp, machine.last_time);
  }
  memset(reinterpret_cast<void*>(running.shared), 0xff, running.shared_bytes);  // NaN in every element type
}

// Runs a warp to its next barrier of the block or its end.
void run_warp(Warp& warp) {
  machine.warp = &warp;
  running.warp_time = warp.time;
  warp.position = 0;
  Thread& first = machine.threads[warp.first_thread + warp.order[0]];
  become(first);
  Fiber::switch_between(machine.scheduler, first.fiber);
  running.stack = 0;
}

// Opens the barrier that all warps have come to.
void pass_barrier() {
  const Warp& first = machine.warps[0];
  int any = 0;
  for (const Warp& warp : machine.warps) {
    const int index = warp.first_thread / 32;
    if (warp.num_finished) return set_message("warp %d has ended while others wait at a barrier of the block", index);
    if (warp.point != first.point)
      return set_message("warp 0 waits at %s [+0x%x] and warp %d at %s [+0x%x]", name_of(first.point),
                         first.operands[0].site, index, name_of(warp.point), warp.operands[0].site);
    any |= warp.any_predicate;
  }
  machine.predicate = any;
  ++machine.last_time;
  running.block_time = machine.last_time;
  for (Warp& warp : machine.warps) {
    warp.num_arrived = warp.any_predicate = 0;
    begin_time(warp, machine.last_time);
  }
}

void run_block(const Stacks& stacks) {
  prepare_block(stacks);
  const int num_warps = static_cast<int>(machine.warps.size());
  for (;;) {
    machine.random.shuffle(machine.warp_order.data(), num_warps);
    int num_finished = 0;
    for (int w : machine.warp_order) {
      run_warp(machine.warps[w]);
      if (machine.has_failed) return;
      num_finished += machine.warps[w].num_finished == 32;
    }
    if (num_finished == num_warps) return;
    pass_barrier();
    if (machine.has_failed) return;
  }
}

}  // namespace

const char* name_of(Point point) { return POINT_NAMES[static_cast<int>(point)]; }

void begin_time(Warp& warp, unsigned time) {
  warp.time = time;
  machine.random.shuffle(warp.order, 32);
}

bool arrive(Point point, const void* return_address) {
  Warp& warp = *machine.warp;
  own_operands().site = site_of(return_address);
  if (warp.num_finished)
    fail("the thread waits at %s [+0x%x] while %d lanes of its warp have ended", name_of(point), own_operands().site,
         warp.num_finished);
  if (warp.num_arrived && warp.point != point)
    fail("the thread has come to %s [+0x%x] while %d lanes of its warp wait at %s", name_of(point), own_operands().site,
         warp.num_arrived, name_of(warp.point));
  warp.point = point;
  ++warp.num_arrived;
  if (warp.num_arrived < 32 || point >= Point::SYNC_THREADS) {
    switch_to_next_lane(false);
    return false;
  }
  warp.num_arrived = 0;
  return true;
}

// Of a kernel's thread: all threads are given up where they are.
void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  set_message_of(format, list);
  va_end(list);
  Fiber::switch_between(machine.thread->fiber, machine.scheduler, true);
  abort();
}

// -------------------------------------------------------------------------------------------------------------- launch

namespace {

const char* reason_not_to_run(const Kernel& kernel, const Launch& launch) {
  if (running.shared) return "a launch while another one runs";
  if (launch.argument_bytes != kernel.argument_bytes) return "the arguments have another size than the kernel's struct";
  if (launch.threads < 32 || launch.threads % 32) return "the number of threads must be a multiple of 32";
  if (launch.threads > kernel.most_threads) return "more threads than the kernel is compiled for";
  if (launch.grid[0] < 1 || launch.grid[1] < 1 || launch.grid[2] < 1) return "an empty grid";
  if (launch.grid[1] > 65535 || launch.grid[2] > 65535) return "a grid of more than 65535 blocks in y or z";
  return nullptr;
}

void run_grid(const Launch& launch, const Stacks& stacks) {
  const long long width = launch.grid[0], height = launch.grid[1], count = width * height * launch.grid[2];
  std::vector<long long> order(count);
  for (long long i = 0; i < count; ++i) order[i] = i;
  machine.random.shuffle(order.data(), static_cast<int>(count));
  for (long long i : order) {
    machine.block = {static_cast<unsigned>(i % width), static_cast<unsigned>(i / width % height),
                     static_cast<unsigned>(i / width / height)};
    run_block(stacks);
    if (machine.has_failed) return;
  }
}

}  // namespace

const char* run(const Kernel& kernel, const Launch& launch) {
  if (const char* reason = reason_not_to_run(kernel, launch)) return reason;
  const Stacks stacks(launch.threads);
  void* shared = nullptr;
  // Of exactly this size, so that AddressSanitizer notices what lies behind.
  if (!stacks.exist() || posix_memalign(&shared, 128, launch.shared_bytes ? launch.shared_bytes : 1))
    return "no memory for the threads' stacks or for shared memory";
  running = Running{};
  running.shared = reinterpret_cast<uintptr_t>(shared);
  running.shared_bytes = launch.shared_bytes;
  machine.kernel = &kernel;
  machine.launch = &launch;
  machine.random = Random(launch.seed);
  machine.threads.resize(launch.threads);
  machine.warps.assign(launch.threads / 32, Warp{});
  machine.warp_order.clear();
  for (int w = 0; w < launch.threads / 32; ++w) machine.warp_order.push_back(w);
  machine.last_time = 0;
  machine.has_failed = machine.is_scheduler_known = false;
  memory_checks.begin(launch);
  run_grid(launch, stacks);
  running = Running{};
  free(shared);
  return machine.has_failed ? machine.message : nullptr;
}

}  // namespace simulator
