#include "memory_checks.h"

#include <cstdio>

#include "fiber.h"

// Of the linker: where this shared object lies in memory.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace simulator {

Running running;
MemoryChecks memory_checks;

unsigned site_of(const void* return_address) {
  return static_cast<unsigned>(static_cast<const char*>(return_address) - __ehdr_start) - 1;  // within the call
}

namespace {

bool writes(Access access) { return access != Access::READ && access != Access::READ_BY_WARP; }

const char* name_of(Access access) {
  switch (access) {
    case Access::READ:
      return "read";
    case Access::READ_BY_WARP:
      return "read for the whole warp";
    case Access::WRITE:
      return "written";
    case Access::START_OF_COPY:
      return "written by an asynchronous copy that starts here";
    case Access::END_OF_COPY:
      return "written by an asynchronous copy that is waited for here";
  }
  return "";
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------- races

void RaceDetector::begin(size_t shared_bytes) {
  const size_t count = (shared_bytes + GRANULE - 1) / GRANULE;
  granules_.assign(count, Cell{});
  if (num_bytes_ < count * GRANULE) {
    num_bytes_ = count * GRANULE;
    bytes_.reset(new Cell[num_bytes_]);  // read only after a split has written them
  }
}

void RaceDetector::record(size_t offset, size_t bytes, Access access, unsigned site) {
  while (bytes) {
    const size_t index = offset / GRANULE, first = offset % GRANULE;
    const size_t count = bytes < GRANULE - first ? bytes : GRANULE - first;
    Cell& granule = granules_[index];
    Cell* own = &bytes_[index * GRANULE];
    const bool is_whole = count == GRANULE;
    if (!granule.is_split && is_whole) {
      record(granule, offset, access, site);
    } else {
      if (!granule.is_split) {
        for (size_t i = 0; i < GRANULE; ++i) own[i] = granule;
        granule.is_split = true;
      }
      for (size_t i = first; i < first + count; ++i) record(own[i], index * GRANULE + i, access, site);
      // After a write all bytes are alike, and what was read before it is ordered by it.
      if (is_whole && writes(access)) granule = own[0], granule.is_split = false;
    }
    offset += count;
    bytes -= count;
  }
}

inline void RaceDetector::record(Cell& cell, size_t offset, Access access, unsigned site) {
  const unsigned thread = running.thread, warp = thread / 32;
  if (cell.is_copy_pending && access != Access::END_OF_COPY) report(cell, offset, access, site, true);
  if (cell.write_time >= running.block_time) {
    const bool is_own = cell.writer == thread && access != Access::READ_BY_WARP;
    if (!is_own && (cell.writer / 32u != warp || cell.write_time == running.warp_time))
      report(cell, offset, access, site, true);
  }
  if (writes(access)) {
    if (cell.read_time >= running.block_time) {
      if (cell.many_warps || cell.reader / 32u != warp ||
          (cell.read_time == running.warp_time && (cell.many_lanes || cell.reader != thread)))
        report(cell, offset, access, site, false);
    }
    cell.write_time = running.warp_time;
    cell.write_site = site;
    cell.writer = static_cast<unsigned short>(thread);
    cell.read_time = 0;
    cell.many_lanes = cell.many_warps = false;
    cell.is_copy_pending = access == Access::START_OF_COPY;
    return;
  }
  const bool by_warp = access == Access::READ_BY_WARP;
  if (cell.read_time < running.block_time) {
    cell.many_warps = false;
  } else if (cell.reader / 32u != warp) {
    cell.many_warps = true;
    return;
  } else if (cell.read_time == running.warp_time) {
    cell.many_lanes = cell.many_lanes || by_warp || cell.reader != thread;
    return;
  }
  cell.read_time = running.warp_time;
  cell.read_site = site;
  cell.reader = static_cast<unsigned short>(thread);
  cell.many_lanes = by_warp;
}

void RaceDetector::report(const Cell& cell, size_t offset, Access access, unsigned site, bool was_write) {
  const unsigned before = was_write ? cell.writer : cell.reader, warp = before / 32;
  const unsigned before_site = was_write ? cell.write_site : cell.read_site;
  if (cell.is_copy_pending)
    fail(
        "shared memory byte %zu is %s [+0x%x] while an asynchronous copy of thread %u [+0x%x] is still on its way: "
        "wait_for_copies comes first",
        offset, name_of(access), site, before, before_site);
  const bool same_warp = warp == running.thread / 32 && !(cell.many_warps && !was_write);
  fail(
      "race on shared memory byte %zu: %s by thread %u (warp %u) [+0x%x] after it was %s by thread %u (warp %u%s) "
      "[+0x%x], without a %s between",
      offset, name_of(access), running.thread, running.thread / 32, site, was_write ? "written" : "read", before, warp,
      !was_write && cell.many_warps ? ", and by other warps" : "", before_site,
      same_warp ? "__syncwarp" : "__syncthreads");
}

// -------------------------------------------------------------------------------------------------------------- bounds

void MemoryChecks::begin(const Launch& launch) {
  regions_.clear();
  for (int i = 0; i < launch.num_buffers; ++i) {
    const Buffer& buffer = launch.buffers[i];
    regions_.push_back(
        {static_cast<uintptr_t>(buffer.address), static_cast<size_t>(buffer.bytes), buffer.is_writable != 0});
  }
  const uintptr_t arguments = reinterpret_cast<uintptr_t>(launch.arguments);
  regions_.push_back({arguments, static_cast<size_t>(launch.argument_bytes), false});
  last_ = 0;
  races_.begin(running.shared_bytes);
}

bool MemoryChecks::is_allowed(uintptr_t address, size_t bytes, bool writes) {
  const auto allows = [&](const Region& region) {
    return region.contains(address, bytes) && (region.is_writable || !writes);
  };
  if (allows(regions_[last_])) return true;
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (!allows(regions_[i])) continue;
    last_ = i;
    return true;
  }
  const uintptr_t image = reinterpret_cast<uintptr_t>(__ehdr_start);  // constants
  return !writes && address - image < static_cast<size_t>(_end - __ehdr_start);
}

void MemoryChecks::check(const void* pointer, size_t bytes, Access access, unsigned site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const size_t offset = address - running.shared;
  if (offset < running.shared_bytes && bytes <= running.shared_bytes - offset)
    races_.record(offset, bytes, access, site);
  else if (running.stack && !is_allowed(address, bytes, writes(access)))
    report(address, bytes, writes(access), site);
}

void MemoryChecks::report(uintptr_t address, size_t bytes, bool writes, unsigned site) {
  const char* verb = writes ? "write" : "read";
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (writes && regions_[i].contains(address, bytes))
      fail("write of %zu bytes to read-only %s %zu, %zu bytes from its beginning [+0x%x]", bytes,
           i + 1 < regions_.size() ? "buffer" : "arguments", i, static_cast<size_t>(address - regions_[i].begin), site);
  }
  // The nearest region; shared memory is the one after the last.
  size_t nearest = 0, least = SIZE_MAX;
  bool is_after = false, is_across = false;
  for (size_t i = 0; i <= regions_.size(); ++i) {
    const bool is_shared = i == regions_.size();
    const uintptr_t begin = is_shared ? running.shared : regions_[i].begin;
    const size_t size = is_shared ? running.shared_bytes : regions_[i].bytes;
    const bool after = address >= begin, across = after && address - begin < size;
    const size_t distance = !after ? begin - address : across ? 0 : address - begin - size;
    if (distance < least || across) least = distance, nearest = i, is_after = after, is_across = across;
  }
  char region[80];
  if (nearest == regions_.size())
    snprintf(region, sizeof region, "shared memory (%zu bytes)", running.shared_bytes);
  else if (nearest + 1 == regions_.size())
    snprintf(region, sizeof region, "the kernel's arguments (%zu bytes)", regions_[nearest].bytes);
  else
    snprintf(region, sizeof region, "buffer %zu (%zu bytes)", nearest, regions_[nearest].bytes);
  if (least > (1u << 30))
    fail("%s of %zu bytes at %#zx, which is far from every buffer [+0x%x]", verb, bytes, static_cast<size_t>(address),
         site);
  if (is_across) fail("%s of %zu bytes that reaches beyond the end of %s [+0x%x]", verb, bytes, region, site);
  fail("%s of %zu bytes, %zu bytes %s %s [+0x%x]", verb, bytes, least, is_after ? "after the end of" : "before", region,
       site);
}

