// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The fast path's encoder (docs/reference/format.md, "What the encoder does"). A team of warps reads a page once from
// device memory into shared memory, decides coding and size, builds the segment in place of the page, and writes it to
// its final position in the arena. One more warp, the *controller*, finds that position while the teams build the bit
// planes, and looks up what comes next.
#pragma once

#include <type_traits>

#include "cuda_strips.inl"

namespace kvz {
namespace gpu {

// Shared memory of a page of n strips: partial results, states, then the segment, whose words follow the classes while
// the strips that they replace lie a little further on: a segment that is worth writing never overtakes the strips.
KVZ_HD constexpr uint32_t team_head_bytes(uint32_t strips) {
  return (static_cast<uint32_t>(sizeof(TeamShared)) + strips * 8 + 15) / 16 * 16;
}
KVZ_HD constexpr uint32_t fast_encode_bytes(uint32_t strips) {
  return team_head_bytes(strips) + strips * (kStripStateBytes + kStripClassBytes + kStripBytes);
}

// What a page with bounds by token needs beside that: scale bytes before the classes, the bounds behind the strips,
// sums of squares, and inverses of the steps.
//
// A sum is that of a token's neighbouring channels, as many as a power of two that divides head_dim; the tree of the
// format adds them further. Sums of whole strips lie where the classes will be, others behind the bounds.
//
// Inverses are those of the steps of 1 to 5 significant bits: a bound of a token has no more. 16 tokens of a head have
// a row for each number of bits; rows lie so that lanes that read different ones meet no bank twice. They take the
// place of the states, which the coder of these pages does without, and what they need more.
constexpr uint32_t kTokenSteps = 5, kTokenRows = 88;
KVZ_HD constexpr uint32_t token_row_at(uint32_t row) { return row * 16 + row / 2 * 4; }
static_assert(token_row_at(kTokenSteps - 1) + 16 == kTokenRows, "rows end where those of the next tokens begin");
KVZ_HD constexpr uint32_t sum_channels(uint32_t head_dim) {
  const uint32_t power = head_dim & (0u - head_dim);
  return power < kStripChannels ? power : kStripChannels;
}
KVZ_HD constexpr uint32_t sum_bytes(uint32_t vectors, uint32_t head_dim) {
  const uint32_t across = sum_channels(head_dim);
  return across == kStripChannels ? 0 : vectors * (head_dim / across) * 4;
}
KVZ_HD constexpr uint32_t state_bytes(uint32_t strips, uint32_t vectors) {
  const uint32_t states = strips * kStripStateBytes, inverses = vectors / 16 * kTokenRows * 4;
  return states > inverses ? states : inverses;
}
KVZ_HD constexpr uint32_t token_memory_bytes(uint32_t tokens, uint32_t heads, uint32_t head_dim, uint32_t strips) {
  const uint32_t vectors = tokens * heads;  // a multiple of 16
  return vectors * (1 + 4) + sum_bytes(vectors, head_dim) + state_bytes(strips, vectors) - state_bytes(strips, 0);
}

KVZ_DEV Team team_of(const EncodeParams& p, uint8_t* memory, const kvz_segment& segment, uint32_t strips) {
  Team t;
  const uint32_t warp = warp_of(threadIdx.x);
  t.index = warp / p.team_warps;
  t.warp = warp - t.index * p.team_warps;
  t.warps = p.team_warps;
  t.lane = lane_of(threadIdx.x);
  t.thread = t.warp * kWarp + t.lane;
  t.threads = t.warps * kWarp;
  uint8_t* const start = memory + kTileSharedBytes + t.index * p.team_bytes;
  t.shared = reinterpret_cast<TeamShared*>(start);
  t.words = reinterpret_cast<uint32_t*>(t.shared + 1);
  t.lossless_words = t.words + strips;
  t.states = reinterpret_cast<uint32_t*>(start + team_head_bytes(strips));
  t.inverses = reinterpret_cast<float*>(t.states);
  t.vectors = segment.bound_kind == KVZ_BOUND_TOKEN_RMS ? segment.tokens * segment.heads : 0;
  t.scale_bytes = t.vectors;
  t.out = start + team_head_bytes(strips) + state_bytes(strips, t.vectors);
  uint8_t* const classes = t.out + t.scale_bytes;
  t.input = classes + strips * kStripClassBytes;
  t.bounds = reinterpret_cast<uint32_t*>(t.input + strips * kStripBytes);
  t.sums = reinterpret_cast<float*>(
      sum_channels(segment.head_dim) == kStripChannels ? classes : reinterpret_cast<uint8_t*>(t.bounds + t.vectors));
  return t;
}

// Word b of both groups to its place. A mask of bits is faster to test than a width to compare with: predicates come
// seven at a time.
KVZ_DEV void store_pair(uint16_t* to0, uint16_t* to1, uint32_t have0, uint32_t have1, int b, uint32_t word) {
  if (have0 & (1u << b)) to0[b] = static_cast<uint16_t>(word);
  if (have1 & (1u << b)) to1[b] = static_cast<uint16_t>(word >> 16);
}

template <int DTYPE>
KVZ_DEV void store_words(uint16_t* to, const uint32_t (&a)[16], uint32_t coding, const Pair& g, bool narrow,
                         uint32_t first) {
  uint16_t* to0 = to;
  uint16_t* to1 = to + g.words0;
  const uint32_t have0 = (1u << g.width0) - 1u, have1 = (1u << g.width1) - 1u;
  if (coding == KVZ_LOSSLESS) {
    constexpr int f = Traits<DTYPE>::kFraction;
#pragma unroll
    for (int b = 0; b < 16; ++b) store_pair(to0, to1, have0, have1, b, b < f ? a[b] : a[b == f ? 15 : b - 1]);
    return;
  }
  if (coding == KVZ_OUTLIER) {
    if (g.apart & 1u) *to0++ = static_cast<uint16_t>(first);
    if (g.apart >> 31) *to1++ = static_cast<uint16_t>(first >> 16);
  }
  // Zigzag on planes: bit 0 of the code is the sign of q, bit b + 1 is bit b of q, turned over when q is negative.
  const uint32_t sign = narrow ? a[7] : a[15];
#pragma unroll
  for (int b = 0; b < 8; ++b) store_pair(to0, to1, have0, have1, b, b == 0 ? sign : a[b - 1] ^ sign);
  if (narrow) return;
#pragma unroll
  for (int b = 8; b < 16; ++b) store_pair(to0, to1, have0, have1, b, a[b - 1] ^ sign);
}

// Strips of a warp are index = k * warps + warp for k = 0, 1, ...; this one is read by its own warp alone until it is
// packed. Fetches them in the background.
KVZ_DEV void fetch_strips(const Strips& strips, uint8_t* input, uint32_t warp, uint32_t warps, uint32_t lane) {
  const uint32_t row = lane >> 3, chunk = lane & 7u;
  const int32_t stride = static_cast<int32_t>(strips.token_stride);
  const int64_t step = strip_step(strips, warps);
  const uint8_t* from = value_address(strips, row, warp * kStripChannels + chunk * 8);
  uint8_t* to = input + warp * kStripBytes + row * 128 + chunk * 16;
#pragma unroll 1
  for (uint32_t index = warp; index < strips.count; index += warps) {
    bool inside = true;
    if (step == 0) {
      const Strip at = strip_at(strips, index);
      inside = at.channel + chunk * 8 < strips.channels;
      from = value_address(strips, at.row * 16 + row, at.channel + chunk * 8);
    }
    if (inside) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async_16(to + i * 512, row_of(from, stride, i * 4));
    }
    from += step;
    to += warps * kStripBytes;
  }
}

// A lane's column of a strip: two channels, a token every 32 words.
KVZ_DEV const uint32_t* column_of(const uint8_t* input, uint32_t index, uint32_t lane) {
  return reinterpret_cast<const uint32_t*>(input + index * kStripBytes) + lane;
}

// Least and largest of a column under a mask, halves apart; NaN wins in both.
template <int DTYPE>
KVZ_DEV void column_extremes(const uint32_t* column, uint32_t mask, uint32_t& low, uint32_t& high) {
  low = high = column[0] & mask;
#pragma unroll
  for (int t = 1; t < 16; ++t) {
    const uint32_t x = column[t * 32] & mask;
    low = min2<DTYPE>(low, x);
    high = max2<DTYPE>(high, x);
  }
}

// Extremes of a strip as far as a lane sees it that reads rows, into those that it had seen; NaN wins.
template <int DTYPE>
KVZ_DEV void row_extremes(const Strips& strips, const uint8_t* input, uint32_t index, uint32_t lane, uint32_t& low,
                          uint32_t& high) {
  if (!strips.whole && strip_at(strips, index).channel + (lane & 7u) * 8 >= strips.channels) return;
  const uint4* const from = reinterpret_cast<const uint4*>(input + index * kStripBytes) + lane;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint4 chunk = from[i * kWarp];
    low = min2<DTYPE>(min2<DTYPE>(low, chunk.x), min2<DTYPE>(min2<DTYPE>(chunk.y, chunk.z), chunk.w));
    high = max2<DTYPE>(max2<DTYPE>(high, chunk.x), max2<DTYPE>(max2<DTYPE>(chunk.y, chunk.z), chunk.w));
  }
}

// ---- bounds within a page
// ---------------------------------------------------------------------------------------------

KVZ_DEV uint32_t steps_of_kind(uint32_t bound_kind) {
  return bound_kind == KVZ_BOUND_TOKEN_RMS       ? static_cast<uint32_t>(KVZ_STEPS_TOKEN)
         : bound_kind == KVZ_BOUND_CHANNEL_TABLE ? static_cast<uint32_t>(KVZ_STEPS_CHANNEL)
                                                 : static_cast<uint32_t>(KVZ_STEPS_PAGE);
}

// The largest bound of a team's page, and whether all of them can be used.
struct Largest {
  float bound;
  bool usable;
};
KVZ_DEV Largest largest_of_team(const Team& team, uint32_t least, uint32_t most) {
  least = __reduce_min_sync(kAllLanes, least);
  most = __reduce_max_sync(kAllLanes, most);
  if (team.lane == 0) {
    team.shared->least[team.warp] = least;
    team.shared->most[team.warp] = most;
  }
  sync_team(team);
  const uint32_t slot = team.lane < team.warps ? team.lane : 0;
  Largest found;
  found.bound = float_of(__reduce_max_sync(kAllLanes, team.shared->most[slot]));
  const uint32_t smallest = __reduce_min_sync(kAllLanes, team.shared->least[slot]);
  found.usable = smallest != 0 && (found.bound == 0.0f || smallest == ~0u ||
                                   scale_of(float_of(smallest), found.bound) <= KVZ_SCALE_LARGEST);
  return found;
}

