// Where threads wait for each other.
//
// A step has many of these, and most waits are shorter than a sleep would be. But where cores are
// shared with other processes, the thread that is waited for may not be running, and those that wait
// would keep its core from it: so who has waited for long sleeps.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace mell {

class Barrier {
 public:
  void wait(int64_t count) {
    uint32_t turn = turn_.load();
    if (arrived_.fetch_add(1) + 1 == count) {
      arrived_.store(0);
      turn_.store(turn + 1);
      if (sleepers_.load()) call(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    for (int tries = 0; tries < TRIES; tries++) {
      if (turn_.load() != turn) return;
      __builtin_ia32_pause();
    }
    sleepers_.fetch_add(1);
    while (turn_.load() == turn) call(FUTEX_WAIT_PRIVATE, turn);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int TRIES = 1000;  // some 50 us

  void call(int operation, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&turn_), operation, value, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> turn_{0}, sleepers_{0};
  std::atomic<int64_t> arrived_{0};
};

}  // namespace mell
