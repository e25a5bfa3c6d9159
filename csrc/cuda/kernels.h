// The CUDA kernels of a rule, as classes of block code (block.h): the counterparts of those in cpu/kernels.h, over the same
// code for an element.
//
// A block reads what the host does not know, step counts, ticks and hyperparameters, through pointers: its first thread
// prepares the step, and one of its second warp, at the same time, the step before, where that is still to be finished. Then
// each thread takes kVector elements at a time.
#pragma once

#include <new>

#include "../tower_step.h"
#include "sums.h"

namespace hyperopt_ext {
namespace cuda {

// What is read, or written, of a tensor.
enum Part : unsigned { kOfW = 1, kOfG = 2, kOfS = 4, kOfLastG = 8, kOfLastW = 16 };

// What a record holds, as parts.
constexpr unsigned parts_of(unsigned record) {
  return ((record & kGrad) ? unsigned(kOfLastG) : 0u) | ((record & kParam) ? unsigned(kOfLastW) : 0u);
}

// kVector elements of a tensor in registers. Given: last_grad has the parameter's dtype.
template <class R, class A, bool Given = false>
struct Tile {
  static constexpr int kSlots = int(R::state.size());
  A w[kVector], g[kVector], s[kSlots + 1][kVector], last_g[kVector], last_w[kVector];

  HX_FN Elements<R, A> elements(double scale) {
    Elements<R, A> x;
    x.w = w, x.g = g, x.last_g = last_g, x.last_w = last_w;
    HX_UNROLL
    for (int k = 0; k < kSlots; ++k) x.s[k] = s[k];
    x.scale = A(scale);
    return x;
  }

  // Brings the state up to date, where the last step left that to this one.
  template <class P>
  HX_FN void finish(const P& last, const Elements<R, A>& x) {
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) x.set_state(j, advance<R>(last, x.last_grad(j), x.state(j)));
  }

  // All at once where that is possible, so that all reads are under way before the first is waited for (what is loaded
  // apart comes before what has to be converted, which waits). A gradient that is
  // not aligned (a view of one of DDP's buckets) is read one by one, the others at once all the same.
  template <unsigned Parts>
  HX_FN void load(const Entry& t, const Run& run) {
    const bool at_once = run.whole && t.aligned();
    if (at_once && t.grad_aligned())
      load<Parts>(t, run, true, true);
    else
      load<Parts>(t, run, at_once, false);
  }

  template <unsigned Parts>
  HX_FN void store(const Entry& t, const Run& run) const {
    using P = Pointer;
    const bool at_once = run.whole && t.aligned();
    with_type<A>(t.type(), [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr ((Parts & kOfW) != 0) write<T>(w, t.pointer<void>(P::kParam), run, at_once);
      if constexpr ((Parts & kOfLastW) != 0) write<T>(last_w, t.pointer<void>(P::kLastParam), run, at_once);
    });
    if constexpr ((Parts & kOfS) != 0) {
      HX_UNROLL
      for (int k = 0; k < kSlots; ++k) write<A>(s[k], t.pointer<void>(P::kStates + k), run, at_once);
    }
    if constexpr ((Parts & kOfLastG) != 0) write<A>(last_g, t.pointer<void>(P::kLastGrad), run, at_once);
  }

 private:
  template <unsigned Parts>
  HX_FN void load(const Entry& t, const Run& run, bool at_once, bool grad_at_once) {
    using P = Pointer;
    if constexpr ((Parts & kOfS) != 0) {
      HX_UNROLL
      for (int k = 0; k < kSlots; ++k) read<A>(t.pointer<const void>(P::kStates + k), run, at_once, s[k]);
    }
    if constexpr ((Parts & kOfLastG) != 0 && !Given) read<A>(t.pointer<const void>(P::kLastGrad), run, at_once, last_g);
    with_type<A>(t.type(), [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr ((Parts & kOfW) != 0) read<T>(t.pointer<const void>(P::kParam), run, at_once, w);
      if constexpr ((Parts & kOfG) != 0) read<T>(t.pointer<const void>(P::kGrad), run, grad_at_once, g);
      if constexpr ((Parts & kOfLastG) != 0 && Given)
        read<T>(t.pointer<const void>(P::kLastGrad), run, at_once, last_g);
      if constexpr ((Parts & kOfLastW) != 0) read<T>(t.pointer<const void>(P::kLastParam), run, at_once, last_w);
    });
  }
};

// The thread that prepares the step before: of another warp than the first.
constexpr int kSecond = 32;

// The prepared values of a step, where one thread leaves them for the others.
template <class R, class A, Mask S>
struct PreparedStep {
  using P = Prepared<R, A, S>;
  alignas(16) unsigned char bytes[sizeof(P)];

