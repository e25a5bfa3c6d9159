// The kernels that no rule changes: norms and traces of tensors, and what closes a pass.
#include "launch.h"

namespace hyperopt_ext {
namespace cuda {

template <class A>
struct SquaredNorm {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {
    double values[kThreads];
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block, 0);
    team.each([&](int thread) {
      A square = A(0);
      chunk.each_run(thread, kThreads, [&](std::int64_t i, int n, bool whole) {
        A g[kVector];
        read<A>(chunk.entry.type(), chunk.entry.pointer<const void>(Pointer::kGrad), i, n, whole, g);
        HX_UNROLL
        for (int j = 0; j < kVector; ++j) square += (A(chunk.scale) * g[j]) * (A(chunk.scale) * g[j]);
      });
      shared.values[thread] = double(square);
    });
    finish_sums<kThreads, 1>(team, shared.values, launch, block);
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
  struct Shared {
    double values[3 * kThreads];
  };

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared& shared, const Team& team) {
    const Chunk chunk(launch, block, 0);
    const int learned = count(launch.learn);
    for (int k = 0; k < learned; ++k) {
      const void* const trace = chunk.entry.pointer<const void>(first_extra(launch) + direction(launch.learn, k));
      team.each([&](int thread) {
        A product = A(0), norm = A(0), square = A(0);
        chunk.each_run(thread, kThreads, [&](std::int64_t i, int n, bool whole) {
          A g[kVector], z[kVector];
          read<A>(chunk.entry.type(), chunk.entry.pointer<const void>(Pointer::kGrad), i, n, whole, g);
          read<A>(trace, i, n, whole, z);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const A upstream = A(chunk.scale) * g[j];
            product += upstream * z[j];
            norm += z[j] * z[j];
            square += upstream * upstream;
          }
        });
        shared.values[thread] = double(product);
        shared.values[kThreads + thread] = double(norm);
        shared.values[2 * kThreads + thread] = double(square);
      });
      sum_chunk<kThreads, 3>(team, shared.values, launch, block,
                             [=](int column) { return column == 2 ? 2 * learned : column * learned + k; });
    }
    sum_row<kThreads>(team, shared.values, launch, block);
  }
};

// z <- keep z for the traces of a tensor that sits a step out.
template <class A>
struct Decay {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  template <class Team>
  HX_FN static void block(const Launch& launch, int block, Shared&, const Team& team) {
    const Chunk chunk(launch, block, 0);
    if (!chunk.ok || !chunk.known) return;
    team.each([&](int thread) {
      const A keep = keep_of<A>(launch, chunk.step);
      for (int k = 0; k < launch.extra; ++k) {
        void* const trace = chunk.entry.pointer<void>(first_extra(launch) + k);
        if (trace == nullptr) continue;
        chunk.each_run(thread, kThreads, [&](std::int64_t i, int n, bool whole) {
          A z[kVector];
          read<A>(trace, i, n, whole, z);
          HX_UNROLL
          for (int j = 0; j < kVector; ++j) z[j] *= keep;
          write<A>(z, trace, i, n, whole);
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
        if (header[kOk] != 0.0 && entry.tick() >= 0) entry.tick() = -1;
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
