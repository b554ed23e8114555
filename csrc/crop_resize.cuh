// Crops, resized in two passes with the weights that crop_weights.cuh has left, rescaled and normalised.
//
// A thread block makes a tile of PLACES x PLACES of one box's result, in all channels. Along the first axis lanes own
// the places, along the second one warps do. It walks along the second axis in steps of the hull: the pixels of a step
// go into shared memory, as many along the first axis as there is room for (a piece); the first pass makes levels of
// them for the tile's places; the second one adds these up in registers. What lies between the passes is nowhere else.
//
// The first axis is that of the columns, or, where the vertical pass comes first, that of the rows.
#pragma once

#include "arguments.cuh"

namespace finegrain {

constexpr int PLACES = 32;
constexpr int STEP = FINEGRAIN_STEP;  // hull pixels along the second axis
constexpr int WARPS = FINEGRAIN_WARPS;
constexpr int OWN_STEP = STEP / WARPS;  // that a warp owns
constexpr int OWN_PLACES = PLACES / WARPS;
constexpr int AT_ONCE = 2;  // pixels that a thread has under way, in each channel
static_assert(STEP % WARPS == 0 && PLACES % WARPS == 0 && 32 * WARPS % STEP == 0, "every warp owns as many");

// What levels are: floating numbers, or for images of bytes whole ones, as Pillow's integers have them.
template <class Element>
struct Levels {
  using Stored = float;
  using Sum = float;
  static constexpr Sum START = 0.0f;
  static constexpr int PIECE = 64;  // hull pixels along the first axis
  static constexpr int PITCH = 67;  // from one to the next along the second axis: an odd number of banks

  static FINEGRAIN_DEVICE Stored of_pixel(Element pixel) { return to_float(pixel); }
  static FINEGRAIN_DEVICE Stored of_fill(float fill) { return fill; }
  static FINEGRAIN_DEVICE Stored of_sum(Sum sum) { return sum; }
};
template <>
struct Levels<byte_t> {
  using Stored = byte_t;
  using Sum = int;
  static constexpr Sum START = 1 << 21;  // one half: weights are multiples of 2^-22
  static constexpr int PIECE = 128;
  static constexpr int PITCH = 4 * 33;

  static FINEGRAIN_DEVICE Stored of_pixel(byte_t pixel) { return pixel; }
  static FINEGRAIN_DEVICE Stored of_fill(float fill) { return (byte_t)(int)fill; }
  static FINEGRAIN_DEVICE Stored of_sum(Sum sum) { return (byte_t)min(max(sum >> 22, 0), 255); }
};

using Element = FINEGRAIN_ELEMENT;
using Stored = Levels<Element>::Stored;
using Sum = Levels<Element>::Sum;
constexpr int PIECE = Levels<Element>::PIECE;
constexpr int PITCH = Levels<Element>::PITCH;
static_assert(PIECE % (32 * AT_ONCE) == 0, "threads load no more than a piece, however short it is");
constexpr int TILE_PITCH = PLACES + 1;

// One axis of a box, and the tile's places on it.
struct CropAxis {
  const int* taps;  // (num_places, 2)
  const Sum* weights;
  int num_places;
  int first_place;  // of the tile
  int begin;        // of the hull's pixels that weigh in the tile
  int end;
  int pixels_begin;  // of those in the image
  int pixels_end;
  long long stride;

  // Hull pixels that weigh in a place; none where the result has no such place.
  FINEGRAIN_DEVICE int2 taps_of(int place) const {
    if (place >= num_places) return make_int2(0, 0);
    return load_constant(reinterpret_cast<const int2*>(taps) + place);
  }
  FINEGRAIN_DEVICE void find_pixels() {
    begin = taps_of(first_place).x;
    const int2 last = taps_of(min(first_place + PLACES, num_places) - 1);
    end = last.x + last.y;
  }
  // Of the tap number `index` of a place; the next one's lies num_places further on.
  FINEGRAIN_DEVICE const Sum* weight(int place, int index) const {
    return weights + (long long)index * num_places + place;
  }
};

// What all threads of a block know of its tile. It lies in shared memory, where it takes no registers.
struct TileOfBox {
  CropRecord record;
  CropAxis first;
  CropAxis second;
  long long box;
  int first_row;
  int first_column;

