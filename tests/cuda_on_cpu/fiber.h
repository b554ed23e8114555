// Stacks that take turns on one OS thread. A switch costs a few nanoseconds: swapcontext would do a system call each.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(FINEGRAIN_USE_UCONTEXT) && (defined(__x86_64__) || defined(__aarch64__))
// Saves what a called function must preserve on the own stack, stores the stack pointer and continues on another stack.
extern "C" __attribute__((visibility("hidden"))) void finegrain_switch_stack(void** from, void* to);
#else
#undef FINEGRAIN_USE_UCONTEXT
#define FINEGRAIN_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simulator {

class Fiber {
 public:
  // entry must not return: its last act is a switch with from_ends.
  void prepare(unsigned char* stack, size_t bytes, size_t offset, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
#if defined(FINEGRAIN_USE_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes - offset;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack + bytes - offset);  // a multiple of 16
#if defined(__x86_64__)
    *--top = nullptr;  // where a return address would lie, so that the entry finds the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
#else
    top -= 20;
    top[10] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);
#endif
    stack_pointer_ = top;
#endif
    fake_stack_ = nullptr;
  }

  static void switch_between(Fiber& from, Fiber& to, bool from_ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, to.stack_, to.bytes_);
#else
    (void)from_ends;
#endif
#if defined(FINEGRAIN_USE_UCONTEXT)
    swapcontext(&from.context_, &to.context_);
#else
    finegrain_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
    from.arrived();
  }

  // Called on a fiber's stack once it runs, by its entry too.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &previous_stack_, &previous_bytes_);
#endif
  }

  // The OS thread's own stack is known only once something was switched to from there.
  void learn_stack_from(const Fiber& other) {
    stack_ = static_cast<const unsigned char*>(other.previous_stack_);
    bytes_ = other.previous_bytes_;
  }

 private:
#if defined(FINEGRAIN_USE_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  const unsigned char* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  const void* previous_stack_ = nullptr;
  size_t previous_bytes_ = 0;
};

// Stacks of equal size, each above a page that may not be touched.
class Stacks {
 public:
  static constexpr size_t BYTES = 256 << 10;

  explicit Stacks(int count) : guard_(sysconf(_SC_PAGESIZE)), length_(count * (BYTES + guard_)) {
    void* memory = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    memory_ = static_cast<unsigned char*>(memory);
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * (BYTES + guard_), guard_, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    if (!memory_) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, length_);  // fibers that were given up have left their frames' marks
#endif
    munmap(memory_, length_);
  }

  bool exist() const { return memory_; }
  unsigned char* operator[](int index) const { return memory_ + index * (BYTES + guard_) + guard_; }

 private:
  size_t guard_;
  size_t length_;
  unsigned char* memory_ = nullptr;
};

}  // namespace simulator