// The largest usable bound of the channels of a page. By every thread of a team.
KVZ_DEV float channel_bounds_of_team(const Team& team, const float* channels, uint32_t count) {
  uint32_t most = 0;
#pragma unroll 4  // loads together
  for (uint32_t c = team.thread; c < count; c += team.threads) {
    const float bound = channels[c];
    if (bound >= kLeastBound && bound <= kLargestBound && bits_of(bound) > most) most = bits_of(bound);
  }
  return largest_of_team(team, ~0u, most).bound;
}

// Sums of squares of 8 neighbouring channels of a row of a strip, as the format adds them. Squares are exact, so that
// fused additions round as separate ones do.
template <int DTYPE>
KVZ_DEV float square_sum_8(uint4 chunk, float scale, bool finite) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  float pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t x = words[i];
    if (!finite) x &= ~sign_fill_2(nonfinite_2<DTYPE>(x, x));
    float a, b;
    if (DTYPE == KVZ_BF16) {  // exact: what is too small for that has the square 0 anyway
      x = scale_bf16_2(x, scale);
      a = widen<DTYPE>(x);
      b = widen_high<DTYPE>(x);
    } else {
      a = widen<DTYPE>(x) * scale;
      b = widen_high<DTYPE>(x) * scale;
    }
    pair[i] = fma_float(a, a, b * b);
  }
  return (pair[0] + pair[1]) + (pair[2] + pair[3]);
}

// Sums of squares of the parts of all vectors, exactly as the format has them. `finite`: all values of the page are. By
// every thread of a team.
template <int DTYPE>
KVZ_DEV void square_sums_of_team(const Team& team, const Strips& strips, float scale, bool finite) {
  const uint32_t lane = team.lane, across = sum_channels(strips.head_dim), per_row = strips.channels / across;
  const uint32_t chunk = lane & 7u;
#pragma unroll 1
  for (uint32_t index = team.warp; index < strips.count; index += team.warps) {
    const Strip at = strip_at(strips, index);
    const uint32_t channel = at.channel + chunk * 8;
    float* const sums = team.sums + (at.row * per_row + channel / across) * 16;
    const uint4* const from = reinterpret_cast<const uint4*>(team.input + index * kStripBytes) + lane;
    float s[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) s[i] = square_sum_8<DTYPE>(from[i * kWarp], scale, finite);
    if (across == kStripChannels) {
      // Four sums at a time: a lane gives away those that others finish.
#pragma unroll
      for (uint32_t d = 1; d <= 2; d *= 2) {
        const bool second = (chunk & d) != 0;
#pragma unroll
        for (uint32_t i = 0; i < 2 / d; ++i) {
          const float keep = second ? s[i + 2 / d] : s[i], send = second ? s[i] : s[i + 2 / d];
          s[i] = keep + __shfl_xor_sync(kAllLanes, send, static_cast<int>(d));
        }
      }
      s[0] = s[0] + __shfl_xor_sync(kAllLanes, s[0], 4);
      if (chunk < 4) sums[(chunk & 1u) * 8 + (chunk >> 1) * 4 + (lane >> 3)] = s[0];
      continue;
    }
    const bool writes = channel < strips.channels && (chunk * 8 & (across - 1)) == 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t d = 1; d < across / 8; d *= 2) s[i] = s[i] + __shfl_xor_sync(kAllLanes, s[i], static_cast<int>(d));
      if (writes) sums[i * 4 + (lane >> 3)] = s[i];
    }
  }
}

// Vectors are numbered so that those of 16 tokens of a head lie beside each other.
struct Vector {
  uint32_t token, head;
};
KVZ_DEV Vector vector_at(uint32_t v, uint32_t heads) {
  const uint32_t block = v / 16, row = block < heads ? 0 : block / heads;
  Vector at;
  at.token = row * 16 + v % 16;
  at.head = block - row * heads;
  return at;
}

// Is a finite value of a vector not zero?
template <int DTYPE>
KVZ_DEV bool any_magnitude(const Team& team, const Strips& strips, const Vector& at) {
  uint32_t any = 0;
  for (uint32_t d = 0; d < strips.head_dim; d += 2) {
    const uint32_t c = at.head * strips.head_dim + d;
    const uint32_t strip = at.token / 16 * strips.per_row + c / kStripChannels;
    uint32_t x = *reinterpret_cast<const uint32_t*>(team.input + strip * kStripBytes + at.token % 16 * 128 +
                                                    c % kStripChannels * 2);
    if (!is_finite<DTYPE>(x)) x &= 0xffff0000u;
    if (!is_finite<DTYPE>(x >> 16)) x &= 0xffffu;
    any |= x & 0x7fff7fffu;
  }
  return any != 0;
}

// Sums of squares of a page of whole strips into team.sums, about, and the extremes of what a lane sees; NaN wins. By
// every thread of a team.
template <int DTYPE>
KVZ_DEV void about_squares_of_team(const Team& team, uint32_t count, uint32_t& low, uint32_t& high) {
  const uint32_t lane = team.lane;
#pragma unroll 1
  for (uint32_t index = team.warp; index < count; index += team.warps) {
    const uint8_t* const rows = team.input + index * kStripBytes + (lane >> 2) * 128;
    uint4 upper[2], lower[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      upper[i] = *reinterpret_cast<const uint4*>(rows + chunk_of(lane, i) * 16);
      lower[i] = *reinterpret_cast<const uint4*>(rows + chunk_of(lane, i) * 16 + 8 * 128);
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t words[8] = {upper[i].x, upper[i].y, upper[i].z, upper[i].w,
                                 lower[i].x, lower[i].y, lower[i].z, lower[i].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        low = min2<DTYPE>(low, words[j]);
        high = max2<DTYPE>(high, words[j]);
      }
    }
    about_squares<DTYPE>(upper, lower, lane, team.sums + index * 16);
  }
}

// Bounds of all vectors into team.bounds, from team.sums: 0 of zeros, NaN where there is no usable one. `scale` is that
// of the page. `about`: the sums are of about_squares, and all values are finite. team.inverses as well where
// `INVERSES`. By every thread of a team.
template <int DTYPE, bool INVERSES>
KVZ_DEV Largest token_bounds_of_team(const Team& team, const Strips& strips, double r, float scale, bool about) {
  const uint32_t lane = team.lane;
  const float factor = about_factor(r, strips.head_dim), own = mantissa_inverse(lane);
  uint32_t least = ~0u, most = 0;
  const uint32_t heads = strips.channels / strips.head_dim, parts = strips.head_dim / sum_channels(strips.head_dim);
#pragma unroll 1
  for (uint32_t first = team.warp * kWarp; first < team.vectors; first += team.threads) {
    const uint32_t v = first + lane;
    const bool exists = v < team.vectors;
    float* const part = team.sums + (exists ? v / 16 * parts * 16 + v % 16 : 0);
    const Vector at = vector_at(exists ? v : 0, heads);
    float bound = 0.0f;
    bool sure = !exists, zero = false;
    if (INVERSES && about) {
      float sum = 0.0f;
      for (uint32_t i = 0; i < parts; ++i) sum += part[i * 16];
      sure = token_bound_about(factor, sum, scale, bound) || !exists;
      zero = sum == 0.0f && exists && !any_magnitude<DTYPE>(team, strips, at);
      // Rare: a bound near the next one.
#pragma unroll 1
      for (uint32_t doubts = __ballot_sync(kAllLanes, !sure && !zero); doubts != 0; doubts &= doubts - 1) {
        const uint32_t source = static_cast<uint32_t>(__ffs(static_cast<int>(doubts)) - 1), u = first + source;
        for (uint32_t i = 0; i < parts; ++i) {
          const float s =
              square_sum_64<DTYPE>(team.input + (u / 16 * parts + i) * kStripBytes + u % 16 * 128, scale, lane);
          if (lane == source) part[i * 16] = s;
        }
      }
    }
    if (!sure && !zero) {
      for (uint32_t n = parts; n > 1; n = (n + 1) / 2) {  // the zeros that fill the tree up change nothing
        for (uint32_t i = 0; i < n / 2; ++i) part[i * 16] = part[2 * i * 16] + part[(2 * i + 1) * 16];
        if (n % 2 != 0) part[n / 2 * 16] = part[(n - 1) * 16];
      }
      bound = token_bound_fast(r, token_factor(r, scale), part[0], strips.head_dim, scale);
      if (bound == 0.0f && any_magnitude<DTYPE>(team, strips, at)) {
        bound = float_of(0x7fc00000u);
        least = 0;
      }
    }
    if (zero || !exists) bound = 0.0f;
    if (bound > 0.0f) {
      least = bits_of(bound) < least ? bits_of(bound) : least;
      most = bits_of(bound) > most ? bits_of(bound) : most;
    }
    if (exists) team.bounds[v] = bound_word(bound);
    if (INVERSES) {
      float* const rows = team.inverses + v / 16 * kTokenRows + v % 16;
#pragma unroll
      for (uint32_t n = 1; n <= kTokenSteps; ++n) {
        constexpr int p = Traits<DTYPE>::kSignificant + 1;
        const float inverse = token_inverse(own, bound, step_bits<DTYPE>(KVZ_FIXED, p - static_cast<int>(n), bound));
        if (exists) rows[token_row_at(n - 1)] = inverse;
      }
    }
  }
  return largest_of_team(team, least, most);
}

// The scale bytes of a page. By every thread of a team.
KVZ_DEV void put_team_scales(const Team& team, const Strips& strips, float page) {
  const uint32_t heads = strips.channels / strips.head_dim;
#pragma unroll 1
  for (uint32_t v = team.thread; v < team.vectors; v += team.threads) {
    const float bound = bound_of_word(team.bounds[v]);
    const Vector at = vector_at(v, heads);
    team.out[at.token * heads + at.head] = static_cast<uint8_t>(bound > 0.0f    ? scale_of(bound, page)
                                                                : bound == 0.0f ? static_cast<uint32_t>(KVZ_SCALE_ZERO)
                                                                                : 0u);
  }
}

