// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// The codings `rice` and `lossless_rice`: low bits of the codes as bit planes, quotients in unary, one stream a strip.
// Part of cpu_kernels.inl. The codes of a page are kept in the scratch, so that they are made once.

// ---- groups ---------------------------------------------------------------------------------------

// What is known of a group: bits 0 to 4 the Rice parameter (`rice`: the best one, later the one used) or the base plane
// value, bit 6 differences, bit 7 raw.
constexpr uint16_t kRiceDelta = 64, kRiceRaw = 128, kRiceNumber = 31;

KVZ_INLINE uint64_t tiles_of(const Geometry& geo) {
  return static_cast<uint64_t>(geo.rows) * ((geo.columns + kTile - 1) / kTile);
}

KVZ_INLINE TileCodes* kept_codes(Scratch& scratch) { return reinterpret_cast<TileCodes*>(scratch.codes); }

// Codes of a page for `rice`, and the classes of its groups.
template <int DTYPE>
KVZ_NOINLINE void rice_codes(const Geometry& geo, const BoundSource& source, Scratch& scratch) {
  using Tr = Traits<DTYPE>;
  const uint32_t length = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  const bool alike = source.steps != KVZ_STEPS_TOKEN && geo.a == 1;  // one bound a lane
  TileCodes* kept = kept_codes(scratch);
  uint16_t* classes = scratch.classes;
  Tile<typename Tr::word> tile;
  TileBounds bounds;
  TileValues<DTYPE> values;
  alignas(64) uint32_t bad[kTile], any[kTile], plain_sum[kTile], delta_sum[kTile];
  alignas(64) int32_t width[kTile], found[kTile];
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile, ++kept) {
      read_tile(geo, r, j, tile);
      tile_values<DTYPE>(tile, values);
      tile_bounds(geo, source, r, j, bounds);
      unquantisable<DTYPE>(values, bounds, bad);
      TileCodes& codes = *kept;
      quantise_coarse<DTYPE, false>(values, bounds, 1, codes);
      or_codes(codes, 0, any);
      for (int k = 0; k < kTile; ++k) width[k] = bad[k] != 0 ? 0 : bit_length(any[k]);
      if (DTYPE != KVZ_FP32) {  // down to the widest width whose codes have just that width
        for (bool stable = false; !stable;) {
          quantise_at<DTYPE>(values, bounds, width, alike, codes);
          or_codes(codes, 0, any);
          uint32_t changed = 0;
          for (int k = 0; k < kTile; ++k) {
            found[k] = bad[k] != 0 ? 0 : bit_length(any[k]);
            changed |= static_cast<uint32_t>(found[k] ^ width[k]);
            width[k] = found[k];
          }
          stable = changed == 0;
        }
      }
      // Differences where their codes are smaller.
      TileCodes deltas;
      for (int k = 0; k < kTile; ++k) plain_sum[k] = delta_sum[k] = 0;
      for (int i = 0; i < kValues; ++i) {
        const int inside = tile.whole ? kTile : tile.valid[i];
        for (int k = 0; k < kTile; ++k) {
          const uint32_t before =
              i % length != 0 ? static_cast<uint32_t>(unzigzag(codes.row[i - (i % length != 0)][k])) : 0;
          const uint32_t d = zigzag(static_cast<int32_t>(static_cast<uint32_t>(unzigzag(codes.row[i][k])) - before));
          const uint32_t mask = k < inside ? ~0u : 0;
          deltas.row[i][k] = d & mask;
          plain_sum[k] += codes.row[i][k];
          delta_sum[k] += d & mask;
        }
      }
      for (int i = 0; i < kValues; ++i) {
        for (int k = 0; k < kTile; ++k) {
          codes.row[i][k] = delta_sum[k] < plain_sum[k] ? deltas.row[i][k] : codes.row[i][k];
        }
      }
      for (uint32_t k = 0; k < tile.count; ++k) {
        const bool delta = delta_sum[k] < plain_sum[k];
        const int best = rice_parameter(delta ? delta_sum[k] : plain_sum[k]);
        *classes++ =
            bad[k] != 0
                ? kRiceRaw
                : static_cast<uint16_t>((best < Tr::kMaxWidth ? best : Tr::kMaxWidth) | (delta ? kRiceDelta : 0));
      }
    }
  }
}

