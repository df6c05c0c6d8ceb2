/* Dequantise packed weight matrices: int4/nf4 through a 16-entry table scaled once per group, int8 by one scale per row.
 *
 * Plain C, called through ctypes (which releases the GIL). Every path computes  value = round(level * scale)  with one fp32
 * multiplication and, for bf16 results, integer round-to-nearest-even; so all paths agree bit for bit, subnormals included
 * (the AVX512_BF16 conversion instruction would flush those). A NaN result is always the quiet positive NaN (0x7FC0, 0x7FC00000).
 *
 * Layout (see quant/layout.py): a group is 64 columns and 32 code bytes; byte j holds column j in its low nibble and column
 * j + 32 in its high nibble; its scale is one bf16. int8 codes are two's complement bytes; a row's scale is one fp32.
 */
#include <stdint.h>
#include <string.h>

#include "../../kernels/threads.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define AVX2 __attribute__((target("avx2")))
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAVE_NEON 1
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { PATH_AUTO = 0, PATH_SCALAR = 1, PATH_AVX2 = 2, PATH_AVX512 = 3, PATH_NEON = 4 };
enum { GROUP_COLUMNS = 64, GROUP_BYTES = 32 };
enum { ERROR_PATH = -1, ERROR_ROW = -2 };

typedef void (*table_row)(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels);
typedef void (*int8_row)(const int8_t *codes, float scale, void *out, int64_t columns);

/* ---- scalar: the definition, and the fallback ---- */

static inline float float_of_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t product_bits(float level, float scale) {
  float value = level * scale;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
}

static inline uint16_t product_bf16(float level, float scale) {
  uint32_t bits = product_bits(level, scale);
  if (bits == 0x7FC00000u) return 0x7FC0u;
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static void table_bf16_scalar(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  uint16_t *o = out, table[16];
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    for (int i = 0; i < 16; i++) table[i] = product_bf16(levels[i], float_of_bf16(scales[g]));
    for (int j = 0; j < GROUP_BYTES; j++) {
      o[j] = table[codes[j] & 15];
      o[j + 32] = table[codes[j] >> 4];
    }
  }
}

static void table_fp32_scalar(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  uint32_t *o = out, table[16];
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    for (int i = 0; i < 16; i++) table[i] = product_bits(levels[i], float_of_bf16(scales[g]));
    for (int j = 0; j < GROUP_BYTES; j++) {
      o[j] = table[codes[j] & 15];
      o[j + 32] = table[codes[j] >> 4];
    }
  }
}

static void int8_bf16_scalar(const int8_t *codes, float scale, void *out, int64_t columns) {
  uint16_t *o = out;
  for (int64_t j = 0; j < columns; j++) o[j] = product_bf16((float)codes[j], scale);
}

static void int8_fp32_scalar(const int8_t *codes, float scale, void *out, int64_t columns) {
  uint32_t *o = out;
  for (int64_t j = 0; j < columns; j++) o[j] = product_bits((float)codes[j], scale);
}

/* ---- AVX-512 (F and BW) ---- */

#if HAVE_X86
AVX512 static inline __m512i canonical_avx512(__m512 product) {
  __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_castps_si512(product), nan, _mm512_set1_epi32(0x7FC00000));
}

AVX512 static inline __m256i round_avx512(__m512 product) {
  __m512i bits = canonical_avx512(product);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

AVX512 static void table_bf16_avx512(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  const __m512 level = _mm512_loadu_ps(levels);
  const __m512i low = _mm512_set1_epi16(15);
  uint16_t *o = out;
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    __m512 product = _mm512_mul_ps(level, _mm512_set1_ps(float_of_bf16(scales[g])));
    __m512i table = _mm512_broadcast_i64x4(round_avx512(product));
    __m512i c = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    _mm512_storeu_si512(o, _mm512_permutexvar_epi16(_mm512_and_si512(c, low), table));
    _mm512_storeu_si512(o + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 4), table));
  }
}

