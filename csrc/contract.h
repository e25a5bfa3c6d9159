// What a rule must have, checked where it is registered, before anything is made of it: an error names what is missing.
#pragma once

#include "rule.h"

namespace hyperopt_ext {
namespace detail {

// Whether Make<R...> exists.
template <class, template <class...> class Make, class... R>
struct Exists : std::false_type {};
template <template <class...> class Make, class... R>
struct Exists<std::void_t<Make<R...>>, Make, R...> : std::true_type {};
template <template <class...> class Make, class... R>
constexpr bool kExists = Exists<void, Make, R...>::value;

template <class T>
struct IsDual : std::false_type {};
template <class T, Mask M>
struct IsDual<Dual<T, M>> : std::true_type {};
template <class T>
struct IsPack : std::false_type {};
template <class... D>
struct IsPack<Pack<D...>> : std::bool_constant<(IsDual<D>::value && ...)> {};

template <class T, class Array>
constexpr bool kIsArrayOf = false;
template <class T, std::size_t N>
constexpr bool kIsArrayOf<T, const std::array<T, N>> = true;

template <class R>
using Name = std::enable_if_t<std::is_convertible_v<decltype(R::name), const char*>>;
template <class R>
using Hyperparameters = std::enable_if_t<kIsArrayOf<Hyperparameter, decltype(R::hypers)>>;
template <class R>
using States = std::enable_if_t<kIsArrayOf<const char*, decltype(R::state)>>;
template <class R>
using Sets = std::enable_if_t<kIsArrayOf<Mask, decltype(R::sets)>>;

using Constant = Dual<double, 0>;
template <class R>
using Prepare = decltype(R::prepare(std::declval<const HypersOf<R, kAllHypers<R>>&>(), 1.0));
template <class R>
using Lr = std::enable_if_t<std::is_enum_v<decltype(R::lr)>>;
template <class R, class P>
using Penalty = decltype(R::penalty(std::declval<const P&>(), std::declval<const Constant&>()));
template <class R, class P, class... S>
using Advance =
    decltype(R::advance(std::declval<const P&>(), std::declval<const Constant&>(), std::declval<const S&>()...));
template <class R, class P, class... S>
using Change = decltype(R::change(std::declval<const P&>(), std::declval<const Constant&>(),
                                  std::declval<const Constant&>(), std::declval<const S&>()...));

// Lower-case letters, digits and underscores, a letter first.
constexpr bool is_name(const char* name) {
  if (name == nullptr || !('a' <= *name && *name <= 'z')) return false;
  for (; *name != 0; ++name)
    if (!(('a' <= *name && *name <= 'z') || ('0' <= *name && *name <= '9') || *name == '_')) return false;
  return true;
}

constexpr const char* name_of(const char* name) {
  return name;
}
constexpr const char* name_of(const Hyperparameter& h) {
  return h.name;
}

template <class Array>
constexpr bool are_names(const Array& entries) {
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (!is_name(name_of(entries[i]))) return false;
    for (std::size_t k = 0; k < i; ++k)
      if (same(name_of(entries[i]), name_of(entries[k]))) return false;
  }
  return true;
}

// None that the optimizer's own entries have (optimizer.py).
template <class Array>
constexpr bool are_free(const Array& state) {
  for (const char* name : state) {
    for (const char* taken : {"step", "tick", "last_grad", "last_param"})
      if (same(name, taken)) return false;
    if (name[0] == 't' && name[1] == 'r' && name[2] == 'a' && name[3] == 'c' && name[4] == 'e' && name[5] == '_')
      return false;
  }
  return true;
}

template <class Array>
constexpr bool are_in_range(const Array& hypers) {
  for (const Hyperparameter& h : hypers)
    if (!(h.low <= h.initial && h.initial < h.high)) return false;
  return true;
}

template <class Array>
constexpr bool are_sets(const Array& sets, std::size_t hypers) {
  for (std::size_t i = 0; i < sets.size(); ++i)
    if (sets[i] == 0 || sets[i] >> hypers != 0 || (i > 0 && count(sets[i]) < count(sets[i - 1]))) return false;
  return true;
}

// Whether the enumerator of lr is its place among the hyperparameters.
template <class R>
constexpr bool lr_is_in_order() {
  if constexpr (kExists<Lr, R>)
    return index_of<R>("lr") < 0 || index_of<R>("lr") == int(R::lr);
  else
    return true;
}

template <class R, class P, class... S>
constexpr bool has_change(const Pack<S...>*) {
  constexpr bool called = kExists<Change, R, P, S...>;
  static_assert(
      called,
      "hyperopt_ext: the rule has no 'static auto change(p, e, w, s...)', which is called with one s for each "
      "value that advance() returns");
  if constexpr (called) {
    constexpr bool dual = IsDual<Change<R, P, S...>>::value;
    static_assert(dual, "hyperopt_ext: change() must return a dual number: what is added to w");
    return dual;
  } else {
    return false;
  }
}

template <class R, class P, std::size_t... I>
constexpr bool has_step(std::index_sequence<I...>) {
  constexpr bool penalised = kExists<Penalty, R, P>, advanced = kExists<Advance, R, P, typename ConstantAt<I>::type...>;
  static_assert(penalised,
                "hyperopt_ext: the rule has no 'static auto penalty(p, w)'; without weight decay it returns 0.0 * w");
  static_assert(advanced,
                "hyperopt_ext: the rule has no 'static auto advance(p, e, s...)', which is called with one s for each "
                "name in 'state'");
  if constexpr (penalised && advanced) {
    using Term = Penalty<R, P>;
    using After = Advance<R, P, typename ConstantAt<I>::type...>;
    static_assert(IsDual<Term>::value,
                  "hyperopt_ext: penalty() must return a dual number: what is added to the gradient");
    static_assert(IsPack<After>::value, "hyperopt_ext: advance() must return pack(...) of dual numbers");
    if constexpr (IsDual<Term>::value && IsPack<After>::value) {
      constexpr bool enough = std::tuple_size<After>::value >= sizeof...(I);
      static_assert(enough,
                    "hyperopt_ext: advance() returns fewer values than 'state' has names; it must return the new value "
                    "of each, in this order");
      if constexpr (enough) return has_change<R, P>(static_cast<const After*>(nullptr));
    }
  }
  return false;
}

}  // namespace detail