  HX_FN void set(const double* hyper, double step) {
    constexpr int kHypers = int(R::hypers.size());
    double values[kHypers];  // read at once: where it is needed, one read would wait for a power of another
    HX_UNROLL
    for (int i = 0; i < kHypers; ++i) values[i] = hyper[i];
    new (bytes) P(to<A>(R::prepare(HypersOf<R, S>{values}, step)));
  }
  HX_FN P get() const { return *reinterpret_cast<const P*>(bytes); }
};

template <class R, class A, unsigned Keep>
struct Update {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    PreparedStep<R, A, 0> now, last;
    bool ticking, pending, counts;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    constexpr bool deferred = (Keep & kDeferred) != 0;
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0 && thread != kSecond) return;
      const Status status(launch, chunk.entry, int(R::hypers.size()));
      if (thread == 0) {
        shared.ticking = status.ticking;
        if (status.ticking) shared.now.set(status.used, double(status.step + 1));
      } else {
        shared.pending = deferred && status.ticking && status.pending;
        if (shared.pending) shared.last.set(status.previous, double(status.step));
      }
    });
    team.each([&](int thread) {
      const Counting<Team> counting(team, launch, thread);
      if (shared.ticking) {
        const bool pending = deferred && shared.pending;
        const auto p = shared.now.get();
        const auto last = pending ? shared.last.get() : p;
        const double scale = scale_of(launch);
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          Tile<R, A> tile;
          const auto x = tile.elements(scale);
          if (pending) tile.template load<parts_of(Keep & kGrad)>(chunk.entry, run);
          tile.template load<kOfW | kOfG | kOfS>(chunk.entry, run);
          if (pending) tile.finish(last, x);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) make_step<R, Keep>(p, x, j, x.state(j));
          tile.template store<kOfW | kOfS | parts_of(Keep)>(chunk.entry, run);
        });
      }
      if (thread == 0) shared.counts = counting.falls_to_this_block();
    });
    if (shared.counts) count_steps<kThreads>(team, launch);
  }
};

// Columns: the squared norms of the coming change and of the parameters, and the number of elements.
template <class R, class A, bool Deferred>
struct Norms {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kColumns = 3;
  struct Shared {
    PreparedStep<R, A, 0> now, last;
    double unit[kMaxHypers];
    double values[kColumns * kThreads];
    bool ticking, pending, last_block;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0 && thread != kSecond) return;
      constexpr int hypers = int(R::hypers.size()), lr = index_of<R>("lr");
      const Status status(launch, chunk.entry, hypers);
      if (thread == 0) {
        shared.ticking = status.ticking;
        // The values in use, but an lr of 1: one so large that the update would overflow can be lowered, too.
        for (int i = 0; i < hypers; ++i) shared.unit[i] = i == lr ? 1.0 : status.used[i];
        if (status.ticking) shared.now.set(shared.unit, double(status.step + 1));
      } else {
        shared.pending = Deferred && status.ticking && status.pending;
        if (shared.pending) shared.last.set(status.previous, double(status.step));
      }
    });
    team.each([&](int thread) {
      A changes = A(0), params = A(0);
      if (shared.ticking) {
        const bool pending = Deferred && shared.pending;
        const auto p = shared.now.get();
        const auto last = pending ? shared.last.get() : p;
        const double scale = scale_of(launch);
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          Tile<R, A> tile;
          const auto x = tile.elements(scale);
          if (pending) tile.template load<kOfLastG>(chunk.entry, run);
          tile.template load<kOfW | kOfG | kOfS>(chunk.entry, run);
          if (pending) tile.finish(last, x);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) {
            if (j >= run.n) continue;
            const A delta = coming_change<R>(p, x, j, x.state(j));
            changes += delta * delta;
            params += square_if_small(x.w[j]);
          }
        });
      }
      shared.values[thread] = double(changes);
      shared.values[kThreads + thread] = double(params);
      shared.values[2 * kThreads + thread] = thread == 0 && shared.ticking ? double(chunk.count) : 0.0;
    });
    finish_sums<kThreads, kColumns>(team, shared.values, shared.last_block, launch, block);
  }
};

