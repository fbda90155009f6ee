// One call of attend: planned in units and tasks, searched (search.cpp), weighed and merged (attend.cpp). What one unit
// waits for is no concern of the others (chains.h).
#pragma once

#include <cstdint>
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
  // Parts by sequence. With will_list, keys without codes become candidates instead of being attended.
  Job(const LayerQueries& queries, const std::vector<std::vector<const Part*>>& parts, float scale, const Budget& budget,
      Scratch& scratch, bool will_list, int first_kv_head = 0);
  Job(const Job&) = delete;
  ~Job() { scratch_.tidy(); }

  // Searches all units, with k = 0 for all that matters, and where results are wanted weighs what was found.
  void run(ThreadPool& pool, int k, float* out, float* lse);
  AttendStats stats() const;
  std::size_t num_units() const { return places_.size(); }
  const Unit& unit(std::size_t at) const { return scratch_.desk(at).unit; }

 private:
  enum Stage : int { kBegin, kMeans, kScan, kFloors, kList, kScore, kWeigh, kMerge };
  struct Place {
    int seq, head, num;  // query heads [head, head + num)
  };

  std::int64_t num_searched(const std::vector<const Part*>& sequence) const;
  bool is_small() const;
  // The stages of a unit: what comes before one, and how many tasks it has; and a task of it.
  Chains::Stage advance(std::size_t at, int stage, std::int64_t num_helped, int k, float* out, float* lse);
  void work(Desk& desk, int stage, std::size_t i, int k);

  void plan(Desk& desk, const Place& place) const;
  void add_part(Desk& desk, const Part& part, bool is_searched) const;
  void prepare(Desk& desk) const;
  void look_first(Unit& unit);
  void scan_all(Unit& unit);
  void scan_chunks(const Unit& unit, const Task& task);
  void scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out);
  void search_chunks(Unit& unit, const Task& task);
  void list_chunks(Unit& unit, const Task& task);
  void count_found(Unit& unit);  // and codes that have been scanned
  void gather(Unit& unit);
  void share_out(Desk& desk) const;
  void score(Unit& unit, const Task& task);
  void settle_floor(Unit& unit, int k);
  void weigh(Unit& unit, std::size_t i);
  void merge(Unit& unit, float* out, float* lse) const;

  const LayerQueries& queries_;
  const std::vector<std::vector<const Part*>>& parts_;
  const float scale_;
  const Budget& budget_;
  Scratch& scratch_;
  const bool will_list_;
  const int first_kv_head_;
  const bool has_ranks_;  // all candidates' scores are needed at once, to find the k best
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
  std::vector<Place> places_;  // of units
};

}  // namespace retrieval
