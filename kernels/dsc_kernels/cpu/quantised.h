// Products with weights of 4 and 8 bits: out[t, n] = Σ_k x[t, k] · (scale · q[n, k] + minimum), inputs in int8 (bytes.h).
//
// A weight [N, D] is packed into panels of 16 outputs, a panel group by group: its levels, then 16 scales and, where
// there are any, 16 minimums in float16. Levels lie in units of 64 bytes, four neighbouring inputs of each output
// together: [16][4] int8, or in 4 bits the unit of inputs 8u … 8u + 3 in the low halves and of the next four in the high
// halves. One unit is a vector of AVX-512 and two of AVX2; a panel is one stream of bytes, read once for a few tokens.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "bytes.h"
#include "gemm.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr int64_t UNIT = 64;  // bytes of four or eight inputs of 16 outputs

INLINE int64_t levels_bytes(int64_t bits, int64_t group) { return group * LANES * bits / 8; }
INLINE int64_t group_bytes(const Format& f) { return levels_bytes(f.bits, f.group) + (f.minimums ? 4 : 2) * LANES; }
INLINE int64_t panel_bytes(const Format& f, int64_t d) { return (d + f.group - 1) / f.group * group_bytes(f); }

// One panel and at most so many tokens: sums of each, and of each of its digits, lie in registers.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int TILE_TOKENS = 4;
#else
constexpr int TILE_TOKENS = 8;
#endif

struct TileCall {
  const uint8_t* w;
  const int8_t* x[TILE_TOKENS];
  const InputGroup* inputs[TILE_TOKENS];
  int64_t groups;  // of the weight
  float centre;    // taken off each level of 4 bits, as a minimum is added
  vf* sums;        // [tokens], added to
};

INLINE int32_t four_at(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return four;
}

// Where a token's first digits of a weight's group g lie.
template <int DIGITS, int GROUP>
INLINE const int8_t* digits_of(const int8_t* x, int64_t g) {
  return x + g * GROUP / INPUT_GROUP * INPUT_GROUP * DIGITS + g * GROUP % INPUT_GROUP;
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// Products of unsigned with signed bytes are summed by twos in 16 bits: eight levels of 4 bits fit, one of 8 bits does
// once its sign has gone over to the input.
template <int BITS, int GROUP, bool MINIMUMS, int DIGITS, int T>
void quantised_tile(const TileCall& c) {
  constexpr int64_t LEVELS = GROUP * LANES * BITS / 8, STEP = LEVELS + (MINIMUMS ? 4 : 2) * LANES;
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  __m256 totals[T][2];
  memcpy(totals, c.sums, sizeof totals);
  const uint8_t* w = c.w;
  for (int64_t g = 0; g < c.groups; g++, w += STEP) {
    for (int64_t i = 0; i < STEP; i += 64) __builtin_prefetch(w + 4 * STEP + i, 0, 3);
    __m256i dots[T * DIGITS][2] = {};
    for (int u = 0; u < LEVELS / UNIT; u++) {
      __m256i q[2] = {_mm256_loadu_si256((const __m256i*)(const void*)(w + u * UNIT)),
                      _mm256_loadu_si256((const __m256i*)(const void*)(w + u * UNIT + 32))};
      if constexpr (BITS == 4) {
        __m256i first[2], second[2];
        for (int h = 0; h < 2; h++) {
          first[h] = _mm256_and_si256(q[h], low);
          second[h] = _mm256_and_si256(_mm256_srli_epi16(q[h], 4), low);
        }
        for (int t = 0; t < T * DIGITS; t++) {
          const int8_t* x = digits_of<DIGITS, GROUP>(c.x[t / DIGITS], g) + t % DIGITS * INPUT_GROUP + 8 * u;
          __m256i four = _mm256_set1_epi32(four_at(x)), next = _mm256_set1_epi32(four_at(x + 4));
          for (int h = 0; h < 2; h++) {
            dots[t][h] = _mm256_add_epi16(dots[t][h], _mm256_maddubs_epi16(first[h], four));
            dots[t][h] = _mm256_add_epi16(dots[t][h], _mm256_maddubs_epi16(second[h], next));
          }
        }
      } else {
        __m256i sizes[2] = {_mm256_abs_epi8(q[0]), _mm256_abs_epi8(q[1])};
        for (int t = 0; t < T * DIGITS; t++) {
          const int8_t* x = digits_of<DIGITS, GROUP>(c.x[t / DIGITS], g) + t % DIGITS * INPUT_GROUP + 4 * u;
          __m256i four = _mm256_set1_epi32(four_at(x));
          for (int h = 0; h < 2; h++) {
            __m256i pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(four, q[h]));
            dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
    const __m128i* halves = (const __m128i*)(const void*)(w + LEVELS);
    __m256 scales[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    __m256 minimums[2];
    for (int h = 0; h < 2; h++)
      minimums[h] = MINIMUMS ? _mm256_cvtph_ps(_mm_loadu_si128(halves + 2 + h))
                             : _mm256_mul_ps(scales[h], _mm256_set1_ps(-c.centre));
    for (int t = 0; t < T; t++) {
      const InputGroup& input = c.inputs[t][g * GROUP / INPUT_GROUP];
      int part = GROUP == INPUT_GROUP ? 2 : g & 1;
      __m256 scale = _mm256_set1_ps(input.scale);
      for (int h = 0; h < 2; h++) {
        __m256i digits[DIGITS];
        for (int i = 0; i < DIGITS; i++)
          digits[i] = BITS == 4 ? _mm256_madd_epi16(dots[t * DIGITS + i][h], ones) : dots[t * DIGITS + i][h];
        __m256i dot = digits[0];
        if constexpr (DIGITS == 2)
          dot = _mm256_add_epi32(_mm256_mullo_epi32(dot, _mm256_set1_epi32(SECOND_DIGIT)), digits[1]);
        totals[t][h] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale), scales[h], totals[t][h]);
        if constexpr (MINIMUMS || BITS == 4)
          totals[t][h] = _mm256_fmadd_ps(_mm256_set1_ps(input.scaled[part]), minimums[h], totals[t][h]);
      }
    }
  }
  memcpy(c.sums, totals, sizeof totals);
}

#else

// sums + four signed inputs · 16 rows of four unsigned levels.
INLINE vi dot_levels(vi sums, vi levels, int32_t four) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)levels, _mm512_set1_epi32(four));
#else
  for (int i = 0; i < 4; i++) sums += ((levels >> 8 * i) & 0xff) * (four << (24 - 8 * i) >> 24);
  return sums;
#endif
}