// Bounds of a lane's column, for any coding and any values; NaN where there is none.
struct ColumnBounds {
  const uint32_t* vectors;  // of the first token, or null
  float channel[2];
  KVZ_DEV float at(uint32_t token, uint32_t half) const {
    return vectors != nullptr ? bound_of_word(vectors[token]) : channel[half];
  }
};
KVZ_DEV ColumnBounds column_bounds(const Team& team, const kvz_segment& segment, const Strips& strips, uint32_t index,
                                   uint32_t lane) {
  ColumnBounds b = {};
  const Strip at = strip_at(strips, index);
  const uint32_t channel = at.channel + lane * 2;
  if (channel >= strips.channels) return b;
  if (segment.bound_kind == KVZ_BOUND_TOKEN_RMS) {
    b.vectors = team.bounds + (at.row * segment.heads + channel / strips.head_dim) * 16;
  } else {
    const float* const channels = reinterpret_cast<const float*>(segment.channel_bounds) + channel;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const float bound = channels[half];
      b.channel[half] = bound >= kLeastBound && bound <= kLargestBound ? bound : float_of(0x7fc00000u);
    }
  }
  return b;
}

// Inverse of the power-of-two step of a bound; 0 where there is no bound.
KVZ_DEV float inverse_of_power(float bound) {
  return bound > 0.0f ? float_of((253u << 23) - (bits_of(bound) & 0x7f800000u)) : 0.0f;
}

// q of a value of a column with the bound b, at the step of `fixed` for a width.
template <int DTYPE>
KVZ_DEV int32_t code_with(float x, uint32_t width, float b) {
  const float step = step_of<DTYPE>(KVZ_FIXED, static_cast<int>(width), b);
  return round_code(x * (b > 0.0f ? reciprocal(step) : 0.0f));
}

// State of one half of a column in the coding `fixed`, as in encode_any.
template <int DTYPE>
KVZ_DEV_NOINLINE uint32_t bounded_state(const uint32_t* column, const ColumnBounds& bounds, uint32_t half) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  uint32_t widest = 0;
#pragma unroll 1
  for (uint32_t t = 0; t < 16; ++t) {
    const float x = Tr::to_float(column[t * 32] >> (16 * half) & 0xffffu), b = bounds.at(t, half);
    const float magnitude = float_of(bits_of(x) & 0x7fffffffu), inverse = inverse_of_power(b);
    if (!(magnitude + b <= most) || !(magnitude * inverse < room)) return 16u | kStateRaw;
    widest |= zigzag(round_code(x * inverse));
  }
  uint32_t w = static_cast<uint32_t>(bit_length(widest));
  if (w > 0) {
    uint32_t finer = 0;
#pragma unroll 1
    for (uint32_t t = 0; t < 16; ++t) {
      const float x = Tr::to_float(column[t * 32] >> (16 * half) & 0xffffu);
      finer |= zigzag(code_with<DTYPE>(x, w - 1, bounds.at(t, half)));
    }
    if (static_cast<uint32_t>(bit_length(finer)) <= w - 1) --w;
  }
  return w <= Tr::kMaxWidth ? w : 16u | kStateRaw;
}

// The codes of both halves of a column in the coding `fixed`, before zigzag, in place of the values; halves of `raw`
// stay.
template <int DTYPE>
KVZ_DEV_NOINLINE void bounded_codes(uint32_t* column, const ColumnBounds& bounds, uint32_t width0, uint32_t width1,
                                    uint32_t raw) {
#pragma unroll 1
  for (uint32_t t = 0; t < 16; ++t) {
    const uint32_t x = column[t * 32];
    const int32_t q0 = code_with<DTYPE>(widen<DTYPE>(x), width0, bounds.at(t, 0));
    const int32_t q1 = code_with<DTYPE>(widen_high<DTYPE>(x), width1, bounds.at(t, 1));
    column[t * 32] = choose(raw, x, low_half(static_cast<uint32_t>(q0), static_cast<uint32_t>(q1)));
  }
}

// The two above for the codings of differences, whose steps are powers of two, of both halves at a time. Bounds are
// those of tokens, or `bound0` and `bound1`.
template <int DTYPE, bool BY_TOKEN>
KVZ_DEV_NOINLINE uint32_t difference_states(const uint32_t* column, const uint32_t* vectors, float bound0, float bound1,
                                            uint32_t coding) {
  using Tr = Traits<DTYPE>;
  const float most = Tr::to_float(Tr::kMaxFinite), room = static_cast<float>(Tr::kMaxCode) + 0.5f;
  float inverse0 = inverse_of_power(bound0), inverse1 = inverse_of_power(bound1);
  uint32_t before0 = kCodeZero, before1 = kCodeZero, first = 0, rest = 0;
  bool fits[2] = {true, true};
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t x = column[t * 32];
    if (BY_TOKEN) {
      bound0 = bound1 = bound_of_word(vectors[t]);
      inverse0 = inverse1 = inverse_of_power(bound0);
    }
    const float value0 = widen<DTYPE>(x), value1 = widen_high<DTYPE>(x);
    const float scaled0 = value0 * inverse0, scaled1 = value1 * inverse1;
    fits[0] = fits[0] && fabsf(value0) + bound0 <= most && fabsf(scaled0) < room;
    fits[1] = fits[1] && fabsf(value1) + bound1 <= most && fabsf(scaled1) < room;
    const uint32_t u0 = bits_of(scaled0 + 12582912.0f), u1 = bits_of(scaled1 + 12582912.0f);
    const uint32_t code = zigzag_2(low_half(u0 - before0, u1 - before1));
    if (t == 0) {
      first = code;
    } else {
      rest |= code;
    }
    before0 = u0;
    before1 = u1;
  }
  uint32_t widths[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t without = static_cast<uint32_t>(bit_length(rest >> (16 * half) & 0xffffu));
    uint32_t w = static_cast<uint32_t>(bit_length((first | rest) >> (16 * half) & 0xffffu));
    if (coding == KVZ_OUTLIER && without + 1 < w) w = without | kStateApart;
    widths[half] = fits[half] && (w & 31u) <= Tr::kMaxWidth ? w : 16u | kStateRaw;
  }
  return make_state(widths[0], widths[1]);
}
template <int DTYPE, bool BY_TOKEN>
KVZ_DEV_NOINLINE void difference_codes(uint32_t* column, const uint32_t* vectors, float bound0, float bound1,
                                       uint32_t raw) {
  float inverse0 = inverse_of_power(bound0), inverse1 = inverse_of_power(bound1);
  uint32_t before0 = kCodeZero, before1 = kCodeZero;
#pragma unroll
  for (int t = 0; t < 16; ++t) {
    const uint32_t x = column[t * 32];
    if (BY_TOKEN) inverse0 = inverse1 = inverse_of_power(bound_of_word(vectors[t]));
    uint32_t u0, u1;
    quantise_2<DTYPE>(x, inverse0, inverse1, u0, u1);
    column[t * 32] = choose(raw, x, low_half(u0 - before0, u1 - before1));
    before0 = u0;
    before1 = u1;
  }
}

// Controller and teams meet, each at a place of its own in the program, which the numbered barrier says plainly.
KVZ_DEV void meet() { sync_all(15); }

// What a team has decided, for the controller. Every thread of a team passes here once a tile.
KVZ_DEV void announce(TileShared& shared, const Team& team, const kvz_entry& entry) {
  if (team.thread == 0) shared.entries[team.index] = entry;
  meet();
}