// Codes of a page for `lossless_rice`: sign and mantissa stay in the page. Returns the page's parameters.
template <int DTYPE>
KVZ_NOINLINE RicePage lossless_rice_codes(const Geometry& geo, Scratch& scratch) {
  using Tr = Traits<DTYPE>;
  using Word = typename Tr::word;
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  TileCodes* kept = kept_codes(scratch);
  uint16_t* classes = scratch.classes;
  Tile<Word> tile;
  uint32_t highest = 0;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile, ++kept) {
      read_tile(geo, r, j, tile);
      alignas(64) uint32_t sum[kTile] = {};
      for (int i = 0; i < kValues; ++i) {
        Word words[kTile];
        memcpy(words, tile.row(i), sizeof words);
        for (int k = 0; k < kTile; ++k) {
          kept->row[i][k] = exponent_of<DTYPE>(words[k]);
          sum[k] += kept->row[i][k];
        }
      }
      for (uint32_t k = 0; k < tile.count; ++k) {
        *classes = static_cast<uint16_t>(rice_base<DTYPE>(sum[k]));
        highest = *classes > highest ? *classes : highest;
        ++classes;
      }
    }
  }
  uint32_t histogram[kRiceBases] = {};
  for (uint64_t i = 0; i < groups; ++i) ++histogram[least(highest - scratch.classes[i], kRiceBases - 1)];
  RicePage page = rice_bases(histogram, groups, highest);
  const uint32_t most = (1u << page.planes) - 1u;
  uint64_t total = 0;
  kept = kept_codes(scratch);
  classes = scratch.classes;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile, ++kept) {
      const uint32_t count = least(kTile, geo.columns - j);
      alignas(64) uint32_t base[kTile] = {};
      for (uint32_t k = 0; k < count; ++k) {
        const uint32_t below = page.base > classes[k] ? page.base - classes[k] : 0;
        classes[k] = static_cast<uint16_t>(least(below, most));
        base[k] = page.base > classes[k] ? page.base - classes[k] : 0;
      }
      const bool whole = geo.page.tokens - r * geo.g >= geo.g && geo.channels - j * geo.a >= count * geo.a;
      for (int i = 0; i < kValues; ++i) {
        for (int k = 0; k < kTile; ++k) kept->row[i][k] = rice_exponent_code(base[k], kept->row[i][k]);
        if (!whole) {
          const uint32_t t = static_cast<uint32_t>(i) % geo.g, a = static_cast<uint32_t>(i) / geo.g;
          for (uint32_t k = 0; k < count; ++k) {
            if (r * geo.g + t >= geo.page.tokens || (j + k) * geo.a + a >= geo.channels) kept->row[i][k] = 0;
          }
        }
        for (uint32_t k = 0; k < count; ++k) total += kept->row[i][k];
      }
      classes += count;
    }
  }
  const uint32_t k = static_cast<uint32_t>(rice_parameter(static_cast<uint32_t>(total / groups)));
  page.least = least(k, KVZ_RICE_MOST_EXPONENT);
  return page;
}

// ---- sizes ----------------------------------------------------------------------------------------

