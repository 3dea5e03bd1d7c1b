// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// Bounds that differ within a page, by token and head or by channel: every value has a step of its own. Part of
// cpu_kernels.inl. A row of a tile is 32 lanes of 32 bits here, in loops that the compiler turns into vectors.

// ---- bounds of a tile -----------------------------------------------------------------------------

// Where the bounds of a page come from: `steps` says, and what does not apply is null.
struct BoundSource {
  uint8_t steps;
  float page;             // KVZ_STEPS_PAGE
  const float* vectors;   // KVZ_STEPS_TOKEN: tokens x heads
  const float* channels;  // KVZ_STEPS_CHANNEL: heads x head_dim
  float missing;          // what stands for a channel's bound that is not in the format's range
};

constexpr float kNoBound = __builtin_nanf("");  // `missing` of an encoder: the channel's groups become raw

KVZ_INLINE float usable(float bound, float missing) {
  return bound >= kLeastBound && bound <= kLargestBound ? bound : missing;
}

struct TileBounds {
  alignas(64) float row[KVZ_GROUP_VALUES][kTile];
};

// The bound of every place of a tile; places outside of the page get that of the nearest inside.
KVZ_NOINLINE void tile_bounds(const Geometry& geo, const BoundSource& source, uint32_t r, uint32_t j,
                              TileBounds& bounds) {
  if (source.steps == KVZ_STEPS_PAGE) {
    for (int i = 0; i < kValues; ++i) {
      for (int k = 0; k < kTile; ++k) bounds.row[i][k] = source.page;
    }
    return;
  }
  for (uint32_t a = 0; a < geo.a; ++a) {
    uint32_t channel[kTile];
    for (uint32_t k = 0; k < kTile; ++k) channel[k] = least((j + k) * geo.a + a, geo.channels - 1);
    if (source.steps == KVZ_STEPS_CHANNEL) {
      float* row = bounds.row[a * geo.g];
      for (int k = 0; k < kTile; ++k) row[k] = usable(source.channels[channel[k]], source.missing);
      for (uint32_t t = 1; t < geo.g; ++t) memcpy(bounds.row[a * geo.g + t], row, sizeof bounds.row[0]);
      continue;
    }
    const uint32_t first = channel[0] / geo.page.head_dim, last = channel[kTile - 1] / geo.page.head_dim;
    if (first != last) {
      for (uint32_t k = 0; k < kTile; ++k) channel[k] /= geo.page.head_dim;
    }
    for (uint32_t t = 0; t < geo.g; ++t) {
      const uint32_t token = least(r * geo.g + t, geo.page.tokens - 1);
      const float* vectors = source.vectors + static_cast<uint64_t>(token) * geo.page.heads;
      float* row = bounds.row[a * geo.g + t];
      if (first == last) {
        for (int k = 0; k < kTile; ++k) row[k] = vectors[first];
      } else {
        for (int k = 0; k < kTile; ++k) row[k] = vectors[channel[k]];
      }
    }
  }
}

// 1/S at the power-of-two step: S = 2 trunc_1(B). 0 for a vector of zeros.
KVZ_INLINE float inverse_coarse(float bound) {
  const uint32_t exponent = bits_of(bound) & 0x7f800000u;
  return exponent == 0 ? 0.0f : float_of((253u << 23) - exponent);
}

// ---- quantising -----------------------------------------------------------------------------------

template <int DTYPE>
struct TileValues {
  alignas(64) float row[KVZ_GROUP_VALUES][kTile];
};

// The values of a tile; places outside of the page are 0.
template <int DTYPE>
KVZ_NOINLINE void tile_values(const Tile<typename Traits<DTYPE>::word>& tile, TileValues<DTYPE>& values) {
  using Word = typename Traits<DTYPE>::word;
  for (int i = 0; i < kValues; ++i) {
    Word words[kTile];
    memcpy(words, tile.row(i), sizeof words);
    for (int k = 0; k < kTile; ++k) values.row[i][k] = Traits<DTYPE>::to_float(words[k]);
    if (!tile.whole) {
      for (int k = tile.valid[i]; k < kTile; ++k) values.row[i][k] = 0.0f;
    }
  }
}

struct TileCodes {
  alignas(64) uint32_t row[KVZ_GROUP_VALUES][kTile];
};

