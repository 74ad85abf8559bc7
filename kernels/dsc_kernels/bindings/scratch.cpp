// The parts of Scratch that no instruction set may compile with its own flags.
#include "../cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace dsc {

namespace {

constexpr int64_t PAGE = 4096;

char* allocate(int64_t bytes) {
  void* made = std::aligned_alloc(PAGE, bytes);
  if (!made) throw std::bad_alloc();
  return static_cast<char*>(made);
}

void release(char* block, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (block) ASAN_UNPOISON_MEMORY_REGION(block, bytes);
#endif
  (void)bytes;
  std::free(block);
}

}  // namespace

void Scratch::grow(int64_t bytes) {
  int64_t held = end_ - start_, size = (bytes > 2 * held ? bytes : 2 * held) + PAGE - 1;
  size = size / PAGE * PAGE;
  if (start_ && outgrown_ == MAX_OUTGROWN) throw std::bad_alloc();
  char* made = allocate(size);
  if (start_) blocks_[outgrown_] = start_, sizes_[outgrown_++] = held;
  start_ = at_ = made, end_ = made + size;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(start_, size);
#endif
}

void Scratch::merge() {
  int64_t total = end_ - start_;
  release(start_, end_ - start_);
  for (int i = 0; i < outgrown_; i++) total += sizes_[i], release(blocks_[i], sizes_[i]);
  start_ = end_ = at_ = nullptr, outgrown_ = 0;
  start_ = at_ = allocate(total);
  end_ = start_ + total;
}

Scratch::~Scratch() {
  for (int i = 0; i < outgrown_; i++) release(blocks_[i], sizes_[i]);
  release(start_, end_ - start_);
}

}  // namespace dsc