AVX512 static void table_fp32_avx512(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  const __m512 level = _mm512_loadu_ps(levels);
  float *o = out;
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    __m512 product = _mm512_mul_ps(level, _mm512_set1_ps(float_of_bf16(scales[g])));
    __m512 table = _mm512_castsi512_ps(canonical_avx512(product));
    for (int half = 0; half < 32; half += 16) {
      __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + half)));
      _mm512_storeu_ps(o + half, _mm512_permutexvar_ps(c, table)); /* reads the low 4 bits of an index only */
      _mm512_storeu_ps(o + half + 32, _mm512_permutexvar_ps(_mm512_srli_epi32(c, 4), table));
    }
  }
}

AVX512 static inline __m512 int8_product_avx512(const int8_t *codes, __m512 scale) {
  __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
}

AVX512 static void int8_bf16_avx512(const int8_t *codes, float scale, void *out, int64_t columns) {
  const __m512 s = _mm512_set1_ps(scale);
  uint16_t *o = out;
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16)
    _mm256_storeu_si256((__m256i *)(o + j), round_avx512(int8_product_avx512(codes + j, s)));
  int8_bf16_scalar(codes + j, scale, o + j, columns - j);
}

AVX512 static void int8_fp32_avx512(const int8_t *codes, float scale, void *out, int64_t columns) {
  const __m512 s = _mm512_set1_ps(scale);
  float *o = out;
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16)
    _mm512_storeu_si512(o + j, canonical_avx512(int8_product_avx512(codes + j, s)));
  int8_fp32_scalar(codes + j, scale, o + j, columns - j);
}

/* ---- AVX2 ---- */

AVX2 static inline __m256i canonical_avx2(__m256 product) {
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(product, product, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_castps_si256(product), _mm256_set1_epi32(0x7FC00000), nan);
}

/* Eight bf16 values, each in the low half of its 32-bit lane. */
AVX2 static inline __m256i round_avx2(__m256 product) {
  __m256i bits = canonical_avx2(product);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}

/* Sixteen bf16 values in order, from two halves of eight. */
AVX2 static inline __m256i pack_avx2(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
}

AVX2 static inline void look_up_avx2(__m256i index, __m256i low_bytes, __m256i high_bytes, uint16_t *out) {
  __m256i low = _mm256_shuffle_epi8(low_bytes, index), high = _mm256_shuffle_epi8(high_bytes, index);
  __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

AVX2 static void table_bf16_avx2(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  const __m256 first = _mm256_loadu_ps(levels), second = _mm256_loadu_ps(levels + 8);
  const __m256i low = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
  uint16_t *o = out;
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    __m256 s = _mm256_set1_ps(float_of_bf16(scales[g]));
    __m256i table = pack_avx2(round_avx2(_mm256_mul_ps(first, s)), round_avx2(_mm256_mul_ps(second, s)));
    __m256i both = _mm256_packus_epi16(_mm256_and_si256(table, byte), _mm256_srli_epi16(table, 8));
    __m256i low_bytes = _mm256_permute4x64_epi64(both, 0x88), high_bytes = _mm256_permute4x64_epi64(both, 0xDD);
    __m256i c = _mm256_loadu_si256((const __m256i *)codes);
    look_up_avx2(_mm256_and_si256(c, low), low_bytes, high_bytes, o);
    look_up_avx2(_mm256_and_si256(_mm256_srli_epi16(c, 4), low), low_bytes, high_bytes, o + 32);
  }
}

AVX2 static inline __m256 choose_avx2(__m256i index, __m256 first, __m256 second) {
  __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* bit 3 of the index as the sign */
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), upper);
}

AVX2 static void table_fp32_avx2(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  const __m256 first = _mm256_loadu_ps(levels), second = _mm256_loadu_ps(levels + 8);
  float *o = out;
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    __m256 s = _mm256_set1_ps(float_of_bf16(scales[g]));
    __m256 t0 = _mm256_castsi256_ps(canonical_avx2(_mm256_mul_ps(first, s)));
    __m256 t1 = _mm256_castsi256_ps(canonical_avx2(_mm256_mul_ps(second, s)));
    for (int part = 0; part < 32; part += 8) {
      __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + part)));
      _mm256_storeu_ps(o + part, choose_avx2(c, t0, t1));
      _mm256_storeu_ps(o + part + 32, choose_avx2(_mm256_srli_epi32(c, 4), t0, t1));
    }
  }
}