// Whether a rule has all that rule.h asks for; else there was an error, and nothing more should be made of it.
template <class R>
constexpr bool keeps_contract() {
  using namespace detail;
  constexpr bool name = kExists<Name, R>, hypers = kExists<Hyperparameters, R>, state = kExists<States, R>,
                 sets = kExists<Sets, R>;
  static_assert(name, "hyperopt_ext: the rule has no 'static constexpr char name[] = \"...\"'");
  static_assert(hypers, "hyperopt_ext: the rule has no 'static constexpr std::array hypers{Hyperparameter{...}, ...}'");
  static_assert(state,
                "hyperopt_ext: the rule has no 'static constexpr std::array<const char*, N> state{...}'; without state "
                "N is 0");
  static_assert(sets,
                "hyperopt_ext: the rule has no 'static constexpr std::array sets{bit(lr), ...}'; without any it is "
                "'std::array<Mask, 0> sets{}'");
  if constexpr (name && hypers && state && sets) {
    static_assert(kMaxHypers == 16 && kMaxStates == 4, "as the messages say");
    constexpr bool few_hypers = 0 < R::hypers.size() && R::hypers.size() <= kMaxHypers;
    constexpr bool few_states = R::state.size() <= kMaxStates;
    static_assert(few_hypers, "hyperopt_ext: a rule has from 1 to 16 hyperparameters");
    static_assert(few_states, "hyperopt_ext: a rule has at most 4 states");
    static_assert(is_name(R::name), "hyperopt_ext: 'name' must be of lower-case letters, digits and underscores");
    static_assert(
        are_names(R::hypers) && are_names(R::state),
        "hyperopt_ext: names in 'hypers' and in 'state' must be of lower-case letters, digits and underscores, "
        "each one once, and as many as the array is long");
    static_assert(!are_names(R::state) || are_free(R::state),
                  "hyperopt_ext: a state cannot be called step, tick, last_grad, last_param or trace_...");
    static_assert(are_in_range(R::hypers), "hyperopt_ext: a hyperparameter must have low <= initial < high");
    static_assert(lr_is_in_order<R>(), "hyperopt_ext: the enum must name the hyperparameters in the order of 'hypers'");
    static_assert(are_sets(R::sets, R::hypers.size()),
                  "hyperopt_ext: each of 'sets' must be made of the bits of hyperparameters, bit(lr) | bit(beta1), the "
                  "smallest set first");
    if constexpr (few_hypers && few_states) {
      constexpr bool prepared = kExists<Prepare, R>;
      static_assert(prepared, "hyperopt_ext: the rule has no 'static auto prepare(h, step)'");
      if constexpr (prepared) {
        constexpr bool pack = IsPack<Prepare<R>>::value;
        static_assert(pack, "hyperopt_ext: prepare() must return pack(...) of dual numbers");
        if constexpr (pack) return has_step<R, Prepare<R>>(std::make_index_sequence<R::state.size()>{});
      }
    }
  }
  return false;
}

}  // namespace hyperopt_ext