// A page whose strips are in shared memory, in any coding and with any values; what fits no coding stays where it is.
// `WITHIN`: bounds may differ within the page. By every thread of the team.
template <int DTYPE, bool WITHIN>
KVZ_DEV_NOINLINE void encode_any(const EncodeParams& p, uint8_t* memory) {
  using Tr = Traits<DTYPE>;
  constexpr uint32_t kInfinity2 = Tr::kInfinity * 0x00010001u;
  constexpr uint32_t kFractionBits = Tr::kFraction;
  constexpr uint32_t kExponentMask = (0x7fffu & ~((1u << Tr::kFraction) - 1u)) * 0x00010001u;
  TileShared& tile_shared = *reinterpret_cast<TileShared*>(memory);
  const Tile& tile = tile_shared.tile;
  const kvz_segment segment = tile.segments[warp_of(threadIdx.x) / p.team_warps];
  const Strips strips = strips_of(segment, tile.block_id);
  const uint32_t count = strips.count;
  const Team team = team_of(p, memory, segment, count);
  const uint32_t thread = team.thread, lane = team.lane, warp = team.warp, warps = team.warps;
  const uint32_t rounds = (count + warps - 1) / warps;
  const uint32_t groups = segment.tokens / 16 * strips.channels;
  const uint32_t raw_bytes = groups * 32;
  TeamShared& shared = *team.shared;
  // Of each strip and lane: the state of its groups in the quantised candidate, and, shifted by 16, their classes and
  // bases in the lossless one.
  uint32_t* const states = team.states;
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;

  uint32_t page_low = kInfinity2, page_high = kInfinity2 | 0x80008000u, nonfinite = 0;
  for (uint32_t k = 0; k < rounds; ++k) {
    const uint32_t index = k * warps + warp;
    if (index >= count) break;
    const uint32_t* const column = column_of(input, index, lane);
    uint32_t low, high;
    column_extremes<DTYPE>(column, 0xffffffffu, low, high);
    const bool inside = groups_at(strips, index, lane).inside;
    if (!inside) {
      low = kInfinity2;
      high = kInfinity2 | 0x80008000u;
    }
    const uint32_t bad = inside ? nonfinite_2<DTYPE>(low, high) : 0u;
    if (__any_sync(kAllLanes, bad != 0)) {
      nonfinite = 1;
#pragma unroll 1
      for (uint32_t shift = 0; shift < 32; shift += 16) {
        if (((bad >> shift) & 0x8000u) == 0) continue;
        const uint32_t half = 0xffffu << shift;
        const uint2 finite = finite_extremes<DTYPE>(column, shift);
        low = (low & ~half) | finite.x;
        high = (high & ~half) | finite.y;
      }
    }
    page_low = min2<DTYPE>(page_low, low);
    page_high = max2<DTYPE>(page_high, high);
  }
  {
    const int32_t low0 = key_16(page_low), low1 = key_16(page_low >> 16);
    const int32_t high0 = key_16(page_high), high1 = key_16(page_high >> 16);
    const int32_t low = __reduce_min_sync(kAllLanes, low0 < low1 ? low0 : low1);
    const int32_t high = __reduce_max_sync(kAllLanes, high0 > high1 ? high0 : high1);
    uint32_t equal = low == high ? value_of_key_16(low) : kDiffers;
    if (nonfinite) {  // the extremes do not tell: compare every value of the warp's strips with the first
      const uint32_t first = *reinterpret_cast<const uint16_t*>(input + warp * kStripBytes) * 0x00010001u;
      uint32_t differs = 0;
#pragma unroll 1
      for (uint32_t index = warp; index < count; index += warps) {
        if (!groups_at(strips, index, lane).inside) continue;
        const uint32_t* const column = column_of(input, index, lane);
#pragma unroll 1
        for (int t = 0; t < 16; ++t) differs |= column[t * 32] ^ first;
      }
      equal = __any_sync(kAllLanes, differs != 0) ? kDiffers : first & 0xffffu;
    }
    if (lane == 0) {
      shared.low[warp] = low;
      shared.high[warp] = high;
      shared.equal[warp] = equal;
    }
  }
  sync_team(team);

  const uint32_t busy = warps < count ? warps : count;  // warps that have a strip
  const uint32_t slot = lane < busy ? lane : 0;
  const int32_t low_key = __reduce_min_sync(kAllLanes, shared.low[slot]);
  const int32_t high_key = __reduce_max_sync(kAllLanes, shared.high[slot]);
  const uint32_t equal = shared.equal[0];
  const bool constant = equal != kDiffers && __all_sync(kAllLanes, shared.equal[slot] == equal);
  const uint32_t low_bits = value_of_key_16(low_key), high_bits = value_of_key_16(high_key);
  const uint32_t lossy_coding = segment.coding;  // or raw, or lossless

  const bool lossy = lossy_coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;

  const uint32_t low_exponent = exponent_of<DTYPE>(low_bits), high_exponent = exponent_of<DTYPE>(high_bits);
  const uint32_t largest = low_key > high_key ? 0u : low_exponent > high_exponent ? low_exponent : high_exponent;
  const uint32_t steps = WITHIN ? steps_of_kind(segment.bound_kind) : static_cast<uint32_t>(KVZ_STEPS_PAGE);
  float bound = 0.0f;
  if (lossy && low_key <= high_key && !constant && lossy_coding != KVZ_RAW) {
    if (steps == KVZ_STEPS_TOKEN) {
      const float scale = square_scale<DTYPE>(largest);
      square_sums_of_team<DTYPE>(team, strips, scale, false);
      sync_team(team);
      const Largest found = token_bounds_of_team<DTYPE, false>(team, strips, segment.bound, scale, false);
      bound = found.bound;
      if (!found.usable) {
        for (uint32_t v = thread; v < team.vectors; v += team.threads) {
          const float b = bound_of_word(team.bounds[v]);
          if (b > 0.0f && scale_of(b, bound) > KVZ_SCALE_LARGEST) team.bounds[v] = kNoBound;
        }
        sync_team(team);
      }
    } else if (steps == KVZ_STEPS_CHANNEL) {
      bound = channel_bounds_of_team(team, reinterpret_cast<const float*>(segment.channel_bounds), strips.channels);
    } else {
      bound = page_bound(segment.bound_kind, segment.bound, widen<DTYPE>(low_bits), widen<DTYPE>(high_bits));
    }
  }
  const uint32_t scale_bytes = WITHIN ? team.scale_bytes : 0;
  uint8_t* const body = out + scale_bytes;  // of the quantised candidate
  uint8_t coding = KVZ_RAW, reason = KVZ_INCOMPRESSIBLE;
  uint32_t size = raw_bytes, param = 0;
  const float inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, bound > 0.0f ? bound : 1.0f));
  float finer = 0.0f;    // lane w: 1 / S for width w
  bool settled = false;  // the quantised candidate is small enough: there is no lossless one

  if (lossy_coding == KVZ_RAW) {
    reason = KVZ_AS_ASKED;
  } else if (constant) {
    coding = KVZ_CONSTANT;
    reason = KVZ_AS_ASKED;
    size = KVZ_CONSTANT_BYTES;
  } else {
    // Widths of the quantised candidate.
    if (bound > 0.0f) {
      finer = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(lane & 15u), bound));
      for (uint32_t k = 0; k < rounds; ++k) {
        const uint32_t index = k * warps + warp;
        if (index >= count) break;
        const Groups at = groups_at(strips, index, lane);
        const uint32_t* const column = column_of(input, index, lane);
        uint32_t low, high;
        column_extremes<DTYPE>(column, 0xffffffffu, low, high);
        const float low0 = widen<DTYPE>(low), low1 = widen_high<DTYPE>(low);
        const float high0 = widen<DTYPE>(high), high1 = widen_high<DTYPE>(high);
        const bool fits0 = quantisable<DTYPE>(low0, high0, bound, inverse);
        const bool fits1 = quantisable<DTYPE>(low1, high1, bound, inverse);
        uint32_t w0, w1;
        if (steps != KVZ_STEPS_PAGE) {
          const ColumnBounds bounds = column_bounds(team, segment, strips, index, lane);
          w0 = w1 = 0;
          if (at.inside) {
            if (lossy_coding == KVZ_FIXED) {
              w0 = bounded_state<DTYPE>(column, bounds, 0);
              w1 = bounded_state<DTYPE>(column, bounds, 1);
            } else {
              const uint32_t both =
                  steps == KVZ_STEPS_TOKEN
                      ? difference_states<DTYPE, true>(column, bounds.vectors, 0.0f, 0.0f, lossy_coding)
                      : difference_states<DTYPE, false>(column, nullptr, bounds.channel[0], bounds.channel[1],
                                                        lossy_coding);
              w0 = both & 255u;
              w1 = both >> 8;
            }
          }
          __syncwarp();
        } else if (lossy_coding == KVZ_FIXED) {
          const int32_t top0 = top_bit(widest_code(low0, high0, inverse)),
                        top1 = top_bit(widest_code(low1, high1, inverse));
          const uint32_t less0 = static_cast<uint32_t>(top0 > 0 ? top0 : 0),
                         less1 = static_cast<uint32_t>(top1 > 0 ? top1 : 0);
          // Lanes past 15 repeat those below, so that the shuffle may have any width of a group that does not fit.
          const float finer0 = __shfl_sync(kAllLanes, finer, static_cast<int>(less0));
          const float finer1 = __shfl_sync(kAllLanes, finer, static_cast<int>(less1));
          w0 = (widest_code(low0, high0, finer0) >> less0) == 0 ? less0 : static_cast<uint32_t>(top0 + 1);
          w1 = (widest_code(low1, high1, finer1) >> less1) == 0 ? less1 : static_cast<uint32_t>(top1 + 1);
          w0 = fits0 ? w0 : 16u | kStateRaw;
          w1 = fits1 ? w1 : 16u | kStateRaw;
        } else {
          uint32_t before0 = kCodeZero, before1 = kCodeZero, rest = 0, first = 0;
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse, inverse, u0, u1);
            const uint32_t code = zigzag_2(low_half(u0 - before0, u1 - before1));
            if (t == 0) {
              first = code;
            } else {
              rest |= code;
            }
            before0 = u0;
            before1 = u1;
          }
          const uint32_t all = rest | first;
          w0 = static_cast<uint32_t>(bit_length(all & 0xffffu));
          w1 = static_cast<uint32_t>(bit_length(all >> 16));
          uint32_t apart0 = 0, apart1 = 0;
          if (lossy_coding == KVZ_OUTLIER) {
            const uint32_t rest0 = static_cast<uint32_t>(bit_length(rest & 0xffffu));
            const uint32_t rest1 = static_cast<uint32_t>(bit_length(rest >> 16));
            apart0 = rest0 + 1 < w0 ? kStateApart : 0u;
            apart1 = rest1 + 1 < w1 ? kStateApart : 0u;
            w0 = apart0 ? rest0 : w0;
            w1 = apart1 ? rest1 : w1;
          }
          w0 = fits0 && w0 <= Tr::kMaxWidth ? w0 | apart0 : 16u | kStateRaw;
          w1 = fits1 && w1 <= Tr::kMaxWidth ? w1 | apart1 : 16u | kStateRaw;
        }
        const uint32_t state = at.inside ? make_state(w0, w1) : 0u;
        states[index * kWarp + lane] = state;
        if (at.inside) {
          if (lossy_coding == KVZ_OUTLIER) {
            const uint32_t class0 = w0 & kStateRaw ? KVZ_BYTE_RAW : w0 + (w0 & kStateApart);  // bit 5 moves to bit 6
            const uint32_t class1 = w1 & kStateRaw ? KVZ_BYTE_RAW : w1 + (w1 & kStateApart);
            *reinterpret_cast<uint16_t*>(body + at.first) = static_cast<uint16_t>(class0 | class1 << 8);
          } else {
            body[at.first / 2] = static_cast<uint8_t>((w0 < 15u ? w0 : 15u) | (w1 < 15u ? w1 : 15u) << 4);
          }
        }
        const uint32_t words = __reduce_add_sync(kAllLanes, state_words(state));
        if (lane == 0) team.words[index] = words;
      }
      sync_team(team);
      const uint32_t quantised =
          scale_bytes + (lossy_coding == KVZ_OUTLIER ? groups : groups / 2) + 2 * sum_words(team.words, count, lane);
      if (quantised < size) {
        size = quantised;
        coding = static_cast<uint8_t>(lossy_coding);
        reason = KVZ_AS_ASKED;
      }
      settled = static_cast<uint64_t>(quantised) * 8 <= static_cast<uint64_t>(raw_bytes) * 5;
    }

    // Widths of the lossless candidate.
    if (!settled) {
      for (uint32_t k = 0; k < rounds; ++k) {
        const uint32_t index = k * warps + warp;
        if (index >= count) break;
        uint32_t least, most;
        column_extremes<DTYPE>(column_of(input, index, lane), 0x7fff7fffu, least, most);
        uint32_t known = 0, words = 0;
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
          const uint32_t top = exponent_of<DTYPE>(most >> (16 * h)), bottom = exponent_of<DTYPE>(least >> (16 * h));
          const bool raw = !is_finite<DTYPE>(most >> (16 * h));
          const uint32_t gap = largest - top, base = gap < 15 ? gap : 15;
          const uint32_t w = static_cast<uint32_t>(bit_length(largest - base - bottom));
          known |= raw ? static_cast<uint32_t>(KVZ_NIBBLE_RAW) << (4 * h) : w << (4 * h) | base << (8 + 4 * h);
          words += raw ? 16u : kFractionBits + 1 + w;
        }
        uint32_t& state = states[index * kWarp + lane];
        state = (bound > 0.0f ? state : 0u) | known << 16;
        words = __reduce_add_sync(kAllLanes, groups_at(strips, index, lane).inside ? words : 0u);
        if (lane == 0) team.lossless_words[index] = words;
      }
      sync_team(team);
      const uint32_t lossless = groups + 2 * sum_words(team.lossless_words, count, lane);
      if (lossless < size) {
        reason = !lossy ? KVZ_AS_ASKED : bound > 0.0f ? KVZ_LOSSLESS_SMALLER : KVZ_BOUND_TOO_FINE;
        size = lossless;
        coding = KVZ_LOSSLESS;
        param = largest;
      }
    }
  }
  const uint32_t units = units_of(size);
  const bool quantised = coding >= KVZ_FIXED && coding <= KVZ_OUTLIER;
  announce(tile_shared, team,
           make_entry(segment, size, static_cast<uint8_t>(quantised ? coding | steps : coding),
                      quantised ? bound : 0.0f, param, reason));
  if (WITHIN && quantised) put_team_scales(team, strips, bound);

  if (coding >= KVZ_FIXED) {
    // Words, round after round: all warps hold the planes of their strips in registers before one of them overwrites
    // strips.
    const uint32_t* const strip_words = coding == KVZ_LOSSLESS ? team.lossless_words : team.words;
    const uint32_t class_end =
        (quantised ? team.scale_bytes : 0u) + (coding == KVZ_OUTLIER || coding == KVZ_LOSSLESS ? groups : groups / 2);
    const bool few = count <= kWarp;
    const uint32_t held = few && lane < count ? strip_words[lane] : 0u;
    for (uint32_t k = 0; k < rounds; ++k) {
      const uint32_t index = k * warps + warp;
      const bool busy_warp = index < count;
      uint32_t a[16];
      uint32_t first = 0, position = 0;
      Pair g = {};
      bool narrow = false;
      if (busy_warp) {
        const uint32_t* const column = column_of(input, index, lane);
        const Groups at = groups_at(strips, index, lane);
        const uint32_t state = states[index * kWarp + lane], known = state >> 16;
        if (coding != KVZ_LOSSLESS) {
          g = pair_of_state(state);
        } else if (at.inside) {
          g = pair_of_classes<DTYPE>(KVZ_LOSSLESS, known & 15u, (known >> 4) & 15u);
        }
        const uint32_t mine = g.words0 + g.words1;
        const uint32_t before =
            few ? __reduce_add_sync(kAllLanes, lane < index ? held : 0u) : sum_words(strip_words, index, lane);
        position = class_end / 2 + before + inclusive_sum(mine, lane) - mine;
        narrow = coding != KVZ_LOSSLESS && !__any_sync(kAllLanes, g.width0 > 8 || g.width1 > 8);

        if (quantised && steps != KVZ_STEPS_PAGE) {
          if (at.inside) {
            const ColumnBounds bounds = column_bounds(team, segment, strips, index, lane);
            uint32_t* const codes = const_cast<uint32_t*>(column);
            if (coding == KVZ_FIXED) {
              bounded_codes<DTYPE>(codes, bounds, g.width0, g.width1, g.raw);
            } else if (steps == KVZ_STEPS_TOKEN) {
              difference_codes<DTYPE, true>(codes, bounds.vectors, 0.0f, 0.0f, g.raw);
            } else {
              difference_codes<DTYPE, false>(codes, nullptr, bounds.channel[0], bounds.channel[1], g.raw);
            }
          }
          __syncwarp();
#pragma unroll
          for (int t = 0; t < 16; ++t) a[t] = column[t * 32];
          first = a[0];
          a[0] &= ~g.apart;
        } else if (coding == KVZ_FIXED) {
          const float inverse0 = __shfl_sync(kAllLanes, finer, static_cast<int>(g.width0 & 15u));
          const float inverse1 = __shfl_sync(kAllLanes, finer, static_cast<int>(g.width1 & 15u));
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse0, inverse1, u0, u1);
            a[t] = low_half(u0, u1);
          }
        } else if (coding == KVZ_LOSSLESS) {
          if (at.inside) {
            out[at.first / 2] = static_cast<uint8_t>(known);
            out[groups / 2 + at.first / 2] = static_cast<uint8_t>(known >> 8);
          }
          const uint32_t top0 = (param - ((known >> 8) & 15u)) << kFractionBits;
          const uint32_t top1 = (param - ((known >> 12) & 15u)) << kFractionBits;
          const uint32_t top = low_half(top0, top1);
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            const uint32_t x = column[t * 32];
            // No borrow passes between the halves: no exponent is above its group's top, and raw halves are replaced
            // below.
            a[t] = (((top | 0x80008000u) - (x & kExponentMask)) & kExponentMask) | (x & ~kExponentMask);
          }
        } else {
          uint32_t before0 = kCodeZero, before1 = kCodeZero;
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            uint32_t u0, u1;
            quantise_2<DTYPE>(column[t * 32], inverse, inverse, u0, u1);
            a[t] = low_half(u0 - before0, u1 - before1);
            before0 = u0;
            before1 = u1;
          }
          first = a[0];
          a[0] &= ~g.apart;
        }
        if (__any_sync(kAllLanes, g.raw != 0)) {
          // A raw group is one whose codes, after zigzag or in the order of lossless words, are the values' bits.
#pragma unroll
          for (int t = 0; t < 16; ++t) {
            const uint32_t x = column[t * 32];
            const uint32_t y = coding == KVZ_LOSSLESS ? sign_to_top<DTYPE>(x) : unzigzag_2(x);
            a[t] = (a[t] & ~g.raw) | (y & g.raw);
          }
        }
        if (narrow) {
#pragma unroll
          for (int i = 0; i < 8; ++i) a[i] = __byte_perm(a[i], a[i + 8], 0x6240);
          transpose_8(a);
        } else {
          transpose_16(a);
        }
      }
      sync_team(team);
      if (busy_warp) store_words<DTYPE>(reinterpret_cast<uint16_t*>(out) + position, a, coding, g, narrow, first);
    }
    if (thread < units * 16 - size) out[size + thread] = 0;
  } else if (coding == KVZ_CONSTANT && thread < 4) {
    reinterpret_cast<uint32_t*>(out)[thread] = thread == 0 ? equal : 0u;
  }
}