  FINEGRAIN_DEVICE explicit TileOfBox(const CropArguments& arguments) {
    const int height = arguments.height, width = arguments.width;
    const int tiles_across = (width + PLACES - 1) / PLACES;
    const int tiles = (height + PLACES - 1) / PLACES * tiles_across;
    const long long index = blockIdx.x / tiles;
    const int tile = blockIdx.x % tiles;
    record = static_cast<const CropRecord*>(arguments.records)[index];
    box = arguments.first_box + index;
    first_row = tile / tiles_across * PLACES, first_column = tile % tiles_across * PLACES;
    if (!record.exists) return;

    CropAxis rows, columns;
    rows.num_places = height, columns.num_places = width;
    rows.first_place = first_row, columns.first_place = first_column;
    rows.taps = arguments.taps + 2 * index * (height + width), columns.taps = rows.taps + 2 * height;
    const long long of_rows = (long long)arguments.row_taps * height;
    const long long of_columns = (long long)arguments.column_taps * width;
    rows.weights = static_cast<const Sum*>(arguments.weights) + index * (of_rows + of_columns);
    columns.weights = rows.weights + of_rows;
    rows.pixels_begin = record.row_begin, rows.pixels_end = record.row_end;
    columns.pixels_begin = record.column_begin, columns.pixels_end = record.column_end;
    rows.stride = record.row_stride, columns.stride = record.column_stride;
    rows.find_pixels();
    columns.find_pixels();
    first = record.vertical_first ? rows : columns, second = record.vertical_first ? columns : rows;
  }
};

constexpr int TILE_BYTES = 256;
static_assert(sizeof(TileOfBox) <= TILE_BYTES, "it lies before the pixels");

template <int CHANNELS>
struct CropTile {
  const CropArguments& arguments;
  const CropRecord& record;
  const CropAxis& first;
  const CropAxis& second;
  Stored* pixels;  // [CHANNELS][STEP][PITCH]; at the end the levels of the tile, [CHANNELS][PLACES][TILE_PITCH]
  Stored* levels;  // [CHANNELS][STEP][PLACES], between the passes
  int lane;
  int warp;

  static_assert(TILE_BYTES + CHANNELS * STEP * (PITCH + PLACES) * sizeof(Stored) <= FINEGRAIN_SHARED_BYTES,
                "shared memory");
  static_assert(PLACES * TILE_PITCH <= STEP * PITCH, "the tile takes the place of the pixels");

  FINEGRAIN_DEVICE CropTile(const CropArguments& arguments, const TileOfBox& tile)
      : arguments(arguments),
        record(tile.record),
        first(tile.first),
        second(tile.second),
        pixels(reinterpret_cast<Stored*>(shared_memory() + TILE_BYTES)),
        levels(pixels + CHANNELS * STEP * PITCH),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {}

  // A piece of a step, from these pixels of the hull on. A line is a row or column of it along the first axis; those of
  // the image that neighbouring threads read always lie in a row. There are no branches around loads, which would wait
  // for one another: where the hull has no pixel the nearest is read, and `fill` is taken; after a short piece there is
  // room for more.
  FINEGRAIN_DEVICE void load(int piece, int piece_length, int step, int step_length) {
    const bool is_vertical = record.vertical_first;
    const int first_line = is_vertical ? threadIdx.x % STEP : warp, lines = is_vertical ? STEP : WARPS;
    const int begin = is_vertical ? threadIdx.x / STEP : lane, stride = is_vertical ? 32 * WARPS / STEP : 32;
    const int first_pixel = first.pixels_begin - piece, last_pixel = first.pixels_end - 1 - piece;
    const long long pixel_stride = first.stride, channel_stride = record.channel_stride;
    for (int line = first_line; line < step_length; line += lines) {
      const int along_second = min(max(step + line, second.pixels_begin), second.pixels_end - 1);
      const bool line_exists = along_second == step + line;
      const Element* const image = static_cast<const Element*>(record.image) + record.offset + piece * pixel_stride +
                                   along_second * second.stride;
      for (int i = begin; i < piece_length; i += AT_ONCE * stride) {
        Element values[AT_ONCE][CHANNELS];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          const int along_first = min(max(i + k * stride, first_pixel), last_pixel);
          const Element* const pixel = image + along_first * pixel_stride;
#pragma unroll
          for (int channel = 0; channel < CHANNELS; ++channel)
            values[k][channel] = load_constant(pixel + channel * channel_stride);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
          const int own = i + k * stride;
          const bool exists = line_exists && own >= first_pixel && own <= last_pixel;
#pragma unroll
          for (int channel = 0; channel < CHANNELS; ++channel)
            pixels[(channel * STEP + line) * PITCH + own] = exists ? Levels<Element>::of_pixel(values[k][channel])
                                                                   : Levels<Element>::of_fill(arguments.fill[channel]);
        }
      }
    }
  }