template <class R, class A, Mask S>
struct TracedUpdate {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    PreparedStep<R, A, S> now;
    A keep;
    bool ticking, counts;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0) return;
      const Status status(launch, chunk.entry, int(R::hypers.size()));
      shared.ticking = status.ticking;
      shared.keep = keep_of<A>(launch, status.step);
      if (status.ticking) shared.now.set(status.used, double(status.step + 1));
    });
    team.each([&](int thread) {
      const Counting<Team> counting(team, launch, thread);
      if (shared.ticking) {
        const auto p = shared.now.get();
        const A keep = shared.keep;
        const double scale = scale_of(launch);
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          Tile<R, A> tile;
          const auto x = tile.elements(scale);
          const bool at_once = run.whole && chunk.entry.aligned();
          const auto trace = [&](int d) {  // null: compiled for more than is learned
            return chunk.entry.template pointer<A>(Pointer::kStates + int(R::state.size()) + d);
          };
          A z[count(S)][kVector] = {};
          each_direction<S>([&](auto d) {
            if (trace(d) != nullptr) read<A>(trace(d), run, at_once, z[position(S, d)]);
          });
          tile.template load<kOfW | kOfG | kOfS>(chunk.entry, run);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const auto delta = make_traced_step<R>(p, x, j);
            each_direction<S>([&](auto d) {
              A& own = z[position(S, d)][j];
              own = next_trace(keep, own, delta.template tangent<d>());
            });
          }
          tile.template store<kOfW | kOfS>(chunk.entry, run);
          each_direction<S>([&](auto d) {
            if (trace(d) != nullptr) write<A>(z[position(S, d)], trace(d), run, at_once);
          });
        });
      }
      if (thread == 0) shared.counts = counting.falls_to_this_block();
    });
    if (shared.counts) count_steps<kThreads>(team, launch);
  }
};

template <class R, class A>
struct Settle {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    PreparedStep<R, A, 0> last;
    bool pending;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0) return;
      const Status status(launch, chunk.entry, int(R::hypers.size()));
      shared.pending = status.ticking && status.pending;
      if (shared.pending) shared.last.set(status.previous, double(status.step));
    });
    team.each([&](int thread) {
      if (!shared.pending) return;
      const auto last = shared.last.get();
      chunk.each_run(thread, kThreads, [&](const Run& run) {
        Tile<R, A> tile;
        const auto x = tile.elements(1.0);
        tile.template load<kOfS | kOfLastG>(chunk.entry, run);
        tile.finish(last, x);
        tile.template store<kOfS>(chunk.entry, run);
      });
    });
  }
};

// Blocks are smaller where many sums are made, so that these fit into what a block can share.
constexpr int threads_for(int columns) {
  return columns > 20 ? kThreads / 2 : kThreads;
}

// Columns: sums of G z for each hyperparameter of S, and, unless Given, of z^2, and of G^2.
template <class R, class A, Mask S, bool Given>
struct Hypergradient {
  static constexpr int kLearned = count(S), kColumns = Given ? kLearned : 2 * kLearned + 1;
  static constexpr int kThreads = threads_for(kColumns);
  struct Shared {
    PreparedStep<R, A, S> now;
    double values[kColumns * kThreads];
    bool recorded, last_block;
  };
  static constexpr unsigned kReads = kOfG | kOfS | (Given ? kOfLastG | kOfLastW : parts_of(RecordOf<R, S>));

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0) return;
      const Status status(launch, chunk.entry, int(R::hypers.size()));
      shared.recorded = Given || status.recorded;
      if (shared.recorded) shared.now.set(status.used, double(status.step));
    });
    team.each([&](int thread) {
      A products[kLearned] = {}, squares[kLearned] = {}, square = A(0);
      const double scale = scale_of(launch);
      if (shared.recorded) {
        const auto p = shared.now.get();
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          Tile<R, A, Given> tile;
          const auto x = tile.elements(scale);
          tile.template load<kReads>(chunk.entry, run);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) {
            if (j >= run.n) continue;
            const auto delta = last_change<R, S, Given>(p, x, j);
            const A upstream = x.grad(j).value;
            each_direction<S>([&](auto d) {
              const A z = delta.template tangent<d>();
              products[position(S, d)] += upstream * z;
              if constexpr (!Given) squares[position(S, d)] += z * z;
            });
            if constexpr (!Given) square += upstream * upstream;
          }
        });
      } else if constexpr (!Given) {
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          Tile<R, A> tile;
          tile.template load<kOfG>(chunk.entry, run);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) square += (A(scale) * tile.g[j]) * (A(scale) * tile.g[j]);
        });
      }
      HX_UNROLL
      for (int k = 0; k < kLearned; ++k) shared.values[k * kThreads + thread] = double(products[k]);
      if constexpr (!Given) {
        HX_UNROLL
        for (int k = 0; k < kLearned; ++k) shared.values[(kLearned + k) * kThreads + thread] = double(squares[k]);
        shared.values[2 * kLearned * kThreads + thread] = double(square);
      }
    });
    finish_sums<kThreads, kColumns>(team, shared.values, shared.last_block, launch, block);
  }
};