// Levels of 8 bits are made unsigned by adding 128, which the inputs' sums take off again. Sums of two digits are at most
// 32 · 255 · 32258, which 32 bits hold.
template <int BITS, int GROUP, bool MINIMUMS, int DIGITS, int T>
void quantised_tile(const TileCall& c) {
  constexpr int64_t LEVELS = GROUP * LANES * BITS / 8, STEP = LEVELS + (MINIMUMS ? 4 : 2) * LANES;
  vf totals[T];
  memcpy(totals, c.sums, sizeof totals);
  const uint8_t* w = c.w;
  for (int64_t g = 0; g < c.groups; g++, w += STEP) {
    for (int64_t i = 0; i < STEP; i += 64) __builtin_prefetch(w + 4 * STEP + i, 0, 3);
    vi dots[T * DIGITS] = {};
    for (int u = 0; u < LEVELS / UNIT; u++) {
      vi q = load_bits<vi>(w + u * UNIT);
      if constexpr (BITS == 4) {
        vi first = q & 0x0f0f0f0f, second = (q >> 4) & 0x0f0f0f0f;
        for (int t = 0; t < T * DIGITS; t++) {
          const int8_t* x = digits_of<DIGITS, GROUP>(c.x[t / DIGITS], g) + t % DIGITS * INPUT_GROUP + 8 * u;
          dots[t] = dot_levels(dot_levels(dots[t], first, four_at(x)), second, four_at(x + 4));
        }
      } else {
        vi shifted = q ^ (int32_t)0x80808080;
        for (int t = 0; t < T * DIGITS; t++) {
          const int8_t* x = digits_of<DIGITS, GROUP>(c.x[t / DIGITS], g) + t % DIGITS * INPUT_GROUP + 4 * u;
          dots[t] = dot_levels(dots[t], shifted, four_at(x));
        }
      }
    }
    const uint16_t* halves = (const uint16_t*)(const void*)(w + LEVELS);
    vf scales = load_half(halves), minimums = MINIMUMS ? load_half(halves + LANES) : scales * -c.centre;
    for (int t = 0; t < T; t++) {
      const InputGroup& input = c.inputs[t][g * GROUP / INPUT_GROUP];
      int part = GROUP == INPUT_GROUP ? 2 : g & 1;
      vi dot = dots[t * DIGITS];
      if constexpr (DIGITS == 2) dot = (dot << 8) - (dot << 1) + dots[t * DIGITS + 1];  // SECOND_DIGIT times
      if constexpr (BITS == 8) dot -= 128 * input.sums[part];
      totals[t] += to_floats(dot) * input.scale * scales;
      if constexpr (MINIMUMS || BITS == 4) totals[t] += minimums * input.scaled[part];
    }
  }
  memcpy(c.sums, totals, sizeof totals);
}

#endif

typedef void (*QuantisedTile)(const TileCall&);

// The tile of each number of tokens, from 1 on.
template <int BITS, int GROUP, bool MINIMUMS, int DIGITS>
constexpr QuantisedTile TILES[] = {
    quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 1>, quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 2>,
    quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 3>, quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 4>,
#if !defined(__AVX2__) || defined(__AVX512VNNI__)
    quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 5>, quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 6>,
    quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 7>, quantised_tile<BITS, GROUP, MINIMUMS, DIGITS, 8>,
#endif
};