// Zigzag codes of the values times `inverse`, or of the differences along `length` values.
template <int DTYPE, bool DELTA, class Inverse>
KVZ_INLINE void quantise_values(const TileValues<DTYPE>& values, uint32_t length, Inverse inverse, TileCodes& codes) {
  alignas(64) uint32_t before[kTile] = {};
  for (int i = 0; i < kValues; ++i) {
    const bool chained = DELTA && i % length != 0;
    for (int k = 0; k < kTile; ++k) {
      const uint32_t q = bits_of(values.row[i][k] * inverse(i, k) + kRounding) - bits_of(kRounding);
      const uint32_t d = chained ? q - before[k] : q;
      if (DELTA) before[k] = q;
      codes.row[i][k] = zigzag(static_cast<int32_t>(d));
    }
  }
}

// Codes of `fixed` at the steps of the widths of the lanes.
template <int DTYPE>
KVZ_NOINLINE void quantise_at(const TileValues<DTYPE>& values, const TileBounds& bounds, const int32_t* width,
                              bool alike, TileCodes& codes) {
  if (alike) {  // all rows have the same bounds
    alignas(64) float inverse[kTile];
    for (int k = 0; k < kTile; ++k) {
      const float bound = bounds.row[0][k];
      inverse[k] = bound > 0.0f ? inverse_step(step_of<DTYPE>(KVZ_FIXED, width[k], bound)) : 0.0f;
    }
    quantise_values<DTYPE, false>(values, 1, [&](int, int k) { return inverse[k]; }, codes);
    return;
  }
  quantise_values<DTYPE, false>(
      values, 1,
      [&](int i, int k) {
        const float bound = bounds.row[i][k];
        return bound > 0.0f ? inverse_step(step_of<DTYPE>(KVZ_FIXED, width[k], bound)) : 0.0f;
      },
      codes);
}

template <int DTYPE, bool DELTA>
KVZ_NOINLINE void quantise_coarse(const TileValues<DTYPE>& values, const TileBounds& bounds, uint32_t length,
                                  TileCodes& codes) {
  quantise_values<DTYPE, DELTA>(values, length, [&](int i, int k) { return inverse_coarse(bounds.row[i][k]); }, codes);
}

// Lanes that cannot be quantised: a value is not finite, has no usable bound, or is too large for its bound.
template <int DTYPE>
KVZ_NOINLINE void unquantisable(const TileValues<DTYPE>& values, const TileBounds& bounds, uint32_t* bad) {
  const float most = Traits<DTYPE>::to_float(Traits<DTYPE>::kMaxFinite);
  const float room = static_cast<float>(Traits<DTYPE>::kMaxCode) + 0.5f;
  for (int k = 0; k < kTile; ++k) bad[k] = 0;
  for (int i = 0; i < kValues; ++i) {
    for (int k = 0; k < kTile; ++k) {
      const float x = float_of(bits_of(values.row[i][k]) & 0x7fffffffu), bound = bounds.row[i][k];
      bad[k] |=
          static_cast<uint32_t>(!(x + bound <= most)) | static_cast<uint32_t>(!(x * inverse_coarse(bound) < room));
    }
  }
}

KVZ_INLINE void or_codes(const TileCodes& codes, int from, uint32_t* any) {
  for (int k = 0; k < kTile; ++k) any[k] = 0;
  for (int i = from; i < kValues; ++i) {
    for (int k = 0; k < kTile; ++k) any[k] |= codes.row[i][k];
  }
}

KVZ_INLINE void split_codes(const TileCodes& from, Codes& codes) {
  for (int i = 0; i < kValues; ++i) split_row(from.row[i], codes, i);
}

