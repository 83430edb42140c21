// A team of threads that work on one job together, part after part.
//
// Each part is a number of pieces; whoever is free takes the next one, and a part is over when its pieces are done, not
// when every thread has come by. A thread that the system has put aside for a moment therefore holds up nobody unless it
// is in the middle of a piece, and when it comes back it runs through what the others have done without it. On a server
// whose cores also speak HTTP that is what keeps a step's time steady; with barriers, each of hundreds would wait.
//
// Why not OpenMP: it has just such barriers, and torch brings a runtime of its own that would fight over the cores.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

struct Part {
  std::atomic<int> taken{0}, done{0};
};

// What a team works on. Members may come late, or lag behind when `work` has returned to the caller: a job must stay
// valid as long as anyone has it, and touch the caller's data in pieces only.
class Job {
 public:
  explicit Job(int max_parts) : parts_(max_parts) {}
  virtual ~Job() = default;
  virtual void work(int rank) = 0;

  // Whether there was no memory for some piece; what would have come after it was left out then.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  // Does pieces of part `index`, and returns when all `count` are done. Every member calls it for the same parts, and
  // takes memory in pieces only.
  template <class Piece>
  void each(int index, int count, const Piece& piece) {
    Part& part = parts_[index];
    int mine = 0;
    for (int i; (i = part.taken.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) attempt(i, piece);
    if (mine) part.done.fetch_add(mine, std::memory_order_release);
    for (int spins = 0; part.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;

  template <class Piece>
  void attempt(int i, const Piece& piece) {
    if (failed()) return;
    try {
      piece(i);
    } catch (const std::bad_alloc&) {
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
  }

  std::vector<Part> parts_;
  std::atomic<bool> failed_{false};
};

class Team {
 public:
  explicit Team(int size) {
    for (int rank = 1; rank < size; ++rank) threads_.emplace_back([this, rank] { serve(rank); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // Works on the job with the caller as rank 0; returns when it is done. False: there was no memory for it.
  bool run(const std::shared_ptr<Job>& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      ++number_;
    }
    wake_.notify_all();
    job->work(0);
    std::lock_guard<std::mutex> lock(mutex_);
    job_.reset();
    return !job->failed();
  }

 private:
  // Jobs are told apart by number: a new one may well lie where the last one lay.
  void serve(int rank) {
    for (uint64_t done = 0;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || (job_ && number_ != done); });
        if (stopping_) return;
        job = job_;
        done = number_;
      }
      job->work(rank);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  uint64_t number_ = 0;
  bool stopping_ = false;
};

// What a function returns to the interpreter: 0, or 1 where there is no memory for `action`, which says false or throws.
template <class Action>
int status_of(const Action& action) {
  try {
    return action() ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