void report_misaligned(const void* address, size_t bytes, unsigned site) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) - running.shared;
  if (offset < running.shared_bytes)
    fail("shared memory at byte %zu is accessed as %zu bytes at once, which must be aligned [+0x%x]", offset, bytes,
         site);
  fail("%p is accessed as %zu bytes at once, which must be aligned [+0x%x]", address, bytes, site);
}

void MemoryChecks::require_shared(const void* pointer, size_t bytes, const char* instruction) {
  const size_t offset = reinterpret_cast<uintptr_t>(pointer) - running.shared;
  if (offset >= running.shared_bytes || bytes > running.shared_bytes - offset)
    fail("%s: its %zu bytes at offset %td are not in shared memory of %zu bytes", instruction, bytes,
         static_cast<ptrdiff_t>(offset), running.shared_bytes);
}

}  // namespace simulator

// ------------------------------------------------------------------------------------ the calls that the compiler adds

namespace {

using simulator::Access;
using simulator::running;

inline __attribute__((always_inline)) void access(const void* address, size_t bytes, Access kind, bool is_aligned,
                                                  const void* return_address) {
  if (reinterpret_cast<uintptr_t>(address) - running.stack < simulator::Stacks::BYTES) return;
  const unsigned site = simulator::site_of(return_address);
  if (is_aligned && reinterpret_cast<uintptr_t>(address) % bytes) simulator::report_misaligned(address, bytes, site);
  simulator::memory_checks.check(address, bytes, kind, site);
}

}  // namespace