// Classes of a page whose bounds differ within it.
template <int DTYPE, int CODING>
KVZ_NOINLINE void value_classes(const Geometry& geo, const BoundSource& source, uint16_t* classes) {
  using Tr = Traits<DTYPE>;
  constexpr bool delta = CODING != KVZ_FIXED;
  const bool alike = source.steps != KVZ_STEPS_TOKEN && geo.a == 1;
  const uint16_t raw = static_cast<uint16_t>(raw_class(byte_classes(DTYPE, CODING)));
  const uint32_t length = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  Tile<typename Tr::word> tile;
  TileBounds bounds;
  TileValues<DTYPE> values;
  TileCodes codes;
  alignas(64) uint32_t bad[kTile], any[kTile], rest[kTile];
  alignas(64) int32_t width[kTile];
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      read_tile(geo, r, j, tile);
      tile_values<DTYPE>(tile, values);
      tile_bounds(geo, source, r, j, bounds);
      unquantisable<DTYPE>(values, bounds, bad);
      quantise_coarse<DTYPE, delta>(values, bounds, length, codes);
      if (delta && !tile.whole) {  // a place outside of the page has the code 0, not the way back to the value 0
        for (int i = 0; i < kValues; ++i) {
          for (int k = tile.valid[i]; k < kTile; ++k) codes.row[i][k] = 0;
        }
      }
      or_codes(codes, 0, any);
      if (CODING == KVZ_OUTLIER) or_codes(codes, 1, rest);
      for (int k = 0; k < kTile; ++k) width[k] = bit_length(any[k]) - (CODING == KVZ_FIXED && any[k] != 0 ? 1 : 0);
      if (CODING == KVZ_FIXED && DTYPE != KVZ_FP32) {  // a bit less, if the step of that width allows it
        for (int k = 0; k < kTile; ++k) width[k] = bad[k] != 0 ? 0 : width[k];
        quantise_at<DTYPE>(values, bounds, width, alike, codes);
        or_codes(codes, 0, rest);
        for (int k = 0; k < kTile; ++k) width[k] = bit_length(rest[k]) <= width[k] ? width[k] : bit_length(any[k]);
      } else if (CODING == KVZ_FIXED) {
        for (int k = 0; k < kTile; ++k) width[k] = bit_length(any[k]);
      }
      for (uint32_t k = 0; k < tile.count; ++k) {
        const int rest_width = bit_length(rest[k]);
        const bool apart = CODING == KVZ_OUTLIER && rest_width + Tr::kBits / 16 < width[k];
        const int w = apart ? rest_width : width[k];
        *classes++ =
            bad[k] != 0 || w > Tr::kMaxWidth ? raw : static_cast<uint16_t>(w | (apart ? KVZ_BYTE_FIRST_APART : 0u));
      }
    }
  }
}

// Codes of one tile for encode_words.
template <int DTYPE, int CODING>
KVZ_NOINLINE void value_codes(const Geometry& geo, const BoundSource& source, uint32_t r, uint32_t j,
                              const Tile<typename Traits<DTYPE>::word>& tile, const uint16_t* classes, uint32_t length,
                              Codes& codes) {
  TileBounds bounds;
  TileValues<DTYPE> values;
  TileCodes z;
  tile_values<DTYPE>(tile, values);
  tile_bounds(geo, source, r, j, bounds);
  if (CODING == KVZ_FIXED) {
    alignas(64) int32_t width[kTile];
    for (int k = 0; k < kTile; ++k) width[k] = classes[k] & 63;
    quantise_at<DTYPE>(values, bounds, width, source.steps != KVZ_STEPS_TOKEN && geo.a == 1, z);
  } else {
    quantise_coarse<DTYPE, true>(values, bounds, length, z);
  }
  split_codes(z, codes);
}

// Values of one tile for decode_words.
template <int DTYPE, int CODING>
KVZ_NOINLINE void value_tile(const Geometry& geo, const BoundSource& source, uint32_t r, uint32_t j,
                             const uint16_t* classes, const Codes& codes, uint32_t length, const Widths& widths,
                             const int32_t* first, bool apart, Tile<typename Traits<DTYPE>::word>& tile) {
  using Word = typename Traits<DTYPE>::word;
  TileBounds bounds;
  tile_bounds(geo, source, r, j, bounds);
  alignas(64) uint32_t before[kTile] = {};
  alignas(64) int32_t width[kTile];
  for (int k = 0; k < kTile; ++k) width[k] = classes[k] & 63;
  for (int i = 0; i < kValues; ++i) {
    alignas(64) uint32_t q[kTile];
    for (int k = 0; k < kTile; ++k) {
      const uint32_t high = DTYPE == KVZ_FP32 ? static_cast<uint32_t>(codes.half[1][i][k]) << 16 : 0;
      q[k] = static_cast<uint32_t>(unzigzag(codes.half[0][i][k] | high));
    }
    if (CODING == KVZ_OUTLIER && i == 0 && apart) {
      for (int k = 0; k < kTile; ++k) {
        if (widths.apart[k] != 0) q[k] = static_cast<uint32_t>(first[k]);
      }
    }
    if (CODING != KVZ_FIXED) {
      for (int k = 0; k < kTile; ++k) q[k] += i % length != 0 ? before[k] : 0;
      memcpy(before, q, sizeof q);
    }
    Word row[kTile];
    for (int k = 0; k < kTile; ++k) {
      const float step = step_of<DTYPE>(CODING, width[k], bounds.row[i][k]);
      row[k] = static_cast<Word>(Traits<DTYPE>::from_float(static_cast<float>(static_cast<int32_t>(q[k])) * step));
    }
    memcpy(tile.row(i), row, sizeof row);
  }
}

// ---- bounds of tokens -----------------------------------------------------------------------------