// Set the parameters of all groups, make those raw that would be larger otherwise, and find the lengths of the strips.
// Returns the bytes of the segment without its prefix.
template <int DTYPE, int CODING>
KVZ_NOINLINE uint64_t rice_size(const Geometry& geo, Scratch& scratch, RicePage& page) {
  constexpr uint32_t bits = Traits<DTYPE>::kBits;
  constexpr uint32_t extra = CODING == KVZ_LOSSLESS_RICE ? Traits<DTYPE>::kFraction + 1 : 0;
  const uint32_t most = page.least + (1u << page.planes) - 1u;
  const TileCodes* kept = kept_codes(scratch);
  uint16_t* classes = scratch.classes;
  uint16_t* lengths = scratch.lengths;
  uint64_t words = 0;
  bool any_raw = false;
  for (uint32_t r = 0; r < geo.rows; ++r) {
    uint32_t stream = 0;
    for (uint32_t j = 0; j < geo.columns; j += kTile, ++kept) {
      const uint32_t count = least(kTile, geo.columns - j);
      alignas(64) uint32_t parameter[kTile] = {}, quotients[kTile] = {};
      for (uint32_t k = 0; k < count; ++k) {
        uint32_t p = page.least;
        if (CODING == KVZ_RICE && (classes[k] & kRiceRaw) == 0) {
          p = classes[k] & kRiceNumber;
          p = p < page.least ? page.least : p > most ? most : p;
          classes[k] = static_cast<uint16_t>((classes[k] & ~kRiceNumber) | p);
        }
        parameter[k] = p;
      }
      for (int i = 0; i < kValues; ++i) {
        for (int k = 0; k < kTile; ++k) quotients[k] += kept->row[i][k] >> parameter[k];
      }
      for (uint32_t k = 0; k < count; ++k) {
        const uint32_t unary = quotients[k] + kValues, planes = extra + parameter[k];
        if ((classes[k] & kRiceRaw) != 0 || kValues * planes + unary > kValues * bits) {
          classes[k] = kRiceRaw;
          any_raw = true;
          words += bits;
        } else {
          words += planes;
          stream += unary;
        }
      }
      classes += count;
      if ((j + kTile) % KVZ_STRIP_GROUPS == 0 || j + kTile >= geo.columns) {
        *lengths = static_cast<uint16_t>((stream + 15) / 16);
        words += *lengths++;
        stream = 0;
      }
    }
  }
  page.any_raw = any_raw;
  constexpr bool lossless = CODING == KVZ_LOSSLESS_RICE;
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  return rice_head_bytes(lossless) + rice_plane_bytes(groups) * page.total_planes(lossless) +
         2 * (rice_strips(geo.rows, geo.columns) + words);
}

// The parameters that suit the groups of a page.
KVZ_INLINE RicePage rice_page(uint64_t groups, int most, const uint16_t* classes) {
  uint32_t histogram[kRiceParameters] = {};
  uint32_t raw = 0;
  for (uint64_t i = 0; i < groups; ++i) {
    const uint32_t is_raw = classes[i] >> 7;
    raw += is_raw;
    histogram[classes[i] & kRiceNumber] += 1u - is_raw;
  }
  return rice_window(histogram, groups - raw, most);
}

// What the words of a tile depend on.
template <int DTYPE, int CODING>
KVZ_INLINE void rice_widths(const uint16_t* classes, uint32_t count, uint32_t least_parameter, Widths& widths) {
  constexpr uint32_t extra = CODING == KVZ_LOSSLESS_RICE ? Traits<DTYPE>::kFraction + 1 : 0;
  uint32_t sum = 0, widest = 0, any_raw = 0;
  for (uint32_t k = 0; k < kTile; ++k) {
    const uint32_t c = k < count ? classes[k] : 0;
    const uint32_t coded = extra + (CODING == KVZ_RICE ? c & kRiceNumber : least_parameter);
    const uint32_t n = k >= count ? 0 : (c & kRiceRaw) != 0 ? static_cast<uint32_t>(Traits<DTYPE>::kBits) : coded;
    widths.words[k] = static_cast<uint16_t>(n);
    sum += n;
    widest = n > widest ? n : widest;
    any_raw |= c & kRiceRaw;
  }
  widths.widest = widest;
  widths.bytes = 2 * sum;
  widths.any_raw = any_raw != 0;
  widths.any_apart = false;
}

KVZ_INLINE uint32_t word_at(const uint8_t* words, uint64_t index) {
  uint16_t word;
  memcpy(&word, words + 2 * index, 2);
  return word;
}