#define FINEGRAIN_ACCESS(name, bytes, kind, is_aligned) \
  extern "C" void name(const void* address) { access(address, bytes, kind, is_aligned, __builtin_return_address(0)); }
// A struct of 16 bytes need not be aligned to more than 8.
#define FINEGRAIN_ACCESSES(bytes, is_aligned)                                    \
  FINEGRAIN_ACCESS(__tsan_read##bytes, bytes, Access::READ, is_aligned)          \
  FINEGRAIN_ACCESS(__tsan_write##bytes, bytes, Access::WRITE, is_aligned)        \
  FINEGRAIN_ACCESS(__tsan_unaligned_read##bytes, bytes, Access::READ, false)     \
  FINEGRAIN_ACCESS(__tsan_unaligned_write##bytes, bytes, Access::WRITE, false)   \
  FINEGRAIN_ACCESS(__tsan_volatile_read##bytes, bytes, Access::READ, is_aligned) \
  FINEGRAIN_ACCESS(__tsan_volatile_write##bytes, bytes, Access::WRITE, is_aligned)
FINEGRAIN_ACCESSES(1, true)
FINEGRAIN_ACCESSES(2, true)
FINEGRAIN_ACCESSES(4, true)
FINEGRAIN_ACCESSES(8, true)
FINEGRAIN_ACCESSES(16, false)

extern "C" {
void __tsan_read_range(const void* address, size_t bytes) {
  if (bytes) access(address, bytes, Access::READ, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t bytes) {
  if (bytes) access(address, bytes, Access::WRITE, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(const void*) {}
void __tsan_func_exit() {}
}
