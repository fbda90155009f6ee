// One call of attend: planned in units and tasks, searched (search.cpp), weighed and merged (attend.cpp). What one unit
// waits for is no concern of the others (chains.h).
#pragma once

#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "attend.h"
#include "chains.h"
#include "scratch.h"
#include "thread_pool.h"
#include "unit.h"

namespace retrieval {

class Job {
 public:
  // With will_list, keys without codes become candidates instead of being attended.
  Job(const LayerQueries& queries, float scale, const Budget& budget, ThreadPool& pool, Scratch& scratch, bool will_list,
      int first_kv_head = 0)
      : queries_(queries), scale_(scale), budget_(budget), pool_(pool), scratch_(scratch), arena_(scratch.arena),
        will_list_(will_list), first_kv_head_(first_kv_head),
        has_ranks_(will_list || budget.k > 0 || budget.min_keys > 1) {
    arena_.reset();
  }
  Job(const Job&) = delete;
  ~Job();

  void plan(const std::vector<std::vector<const Part*>>& parts);
  // Searches all units, with k = 0 for all that matters, and where results are wanted weighs what was found.
  void run(int k, float* out, float* lse);
  AttendStats stats() const;
  const std::vector<Unit>& units() const { return units_; }

 private:
  enum Stage : int { kBegin, kMeans, kScan, kFloors, kList, kScore, kWeigh, kMerge };

  void lock(const std::vector<std::vector<const Part*>>& parts);
  void add_part(Unit& unit, const Part& part, bool is_searched);
  std::size_t add_partial(Unit& unit);
  // The stages of a unit: what comes before one, and how many tasks it has; and a task of it.
  std::int64_t advance(Unit& unit, int stage, int k, float* out, float* lse);
  void work(Unit& unit, int stage, std::size_t i, int k);

  void prepare(Unit& unit);
  void look_first(Unit& unit);
  void scan_all(Unit& unit);
  void scan_chunks(const Unit& unit, const Task& task);
  void scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out);
  void search_chunks(Unit& unit, const Task& task);
  void list_chunks(Unit& unit, const Task& task);
  void count_found(Unit& unit);  // and codes that have been scanned
  void gather(Unit& unit);
  void share_out(Unit& unit);
  void score(Unit& unit, const Task& task);
  void settle_floor(Unit& unit, int k);
  void weigh(Unit& unit, std::size_t i);
  void merge(Unit& unit, float* out, float* lse) const;

  const LayerQueries& queries_;
  const float scale_;
  const Budget& budget_;
  ThreadPool& pool_;
  Scratch& scratch_;
  Arena& arena_;
  const bool will_list_;
  bool is_small_ = false;  // waking a worker takes longer than all the work
  const int first_kv_head_;
  const bool has_ranks_;  // all candidates' scores are needed at once, to find the k best
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
  std::vector<Unit> units_;
  std::mutex arena_mutex_;  // once units run
};

}  // namespace retrieval