// ---- fast path: coders
//
// A coder knows one coding of a page of strips: how wide the groups of a strip are, what planes they have, and how
// planes become words. What is common to codings, where words go and when they may go there, is in pack_page. Coders
// leave pages with values that are not finite, and other rare ones, to encode_any.

// Codes of `fixed` at the finest step that each group's width allows: what does not depend on where bounds come from.
template <int DTYPE>
struct FixedPlanes {
  static constexpr uint32_t kCoding = KVZ_FIXED;

  KVZ_DEV static uint32_t class_bytes(uint32_t groups) { return groups / 2; }

  // One pass of packing: planes of a strip in a[], then words[].
  uint32_t width0, width1, level;  // level: planes that any group of the strip has, rounded up to 8, 12 or 16
  KVZ_DEV uint32_t begin(uint32_t c) {
    width0 = c & 15u;
    width1 = c >> 4;
    return width0 + width1;
  }

 protected:
  // inverse0(q) and inverse1(q): 1 / S of tokens 4 q to 4 q + 3 of both groups.
  template <class Inverse0, class Inverse1>
  KVZ_DEV void planes_with(uint32_t c, const uint32_t* column, uint32_t (&a)[16], Inverse0 inverse0,
                           Inverse1 inverse1) {
    begin(c);
    const uint32_t widest = width0 > width1 ? width0 : width1;
    level = !__any_sync(kAllLanes, widest > 8) ? 8 : !__any_sync(kAllLanes, widest > 12) ? 12 : 16;
    // Visits tokens t and t + 8, with their inverses.
    const auto for_pairs = [&](auto visit) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const float4 l0 = inverse0(q), h0 = inverse0(q + 2), l1 = inverse1(q), h1 = inverse1(q + 2);
        const float low0[4] = {l0.x, l0.y, l0.z, l0.w}, high0[4] = {h0.x, h0.y, h0.z, h0.w};
        const float low1[4] = {l1.x, l1.y, l1.z, l1.w}, high1[4] = {h1.x, h1.y, h1.z, h1.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int t = q * 4 + j;
          const uint32_t x = column[t * 32], y = column[(t + 8) * 32];
          visit(t, widen<DTYPE>(x) * low0[j], widen<DTYPE>(y) * high0[j], widen_high<DTYPE>(x) * low1[j],
                widen_high<DTYPE>(y) * high1[j]);
        }
      }
    };
    // Numbers are rounded by adding 2^23 and an even bias that makes codes positive: integers are then in the low bits
    // of the sums, which multiplication and addition of integers put beside each other.
    if (level == 8) {
      constexpr float kBias = 8388608.0f + 65536.0f + 128.0f;  // 65,536: no sum is below 2^23
      for_pairs([&](int t, float x0, float y0, float x1, float y1) {
        a[t] = low_half(bits_of(y0 + kBias) * 256u + bits_of(x0 + kBias),
                        bits_of(y1 + kBias) * 256u + bits_of(x1 + kBias));
      });
      transpose_8(a);
    } else {
      // The exponent of the lower code, 0x4b00, runs into the higher one, whose bias makes up for it: both are q +
      // 0x8000 in the end.
      constexpr float kLow = 8388608.0f + 32768.0f, kHigh = 8388608.0f + 32768.0f - 19200.0f;
      for_pairs([&](int t, float x0, float y0, float x1, float y1) {
        const uint32_t both0 = bits_of(y0 + kHigh) * 65536u + bits_of(x0 + kLow);
        const uint32_t both1 = bits_of(y1 + kHigh) * 65536u + bits_of(x1 + kLow);
        a[t] = __byte_perm(both0, both1, 0x6420);
        a[t + 8] = __byte_perm(both0, both1, 0x7531);
      });
      transpose_8(a);
      if (level == 12) {
        transpose_low_4(a + 8);
      } else {
        transpose_8(a + 8);
      }
    }
  }
  KVZ_DEV static float4 same(float x) {
    float4 four;
    four.x = four.y = four.z = four.w = x;
    return four;
  }

 public:
  // Zigzag on planes: bit 0 of the code is the sign of q, bit b + 1 is bit b of q, turned over when q is negative.
  template <int LEVEL>
  KVZ_DEV void store_level(uint16_t* to, const uint32_t (&a)[16]) const {
    uint16_t* const to1 = to + width0;
    const uint32_t have0 = (1u << width0) - 1u, have1 = (1u << width1) - 1u;
    const uint32_t sign = LEVEL == 12 ? a[11] : turned_over(a[LEVEL - 1]);
#pragma unroll
    for (int b = 0; b < (LEVEL == 16 ? 14 : LEVEL); ++b) {
      store_pair(to, to1, have0, have1, b, b == 0 ? sign : a[b - 1] ^ sign);
    }
  }
  KVZ_DEV void store(uint16_t* to, const uint32_t (&a)[16]) const {
    if (level == 8) {
      store_level<8>(to, a);
    } else if (level == 12) {
      store_level<12>(to, a);
    } else {
      store_level<16>(to, a);
    }
  }
};