AVX2 static inline __m256 int8_product_avx2(const int8_t *codes, __m256 scale) {
  __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(wide), scale);
}

AVX2 static void int8_bf16_avx2(const int8_t *codes, float scale, void *out, int64_t columns) {
  const __m256 s = _mm256_set1_ps(scale);
  uint16_t *o = out;
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16) {
    __m256i first = round_avx2(int8_product_avx2(codes + j, s)), second = round_avx2(int8_product_avx2(codes + j + 8, s));
    _mm256_storeu_si256((__m256i *)(o + j), pack_avx2(first, second));
  }
  int8_bf16_scalar(codes + j, scale, o + j, columns - j);
}

AVX2 static void int8_fp32_avx2(const int8_t *codes, float scale, void *out, int64_t columns) {
  const __m256 s = _mm256_set1_ps(scale);
  float *o = out;
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8)
    _mm256_storeu_si256((__m256i *)(o + j), canonical_avx2(int8_product_avx2(codes + j, s)));
  int8_fp32_scalar(codes + j, scale, o + j, columns - j);
}
#endif

/* ---- NEON: the bf16 table only; the others are scalar loops that the compiler vectorises ---- */

#if HAVE_NEON
static void table_bf16_neon(const uint8_t *codes, const uint16_t *scales, void *out, int64_t groups, const float *levels) {
  uint16_t *o = out, table[16];
  for (int64_t g = 0; g < groups; g++, codes += GROUP_BYTES, o += GROUP_COLUMNS) {
    for (int i = 0; i < 16; i++) table[i] = product_bf16(levels[i], float_of_bf16(scales[g]));
    uint8x16x2_t bytes = vld2q_u8((const uint8_t *)table); /* little-endian: low bytes, high bytes */
    for (int part = 0; part < 32; part += 16) {
      uint8x16_t c = vld1q_u8(codes + part), low = vandq_u8(c, vdupq_n_u8(15)), high = vshrq_n_u8(c, 4);
      uint8x16x2_t first = {{vqtbl1q_u8(bytes.val[0], low), vqtbl1q_u8(bytes.val[1], low)}};
      uint8x16x2_t second = {{vqtbl1q_u8(bytes.val[0], high), vqtbl1q_u8(bytes.val[1], high)}};
      vst2q_u8((uint8_t *)(o + part), first);
      vst2q_u8((uint8_t *)(o + part + 32), second);
    }
  }
}
#endif

/* ---- dispatch ---- */

/* Bit p is set when path p runs on this processor. */
EXPORT int32_t mebp_dequantise_paths(void) {
  int32_t paths = 1 << PATH_SCALAR;
#if HAVE_X86
  if (__builtin_cpu_supports("avx2")) paths |= 1 << PATH_AVX2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) paths |= 1 << PATH_AVX512;
#elif HAVE_NEON
  paths |= 1 << PATH_NEON;
#endif
  return paths;
}

static int choose_path(int path) {
  int32_t paths = mebp_dequantise_paths();
  if (path != PATH_AUTO) return path > PATH_AUTO && path <= PATH_NEON && (paths >> path & 1) ? path : ERROR_PATH;
  for (int p = PATH_NEON; p > PATH_SCALAR; p--)
    if (paths >> p & 1) return p;
  return PATH_SCALAR;
}

static table_row choose_table_row(int path, int fp32) {
#if HAVE_X86
  if (path == PATH_AVX512) return fp32 ? table_fp32_avx512 : table_bf16_avx512;
  if (path == PATH_AVX2) return fp32 ? table_fp32_avx2 : table_bf16_avx2;
#elif HAVE_NEON
  if (path == PATH_NEON && !fp32) return table_bf16_neon;
#endif
  (void)path;
  return fp32 ? table_fp32_scalar : table_bf16_scalar;
}

