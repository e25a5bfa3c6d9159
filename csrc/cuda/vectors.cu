// The kernels that no rule changes: norms and traces of tensors, and what closes a pass.
#include "sums.h"

namespace hyperopt_ext {
namespace cuda {

// kVector elements of a gradient, times `scale`.
template <class A>
HX_FN void read_grad(const Chunk& chunk, const Run& run, double scale, A (&g)[kVector]) {
  with_type<A>(chunk.entry.type(), [&](auto type) {
    using T = typename decltype(type)::type;
    read<T>(chunk.entry.pointer<const void>(Pointer::kGrad), run, run.whole && chunk.entry.grad_aligned(), g);
  });
  HX_UNROLL
  for (int j = 0; j < kVector; ++j) g[j] *= A(scale);
}

template <class A>
struct SquaredNorm {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    double values[kThreads];
    bool last_block;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    team.each([&](int thread) {
      A square = A(0);
      const double scale = scale_of(launch);
      chunk.each_run(thread, kThreads, [&](const Run& run) {
        A g[kVector];
        read_grad(chunk, run, scale, g);
        HX_UNROLL
        for (int j = 0; j < kVector; ++j) square += g[j] * g[j];
      });
      shared.values[thread] = double(square);
    });
    finish_sums<kThreads, 1>(team, shared.values, shared.last_block, launch, block);
  }
};

// Where the pointers beyond the states start: here, the traces.
HX_FN int first_extra(const Launch& launch) {
  return launch.stride - kPointers - launch.extra;
}

// Columns: for each learned hyperparameter, with its trace z, sums of G z, then of z^2, then of G^2.
template <class A>
struct TraceProducts {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kTogether = 4;  // traces that are read with the gradient
  struct Shared {
    double values[(2 * kTogether + 1) * kThreads];
    bool last_block;
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block);
    const int learned = count(launch.learn);
    for (int first = 0; first < learned; first += kTogether) {
      const int traces = learned - first < kTogether ? learned - first : kTogether;
      team.each([&](int thread) {
        A product[kTogether] = {}, norm[kTogether] = {}, square = A(0);
        const double scale = scale_of(launch);
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          A g[kVector], z[kTogether][kVector];
          HX_UNROLL
          for (int k = 0; k < kTogether; ++k) {
            if (k >= traces) continue;
            const int hyper = direction(launch.learn, first + k);
            read<A>(chunk.entry.pointer<const void>(first_extra(launch) + hyper), run,
                    run.whole && chunk.entry.aligned(), z[k]);
          }
          read_grad(chunk, run, scale, g);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) square += g[j] * g[j];
          HX_UNROLL
          for (int k = 0; k < kTogether; ++k) {
            if (k >= traces) continue;
            HX_UNROLL
            for (int j = 0; j < kVector; ++j) product[k] += g[j] * z[k][j], norm[k] += z[k][j] * z[k][j];
          }
        });
        HX_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          shared.values[k * kThreads + thread] = double(product[k]);
          shared.values[(kTogether + k) * kThreads + thread] = double(norm[k]);
        }
        shared.values[2 * kTogether * kThreads + thread] = double(square);
      });
      sum_chunk<kThreads, 2 * kTogether + 1>(team, shared.values, launch, block, [=](int column) {
        if (column == 2 * kTogether) return first == 0 ? 2 * learned : -1;
        const int k = column % kTogether;
        return k >= traces ? -1 : column / kTogether * learned + first + k;
      });
    }
    sum_row<kThreads>(team, shared.values, shared.last_block, launch, block);
  }
};

// z <- keep z for the traces of a tensor that sits a step out.
template <class A>
struct Decay {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared&, const Team& team) {
    const Chunk chunk(launch, block);
    const Status status(launch, chunk.entry, 0);
    if (!status.ticking || !status.known) return;
    team.each([&](int thread) {
      const A keep = keep_of<A>(launch, status.step);
      for (int k = 0; k < launch.extra; ++k) {
        void* const trace = chunk.entry.pointer<void>(first_extra(launch) + k);
        if (trace == nullptr) continue;
        chunk.each_run(thread, kThreads, [&](const Run& run) {
          const bool at_once = run.whole && chunk.entry.aligned();
          A z[kVector];
          read<A>(trace, run, at_once, z);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) z[j] = next_trace(keep, z[j], A(0));
          write<A>(z, trace, run, at_once);
        });
      }
    });
  }
};

struct ForgetSteps {
  static constexpr int kThreads = 64;
  struct Shared {};

  template <class Team>
  HX_FN static void block(const Launch& launch, int, Shared&, const Team& team) {
    team.each([&](int thread) {
      each_tensor(launch, thread, kThreads, [](const Entry& entry, const double* header) {
        if (header[kTicking] != 0.0 && entry.tick() >= 0) entry.tick() = -1;
      });
    });
  }
};

// A block for each column, of a single row.
struct SumChunks {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    double values[kThreads];
  };

  template <class Team>
  HX_FN static void block(const Sums& sums, int block, Shared& shared, const Team& team) {
    add_chunks<kThreads>(team, shared.values, sums, 0, 0, int(sums.chunks), block, 1);
  }
};

template <class A>
constexpr VectorLaunches launches() {
  return {launch<SquaredNorm<A>, Launch>, launch<TraceProducts<A>, Launch>, launch<Decay<A>, Launch>};
}

const VectorLaunches vector_launches[2] = {launches<float>(), launches<double>()};

void forget_steps(const Launch& arguments, void* stream) {
  launch<ForgetSteps>(arguments, 1, stream);
}

void sum_chunks(const Sums& arguments, void* stream) {
  launch<SumChunks>(arguments, arguments.columns, stream);
}

}  // namespace cuda
}  // namespace hyperopt_ext
