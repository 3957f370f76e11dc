// A loop shared with the threads of a pool, for any pool that takes tasks.
#ifndef CUSTOM_OPS_PARALLEL_FOR_H_
#define CUSTOM_OPS_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace kogpt {

// The part of one loop that the calling thread and its helpers share. It outlives the call: a
// helper that a busy pool starts late finds nothing left to take, and never looks at `body`.
struct ParallelLoop {
  using Body = std::function<void(int64_t begin, int64_t end)>;

  const Body* body;  // the caller's: there as long as `done` is less than `count`
  int64_t count;
  int64_t grain;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  // Runs ranges until none is left that nobody has taken.
  void TakeRanges() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      const int64_t end = std::min(begin + grain, count);
      (*body)(begin, end);
      if (done.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  bool IsDone() const { return done.load(std::memory_order_acquire) == count; }

  // Waits for ranges that helpers are still running.
  void Wait() {
    // A range takes microseconds, less than going to sleep and waking up.
    constexpr int kSpins = 200;
    for (int i = 0; i < kSpins && !IsDone(); ++i) std::this_thread::yield();
    if (IsDone()) return;
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return IsDone(); });
  }
};

// Calls body(begin, end) over disjoint ranges that cover [0, count) and returns when all have
// ended.
//
// schedule(task) hands a task to the pool. The calling thread takes ranges too and never waits for
// a task to start, only for ranges that are running: so this ends with a pool of any size, one
// without threads included, and on a thread of the pool itself.
template <typename Schedule>
void RunParallel(int64_t count, int64_t num_threads, const ParallelLoop::Body& body,
                 Schedule schedule) {
  if (count <= 0) return;
  // Several ranges a thread, since threads start at different times and share their cores with
  // others.
  constexpr int64_t kRangesPerThread = 4;
  num_threads = std::max<int64_t>(1, std::min(num_threads, count));
  if (num_threads == 1) {
    body(0, count);
    return;
  }
  const auto loop = std::make_shared<ParallelLoop>();
  loop->body = &body;
  loop->count = count;
  loop->grain = std::max<int64_t>(1, count / (num_threads * kRangesPerThread));
  for (int64_t i = 1; i < num_threads; ++i) schedule([loop] { loop->TakeRanges(); });
  loop->TakeRanges();
  loop->Wait();
}

}  // namespace kogpt

#endif  // CUSTOM_OPS_PARALLEL_FOR_H_