// One bound for the page.
template <int DTYPE>
struct FixedCoder : FixedPlanes<DTYPE> {
  float bound, inverse;
  float finer;  // lane w: 1 / S for width w

  KVZ_DEV FixedCoder(float page_bound, uint32_t lane) : bound(page_bound) {
    inverse = inverse_step(step_of<DTYPE>(KVZ_PLAIN, 0, bound));
    finer = inverse_step(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(lane & 15u), bound));
  }

  KVZ_DEV bool fits(float least, float most) const { return quantisable<DTYPE>(least, most, bound, inverse); }

  // Width of a group between two extremes, all quantisable.
  KVZ_DEV uint32_t width(float low, float high) const {
    const int32_t top = top_bit(widest_code(low, high, inverse));
    const uint32_t less = static_cast<uint32_t>(top > 0 ? top : 0);
    const float step = __shfl_sync(kAllLanes, finer, static_cast<int>(less));
    return (widest_code(low, high, step) >> less) == 0 ? less : static_cast<uint32_t>(top + 1);
  }

  // Classes of a lane's two groups of strip `index`, whose column and extremes these are.
  KVZ_DEV uint32_t classes(uint32_t, const uint32_t*, uint32_t low, uint32_t high, bool&) const {
    const uint32_t w0 = width(widen<DTYPE>(low), widen<DTYPE>(high));
    const uint32_t w1 = width(widen_high<DTYPE>(low), widen_high<DTYPE>(high));
    return w0 | w1 << 4;
  }

  KVZ_DEV void planes(uint32_t, uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    const float inverse0 = __shfl_sync(kAllLanes, finer, static_cast<int>(c & 15u));
    const float inverse1 = __shfl_sync(kAllLanes, finer, static_cast<int>(c >> 4));
    this->planes_with(
        c, column, a, [&](int) { return this->same(inverse0); }, [&](int) { return this->same(inverse1); });
  }
};

// A bound for each channel.
template <int DTYPE>
struct ChannelCoder : FixedPlanes<DTYPE> {
  const float* channels;
  const Strips& strips;
  uint32_t lane;

  KVZ_DEV ChannelCoder(const float* bounds, const Strips& page, uint32_t own)
      : channels(bounds), strips(page), lane(own) {}

  KVZ_DEV float2 bounds_at(uint32_t index) const {
    const uint32_t channel = strip_at(strips, index).channel + lane * 2;
    float2 b;
    b.x = b.y = 1.0f;
    if (channel < strips.channels) {
      b.x = channels[channel];
      b.y = channels[channel + 1];
    }
    return b;
  }

  KVZ_DEV static uint32_t width(float low, float high, float bound, bool& bad) {
    const float inverse = inverse_of_power(bound);
    bad = bad || !(bound >= kLeastBound && bound <= kLargestBound) || !quantisable<DTYPE>(low, high, bound, inverse);
    const int32_t top = top_bit(widest_code(low, high, inverse));
    const uint32_t less = static_cast<uint32_t>(top > 0 ? top : 0) & 15u;
    const float finer = reciprocal(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(less), bound));
    return (widest_code(low, high, finer) >> less) == 0 ? less : (less + (top >= 0 ? 1u : 0u)) & 15u;
  }
  KVZ_DEV uint32_t classes(uint32_t index, const uint32_t*, uint32_t low, uint32_t high, bool& bad) const {
    const float2 b = bounds_at(index);
    return width(widen<DTYPE>(low), widen<DTYPE>(high), b.x, bad) |
           width(widen_high<DTYPE>(low), widen_high<DTYPE>(high), b.y, bad) << 4;
  }

  KVZ_DEV void planes(uint32_t index, uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    const float2 b = bounds_at(index);
    const float inverse0 = reciprocal(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(c & 15u), b.x));
    const float inverse1 = reciprocal(step_of<DTYPE>(KVZ_FIXED, static_cast<int>(c >> 4), b.y));
    this->planes_with(
        c, column, a, [&](int) { return this->same(inverse0); }, [&](int) { return this->same(inverse1); });
  }
};

// A bound for each token and head.
template <int DTYPE>
struct TokenCoder : FixedPlanes<DTYPE> {
  const float* inverses;   // as in Team
  const uint32_t* bounds;  // as in Team
  const Strips& strips;
  uint32_t lane;

  KVZ_DEV TokenCoder(const Team& team, const Strips& page)
      : inverses(team.inverses), bounds(team.bounds), strips(page), lane(team.lane) {}

  // Number of the 16 tokens of a head that a lane's groups of a strip are of.
  KVZ_DEV uint32_t tokens_at(uint32_t index) const {
    const Strip at = strip_at(strips, index);
    const uint32_t channel = at.channel + lane * 2 < strips.channels ? at.channel + lane * 2 : at.channel;
    const uint32_t head = (strips.head_dim & (strips.head_dim - 1)) == 0
                              ? channel >> (31 - __clz(static_cast<int>(strips.head_dim)))
                              : channel / strips.head_dim;
    return at.row * (strips.channels / strips.head_dim) + head;
  }
  // Significant bits of the step of a width.
  KVZ_DEV static uint32_t bits_of_width(uint32_t width) {
    constexpr uint32_t p = Traits<DTYPE>::kSignificant + 1;
    const uint32_t n = width < p ? p - width : 1;
    return n < kTokenSteps ? n : kTokenSteps;
  }
  KVZ_DEV static uint32_t row_of_width(uint32_t width) { return token_row_at(bits_of_width(width) - 1); }

  // Least and largest of the values of both groups over their steps.
  KVZ_DEV static void extremes(const uint32_t* column, const float* row0, const float* row1, float (&low)[2],
                               float (&high)[2]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 i0 = reinterpret_cast<const float4*>(row0)[q], i1 = reinterpret_cast<const float4*>(row1)[q];
      const float inverse0[4] = {i0.x, i0.y, i0.z, i0.w}, inverse1[4] = {i1.x, i1.y, i1.z, i1.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t x = column[(q * 4 + j) * 32];
        const float v0 = widen<DTYPE>(x) * inverse0[j], v1 = widen_high<DTYPE>(x) * inverse1[j];
        low[0] = q + j == 0 ? v0 : fminf(low[0], v0);
        high[0] = q + j == 0 ? v0 : fmaxf(high[0], v0);
        low[1] = q + j == 0 ? v1 : fminf(low[1], v1);
        high[1] = q + j == 0 ? v1 : fmaxf(high[1], v1);
      }
    }
  }
  // Does a strip need the extremes of the products themselves? A width of 2 with a bound of 30 / 16: -2.5 steps become
  // 3 codes.
  KVZ_DEV bool is_apart(const uint32_t* words, uint32_t less0, uint32_t less1) const {
    const uint32_t least = less0 < less1 ? less0 : less1, most = less0 > less1 ? less0 : less1;
    if (__any_sync(kAllLanes, least < 2 || most > 7)) return true;
    return __any_sync(kAllLanes, least == 2) && __any_sync(kAllLanes, (words[lane & 15u] & 0x78u) == 0x70u);
  }

  KVZ_DEV uint32_t classes(uint32_t index, const uint32_t* column, uint32_t, uint32_t, bool& bad) const {
    const uint32_t tokens = tokens_at(index);
    const float* const rows = inverses + tokens * kTokenRows;
    const uint32_t* const words = bounds + tokens * 16;
    uint32_t x[16];
    float low[2], high[2];
    if (DTYPE == KVZ_BF16) {
#pragma unroll
      for (int t = 0; t < 16; ++t) x[t] = column[t * 32];
      extremes_of_powers(x, words, low, high);
    } else {
      extremes(column, rows, rows, low, high);
    }
    uint32_t less[2], more[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float largest = -low[h] > high[h] ? -low[h] : high[h];
      bad = bad || !(largest < static_cast<float>(Traits<DTYPE>::kMaxCode) + 0.5f);
      const int32_t top = top_bit(widest_code(low[h], high[h], 1.0f));
      less[h] = static_cast<uint32_t>(top > 0 ? top : 0) & 15u;
      more[h] = static_cast<uint32_t>(top + 1) & 15u;
    }
    if (DTYPE == KVZ_BF16 && !is_apart(words, less[0], less[1])) {
      const uint32_t exceeded =
          codes_exceed(x, words, bits_of_width(less[0]), bits_of_width(less[1]), less[0], less[1]);
      return (exceeded & 0x8000u ? more[0] : less[0]) | (exceeded & 0x80000000u ? more[1] : less[1]) << 4;
    }
    extremes(column, rows + row_of_width(less[0]), rows + row_of_width(less[1]), low, high);
    uint32_t c = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      c |= ((widest_code(low[h], high[h], 1.0f) >> less[h]) == 0 ? less[h] : more[h]) << (4 * h);
    }
    return c;
  }

  KVZ_DEV void planes(uint32_t index, uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    const float* const rows = inverses + tokens_at(index) * kTokenRows;
    const float4* const row0 = reinterpret_cast<const float4*>(rows + row_of_width(c & 15u));
    const float4* const row1 = reinterpret_cast<const float4*>(rows + row_of_width(c >> 4));
    this->planes_with(c, column, a, [&](int q) { return row0[q]; }, [&](int q) { return row1[q]; });
  }
};

