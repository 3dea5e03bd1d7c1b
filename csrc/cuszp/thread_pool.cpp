// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <thread>

namespace kvz {
namespace {

constexpr uint32_t kMaxWorkers = 255;

struct Job {
  void (*body)(void*, uint64_t);
  void* context;
  uint64_t items;
  std::atomic<uint64_t> next{0};
  uint32_t helpers = 0;  // workers inside the job; guarded by the pool's mutex
  std::condition_variable left;

  void run() {
    for (uint64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  }
};

// Never destroyed: workers may wait in it while the process exits.
class Pool {
 public:
  void run(Job& job, uint32_t wanted) {
    uint32_t tickets = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(wanted);
      tickets = wanted < workers_ ? wanted : workers_;
      try {
        for (uint32_t i = 0; i < tickets; ++i) queue_.push_back(&job);
      } catch (const std::bad_alloc&) {  // fewer helpers; the caller does the work
      }
    }
    for (uint32_t i = 0; i < tickets; ++i) work_.notify_one();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    for (auto it = queue_.begin(); it != queue_.end();) it = *it == &job ? queue_.erase(it) : it + 1;
    job.left.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  void grow(uint32_t wanted) {
    while (workers_ < wanted && workers_ < kMaxWorkers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (...) {  // no more threads to be had: go on with those there are
        return;
      }
      ++workers_;
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return !queue_.empty(); });
      Job* job = queue_.front();
      queue_.pop_front();
      ++job->helpers;
      lock.unlock();
      job->run();
      lock.lock();
      if (--job->helpers == 0) job->left.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Job*> queue_;
  uint32_t workers_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};

// The child of a fork has none of the parent's workers, and the parent's mutex may be locked for ever: start afresh.
void forget_pool() { g_pool.store(nullptr); }

Pool* pool() {
  Pool* found = g_pool.load();
  if (found != nullptr) return found;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr) return nullptr;
  if (!g_pool.compare_exchange_strong(found, made)) {
    delete made;  // another thread was first; this one has no workers yet
    return found;
  }
  static std::atomic<bool> registered{false};
  if (!registered.exchange(true)) pthread_atfork(nullptr, nullptr, forget_pool);
  return made;
}

}  // namespace

uint32_t usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return static_cast<uint32_t>(count);
  }
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : count;
}

void parallel_for(uint64_t items, uint32_t threads, void (*body)(void*, uint64_t), void* context) {
  if (threads == 0) threads = items > 1 ? usable_cores() : 1;
  if (threads > items) threads = static_cast<uint32_t>(items);
  Pool* workers = threads > 1 ? pool() : nullptr;
  if (workers == nullptr) {
    for (uint64_t item = 0; item < items; ++item) body(context, item);
    return;
  }
  Job job;
  job.body = body;
  job.context = context;
  job.items = items;
  workers->run(job, threads - 1);
}

}  // namespace kvz
