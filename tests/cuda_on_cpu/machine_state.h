// The threads and warps of the block that runs: machine.cpp lets them take turns, instructions.cpp works on them.
#pragma once

#include <vector>

#include "fiber.h"
#include "matrix_instructions.h"
#include "memory_checks.h"

#pragma GCC visibility push(hidden)

namespace simulator {

enum class Point {  // where the lanes of a warp wait for each other
  SYNC_WARP,
  SHUFFLE,
  LOAD_MATRICES,
  LOAD_MATRICES_TRANSPOSED,
  MULTIPLY_16X8X16_HALF,
  MULTIPLY_16X8X16_BFLOAT16,
  MULTIPLY_16X8X8,
  MULTIPLY_8X8X4_BY_COLUMNS,
  MULTIPLY_8X8X4_BY_ROWS,
  SYNC_THREADS,  // the barriers of the block come last
  SYNC_THREADS_OR,
};
const char* name_of(Point point);

struct Copy {
  unsigned char* shared;
  const void* global;  // null: zeros
  int group;
  unsigned site;
};

struct Thread {
  Fiber fiber;
  unsigned index;
  const unsigned char* stack;
  std::vector<Copy> copies;  // issued and not waited for
  int groups_committed;
};

struct Warp {
  int first_thread;
  int order[32];    // of lanes
  int position;     // in that order, of the lane that runs
  int num_arrived;  // at point
  int num_finished;
  Point point;
  int any_predicate;  // of __syncthreads_or
  unsigned time;      // see Running::warp_time
  unsigned shuffled[32];
  int sources[32];
  WarpOperands operands;
};

class Random {  // splitmix64
 public:
  explicit Random(unsigned long long seed) : state_(seed) {}
  unsigned below(unsigned bound) {
    unsigned long long z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return static_cast<unsigned>(((z ^ z >> 31) >> 32) * bound >> 32);
  }
  template <class T>
  void shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) {
      const unsigned j = below(i + 1);
      const T item = items[i];
      items[i] = items[j], items[j] = item;
    }
  }

 private:
  unsigned long long state_;
};

struct Machine {
  const Kernel* kernel = nullptr;
  const Launch* launch = nullptr;
  Random random{0};
  Fiber scheduler;
  bool is_scheduler_known;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> warp_order;
  unsigned last_time = 0;
  Index block{};
  Thread* thread = nullptr;  // the one that runs, and its warp
  Warp* warp = nullptr;
  int predicate = 0;  // what the last __syncthreads_or gave
  bool has_failed = false;
  char message[2048];
};
extern Machine machine;

inline void become(Thread& thread) {
  machine.thread = &thread;
  running.thread = thread.index;
  running.stack = reinterpret_cast<uintptr_t>(thread.stack);
}

inline Operands& own_operands() { return machine.warp->operands[running.thread % 32]; }

// True for the last lane of the warp, which must do the work; the others return when that is done.
bool arrive(Point point, const void* return_address);
// After a barrier.
void begin_time(Warp& warp, unsigned time);

}  // namespace simulator

#pragma GCC visibility pop
