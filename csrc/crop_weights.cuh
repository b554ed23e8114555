// Which pixels weigh how much in each row and column of the resized crops, in float64: to the bit what
// finegrain_ops/backends/crops/sampling.py defines, whose names these are.
//
// A thread owns a place of one box: a row of the result, or a column. Products are multiply(), which no compiler makes
// a multiply-add with the sum after it.
#pragma once

#include "arguments.cuh"

namespace finegrain {

// Along one axis. Pixels are counted from the hull's first.
struct Interval {
  double begin;  // of the hull, in the image
  double length;
  float start;  // of what is sampled
  float end;
};

// The box [low, high] on one axis, in a square with sides of `longest`; 0: it is not letterboxed.
FINEGRAIN_DEVICE Interval interval_of(double low, double high, double longest) {
  const double margin = longest == 0.0 ? 0.0 : longest - (high - low);
  const double before = floor(multiply(margin, 0.5));
  const double start = low - before, end = high + (margin - before);
  const double begin = floor(start);
  return {begin, ceil(end) - begin, (float)(start - begin), (float)(end - begin)};
}

struct Crop {
  CropRecord record;
  Interval rows;
  Interval columns;
  double resized_height;
  double resized_width;

  FINEGRAIN_DEVICE Crop(const CropArguments& arguments, long long box) : record{} {
    const long long own = arguments.num_images > 1 ? box : 0;
    const long long index = arguments.image_index ? arguments.image_index[box] : own;
    record.exists = index >= 0 && index < arguments.num_images;
    if (!record.exists) return;
    double image_height = arguments.image_height, image_width = arguments.image_width;
    if (arguments.image_table) {
      const long long* row = arguments.image_table + 6 * index;
      record.image = reinterpret_cast<const void*>(row[0]);
      record.offset = 0;
      record.channel_stride = row[1], record.row_stride = row[2], record.column_stride = row[3];
      image_height = row[4], image_width = row[5];
    } else {
      record.image = arguments.images;
      record.offset = index * arguments.image_stride;
      record.channel_stride = arguments.channel_stride;
      record.row_stride = arguments.row_stride, record.column_stride = arguments.column_stride;
    }

    // Comparisons that leave a NaN what it is, so that the last one is false.
    const double *const edges = arguments.boxes + 4 * box, x0 = edges[0], y0 = edges[1], x1 = edges[2], y1 = edges[3];
    const double left = x0 < 0.0 ? 0.0 : x0, right = x1 > image_width ? image_width : x1;
    const double top = y0 < 0.0 ? 0.0 : y0, bottom = y1 > image_height ? image_height : y1;
    record.exists = left < right && top < bottom;
    if (!record.exists) return;

    const double height = bottom - top, width = right - left;
    const double longest = !arguments.is_padded ? 0.0 : height > width ? height : width;
    rows = interval_of(top, bottom, longest);
    columns = interval_of(left, right, longest);
    record.offset += (long long)rows.begin * record.row_stride + (long long)columns.begin * record.column_stride;
    record.row_begin = (int)(floor(top) - rows.begin), record.row_end = (int)(ceil(bottom) - rows.begin);
    record.column_begin = (int)(floor(left) - columns.begin), record.column_end = (int)(ceil(right) - columns.begin);

    resized_height = arguments.height, resized_width = arguments.width;
    if (arguments.shortest_edge) {
      const double shortest = rows.length < columns.length ? rows.length : columns.length;
      resized_height = floor(multiply(arguments.shortest_edge, rows.length) / shortest);
      resized_width = floor(multiply(arguments.shortest_edge, columns.length) / shortest);
    }
    const double shrinks = rows.length - resized_height;
    record.vertical_first = 0;
    if (arguments.pass_order == VERTICAL_FIRST_IF_TALL)
      record.vertical_first = shrinks > 0.0 && rows.length > 100.0 * columns.length;
    if (arguments.pass_order == VERTICAL_FIRST_IF_SHRUNK)
      record.vertical_first = shrinks > 0.0 && shrinks > 2.0 * (columns.length - resized_width);
  }
};

// The filter at a distance x: bilinear, or bicubic with the parameter a.
FINEGRAIN_DEVICE double filter(double x, int radius, double a) {
  x = fabs(x);
  if (radius == 1) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return multiply(multiply(multiply(a + 2.0, x) - (a + 3.0), x), x) + 1.0;
  if (x < 2.0) return multiply(multiply(multiply(x - 5.0, x) + 8.0, x) - 4.0, a);
  return 0.0;
}

// The weights of one place, of the taps `first` and the `count` - 1 after it.
struct Place {
  double centre;
  double inverse_width;  // of the filter
  double below;          // without antialiasing: the last pixel whose centre is not after that of the place
  double total;          // by which weights are divided
  int radius;
  int antialias;
  int length;  // of the hull
  int first;
  int count;

