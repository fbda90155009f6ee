// One call of attend: planned in units and tasks, searched (search.cpp), weighed and merged (attend.cpp).
#pragma once

#include <cstdint>
#include <shared_mutex>
#include <vector>

#include "attend.h"
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
  void scan();           // exact parts, and the bounds of searched ones
  void search(int k);    // candidates with exact scores: the k best, or with k = 0 all that matter
  void weigh();          // values of the candidates that matter
  void merge(float* out, float* lse) const;
  AttendStats stats() const;
  const std::vector<Unit>& units() const { return units_; }

 private:
  void lock(const std::vector<std::vector<const Part*>>& parts);
  void add_part(Unit& unit, std::size_t at, const Part& part, bool is_searched);
  std::size_t add_partial(Unit& unit);
  void prepare(Unit& unit);
  bool begins_by_unit() const;
  void scan_by_unit();
  void begin_unit(Unit& unit);
  void begin_by_task();
  void scan_task(std::size_t i);
  void look_first(Unit& unit);
  void scan_all(Unit& unit);
  void find_floors(int k);
  void count_codes();    // of what has been scanned
  void scan_chunks(const Task& task);
  void scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out);
  std::int64_t refine_chunks(const Task& task);
  std::int64_t search_chunks(const Task& task);
  void gather(Unit& unit);
  void share_out(std::size_t at);
  void settle_floor(Unit& unit, int k);
  template <typename Work>
  void run(std::int64_t count, Work work) {
    if (!is_small_) return pool_.run(count, work);
    for (std::int64_t i = 0; i < count; ++i) work(i);
  }
  template <typename Work>
  void for_units(Work work) {
    run(static_cast<std::int64_t>(units_.size()), [&](std::int64_t u) { work(units_[static_cast<std::size_t>(u)]); });
  }
  template <typename Work>
  void for_tasks(const std::vector<Task>& tasks, Work work) {
    run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i) { work(static_cast<std::size_t>(i)); });
  }

  const LayerQueries& queries_;
  const float scale_;
  const Budget& budget_;
  ThreadPool& pool_;
  Scratch& scratch_;
  Arena& arena_;
  const bool will_list_;
  bool is_long_ = false;   // so are all units
  bool is_small_ = false;  // waking a worker takes longer than all the work
  const int first_kv_head_;
  const bool has_ranks_;  // all candidates' scores are needed at once, to find the k best
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
  std::vector<Unit> units_;
  std::vector<Task> exact_tasks_, scan_tasks_, score_tasks_;
  std::vector<std::int64_t> drawn_;  // keys, by scan task
  AttendStats stats_;
};

}  // namespace retrieval
