// Random chains on one to four threads: every task is done once, stages keep their order and what one stage wrote the
// next one reads, an exception ends the run. What chains share is plain memory, where ThreadSanitizer sees a missing order.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "chains.h"

namespace {

using retrieval::Chains;

constexpr int kStages = 8;

[[noreturn]] void fail(const char* what) {
  std::puts(what);
  std::exit(1);
}

struct Chain {
  std::vector<std::vector<int>> times;  // each task of each stage was done
  int stage = -1;
  std::int64_t most_helped = 1;  // of the last stage that had tasks

  explicit Chain(std::mt19937& rng) {
    for (int s = 0; s < kStages; ++s) times.emplace_back(rng() % 4 == 0 ? 0 : rng() % 9);
  }
  bool is_done(int num_stages) const {
    for (int s = 0; s < num_stages; ++s) {
      for (const int each : times[static_cast<std::size_t>(s)]) {
        if (each != 1) return false;
      }
    }
    return true;
  }
  Chains::Stage advance(int next, std::int64_t num_helped) {
    if (next <= stage) fail("stages are out of order");
    if (!is_done(std::min(next, kStages))) fail("a stage began before its last one was done");
    if (num_helped < 0 || num_helped > most_helped) fail("helpers did more than they may");
    stage = next;
    if (next >= kStages) return {Chains::kEnd};
    const auto count = static_cast<std::int64_t>(times[static_cast<std::size_t>(next)].size());
    // Every third stage is done by those who did the last one.
    const std::int64_t most = next % 3 == 2 ? num_helped : count;
    if (count > 0) most_helped = most;
    return {count, most};
  }
};

void run(retrieval::ThreadPool& pool, std::mt19937& rng, bool fails) {
  std::vector<Chain> chains;
  for (std::size_t left = rng() % 6; left > 0; --left) chains.emplace_back(rng);
  bool will_throw = false;
  for (const Chain& chain : chains) will_throw |= fails && !chain.times[3].empty();
  bool has_thrown = false;
  try {
    Chains(chains.size(),
           [&](std::size_t at, int stage, std::int64_t num_helped) { return chains[at].advance(stage, num_helped); },
           [&](std::size_t at, int stage, std::int64_t task) {
             if (chains[at].stage != stage) fail("a task of another stage");
             if (fails && stage == 3 && task == 0) throw std::runtime_error("as asked");
             ++chains[at].times[static_cast<std::size_t>(stage)][static_cast<std::size_t>(task)];
           }).run(pool);
  } catch (const std::runtime_error&) {
    has_thrown = true;
  }
  if (has_thrown != will_throw) fail("an exception got lost");
  for (const Chain& chain : chains) {
    if (!has_thrown && !chain.is_done(kStages)) fail("tasks were left out");
  }
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 rng(1);
  for (const int num_threads : {1, 2, 3, 4}) {
    retrieval::ThreadPool pool(num_threads);
    for (int round = 0; round < std::atoi(arguments[1]); ++round) run(pool, rng, round % 50 == 7);
  }
}