// ---- writing --------------------------------------------------------------------------------------

KVZ_NOINLINE uint8_t* put_plane(const uint16_t* classes, uint64_t groups, uint16_t shift, uint8_t* out) {
  for (uint64_t g = 0; g < groups; g += 32) {
    uint32_t word = 0;
    const uint32_t n = groups - g < 32 ? static_cast<uint32_t>(groups - g) : 32;
    for (uint32_t i = 0; i < n; ++i) word |= static_cast<uint32_t>(classes[g + i] >> shift & 1u) << i;
    memcpy(out, &word, 4);
    out += 4;
  }
  return out;
}

class UnaryWriter {
 public:
  explicit UnaryWriter(uint8_t* out) : out_(out) {}
  void put(uint32_t quotient) {
    used_ += quotient;
    while (used_ >= 64) {
      memcpy(out_, &bits_, 8);
      out_ += 8;
      bits_ = 0;
      used_ -= 64;
    }
    bits_ |= 1ull << used_++;
  }
  uint8_t* finish() {
    const size_t bytes = (used_ + 15) / 16 * 2;
    memcpy(out_, &bits_, bytes);
    return out_ + bytes;
  }

 private:
  uint8_t* out_;
  uint64_t bits_ = 0;
  uint32_t used_ = 0;
};

template <int DTYPE, int CODING>
KVZ_NOINLINE void write_rice(const Geometry& geo, const RicePage& page, Scratch& scratch, uint8_t* out,
                             const uint8_t* end) {
  using Word = typename Traits<DTYPE>::word;
  constexpr uint32_t extra = CODING == KVZ_LOSSLESS_RICE ? Traits<DTYPE>::kFraction + 1 : 0;
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  const uint16_t* classes = scratch.classes;
  if (CODING == KVZ_LOSSLESS_RICE) {
    const uint8_t head[4] = {static_cast<uint8_t>(page.least), static_cast<uint8_t>(page.planes),
                             static_cast<uint8_t>(page.any_raw), 0};
    memcpy(out, head, sizeof head);
  }
  out += rice_head_bytes(CODING == KVZ_LOSSLESS_RICE);
  if (page.any_raw) out = put_plane(classes, groups, 7, out);
  if (CODING == KVZ_RICE) out = put_plane(classes, groups, 6, out);
  if (CODING == KVZ_RICE && page.planes > 0) {  // numbers above the least one
    for (uint64_t i = 0; i < groups; ++i) {
      scratch.lossless[i] =
          static_cast<uint16_t>((classes[i] & kRiceRaw) != 0 ? 0 : (classes[i] & kRiceNumber) - page.least);
    }
    for (uint32_t p = 0; p < page.planes; ++p) out = put_plane(scratch.lossless, groups, static_cast<uint16_t>(p), out);
  } else {
    for (uint32_t p = 0; p < page.planes; ++p) out = put_plane(classes, groups, static_cast<uint16_t>(p), out);
  }
  const uint64_t strips = rice_strips(geo.rows, geo.columns);
  memcpy(out, scratch.lengths, 2 * strips);
  out += 2 * strips;

  Tile<Word> tile;
  Codes codes;
  memset(&codes, 0, sizeof codes);
  Widths widths;
  uint8_t spill[kTileBytes + kOverrun];
  const TileCodes* kept = kept_codes(scratch);
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile, ++kept) {
      const uint32_t count = least(kTile, geo.columns - j);
      rice_widths<DTYPE, CODING>(classes, count, page.least, widths);
      if (CODING == KVZ_LOSSLESS_RICE) {
        read_tile(geo, r, j, tile);
        for (int i = 0; i < kValues; ++i) {
          Word words[kTile];
          alignas(64) uint32_t row[kTile];
          memcpy(words, tile.row(i), sizeof words);
          for (int k = 0; k < kTile; ++k) {
            const uint32_t v = words[k];
            const uint32_t sign = v >> (Traits<DTYPE>::kBits - 1);
            const uint32_t fraction = v & ((1u << Traits<DTYPE>::kFraction) - 1u);
            row[k] = kept->row[i][k] << extra | sign << (extra - 1) | fraction;
          }
          split_row(row, codes, i);
        }
      } else {
        split_codes(*kept, codes);
        if (widths.any_raw) read_tile(geo, r, j, tile);
      }
      if (widths.any_raw) {
        alignas(64) uint16_t raws[kTile];
        for (uint32_t k = 0; k < count; ++k) raws[k] = classes[k] & kRiceRaw;
        patch_raw(tile, raws, kRiceRaw, codes);
      }
      if ((CODING == KVZ_LOSSLESS_RICE || widths.any_raw) && !tile.whole) clear_outside(tile, codes);
      const bool room = static_cast<uint64_t>(end - out) >= kTileBytes + kOverrun;
      uint8_t* to = room ? out : spill;
      put_tile<false>(codes, widths, nullptr, to);
      if (!room) memcpy(out, spill, widths.bytes);
      out += widths.bytes;
      classes += count;
    }
  }
  classes = scratch.classes;
  kept = kept_codes(scratch);
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns;) {
      UnaryWriter stream(out);
      const uint32_t strip_end = least(j + KVZ_STRIP_GROUPS, geo.columns);
      for (; j < strip_end; j += kTile, ++kept) {
        const uint32_t count = least(kTile, geo.columns - j);
        for (uint32_t k = 0; k < count; ++k) {
          if ((classes[k] & kRiceRaw) != 0) continue;
          const uint32_t parameter = CODING == KVZ_RICE ? classes[k] & kRiceNumber : page.least;
          for (int i = 0; i < kValues; ++i) stream.put(kept->row[i][k] >> parameter);
        }
        classes += count;
      }
      out = stream.finish();
    }
  }
}