template <int BITS, int GROUP, bool MINIMUMS>
INLINE const QuantisedTile* tiles_of_digits(int64_t digits) {
  return digits == 2 ? TILES<BITS, GROUP, MINIMUMS, 2> : TILES<BITS, GROUP, MINIMUMS, 1>;
}

template <int BITS, int GROUP>
INLINE const QuantisedTile* tiles_of_group(const Format& f, int64_t digits) {
  return f.minimums ? tiles_of_digits<BITS, GROUP, true>(digits) : tiles_of_digits<BITS, GROUP, false>(digits);
}

INLINE const QuantisedTile* tiles_of(const Format& f, int64_t digits) {
  if (f.bits == 4) return f.group == 32 ? tiles_of_group<4, 32>(f, digits) : tiles_of_group<4, 16>(f, digits);
  return f.group == 32 ? tiles_of_group<8, 32>(f, digits) : tiles_of_group<8, 16>(f, digits);
}

// right · x of a compensation, for some tokens of a product: as many as there is room for, the fewer the higher its rank.
template <typename T>
struct Compensation {
  typedef typename Input<T>::type I;
  static constexpr int64_t MOST_TOKENS = 96, ROOM = MAX_RANK;
  int64_t stride;  // of a token's
  I latent[ROOM];

  // How many tokens there may be at a time.
  INLINE static int64_t tokens_of(const Format& f) {
    int64_t fit = ROOM / (panel_count(f.rank) * LANES);
    return fit < MOST_TOKENS ? fit : MOST_TOKENS;
  }

  INLINE Compensation(const Format& f, const I* x, int64_t x_stride, const int32_t* rows, int64_t count, int64_t d)
      : stride(panel_count(f.rank) * LANES) {
    Epilogue e = {nullptr, NONE, nullptr, nullptr, nullptr, stride};
    gemm<T, I>((const T*)f.right, x, x_stride, rows, count, d, stride, e, latent, 0, panel_count(f.rank));
  }

  // To the sums of panel p and token t.
  INLINE void add(const Format& f, int64_t p, int64_t t, vf& sums) const {
    int64_t panel = Packed<T>::panel_size(f.rank);
    const I* at = latent + t * stride;
    vf acc[1][1] = {{sums}};
    Ahead ahead = {nullptr, nullptr, 0};
    tile<1, 1>((const T*)f.left + p * panel, panel, &at, f.rank, ahead, acc);
    sums = acc[0][0];
  }
};

// What `multiply` gives for a packed weight of this format, and tokens both in int8 and, where there is a compensation,
// as they are: panels first … last − 1 go to the sink.
template <typename T, typename Sink>
INLINE void multiply_tokens(const uint8_t* w, const Format& f, const Bytes& x, const int32_t* rows, int64_t base,
                            int64_t count, int64_t d, const Compensation<T>* more, const Sink& sink, int64_t first,
                            int64_t last) {
  const QuantisedTile* tile_of = tiles_of(f, x.digits);
  int64_t panel = panel_bytes(f, d);
  TileCall c;
  vf sums[TILE_TOKENS];
  c.groups = (d + f.group - 1) / f.group, c.centre = (float)f.centre, c.sums = sums;
  for (int64_t p = first; p < last; p++) {
    c.w = w + p * panel;
    int64_t tiles = (count + TILE_TOKENS - 1) / TILE_TOKENS;
    for (int64_t t = 0, group; t < count; t += group, tiles--) {
      group = (count - t + tiles - 1) / tiles;  // as even as they can be
      for (int64_t i = 0; i < group; i++) {
        int64_t at = rows ? rows[base + t + i] : base + t + i;
        c.x[i] = x.values + at * x.token_bytes(), c.inputs[i] = x.groups + at * x.count;
        sums[i] = vf{};
        if (more) more->add(f, p, t + i, sums[i]);
      }
      tile_of[group - 1](c);
      for (int64_t i = 0; i < group; i++) sink(sums[i], base + t + i, p * LANES);
    }
  }
}

template <typename T, typename Sink>
INLINE void multiply_quantised(const uint8_t* w, const Format& f, const typename Input<T>::type* x, int64_t stride,
                               const Bytes& bytes, const int32_t* rows, int64_t count, int64_t d, const Sink& sink,
                               int64_t first, int64_t last) {
  if (!f.rank) return multiply_tokens<T>(w, f, bytes, rows, 0, count, d, nullptr, sink, first, last);
  int64_t fit = Compensation<T>::tokens_of(f);
  for (int64_t t = 0; t < count && first < last; t += fit) {
    int64_t some = count - t < fit ? count - t : fit;
    Compensation<T> more(f, rows ? x : x + t * stride, stride, rows ? rows + t : nullptr, some, d);
    multiply_tokens<T>(w, f, bytes, rows, t, some, d, &more, sink, first, last);
  }
}

DSC_KERNELS_END