  // Place number `index` of `size`, to which `resized` pixels are cut from the centre.
  FINEGRAIN_DEVICE Place(const CropArguments& arguments, const Interval& interval, double resized, int index, int size,
                         int most_taps)
      : radius(arguments.radius), antialias(arguments.antialias), length((int)interval.length) {
    const double scale = (double)(interval.end - interval.start) / resized;
    const double cut = floor((resized - size) * 0.5);
    centre = interval.start + multiply(index + cut + 0.5, scale);
    int end;
    if (antialias) {
      const double width = scale < 1.0 ? 1.0 : scale;
      const double support = multiply(radius, width);
      inverse_width = 1.0 / width;
      first = max((int)(centre - support + 0.5), 0);
      end = min((int)(centre + support + 0.5), length);
    } else {
      below = floor(centre - 0.5);
      first = tap(0);
      end = tap(2 * radius - 1) + 1;
    }
    count = max(min(end - first, most_taps), 0);
    total = 1.0;
    if (!antialias) return;
    total = 0.0;
    for (int i = 0; i < count; ++i) total += antialiased(first + i);
  }

  // Without antialiasing: the pixel that number i of 2 * radius weighs, the border's for those beyond it.
  FINEGRAIN_DEVICE int tap(int i) const { return min(max((int)below + 1 - radius + i, 0), length - 1); }

  FINEGRAIN_DEVICE double antialiased(int pixel) const {
    return filter(multiply(pixel - centre + 0.5, inverse_width), radius, -0.5);
  }

  FINEGRAIN_DEVICE double weight(int pixel) const {
    if (antialias) return antialiased(pixel) / total;
    double sum = 0.0;
    for (int i = 0; i < 2 * radius; ++i)
      if (tap(i) == pixel) sum += filter(below + (1 - radius + i) - (centre - 0.5), radius, -0.75);
    return sum;
  }
};

// In units of 2^-22, half away from zero.
FINEGRAIN_DEVICE int rounded_weight(double weight) {
  return (int)(multiply(weight, 4194304.0) + (weight < 0.0 ? -0.5 : 0.5));
}

}  // namespace finegrain

FINEGRAIN_KERNEL(crop_weights, 32 * FINEGRAIN_WARPS, FINEGRAIN_BLOCKS, finegrain::CropArguments arguments) {
  using namespace finegrain;
  const int num_places = arguments.height + arguments.width, threads = 32 * FINEGRAIN_WARPS;
  const int blocks_per_box = (num_places + threads - 1) / threads;
  const long long index = blockIdx.x / blocks_per_box;
  const int place = blockIdx.x % blocks_per_box * threads + threadIdx.x;
  const Crop crop(arguments, arguments.first_box + index);
  if (place == 0) static_cast<CropRecord*>(arguments.records)[index] = crop.record;
  if (!crop.record.exists || place >= num_places) return;

  const bool is_row = place < arguments.height;
  const int own = is_row ? place : place - arguments.height, size = is_row ? arguments.height : arguments.width;
  const Place weights(arguments, is_row ? crop.rows : crop.columns, is_row ? crop.resized_height : crop.resized_width,
                      own, size, is_row ? arguments.row_taps : arguments.column_taps);
  store_vector(arguments.taps + 2 * (index * num_places + place), make_int2(weights.first, weights.count));

  const long long of_rows = (long long)arguments.row_taps * arguments.height;
  const long long of_columns = (long long)arguments.column_taps * arguments.width;
  const long long begin = index * (of_rows + of_columns) + (is_row ? 0 : of_rows) + own;
  for (int i = 0; i < weights.count; ++i) {
    const double weight = weights.weight(weights.first + i);
    if (arguments.is_rounded)
      static_cast<int*>(arguments.weights)[begin + (long long)i * size] = rounded_weight(weight);
    else
      static_cast<float*>(arguments.weights)[begin + (long long)i * size] = (float)weight;
  }
}