  // The levels of a step, after the first pass. [CHANNELS][STEP][PLACES]
  FINEGRAIN_DEVICE void first_pass(int step, int step_length) {
    const int place = first.first_place + lane;
    const int2 taps = first.taps_of(place);
    Sum sums[OWN_STEP][CHANNELS];
#pragma unroll
    for (int s = 0; s < OWN_STEP; ++s)
#pragma unroll
      for (int channel = 0; channel < CHANNELS; ++channel) sums[s][channel] = Levels<Element>::START;

    for (int piece = first.begin; piece < first.end; piece += PIECE) {
      const int piece_length = min(first.end - piece, PIECE);
      if (piece > first.begin) __syncthreads();
      load(piece, piece_length, step, step_length);
      __syncthreads();
      const int begin = max(taps.x, piece), end = min(taps.x + taps.y, piece + piece_length);
      const Stored* own = pixels + warp * PITCH - piece;
      const Sum* next = first.weight(place, begin - taps.x);
#pragma unroll 2
      for (int i = begin; i < end; ++i, next += first.num_places) {
        const Sum weight = load_constant(next);
#pragma unroll
        for (int s = 0; s < OWN_STEP; ++s)
#pragma unroll
          for (int channel = 0; channel < CHANNELS; ++channel)
            sums[s][channel] += weight * own[(channel * STEP + s * WARPS) * PITCH + i];
      }
    }
#pragma unroll
    for (int s = 0; s < OWN_STEP; ++s)
#pragma unroll
      for (int channel = 0; channel < CHANNELS; ++channel)
        levels[(channel * STEP + warp + s * WARPS) * PLACES + lane] = Levels<Element>::of_sum(sums[s][channel]);
  }

  // Leaves the tile in `pixels`, [CHANNELS][PLACES along the second axis][TILE_PITCH].
  FINEGRAIN_DEVICE void resize() {
    Sum sums[OWN_PLACES][CHANNELS];
#pragma unroll
    for (int p = 0; p < OWN_PLACES; ++p)
#pragma unroll
      for (int channel = 0; channel < CHANNELS; ++channel) sums[p][channel] = Levels<Element>::START;

    for (int step = second.begin; step < second.end; step += STEP) {
      const int step_length = min(second.end - step, STEP);
      first_pass(step, step_length);
      __syncthreads();
#pragma unroll
      for (int p = 0; p < OWN_PLACES; ++p) {
        const int place = second.first_place + warp + p * WARPS;
        const int2 taps = second.taps_of(place);
        const int begin = max(taps.x, step), end = min(taps.x + taps.y, step + step_length);
        const Stored* own = levels + lane - step * PLACES;
        const Sum* next = second.weight(place, begin - taps.x);
#pragma unroll 2
        for (int i = begin; i < end; ++i, next += second.num_places) {
          const Sum weight = load_constant(next);
#pragma unroll
          for (int channel = 0; channel < CHANNELS; ++channel)
            sums[p][channel] += weight * own[(channel * STEP + i) * PLACES];
        }
      }
    }
#pragma unroll
    for (int p = 0; p < OWN_PLACES; ++p)
#pragma unroll
      for (int channel = 0; channel < CHANNELS; ++channel)
        pixels[(channel * PLACES + warp + p * WARPS) * TILE_PITCH + lane] = Levels<Element>::of_sum(sums[p][channel]);
    __syncthreads();
  }

  // A level of the tile that resize() has left.
  FINEGRAIN_DEVICE float level(int channel, int row, int column) const {
    const int along_second = record.vertical_first ? column : row, along_first = record.vertical_first ? row : column;
    return pixels[(channel * PLACES + along_second) * TILE_PITCH + along_first];
  }
};

// To nearest even, without the instruction that sm_70 and sm_75 do not have.
FINEGRAIN_DEVICE bfloat16_t rounded_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return {(unsigned short)(bits >> 16 | 0x40)};
  return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

FINEGRAIN_DEVICE void store_result(const CropArguments& arguments, long long index, float value) {
  if (arguments.result_type == 0)
    static_cast<float*>(arguments.result)[index] = value;
  else if (arguments.result_type == 1)
    static_cast<half_t*>(arguments.result)[index] = Convert<half_t>::one(value);
  else
    static_cast<bfloat16_t*>(arguments.result)[index] = rounded_to_bfloat16(value);
}

template <int CHANNELS>
FINEGRAIN_DEVICE void crop_resize_tile(const CropArguments& arguments) {
  TileOfBox& shared = *reinterpret_cast<TileOfBox*>(shared_memory());
  if (threadIdx.x == 0) shared = TileOfBox(arguments);
  __syncthreads();
  CropTile<CHANNELS> tile(arguments, shared);
  const bool exists = shared.record.exists;
  if (exists) tile.resize();

  const int column = shared.first_column + tile.lane;
  if (column >= arguments.width) return;
  for (int channel = 0; channel < CHANNELS; ++channel) {
    const float multiplier = arguments.multiplier[channel], offset = arguments.offset[channel];
    for (int i = tile.warp; i < PLACES; i += WARPS) {
      const int row = shared.first_row + i;
      if (row >= arguments.height) break;
      const float level = exists ? tile.level(channel, i, tile.lane) : arguments.fill[channel];
      const long long index = ((shared.box * CHANNELS + channel) * arguments.height + row) * arguments.width + column;
      store_result(arguments, index, level * multiplier + offset);
    }
  }
}

}  // namespace finegrain

FINEGRAIN_KERNEL(crop_resize, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::CropArguments arguments) {
  if (arguments.channels == 1)
    finegrain::crop_resize_tile<1>(arguments);
  else
    finegrain::crop_resize_tile<3>(arguments);
}
