// What may be read and written, and in which order: bounds of buffers and races in shared memory.
//
// g++ -fsanitize=thread puts a call before every access of a kernel; memory_checks.cpp receives it instead of libtsan.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"

#pragma GCC visibility push(hidden)

namespace simulator {

enum class Access { READ, WRITE, READ_BY_WARP, START_OF_COPY, END_OF_COPY };

// What the checks have to know of the running thread; kept together, since most accesses end after a look at it.
struct Running {
  uintptr_t stack = 0;  // 0: no kernel is running
  uintptr_t shared = 0;
  size_t shared_bytes = 0;
  unsigned thread = 0;
  unsigned warp_time = 0;   // of the last barrier that this warp took part in
  unsigned block_time = 0;  // of the last barrier of the whole block
};
extern Running running;

// Orders the accesses of a block's threads. Only barriers do, so two accesses, one of them a write, are a race unless
// a thread did both, or a barrier of the block lies between them, or they are of one warp with a __syncwarp between.
// Barriers are numbered, and the number of a warp's last one is the time of its accesses; times grow from block to
// block.
class RaceDetector {
 public:
  void begin(size_t shared_bytes);
  void record(size_t offset, size_t bytes, Access access, unsigned site);

 private:
  // The last write, and those reads since that a later access can still be in conflict with: of the last warp time of
  // one warp, and whether other lanes or other warps have read as well.
  struct Cell {
    unsigned write_time, read_time;
    unsigned write_site, read_site;  // where in the code
    unsigned short writer, reader;   // threads
    bool many_lanes, many_warps;
    bool is_copy_pending;
    bool is_split;  // of the cell of 16 bytes: each byte has its own
  };
  static constexpr size_t GRANULE = 16;

  void record(Cell& cell, size_t offset, Access access, unsigned site);
  [[noreturn]] void report(const Cell& cell, size_t offset, Access access, unsigned site, bool was_write);

  std::vector<Cell> granules_;
  std::unique_ptr<Cell[]> bytes_;
  size_t num_bytes_ = 0;
};

class MemoryChecks {
 public:
  void begin(const Launch& launch);
  // An access by the running thread to anything but its own stack.
  void check(const void* address, size_t bytes, Access access, unsigned site);
  void require_shared(const void* address, size_t bytes, const char* instruction);

 private:
  struct Region {
    uintptr_t begin;
    size_t bytes;
    bool is_writable;
    bool contains(uintptr_t address, size_t size) const {
      return address - begin < bytes && size <= bytes - (address - begin);
    }
  };
  bool is_allowed(uintptr_t address, size_t bytes, bool writes);
  [[noreturn]] void report(uintptr_t address, size_t bytes, bool writes, unsigned site);

  std::vector<Region> regions_;  // the buffers, then the kernel's arguments
  size_t last_ = 0;              // where the previous access was found
  RaceDetector races_;
};
extern MemoryChecks memory_checks;

// A place in the code, as an offset in the shared object; simulator.py turns it into a line.
unsigned site_of(const void* return_address);

[[noreturn]] void report_misaligned(const void* address, size_t bytes, unsigned site);

// Ends the launch with a message. Where the running thread is, is said after it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simulator

#pragma GCC visibility pop
