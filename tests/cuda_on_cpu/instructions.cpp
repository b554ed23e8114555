// What a thread can do that other threads see: collectives of its warp, barriers, vector accesses, asynchronous copies.
#include <cstring>

#include "machine_state.h"

namespace simulator {
namespace {

void require_aligned(const void* address, size_t bytes, const void* return_address) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) report_misaligned(address, bytes, site_of(return_address));
}

// Unlike the calls that the compiler adds, these see a vector as one access, and as a whole where a part is used.
template <class Value>
Value load_vector(const void* address, const void* return_address) {
  require_aligned(address, sizeof(Value), return_address);
  if (reinterpret_cast<uintptr_t>(address) - running.stack >= Stacks::BYTES)
    memory_checks.check(address, sizeof(Value), Access::READ, site_of(return_address));
  return *static_cast<const Value*>(address);
}
template <class Value>
void store_vector(void* address, Value value, const void* return_address) {
  require_aligned(address, sizeof(Value), return_address);
  if (reinterpret_cast<uintptr_t>(address) - running.stack >= Stacks::BYTES)
    memory_checks.check(address, sizeof(Value), Access::WRITE, site_of(return_address));
  *static_cast<Value*>(address) = value;
}

void require_whole_warp(unsigned mask, const char* name) {
  if (mask != ~0u) fail("%s with the mask %#x: only whole warps are simulated", name, mask);
}

FourRegisters load_at(Point point, const void* row, const void* return_address) {
  Operands& own = own_operands();
  require_aligned(row, 16, return_address);
  memory_checks.require_shared(row, 16, name_of(point));
  own.row = row;
  if (arrive(point, return_address)) {
    Thread& thread = *machine.thread;
    for (int lane = 0; lane < 32; ++lane) {  // each reads for lanes that it cannot know of
      become(machine.threads[machine.warp->first_thread + lane]);
      memory_checks.check(machine.warp->operands[lane].row, 16, Access::READ_BY_WARP,
                          machine.warp->operands[lane].site);
    }
    become(thread);
    load_four_matrices(machine.warp->operands, point == Point::LOAD_MATRICES_TRANSPOSED);
  }
  return {{own.registers[0], own.registers[1], own.registers[2], own.registers[3]}};
}

void bring(const float (&sums)[8], const unsigned (&left)[4], const unsigned (&right)[2]) {
  Operands& own = own_operands();
  memcpy(own.sums, sums, sizeof sums);
  memcpy(own.left, left, sizeof left);
  memcpy(own.right, right, sizeof right);
}

template <void (*WORK)(WarpOperands&)>
FourSums multiply_at(Point point, const void* return_address) {
  if (arrive(point, return_address)) WORK(machine.warp->operands);
  const Operands& own = own_operands();
  return {{own.sums[0], own.sums[1], own.sums[2], own.sums[3]}};
}

}  // namespace

void report_wrong_architecture(const char* function, int needed) {
  fail("%s needs FINEGRAIN_ARCH %d or later [+0x%x]", function, needed, site_of(__builtin_return_address(0)));
}

// ------------------------------------------------------------------------------------ what machine.h offers to kernels

Index thread_index() { return {running.thread, 0, 0}; }
Index block_index() { return machine.block; }
Index block_size() { return {static_cast<unsigned>(machine.launch->threads), 1, 1}; }
Index grid_size() {
  const int (&grid)[3] = machine.launch->grid;
  return {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2])};
}
unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(running.shared); }
unsigned shared_offset(const void* address) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) - running.shared);
}

void sync_threads() { arrive(Point::SYNC_THREADS, __builtin_return_address(0)); }

int sync_threads_or(int predicate) {
  machine.warp->any_predicate |= predicate != 0;
  arrive(Point::SYNC_THREADS_OR, __builtin_return_address(0));
  return machine.predicate;
}

void sync_warp(unsigned mask) {
  require_whole_warp(mask, "__syncwarp");
  if (!arrive(Point::SYNC_WARP, __builtin_return_address(0))) return;
  Warp& warp = *machine.warp;
  begin_time(warp, ++machine.last_time);
  running.warp_time = warp.time;
  warp.position = 0;
  while (warp.order[warp.position] != static_cast<int>(running.thread % 32)) ++warp.position;
}

unsigned shuffle(unsigned mask, unsigned value, int source_lane) {
  require_whole_warp(mask, "a shuffle");
  Warp& warp = *machine.warp;
  const unsigned lane = running.thread % 32;
  warp.shuffled[lane] = value;
  warp.sources[lane] = source_lane;
  if (arrive(Point::SHUFFLE, __builtin_return_address(0))) {
    unsigned results[32];
    for (int i = 0; i < 32; ++i) results[i] = warp.shuffled[warp.sources[i]];
    memcpy(warp.shuffled, results, sizeof results);
  }
  return warp.shuffled[lane];
}

FourRegisters load_matrices(const void* row) { return load_at(Point::LOAD_MATRICES, row, __builtin_return_address(0)); }
FourRegisters load_matrices_transposed(const void* row) {
  return load_at(Point::LOAD_MATRICES_TRANSPOSED, row, __builtin_return_address(0));
}