static int8_row choose_int8_row(int path, int fp32) {
#if HAVE_X86
  if (path == PATH_AVX512) return fp32 ? int8_fp32_avx512 : int8_bf16_avx512;
  if (path == PATH_AVX2) return fp32 ? int8_fp32_avx2 : int8_bf16_avx2;
#endif
  (void)path;
  return fp32 ? int8_fp32_scalar : int8_bf16_scalar;
}

static int rows_in_range(const int64_t *row_ids, int64_t rows, int64_t table_rows) {
  if (!row_ids) return rows <= table_rows;
  for (int64_t r = 0; r < rows; r++)
    if (row_ids[r] < 0 || row_ids[r] >= table_rows) return 0;
  return 1;
}

/* What the threads share: rows of codes and scales, where they go, and how a row is made. `row_ids` may be NULL. */
typedef struct {
  const uint8_t *codes, *scales;
  uint8_t *out;
  int64_t code_stride, scale_stride, out_stride, width; /* width: groups or columns of a row */
  const int64_t *row_ids;
  const float *levels;
  table_row table;
  int8_row int8;
} Matrix;

static void table_rows_of(const void *work, int64_t first, int64_t last) {
  const Matrix *m = work;
  for (int64_t r = first; r < last; r++) {
    const int64_t row = m->row_ids ? m->row_ids[r] : r;
    m->table(m->codes + row * m->code_stride, (const uint16_t *)(m->scales + row * m->scale_stride), m->out + r * m->out_stride, m->width, m->levels);
  }
}

static void int8_rows_of(const void *work, int64_t first, int64_t last) {
  const Matrix *m = work;
  for (int64_t r = first; r < last; r++) {
    const int64_t row = m->row_ids ? m->row_ids[r] : r;
    float scale;
    memcpy(&scale, m->scales + row * m->scale_stride, 4);
    m->int8((const int8_t *)(m->codes + row * m->code_stride), scale, m->out + r * m->out_stride, m->width);
  }
}

/* Rows of an int4 or nf4 matrix, `groups` groups each, on up to `threads` threads. Strides in bytes. `row_ids` may be NULL (rows 0, 1, 2, ...).
 * Returns 0, ERROR_PATH (this processor lacks the path asked for) or ERROR_ROW (an id outside the table; nothing is written). */
EXPORT int32_t mebp_dequantise_table(const uint8_t *codes, int64_t code_stride, const uint8_t *scales, int64_t scale_stride,
                                     uint8_t *out, int64_t out_stride, const int64_t *row_ids, int64_t rows,
                                     int64_t table_rows, int64_t groups, const float *levels, int32_t fp32, int32_t path, int32_t threads) {
  int chosen = choose_path(path);
  if (chosen == ERROR_PATH) return ERROR_PATH;
  if (!rows_in_range(row_ids, rows, table_rows)) return ERROR_ROW;
  const Matrix m = {codes, scales, out, code_stride, scale_stride, out_stride, groups, row_ids, levels, choose_table_row(chosen, fp32), 0};
  in_parts(table_rows_of, &m, rows, rows * groups * GROUP_COLUMNS, threads);
  return 0;
}

/* Rows of an int8 matrix, `columns` columns each; arguments and result as above. */
EXPORT int32_t mebp_dequantise_int8(const uint8_t *codes, int64_t code_stride, const uint8_t *scales, int64_t scale_stride,
                                    uint8_t *out, int64_t out_stride, const int64_t *row_ids, int64_t rows,
                                    int64_t table_rows, int64_t columns, int32_t fp32, int32_t path, int32_t threads) {
  int chosen = choose_path(path);
  if (chosen == ERROR_PATH) return ERROR_PATH;
  if (!rows_in_range(row_ids, rows, table_rows)) return ERROR_ROW;
  const Matrix m = {codes, scales, out, code_stride, scale_stride, out_stride, columns, row_ids, 0, 0, choose_int8_row(chosen, fp32)};
  in_parts(int8_rows_of, &m, rows, rows * columns, threads);
  return 0;
}
