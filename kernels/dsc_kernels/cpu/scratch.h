// Working memory of kernels: taken piece by piece before a kernel starts its threads, given back all at once.
//
// A thread's Scratch grows to its largest call and stays, so a call seldom allocates; nobody computes sizes beforehand.
// What is taken holds whatever was there. With the address sanitizer every piece has a red zone behind it.
#pragma once

#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dsc {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();  // this and `grow` are defined once, outside of the instruction sets

  // All that was taken is given back. Returns this.
  __attribute__((always_inline)) Scratch& reset() {
    if (outgrown_) merge();
    at_ = start_;
#if defined(__SANITIZE_ADDRESS__)
    if (start_) ASAN_POISON_MEMORY_REGION(start_, end_ - start_);
#endif
    return *this;
  }

  // Room for `count` values, which begins at a cache line. Throws std::bad_alloc.
  template <typename T>
  __attribute__((always_inline)) T* take(int64_t count) {
    int64_t bytes = count * (int64_t)sizeof(T), room = (bytes + GAP + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (room > end_ - at_) grow(room);
    char* piece = at_;
    at_ += room;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(piece, bytes);
#endif
    return (T*)(void*)piece;
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t GAP = 64;
#else
  static constexpr int64_t GAP = 0;
#endif
  static constexpr int MAX_OUTGROWN = 64;  // each block is at least twice as large as the one before

  void grow(int64_t bytes);  // a new block; the old one is kept until `reset`, since pieces of it are in use
  void merge();              // one block in place of all, so that the next call of this size fits

  char *start_ = nullptr, *end_ = nullptr, *at_ = nullptr;  // the present block, and where the next piece begins
  char* blocks_[MAX_OUTGROWN] = {};                         // earlier blocks that still hold pieces
  int64_t sizes_[MAX_OUTGROWN] = {};                        // theirs
  int outgrown_ = 0;                                        // how many
};

}  // namespace dsc
