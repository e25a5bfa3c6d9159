// How a pass adds up, in a fixed order whatever the order of its blocks: over the threads of a block, over the chunks of a
// row of the tower; and how an update counts its steps.
#pragma once

#include "launch.h"

namespace hyperopt_ext {
namespace cuda {

constexpr int kParts = 16;  // sums of every 16th value: neighbouring threads read from different banks

// Adds values [Columns][Threads] up over the threads, in a fixed order; folded() has the sum of a column then.
template <int Threads, int Columns, class Team>
HX_FN void fold(const Team& team, double* values) {
  static_assert(Columns <= Threads);
  team.each([&](int thread) {
    HX_UNROLL_BY(1)  // the registers of a kernel are those of its hungriest phase, and this one has the least to do
    for (int q = thread; q < Columns * kParts; q += Threads) {
      double* const part = values + q / kParts * Threads + q % kParts;
      double sum = 0.0;
      HX_UNROLL_BY(4)
      for (int j = 0; j < Threads; j += kParts) sum += part[j];
      part[0] = sum;
    }
  });
}

template <int Threads>
HX_FN double folded(const double* values, int column) {
  double sum = 0.0;
  HX_UNROLL_BY(4)
  for (int part = 0; part < kParts; ++part) sum += values[column * Threads + part];
  return sum;
}

// The values [Columns][Threads] of a block to those columns of `partial` that place(column) names; -1: none.
template <int Threads, int Columns, class Team, class F>
HX_FN void sum_chunk(const Team& team, double* values, const Launch& launch, int block, F&& place) {
  fold<Threads, Columns>(team, values);
  team.each([&](int thread) {
    const std::int64_t to = thread < Columns ? place(thread) : -1;
    if (to < 0) return;
    launch.sums.partial[to * launch.sums.chunks + launch.first_chunk + block] = folded<Threads>(values, thread);
  });
}

// The column of `partial` that a number of the result is the sum of; -1: it is 0.
HX_FN int source_of(const Sums& sums, int column) {
  if (sums.hypers < 0) return column;
  const int learned = count(sums.set), hyper = column % sums.hypers;
  if (column == 2 * sums.hypers) return 2 * learned;
  if ((sums.learn & bit(hyper)) == 0) return -1;
  return position(sums.set, hyper) + (column < sums.hypers ? 0 : learned);
}

// Adds the chunks of a row up, from `begin` up to, and without, `end`: so many columns of them, from `first`. `values` has
// room for a number of each thread.
template <int Threads, class Team>
HX_FN void add_chunks(const Team& team, double* values, const Sums& sums, int row, int begin, int end, int first,
                      int columns) {
  const int lanes = Threads / columns, parts = lanes < kParts ? lanes : kParts;
  team.each([&](int thread) {
    if (thread >= columns * lanes) return;
    const double* const partial = sums.partial + (first + thread / lanes) * sums.chunks;
    constexpr int kReads = 4;  // under way at once
    double sum = 0.0;
    HX_UNROLL_BY(1)
    for (int chunk = begin + thread % lanes; chunk < end; chunk += kReads * lanes) {
      double part[kReads];
      HX_UNROLL
      for (int j = 0; j < kReads; ++j) part[j] = chunk + j * lanes < end ? partial[chunk + j * lanes] : 0.0;
      HX_UNROLL
      for (int j = 0; j < kReads; ++j) sum += part[j];
    }
    values[thread] = sum;
  });
  team.each([&](int thread) {
    for (int q = thread; q < columns * parts; q += Threads) {
      double* const part = values + q / parts * lanes + q % parts;
      double sum = 0.0;
      HX_UNROLL_BY(4)
      for (int j = 0; j < lanes - q % parts; j += parts) sum += part[j];
      part[0] = sum;
    }
  });
  team.each([&](int thread) {
    for (int column = thread; column < sums.width; column += Threads) {
      const int source = source_of(sums, column), place = source - first;
      double& result = sums.result[std::int64_t(row) * sums.width + column];
      if (source < 0 && first == 0) result = 0.0;
      if (place < 0 || place >= columns) continue;
      double sum = 0.0;
      for (int part = 0; part < parts; ++part) sum += values[place * lanes + part];
      result = sum;
    }
  });
}

// After sum_chunk(): the last block of a row adds its chunks up. `last`: shared by the threads.
template <int Threads, class Team>
HX_FN void sum_row(const Team& team, double* values, bool& last, const Launch& launch, int block) {
  if (!launch.adds_up) return;
  const Entry entry(launch, tensor_of(launch, block));
  const int row = entry.row(), begin = entry.row_begin(), end = entry.row_end();
  team.each([&](int thread) {
    const unsigned blocks = unsigned(end - begin);
    if (thread == 0) last = team.is_last(team.arrive(launch.arrived(row), blocks), blocks);
  });
  if (last) add_chunks<Threads>(team, values, launch.sums, row, begin, end, 0, launch.sums.columns);
}

// At the end of a kernel with `Columns` sums of each chunk.
template <int Threads, int Columns, class Team>
HX_FN void finish_sums(const Team& team, double* values, bool& last, const Launch& launch, int block) {
  sum_chunk<Threads, Columns>(team, values, launch, block, [](int column) { return column; });
  sum_row<Threads>(team, values, last, launch, block);
}

// f(entry, header of its row) for every tensor of a launch, by one block.
template <class F>
HX_FN void each_tensor(const Launch& launch, int thread, int threads, F&& f) {
  for (int tensor = thread; tensor < launch.tensors; tensor += threads) {
    const Entry entry(launch, tensor);
    f(entry, launch.header(entry.row()));
  }
}

// The last block of an update counts the step of every tensor. The first thread takes a ticket once nobody in its block
// reads a Status any more, and looks at it when its elements are done, so that it does not wait for it before.
template <class Team>
class Counting {
 public:
  HX_FN Counting(const Team& team, const Launch& launch, int thread) : team_(team), launch_(launch) {
    if (thread == 0 && launch.counts) ticket_ = team.arrive(launch.arrived(0), unsigned(launch.blocks));
  }
  // Of the first thread.
  HX_FN bool falls_to_this_block() const { return launch_.counts && team_.is_last(ticket_, unsigned(launch_.blocks)); }

 private:
  const Team& team_;
  const Launch& launch_;
  unsigned ticket_ = 0;
};
template <int Threads, class Team>
HX_FN void count_steps(const Team& team, const Launch& launch) {
  team.each([&](int thread) {
    each_tensor(launch, thread, Threads, [](const Entry& entry, const double* header) {
      if (header[kTicking] == 0.0) return;
      entry.step() += 1;
      entry.tick() = std::int64_t(header[kTicks]);
    });
  });
}

}  // namespace cuda
}  // namespace hyperopt_ext
