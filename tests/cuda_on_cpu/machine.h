// What a kernel compiled for the CPU asks of the simulator (machine.cpp). Values travel in registers and not through
// pointers to locals: a local whose address is taken would have each of its accesses reported to the memory checks.
#pragma once

#include "element_conversions.h"

#pragma GCC visibility push(hidden)

namespace simulator {

struct Index {
  unsigned x, y, z;
};
struct FourRegisters {
  unsigned values[4];
};
struct FourSums {
  float values[4];
};

// They are the same for as long as a kernel's thread lives, whatever runs in between.
Index thread_index() __attribute__((const));
Index block_index() __attribute__((const));
Index block_size() __attribute__((const));
Index grid_size() __attribute__((const));
unsigned char* shared_memory() __attribute__((const));

void sync_threads();
int sync_threads_or(int predicate);
void sync_warp(unsigned mask);
unsigned shuffle(unsigned mask, unsigned value, int source_lane);

FourRegisters load_matrices(const void* row);
FourRegisters load_matrices_transposed(const void* row);
// The accumulators come first, in registers of their own.
FourSums multiply_16x8x16_half(float, float, float, float, unsigned left_0, unsigned left_1, unsigned left_2,
                               unsigned left_3, unsigned right_0, unsigned right_1);
FourSums multiply_16x8x16_bfloat16(float, float, float, float, unsigned left_0, unsigned left_1, unsigned left_2,
                                   unsigned left_3, unsigned right_0, unsigned right_1);
FourSums multiply_16x8x8(float, float, float, float, unsigned left_0, unsigned left_1, unsigned right);
FourSums multiply_8x8x4_by_columns(float, float, float, float, float, float, float, float, unsigned left_0,
                                   unsigned left_1, unsigned right_0, unsigned right_1);
FourSums multiply_8x8x4_by_rows(float, float, float, float, float, float, float, float, unsigned left_0,
                                unsigned left_1, unsigned right_0, unsigned right_1);
FourSums last_four_sums();  // of the eight that an 8 x 8 x 4 product has just computed

// Several elements at once, checked as one access.
unsigned load_4_bytes(const void* address);
unsigned long long load_8_bytes(const void* address);
FourRegisters load_16_bytes(const void* address);
void store_4_bytes(void* address, unsigned value);
void store_8_bytes(void* address, unsigned long long value);
void store_16_bytes(void* address, FourRegisters value);

void start_copy(void* shared, const void* global, bool is_valid);
void commit_copies();
void wait_for_copies(int groups_left);

unsigned shared_offset(const void* address);
[[noreturn]] void report_wrong_architecture(const char* function, int needed);

// -------------------------------------------------------------------------------------------------------------- launch
// Mirrored field by field in simulator.py.

struct Buffer {
  unsigned long long address;
  unsigned long long bytes;
  int is_writable;
  int unused;
};

struct Launch {
  const void* arguments;
  const Buffer* buffers;
  unsigned long long argument_bytes;
  unsigned long long shared_bytes;
  unsigned long long seed;
  int grid[3];
  int threads;
  int num_buffers;
  int unused;
};

struct Kernel {
  void (*call)(const void* arguments);
  unsigned long long argument_bytes;
  int most_threads;
};

// The message of the first error, or null.
const char* run(const Kernel& kernel, const Launch& launch);

template <class Arguments, void (*KERNEL)(Arguments)>
struct Entry {
  static void call(const void* arguments) { KERNEL(*static_cast<const Arguments*>(arguments)); }
};
template <auto KERNEL, class Arguments>
Kernel kernel_of(void (*)(Arguments), int most_threads) {
  return {&Entry<Arguments, KERNEL>::call, sizeof(Arguments), most_threads};
}

}  // namespace simulator

#pragma GCC visibility pop