// ---- reading --------------------------------------------------------------------------------------

KVZ_NOINLINE const uint8_t* take_plane(const uint8_t* in, uint64_t groups, uint16_t shift, uint16_t* classes) {
  for (uint64_t g = 0; g < groups; g += 32) {
    uint32_t word;
    memcpy(&word, in, 4);
    const uint32_t n = groups - g < 32 ? static_cast<uint32_t>(groups - g) : 32;
    for (uint32_t i = 0; i < n; ++i) {
      classes[g + i] = static_cast<uint16_t>(classes[g + i] | (word >> i & 1u) << shift);
    }
    in += 4;
  }
  return in;
}

// Quotients of a strip, value by value: row[i][k] is that of value i of group k. Raw groups get 0.
struct StripQuotients {
  alignas(64) uint16_t row[KVZ_GROUP_VALUES][KVZ_STRIP_GROUPS];
};

// What lies between the ones of a stream of `bytes` bytes; validated, so that there is a one for each value.
KVZ_INLINE void take_quotients(const uint8_t* in, uint64_t bytes, const uint16_t* classes, uint32_t count,
                               StripQuotients& quotients) {
  uint64_t word = 0, at = 0;
  uint32_t from = 0, last = ~0u;  // position of the word, and of the one before
  for (uint32_t k = 0; k < count; ++k) {
    if ((classes[k] & kRiceRaw) != 0) {
      for (int i = 0; i < kValues; ++i) quotients.row[i][k] = 0;
      continue;
    }
    for (int i = 0; i < kValues; ++i) {
      while (word == 0) {
        from = static_cast<uint32_t>(8 * at);
        memcpy(&word, in + at, bytes - at < 8 ? bytes - at : 8);
        at += 8;
      }
      const uint32_t position = from + static_cast<uint32_t>(__builtin_ctzll(word));
      quotients.row[i][k] = static_cast<uint16_t>(position - last - 1);
      last = position;
      word &= word - 1;
    }
  }
}