// Columns: what is pulled back to each hyperparameter; to the inputs, in grad_input.
template <class R, class A>
struct Vjp {
  static constexpr Mask S = kAllHypers<R>;
  static constexpr int kStates = int(R::state.size()), kColumns = count(S);
  static constexpr int kThreads = threads_for(kColumns);
  struct Shared {
    PreparedStep<R, A, S> now;
    double values[kColumns * kThreads];
    bool last_block;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      if (thread != 0) return;
      const Status status(launch, chunk.entry, int(R::hypers.size()));
      shared.now.set(status.used, double(status.step));
    });
    team.each([&](int thread) {
      const auto p = shared.now.get();
      A sums[kColumns] = {};
      chunk.each_run(thread, kThreads, [&](const Run& run) {
        constexpr int kGradState = Pointer::kStates + kStates, kGradInput = kGradState + kStates;
        Tile<R, A, true> tile;
        const auto x = tile.elements(1.0);
        tile.template load<kOfG | kOfS | kOfLastG | kOfLastW>(chunk.entry, run);
        const bool at_once = run.whole && chunk.entry.aligned();
        A above[kStates + 1][kVector], below[2 + kStates][kVector];
        HX_UNROLL
        for (int k = 0; k < kStates; ++k)
          read<A>(chunk.entry.template pointer<const void>(kGradState + k), run, at_once, above[k]);
        HX_UNROLL
        for (int j = 0; j < kVector; ++j) {
          if (j >= run.n) continue;
          pull_back<R>(
              p, x, j, [&](int k) { return above[k][j]; }, [&](int k, A value) { below[k][j] = value; },
              [&](int k, A value) { sums[k] += value; });
        }
        HX_UNROLL
        for (int k = 0; k < 2 + kStates; ++k) {
          void* const wanted = chunk.entry.template pointer<void>(kGradInput + k);
          if (wanted != nullptr) write<A>(below[k], wanted, run, at_once);
        }
      });
      HX_UNROLL
      for (int k = 0; k < kColumns; ++k) shared.values[k * kThreads + thread] = double(sums[k]);
    });
    finish_sums<kThreads, kColumns>(team, shared.values, shared.last_block, launch, block);
  }
};

// The team of the block code in tower_step.h, for a block's Team.
template <class Team>
struct TowerTeam {
  static constexpr int kWorkers = 128, kLanes = kMaxHypers;
  const Team& team;
  template <class F>
  HX_FN void each(F&& f) const {
    team.each(static_cast<F&&>(f));
  }
};

// Brings the first row of a tower, and what it was built from, into the cache of the multiprocessor, all of it at once: the
// levels come one after the other, and each would wait for its own.
template <class Team>
HX_FN void fetch(const TowerTeam<Team>& team, const TowerView& tower, const tower::Scratch& scratch) {
#ifdef __CUDA_ARCH__
  constexpr int kSector = 32;  // bytes that a read brings in, of a line of the cache
  const int last = tower.levels - 1;
  team.each([&](int worker) {
    unsigned sum = 0;
    const auto touch = [&](const void* start, std::int64_t words) {
      for (std::int64_t i = worker * kSector; i < 8 * words; i += TowerTeam<Team>::kWorkers * kSector)
        sum += static_cast<const unsigned char*>(start)[i];
    };
    touch(tower.start, tower.width);
    touch(tower.plan, tower.levels * kPlanColumns);
    touch(tower.settings, tower.levels * kSettings);
    touch(tower.bounds, 2 * (tower.level(last)[kBounds] + tower.level(last)[kHypers]));
    if (sum == ~0u) *scratch.any = 0.0;  // never; without a use, the reads would be left out
  });
#endif
}

template <class Call>
struct MoveTowers {
  static constexpr int kThreads = 128;
  struct Shared {};

  template <class Team>
  HX_FN static void block(const TowerLaunch& launch, int block, Shared&, const Team& threads) {
    const TowerTeam<Team> team{threads};
    const TowerView tower = launch.views[block];
    const tower::Scratch scratch(tower);
    if (launch.differentiates) {
      fetch(team, tower, scratch);
      tower::differentiate(team, tower, scratch);
      tower::decide(team, tower, scratch);
    }
    const int from = launch.from < tower.levels ? launch.from : tower.levels - 1;
    for (int k = from; k >= launch.to; --k) tower::move_level(team, Call{}, tower, scratch, k);
  }
};

// Moves coordinates by one rule.
template <class R>
struct CallOne {
  static constexpr int kCapacity = 1;
  template <class... Arguments>
  HX_FN void operator()(const std::int64_t*, Arguments... arguments) const {
    move_coordinates<R>(arguments...);
  }
};

}  // namespace cuda
}  // namespace hyperopt_ext