// The lossless coding. A class holds the widths of both groups and their bases.
template <int DTYPE>
struct LosslessCoder {
  uint32_t largest;  // exponent of the page
  static constexpr uint32_t kCoding = KVZ_LOSSLESS;
  static constexpr int kFraction = Traits<DTYPE>::kFraction;

  KVZ_DEV explicit LosslessCoder(uint32_t exponent) : largest(exponent) {}

  KVZ_DEV static uint32_t class_bytes(uint32_t groups) { return groups; }

  // From the extremes of the magnitudes.
  KVZ_DEV uint32_t classes(uint32_t, const uint32_t*, uint32_t least, uint32_t most, bool&) const {
    uint32_t c = 0;
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t top = exponent_of<DTYPE>(most >> (16 * h)), bottom = exponent_of<DTYPE>(least >> (16 * h));
      const uint32_t gap = largest - top, base = gap < 15 ? gap : 15;
      c |= static_cast<uint32_t>(bit_length(largest - base - bottom)) << (4 * h) | base << (8 + 4 * h);
    }
    return c;
  }

  uint32_t width0, width1;
  KVZ_DEV uint32_t begin(uint32_t c) {
    width0 = kFraction + 1 + (c & 15u);
    width1 = kFraction + 1 + ((c >> 4) & 15u);
    return width0 + width1;
  }
  KVZ_DEV void planes(uint32_t, uint32_t c, const uint32_t* column, uint32_t (&a)[16]) {
    begin(c);
    const uint32_t top =
        low_half((largest - ((c >> 8) & 15u)) << kFraction, (largest - ((c >> 12) & 15u)) << kFraction);
    // Exponents are subtracted, sign and fraction come out turned over, and nothing is borrowed: no exponent is above
    // its group's top.
    const uint32_t all = top | 0x80008000u | ((1u << kFraction) - 1u) * 0x00010001u;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint32_t x = all - column[t * 32], y = all - column[(t + 8) * 32];
      a[t] = __byte_perm(x, y, 0x6240);
      a[t + 8] = __byte_perm(x, y, 0x7351);
    }
    transpose_8(a);
    transpose_8(a + 8);
  }
  KVZ_DEV void store(uint16_t* to, const uint32_t (&a)[16]) const {
    uint16_t* const to1 = to + width0;
    const uint32_t have0 = (1u << width0) - 1u, have1 = (1u << width1) - 1u;
    if (width0 != 0) {
#pragma unroll
      for (int b = 0; b <= kFraction; ++b) {
        const uint32_t word = ~(b < kFraction ? a[b] : a[15]);
        to[b] = static_cast<uint16_t>(word);
        to1[b] = static_cast<uint16_t>(word >> 16);
      }
    }
#pragma unroll
    for (int b = kFraction + 1; b < 16; ++b) store_pair(to, to1, have0, have1, b, a[b - 1]);
  }
};

// Classes of a strip in shared memory.
template <class Coder>
KVZ_DEV void store_classes(uint8_t* out, uint32_t groups, uint32_t first, uint32_t c) {
  out[first / 2] = static_cast<uint8_t>(c);
  if (Coder::kCoding == KVZ_LOSSLESS) out[groups / 2 + first / 2] = static_cast<uint8_t>(c >> 8);
}
template <class Coder>
KVZ_DEV uint32_t load_classes(const uint8_t* out, uint32_t groups, uint32_t first) {
  uint32_t c = out[first / 2];
  if (Coder::kCoding == KVZ_LOSSLESS) c |= static_cast<uint32_t>(out[groups / 2 + first / 2]) << 8;
  return c;
}

// Words of a page whose classes are in place, in place of the strips. Words follow the classes and reach only strips
// that were packed before, or at the same time: those are in registers, once all warps have met.
template <class Coder>
KVZ_DEV void pack_page(Coder& coder, const Team& team, const Strips& strips, const Prefix& prefix, uint32_t groups,
                       uint32_t scale_bytes) {
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;
  const uint32_t warp = team.warp, warps = team.warps, lane = team.lane;
  const uint32_t count = strips.count, rounds = (count + warps - 1) / warps;
  const uint32_t class_end = scale_bytes + Coder::class_bytes(groups);
  const uint32_t strips_at = static_cast<uint32_t>(input - out);
  uint32_t read_until = strips_at;  // all warps have read the strips before
  for (uint32_t k = 0; k < rounds; k += 2) {
    uint32_t c[2], words[2];
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t index = (k + j) * warps + warp;
      const Groups at = groups_at(strips, index, lane);
      const bool inside = index < count && at.inside;
      c[j] = inside ? load_classes<Coder>(out + scale_bytes, groups, at.first) : 0u;
      words[j] = inside ? coder.begin(c[j]) : 0u;
    }
    const uint32_t both = words[0] | words[1] << 16, before = inclusive_sum(both, lane) - both;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      if (k + j >= rounds) break;
      const uint32_t index = (k + j) * warps + warp, next = (k + j + 1) * warps;
      const bool busy = index < count;
      const uint32_t start = words_before(prefix, index, lane) + ((before >> (16 * j)) & 0xffffu);
      uint32_t a[16];
      if (busy) coder.planes(index, c[j], column_of(input, index, lane), a);
      const uint32_t end = (class_end + 2 * words_before(prefix, next, lane) + 15) & ~15u;
      if (end > read_until) {
        sync_team(team);
        read_until = strips_at + next * kStripBytes;
      }
      if (busy) {
        if (words[j] == 0) coder.width0 = coder.width1 = 0;
        coder.store(reinterpret_cast<uint16_t*>(out + class_end) + start, a);
      }
    }
  }
}

constexpr uint32_t kBatch = 4;  // strips of a warp whose extremes stay in registers

enum Coding { kFixedByPage, kFixedByToken, kFixedByChannel, kLossless };

constexpr uint32_t kTooManyWords = 1u << 20;  // of a strip with a group that cannot be quantised

// A page in the coding of a coder, or nothing, and false, when it is one for encode_any, which finds the page as it
// was.
template <int DTYPE, Coding CODING>
KVZ_DEV bool encode_page_of(TileShared& tile_shared, const Team& team, const kvz_segment& segment,
                            const Strips& strips) {
  using Coder = std::conditional_t<
      CODING == kFixedByPage, FixedCoder<DTYPE>,
      std::conditional_t<CODING == kFixedByToken, TokenCoder<DTYPE>,
                         std::conditional_t<CODING == kFixedByChannel, ChannelCoder<DTYPE>, LosslessCoder<DTYPE>>>>;
  constexpr bool kQuantised = CODING != kLossless;
  constexpr bool kByGroup = CODING != kFixedByToken;  // the extremes of a group are enough to tell its class
  constexpr uint32_t kInfinity = Traits<DTYPE>::kInfinity, kInfinity2 = kInfinity * 0x00010001u;
  constexpr uint32_t kMask = kQuantised ? 0xffffffffu : 0x7fff7fffu;
  TeamShared& shared = *team.shared;
  const uint32_t thread = team.thread, lane = team.lane, warp = team.warp, warps = team.warps;
  const uint32_t count = strips.count;
  const uint32_t groups = segment.tokens / 16 * strips.channels, raw_bytes = groups * 32;
  const uint32_t scale_bytes = CODING == kFixedByToken ? team.scale_bytes : 0u;
  uint8_t* const out = team.out;
  const uint8_t* const input = team.input;

  // The least values of a warp's first strips stay in registers, the largest in team.states: there are not registers
  // for both. Larger pages are looked at twice.
  uint32_t low[kBatch] = {};
  uint32_t page_low = kInfinity2, page_high = kInfinity2 | 0x80008000u;
  const bool about = CODING == kFixedByToken && sum_channels(strips.head_dim) == kStripChannels;
  if (about) {
    about_squares_of_team<DTYPE>(team, count, page_low, page_high);
  } else {
    const auto look_at = [&](uint32_t index, uint32_t& least, uint32_t& most) {
      column_extremes<DTYPE>(column_of(input, index, lane), kMask, least, most);
      if (!groups_at(strips, index, lane).inside) return;
      page_low = min2<DTYPE>(page_low, least);
      page_high = max2<DTYPE>(page_high, most);
    };
    if constexpr (kByGroup) {
#pragma unroll
      for (uint32_t j = 0; j < kBatch; ++j) {
        const uint32_t index = j * warps + warp;
        if (index >= count) break;
        uint32_t most;
        look_at(index, low[j], most);
        team.states[index * kWarp + lane] = most;
      }
    }
#pragma unroll 1
    for (uint32_t index = (kByGroup ? kBatch : 0u) * warps + warp; index < count; index += warps) {
      uint32_t least, most;
      if constexpr (kByGroup) {
        look_at(index, least, most);
      } else {
        row_extremes<DTYPE>(strips, input, index, lane, page_low, page_high);
      }
    }
  }
  {
    const int32_t low0 = key_16(page_low), low1 = key_16(page_low >> 16);
    const int32_t high0 = key_16(page_high), high1 = key_16(page_high >> 16);
    const int32_t least = __reduce_min_sync(kAllLanes, low0 < low1 ? low0 : low1);
    const int32_t most = __reduce_max_sync(kAllLanes, high0 > high1 ? high0 : high1);
    if (lane == 0) {
      shared.low[warp] = least;
      shared.high[warp] = most;
    }
  }
  sync_team(team);
  const uint32_t slot = lane < warps && lane < count ? lane : 0;
  const int32_t low_key = __reduce_min_sync(kAllLanes, shared.low[slot]);
  const int32_t high_key = __reduce_max_sync(kAllLanes, shared.high[slot]);
  if (low_key <= key_16(kInfinity | 0x8000u) || high_key >= key_16(kInfinity) || low_key == high_key) return false;

  const uint32_t low_bits = value_of_key_16(low_key), high_bits = value_of_key_16(high_key);
  float bound = 0.0f;
  uint32_t param = 0;
  if constexpr (CODING == kFixedByPage) {
    bound = page_bound(segment.bound_kind, segment.bound, widen<DTYPE>(low_bits), widen<DTYPE>(high_bits));
  } else if constexpr (CODING == kFixedByToken) {
    const uint32_t low_magnitude = low_bits & 0x7fffu, high_magnitude = high_bits & 0x7fffu;
    const uint32_t magnitude = low_magnitude > high_magnitude ? low_magnitude : high_magnitude;
    const float scale = square_scale<DTYPE>(exponent_of<DTYPE>(magnitude));
    if (!about) {
      square_sums_of_team<DTYPE>(team, strips, scale, true);
      sync_team(team);
    }
    const Largest found = token_bounds_of_team<DTYPE, true>(team, strips, segment.bound, scale, about);
    bound = found.bound;
    if (!found.usable || !(widen<DTYPE>(magnitude) + bound <= Traits<DTYPE>::to_float(Traits<DTYPE>::kMaxFinite)))
      return false;
  } else if constexpr (CODING == kFixedByChannel) {
    bound = channel_bounds_of_team(team, reinterpret_cast<const float*>(segment.channel_bounds), strips.channels);
  } else {
    param = exponent_of<DTYPE>(static_cast<uint32_t>(high_key));
  }
  if (kQuantised && !(bound > 0.0f)) return false;
  Coder coder = [&] {
    if constexpr (CODING == kFixedByPage) {
      return FixedCoder<DTYPE>(bound, lane);
    } else if constexpr (CODING == kFixedByToken) {
      return TokenCoder<DTYPE>(team, strips);
    } else if constexpr (CODING == kFixedByChannel) {
      return ChannelCoder<DTYPE>(reinterpret_cast<const float*>(segment.channel_bounds), strips, lane);
    } else {
      return LosslessCoder<DTYPE>(param);
    }
  }();
  if constexpr (CODING == kFixedByPage) {
    if (!coder.fits(widen<DTYPE>(low_bits), widen<DTYPE>(high_bits))) return false;
  }

  const auto classify = [&](uint32_t index, uint32_t least, uint32_t most) {
    const Groups at = groups_at(strips, index, lane);
    bool bad = false;
    const uint32_t c = coder.classes(index, column_of(input, index, lane), least, most, bad);
    uint32_t words = 0;
    if (at.inside) {
      store_classes<Coder>(out + scale_bytes, groups, at.first, c);
      words = coder.begin(c);
    }
    words = __reduce_add_sync(kAllLanes, words);
    if (CODING == kFixedByToken || CODING == kFixedByChannel) {
      if (__any_sync(kAllLanes, bad && at.inside)) words = kTooManyWords;
    }
    if (lane == 0) team.words[index] = words;
  };
  if constexpr (kByGroup) {
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t index = j * warps + warp;
      if (index >= count) break;
      classify(index, low[j], team.states[index * kWarp + lane]);
    }
  }