// Values of a tile from its codes.
template <int DTYPE>
KVZ_NOINLINE void rice_values(const Geometry& geo, const BoundSource& source, uint32_t r, uint32_t j,
                              const uint16_t* classes, uint32_t count, uint32_t length, TileCodes& codes,
                              Tile<typename Traits<DTYPE>::word>& tile) {
  using Word = typename Traits<DTYPE>::word;
  const bool alike = source.steps != KVZ_STEPS_TOKEN && geo.a == 1;
  TileBounds bounds;
  tile_bounds(geo, source, r, j, bounds);
  alignas(64) uint32_t before[kTile] = {}, delta[kTile] = {}, any[kTile] = {};
  for (uint32_t k = 0; k < count; ++k) delta[k] = (classes[k] & kRiceDelta) != 0 ? ~0u : 0;
  for (int i = 0; i < kValues; ++i) {
    const uint32_t chained = i % length != 0 ? ~0u : 0;
    for (int k = 0; k < kTile; ++k) {
      const uint32_t q = static_cast<uint32_t>(unzigzag(codes.row[i][k])) + (before[k] & delta[k] & chained);
      before[k] = q;
      codes.row[i][k] = q;
      any[k] |= zigzag(static_cast<int32_t>(q));
    }
  }
  alignas(64) int32_t width[kTile];
  alignas(64) float step[kTile];
  for (int k = 0; k < kTile; ++k) width[k] = bit_length(any[k]);
  for (int i = 0; i < kValues; ++i) {
    if (i == 0 || !alike) {
      for (int k = 0; k < kTile; ++k) step[k] = step_of<DTYPE>(KVZ_FIXED, width[k], bounds.row[i][k]);
    }
    Word row[kTile];
    for (int k = 0; k < kTile; ++k) {
      const float q = static_cast<float>(static_cast<int32_t>(codes.row[i][k]));
      row[k] = static_cast<Word>(Traits<DTYPE>::from_float(q * step[k]));
    }
    memcpy(tile.row(i), row, sizeof row);
  }
}

template <int DTYPE>
KVZ_INLINE void rice_exponents(const RicePage& page, const uint16_t* classes, uint32_t count, const TileCodes& codes,
                               const Codes& low, Tile<typename Traits<DTYPE>::word>& tile) {
  using Tr = Traits<DTYPE>;
  using Word = typename Tr::word;
  alignas(64) uint32_t base[kTile] = {};
  for (uint32_t k = 0; k < count; ++k) {
    const uint32_t below = classes[k] & kRiceNumber;
    base[k] = page.base > below ? page.base - below : 0;
  }
  for (int i = 0; i < kValues; ++i) {
    Word row[kTile];
    for (int k = 0; k < kTile; ++k) {
      const uint32_t e = rice_exponent(base[k], codes.row[i][k]) & ((1u << Tr::kExponentBits) - 1u);
      const uint32_t high = DTYPE == KVZ_FP32 ? static_cast<uint32_t>(low.half[1][i][k]) << 16 : 0;
      const uint32_t v = low.half[0][i][k] | high;
      const uint32_t sign = v >> Tr::kFraction & 1u, fraction = v & ((1u << Tr::kFraction) - 1u);
      row[k] = static_cast<Word>(sign << (Tr::kBits - 1) | e << Tr::kFraction | fraction);
    }
    memcpy(tile.row(i), row, sizeof row);
  }
}

