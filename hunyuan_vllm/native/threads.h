// OpenMP by its run-time calls, which GCC's and LLVM's libraries have, and linked with neither: torch has loaded one, and
// a second would start threads of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace hunyuan {

constexpr int64_t kWorthAThread = 64 * 1024;  // multiplications

// Runs work() on as many of torch's threads as are worth their start.
template <typename Work>
void parallel(int64_t multiplications, const Work& work) {
  const auto call = [](void* data) { (*static_cast<const Work*>(data))(); };
  const int64_t threads = std::clamp<int64_t>(multiplications / kWorthAThread, 1, omp_get_max_threads());
  GOMP_parallel(call, const_cast<Work*>(&work), static_cast<unsigned>(threads), 0);
}

inline void barrier() { GOMP_barrier(); }

// This thread's part of `count` things: [first, last).
inline std::pair<int64_t, int64_t> part_of(int64_t count) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace hunyuan