#pragma unroll 1
  for (uint32_t index = (kByGroup ? kBatch : 0u) * warps + warp; index < count; index += warps) {
    uint32_t least = 0, most = 0;
    if (kByGroup) column_extremes<DTYPE>(column_of(input, index, lane), kMask, least, most);
    classify(index, least, most);
  }
  sync_team(team);
  const Prefix prefix = prefix_of(team.words, count, lane);
  const uint32_t size = scale_bytes + Coder::class_bytes(groups) + 2 * prefix.total;
  // A quantised candidate that is not small enough has a lossless one beside it.
  if (kQuantised ? static_cast<uint64_t>(size) * 8 > static_cast<uint64_t>(raw_bytes) * 5 : size >= raw_bytes) {
    return false;
  }
  constexpr uint32_t kSteps = CODING == kFixedByToken     ? static_cast<uint32_t>(KVZ_STEPS_TOKEN)
                              : CODING == kFixedByChannel ? static_cast<uint32_t>(KVZ_STEPS_CHANNEL)
                                                          : 0u;
  announce(tile_shared, team,
           make_entry(segment, size, static_cast<uint8_t>(Coder::kCoding | kSteps), bound, param, KVZ_AS_ASKED));
  if (CODING == kFixedByToken) put_team_scales(team, strips, bound);
  pack_page(coder, team, strips, prefix, groups, scale_bytes);
  if (thread < units_of(size) * 16 - size) out[size + thread] = 0;
  return true;
}

// The next tile of this CTA. By one warp; the others see it after a barrier.
KVZ_DEV void take_tile(const EncodeParams& p, Tile& tile, uint32_t lane) {
  uint32_t index = 0;
  if (lane == 0) index = atomicAdd(&p.counters->ticket, 1u);
  index = __shfl_sync(kAllLanes, index, 0);
  if (index >= p.num_blocks * p.tiles) {
    if (lane == 0) tile.pages = 0;
    return;
  }
  const uint32_t block = index / p.tiles, within = index - block * p.tiles, first = within * p.teams;
  const uint32_t left = p.num_segments - first, pages = left < p.teams ? left : p.teams;
  const uint64_t* const from = reinterpret_cast<const uint64_t*>(p.segments + first);
  for (uint32_t i = lane; i < pages * (sizeof(kvz_segment) / 8); i += kWarp) {
    reinterpret_cast<uint64_t*>(tile.segments)[i] = from[i];
  }
  if (lane == 0) {
    tile.index = index;
    tile.block = block;
    tile.within = within;
    tile.pages = pages;
    tile.block_id = p.block_ids[block];
  }
}

// What one warp does for the teams of a CTA.
KVZ_DEV void control_encode(const EncodeParams& p, TileShared& shared, uint32_t lane) {
  const Tile& tile = shared.tile;
  take_tile(p, shared.tile, lane);
  meet();
  while (tile.pages != 0) {
    meet();  // all teams have announced
    const uint32_t pages = tile.pages, index = tile.index, block = tile.block, within = tile.within;
    kvz_entry entry = {};
    if (lane < pages) entry = shared.entries[lane];
    const uint32_t units = units_of(entry.size), sum = inclusive_sum(units, lane);
    const uint32_t total = __shfl_sync(kAllLanes, sum, 31);
    if (lane == 0) publish_size(p, index, block, within, total);
    const Place at = place(p, index, block, within, total, lane);
    if (lane < pages) {
      const uint32_t page = block * p.num_segments + within * p.teams + lane;
      shared.destinations[lane] = place_page(p, at, sum - units, page, entry);
    }
    meet();
    // Not before the teams are ready for it: whoever has a later tile waits until this one has been looked at.
    take_tile(p, shared.tile, lane);
    meet();
  }
}

// What a team does, tile after tile.
template <int DTYPE, bool WITHIN>
KVZ_DEV void encode_tiles(const EncodeParams& p, uint8_t* memory) {
  TileShared& shared = *reinterpret_cast<TileShared*>(memory);
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x);
  const Tile& tile = shared.tile;
  meet();
  while (tile.pages != 0) {
    const uint32_t index = warp / p.team_warps;
    if (index >= tile.pages) {
      for (int meeting = 0; meeting < 3; ++meeting) meet();
      continue;
    }
    const kvz_segment segment = tile.segments[index];
    const Strips strips = strips_of(segment, tile.block_id);
    const Team team = team_of(p, memory, segment, strips.count);
    fetch_strips(strips, team.input, team.warp, team.warps, lane);
    copy_async_wait();
    __syncwarp();

    bool encoded = false;
    const bool lossy = segment.coding != KVZ_LOSSLESS && segment.bound_kind != KVZ_BOUND_LOSSLESS;
    if (segment.coding == KVZ_FIXED && lossy) {
      if (WITHIN && segment.bound_kind == KVZ_BOUND_TOKEN_RMS) {
        encoded = encode_page_of<DTYPE, kFixedByToken>(shared, team, segment, strips);
      } else if (WITHIN && segment.bound_kind == KVZ_BOUND_CHANNEL_TABLE) {
        encoded = encode_page_of<DTYPE, kFixedByChannel>(shared, team, segment, strips);
      } else {
        encoded = encode_page_of<DTYPE, kFixedByPage>(shared, team, segment, strips);
      }
    } else if (segment.coding != KVZ_RAW && !lossy) {
      encoded = encode_page_of<DTYPE, kLossless>(shared, team, segment, strips);
    }
    if (!encoded) {
      sync_team(team);  // some may still look at what the others left in shared memory
      encode_any<DTYPE, WITHIN>(p, memory);
    }
    meet();  // the controller knows where to

    const uint64_t destination = shared.destinations[index];
    if (destination != ~0ull) {
      const uint32_t units = units_of(shared.entries[index].size);
      uint4* const to = reinterpret_cast<uint4*>(p.arena) + destination;
      if (shared.entries[index].coding == KVZ_RAW) {
        const uint32_t chunks = strips.channels / 8;  // of a token
        for (uint32_t i = team.thread; i < units; i += team.threads) {
          const uint32_t token = i / chunks, chunk = i - token * chunks;
          const uint32_t strip = token / 16 * strips.per_row + chunk / 8;
          to[i] = *reinterpret_cast<const uint4*>(team.input + strip * kStripBytes + token % 16 * 128 + chunk % 8 * 16);
        }
      } else {
        for (uint32_t i = team.thread; i < units; i += team.threads) {
          to[i] = reinterpret_cast<const uint4*>(team.out)[i];
        }
      }
    }
    meet();  // the controller has the next tile
  }
}

// `WITHIN`: some pages have bounds that differ within them.
template <int DTYPE, bool WITHIN>
KVZ_DEV void encode_fast(const EncodeParams& p, uint8_t* memory) {
  TileShared& shared = *reinterpret_cast<TileShared*>(memory);
  const uint32_t lane = lane_of(threadIdx.x), warp = warp_of(threadIdx.x);
#if defined(KVZ_RACECHECK)
  if (threadIdx.x < p.teams) {
    uint8_t* const team = memory + kTileSharedBytes + threadIdx.x * p.team_bytes;
    make_barrier(&reinterpret_cast<TeamShared*>(team)->barrier, p.team_warps * kWarp);
  }
  __syncthreads();
#endif
  if (warp == p.teams * p.team_warps) {
    control_encode(p, shared, lane);
  } else {
    encode_tiles<DTYPE, WITHIN>(p, memory);
  }
  finish_encode(p, shared.last);
}

}  // namespace gpu
}  // namespace kvz