template <int DTYPE, int CODING>
static void read_rice(const Geometry& geo, const uint8_t* in, const kvz_entry& entry, Scratch& scratch) {
  using Word = typename Traits<DTYPE>::word;
  constexpr uint32_t extra = CODING == KVZ_LOSSLESS_RICE ? Traits<DTYPE>::kFraction + 1 : 0;
  const uint64_t groups = static_cast<uint64_t>(geo.rows) * geo.columns;
  const uint8_t* end = in + entry.size;
  const BoundSource source =
      bound_source(geo, entry.coding & KVZ_STEPS_MASK, CODING == KVZ_RICE ? entry.bound : 1.0f, in, scratch);
  in += prefix_bytes(geo.page, entry.coding);
  RicePage page = rice_of_param(entry.param);
  if (CODING == KVZ_LOSSLESS_RICE) page = {in[0], in[1], entry.param, in[2] != 0};
  in += rice_head_bytes(CODING == KVZ_LOSSLESS_RICE);
  memset(scratch.classes, 0, groups * sizeof scratch.classes[0]);
  if (page.any_raw) in = take_plane(in, groups, 7, scratch.classes);
  if (CODING == KVZ_RICE) in = take_plane(in, groups, 6, scratch.classes);
  for (uint32_t p = 0; p < page.planes; ++p) in = take_plane(in, groups, static_cast<uint16_t>(p), scratch.classes);
  if (CODING == KVZ_RICE) {
    for (uint64_t i = 0; i < groups; ++i) scratch.classes[i] = static_cast<uint16_t>(scratch.classes[i] + page.least);
  }
  const uint8_t* lengths = in;
  const uint64_t strips = rice_strips(geo.rows, geo.columns);
  in += 2 * strips;
  const uint8_t* streams = end;
  for (uint64_t i = 0; i < strips; ++i) streams -= 2 * word_at(lengths, i);
  const uint32_t run = geo.g == 1 ? KVZ_GROUP_VALUES : geo.g;
  const uint16_t* classes = scratch.classes;
  Tile<Word> tile;
  Codes low;
  memset(&low, 0, sizeof low);
  Widths widths;
  TileCodes codes;
  StripQuotients quotients;
  memset(&quotients, 0, sizeof quotients);
  uint8_t spill[kTileBytes + kOverrun];
  for (uint32_t r = 0; r < geo.rows; ++r) {
    for (uint32_t j = 0; j < geo.columns; j += kTile) {
      if (j % KVZ_STRIP_GROUPS == 0) {
        const uint64_t bytes = 2 * word_at(lengths, 0);
        take_quotients(streams, bytes, classes, least(KVZ_STRIP_GROUPS, geo.columns - j), quotients);
        streams += bytes;
        lengths += 2;
      }
      const uint32_t count = least(kTile, geo.columns - j);
      prefetch_ahead<Word>(geo, r, j);
      const bool direct = place_tile(geo, r, j, tile);
      tile.count = count;
      rice_widths<DTYPE, CODING>(classes, count, page.least, widths);
      const uint8_t* from = in;
      if (static_cast<uint64_t>(end - in) < static_cast<uint64_t>(widths.bytes) + kOverrun) {
        memcpy(spill, in, widths.bytes);
        memset(spill + widths.bytes, 0, kOverrun);
        from = spill;
      }
      take_tile<DTYPE, false>(from, widths, nullptr, low);
      in += widths.bytes;
      alignas(64) uint32_t parameter[kTile] = {};
      for (uint32_t k = 0; k < count; ++k) {
        parameter[k] = CODING == KVZ_RICE && (classes[k] & kRiceRaw) == 0 ? classes[k] & kRiceNumber : page.least;
      }
      const uint32_t within = j % KVZ_STRIP_GROUPS;
      for (int i = 0; i < kValues; ++i) {
        for (int k = 0; k < kTile; ++k) {
          const uint32_t high = DTYPE == KVZ_FP32 ? static_cast<uint32_t>(low.half[1][i][k]) << 16 : 0;
          const uint32_t quotient = quotients.row[i][within + static_cast<uint32_t>(k)];
          codes.row[i][k] = quotient << parameter[k] | (low.half[0][i][k] | high) >> extra;
        }
      }
      if (CODING == KVZ_RICE) {
        rice_values<DTYPE>(geo, source, r, j, classes, count, run, codes, tile);
      } else {
        rice_exponents<DTYPE>(page, classes, count, codes, low, tile);
      }
      if (widths.any_raw) {
        alignas(64) uint16_t raws[kTile];
        for (uint32_t k = 0; k < count; ++k) raws[k] = classes[k] & kRiceRaw;
        restore_raw(low, raws, kRiceRaw, tile);
      }
      if (!direct) write_tile(geo, r, j, tile);
      classes += count;
    }
  }
}