FourSums multiply_16x8x16_half(float sum_0, float sum_1, float sum_2, float sum_3, unsigned left_0, unsigned left_1,
                               unsigned left_2, unsigned left_3, unsigned right_0, unsigned right_1) {
  bring({sum_0, sum_1, sum_2, sum_3}, {left_0, left_1, left_2, left_3}, {right_0, right_1});
  return multiply_at<multiply_16x8<Half, 16>>(Point::MULTIPLY_16X8X16_HALF, __builtin_return_address(0));
}
FourSums multiply_16x8x16_bfloat16(float sum_0, float sum_1, float sum_2, float sum_3, unsigned left_0, unsigned left_1,
                                   unsigned left_2, unsigned left_3, unsigned right_0, unsigned right_1) {
  bring({sum_0, sum_1, sum_2, sum_3}, {left_0, left_1, left_2, left_3}, {right_0, right_1});
  return multiply_at<multiply_16x8<Bfloat16, 16>>(Point::MULTIPLY_16X8X16_BFLOAT16, __builtin_return_address(0));
}
FourSums multiply_16x8x8(float sum_0, float sum_1, float sum_2, float sum_3, unsigned left_0, unsigned left_1,
                         unsigned right) {
  bring({sum_0, sum_1, sum_2, sum_3}, {left_0, left_1}, {right});
  return multiply_at<multiply_16x8<Half, 8>>(Point::MULTIPLY_16X8X8, __builtin_return_address(0));
}
FourSums multiply_8x8x4_by_columns(float sum_0, float sum_1, float sum_2, float sum_3, float sum_4, float sum_5,
                                   float sum_6, float sum_7, unsigned left_0, unsigned left_1, unsigned right_0,
                                   unsigned right_1) {
  bring({sum_0, sum_1, sum_2, sum_3, sum_4, sum_5, sum_6, sum_7}, {left_0, left_1}, {right_0, right_1});
  return multiply_at<multiply_8x8x4<false>>(Point::MULTIPLY_8X8X4_BY_COLUMNS, __builtin_return_address(0));
}
FourSums multiply_8x8x4_by_rows(float sum_0, float sum_1, float sum_2, float sum_3, float sum_4, float sum_5,
                                float sum_6, float sum_7, unsigned left_0, unsigned left_1, unsigned right_0,
                                unsigned right_1) {
  bring({sum_0, sum_1, sum_2, sum_3, sum_4, sum_5, sum_6, sum_7}, {left_0, left_1}, {right_0, right_1});
  return multiply_at<multiply_8x8x4<true>>(Point::MULTIPLY_8X8X4_BY_ROWS, __builtin_return_address(0));
}
FourSums last_four_sums() {
  const Operands& own = own_operands();
  return {{own.sums[4], own.sums[5], own.sums[6], own.sums[7]}};
}

unsigned load_4_bytes(const void* address) { return load_vector<unsigned>(address, __builtin_return_address(0)); }
unsigned long long load_8_bytes(const void* address) {
  return load_vector<unsigned long long>(address, __builtin_return_address(0));
}
FourRegisters load_16_bytes(const void* address) {
  return load_vector<FourRegisters>(address, __builtin_return_address(0));
}
void store_4_bytes(void* address, unsigned value) { store_vector(address, value, __builtin_return_address(0)); }
void store_8_bytes(void* address, unsigned long long value) {
  store_vector(address, value, __builtin_return_address(0));
}
void store_16_bytes(void* address, FourRegisters value) { store_vector(address, value, __builtin_return_address(0)); }

// What was there is lost at once, what is copied comes as late as it may: at the wait.
void start_copy(void* shared, const void* global, bool is_valid) {
  const void* return_address = __builtin_return_address(0);
  const unsigned site = site_of(return_address);
  require_aligned(shared, 16, return_address);
  memory_checks.require_shared(shared, 16, "copy_16_bytes");
  if (is_valid) {
    require_aligned(global, 16, return_address);
    memory_checks.check(global, 16, Access::READ, site);
  }
  memory_checks.check(shared, 16, Access::START_OF_COPY, site);
  memset(shared, 0xff, 16);
  Thread& thread = *machine.thread;
  thread.copies.push_back(
      {static_cast<unsigned char*>(shared), is_valid ? global : nullptr, thread.groups_committed, site});
}

void commit_copies() { ++machine.thread->groups_committed; }

void wait_for_copies(int groups_left) {
  const unsigned site = site_of(__builtin_return_address(0));
  Thread& thread = *machine.thread;
  size_t kept = 0;
  for (const Copy& copy : thread.copies) {
    if (copy.group >= thread.groups_committed - groups_left) {
      thread.copies[kept++] = copy;
      continue;
    }
    memory_checks.check(copy.shared, 16, Access::END_OF_COPY, site);
    if (copy.global)
      memcpy(copy.shared, copy.global, 16);
    else
      memset(copy.shared, 0, 16);
  }
  thread.copies.resize(kept);
}

}  // namespace simulator