// Sum of n numbers as of the leaves of a binary tree, neighbours first, padded with zeros to a power of two.
class TreeSum {
 public:
  void add(float x) {  // the next leaf
    uint64_t n = count_++;
    int level = 0;
    for (; (n & 1u) != 0; n >>= 1) x = partial_[level++] + x;
    partial_[level] = x;
  }
  float total() const {
    float sum = 0.0f;
    for (int level = 0; (count_ >> level) != 0; ++level) {
      if ((count_ >> level & 1u) != 0) sum = partial_[level] + sum;
    }
    return sum;
  }

 private:
  uint64_t count_ = 0;
  float partial_[33];
};

// Bounds of all tokens and heads of a page, their scale bytes, and the largest one; 0 if there is none. A vector of
// zeros gets the bound 0 (every code gives 0), a vector without a usable bound NaN.
template <int DTYPE>
KVZ_NOINLINE float token_bounds(const Geometry& geo, double r, uint32_t page_exponent, Scratch& scratch) {
  using Word = typename Traits<DTYPE>::word;
  constexpr uint32_t kPiece = 16;
  const float scale = square_scale<DTYPE>(page_exponent);
  const uint32_t dim = geo.page.head_dim;
  float* bound = scratch.bounds;
  float largest = 0.0f;
  for (uint32_t t = 0; t < geo.page.tokens; ++t) {
    for (uint32_t h = 0; h < geo.page.heads; ++h) {
      const uint8_t* from = geo.address(t, h * dim, sizeof(Word));
      TreeSum sum;
      uint32_t magnitudes = 0;
      for (uint32_t d = 0; d < dim; d += kPiece) {
        Word words[kPiece] = {};
        memcpy(words, from + static_cast<size_t>(d) * sizeof(Word), least(dim - d, kPiece) * sizeof(Word));
        float s[kPiece];
        for (uint32_t i = 0; i < kPiece; ++i) {
          const uint32_t v = is_finite<DTYPE>(words[i]) ? words[i] : 0;
          const float y = Traits<DTYPE>::to_float(v) * scale;
          magnitudes |= v & kMagnitude<DTYPE>;
          s[i] = y * y;
        }
        for (uint32_t n = kPiece / 2; n > 0; n /= 2) {
          for (uint32_t i = 0; i < n; ++i) s[i] = s[2 * i] + s[2 * i + 1];
        }
        sum.add(s[0]);
      }
      *bound = token_bound(r, sum.total(), dim, scale);
      largest = *bound > largest ? *bound : largest;
      if (magnitudes != 0 && *bound == 0.0f) *bound = float_of(0x7fc00000u);
      if (magnitudes == 0) *bound = 0.0f;
      ++bound;
    }
  }
  const uint64_t vectors = page_vectors(geo.page);
  for (uint64_t i = 0; i < vectors; ++i) {
    float& b = scratch.bounds[i];
    if (b > 0.0f && scale_of(b, largest) > KVZ_SCALE_LARGEST) b = float_of(0x7fc00000u);
    scratch.scales[i] = static_cast<uint8_t>(b > 0.0f ? scale_of(b, largest) : b == 0.0f ? KVZ_SCALE_ZERO : 0u);
  }
  return largest;
}

// The bounds that a segment was coded with.
KVZ_INLINE BoundSource bound_source(const Geometry& geo, uint8_t steps, float page_bound, const uint8_t* scales,
                                    Scratch& scratch) {
  if (steps == KVZ_STEPS_TOKEN) {
    const uint64_t vectors = page_vectors(geo.page);
    for (uint64_t i = 0; i < vectors; ++i) scratch.bounds[i] = bound_of_scale(scales[i], page_bound);
  }
  return {steps, page_bound, scratch.bounds, geo.page.channel_bounds, 0.0f};
}

// The largest usable bound of the channels, for the segment table; 0 if there is none.
KVZ_INLINE float largest_channel_bound(const Geometry& geo) {
  float largest = 0.0f;
  for (uint32_t c = 0; c < geo.channels; ++c) {
    const float b = usable(geo.page.channel_bounds[c], 0.0f);
    largest = b > largest ? b : largest;
  }
  return largest;
}

// The scale bytes of a segment that begins with them.
KVZ_INLINE uint8_t* put_scales(const Geometry& geo, uint64_t prefix, const Scratch& scratch, uint8_t* out) {
  if (prefix > 0) {
    memset(out + prefix - 4, 0, 4);
    memcpy(out, scratch.scales, page_vectors(geo.page));
  }
  return out + prefix;
}
