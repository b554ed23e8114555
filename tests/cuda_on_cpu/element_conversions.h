// half and bfloat16 as bit patterns, converted as the PTX instructions cvt.f32.* and cvt.rn.* do.
#pragma once

namespace simulator {

inline __attribute__((always_inline)) unsigned bits_of(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline __attribute__((always_inline)) float float_of(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

constexpr unsigned short NOT_A_NUMBER = 0x7fff;  // what cvt.rn.f16.f32 and cvt.rn.bf16.f32 make of every NaN

// Without branches, so that loops over it are vectorised.
inline __attribute__((always_inline)) float half_to_float(unsigned short half) {
  const unsigned magnitude = (half & 0x7fffu) << 13;
  const unsigned normal = magnitude + (112u << 23);
  const unsigned not_finite = magnitude | (255u << 23);
  // A subnormal is mantissa * 2^-24; with the exponent of 2^-14 the mantissa stands behind a leading one.
  const unsigned subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  unsigned bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? not_finite : bits;
  return float_of(bits | (half & 0x8000u) << 16);
}

inline __attribute__((always_inline)) unsigned short half_from_float(float value) {
  const unsigned sign = bits_of(value) >> 16 & 0x8000u, magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return NOT_A_NUMBER;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u)                          // subnormal: the sum's last place is 2^-24, as the result's
    return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  return sign | (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}

inline __attribute__((always_inline)) float bfloat16_to_float(unsigned short bits) {
  return float_of((unsigned)bits << 16);
}

inline __attribute__((always_inline)) unsigned short bfloat16_from_float(float value) {
  const unsigned bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return NOT_A_NUMBER;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace simulator
