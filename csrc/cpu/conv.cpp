// Convolutions: products of rows of patches with the weight, by the drivers of all products.
//
// NOTE [patches]. x is copied once, as int8 with a scale for each image (a16 schemes: as it is), channels last, with
// the zeros around it, and the channels of each group by themselves. A patch then is a few contiguous pieces of that
// copy, and the drivers gather it when they pack a row (IntRows): there is no matrix of patches. What the drivers pack
// is bounded by kMostPacked: blocks of output pixels are computed one after another.
#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/patches.h"
#include "cpu/drivers/rows.h"

namespace qk {
namespace {

// Values of patches in a block of output pixels, and the least pixels in it, for which packing the weight hardly
// counts.
constexpr int64_t kMostPacked = int64_t{2} << 20;
constexpr int64_t kLeastPixels = 256;
// Values of an image that are looked through for its range at a time.
constexpr int64_t kRangeValues = int64_t{16} << 10;
// Values of a channel that are quantized at a time where channels come first: rows of small images are too short.
constexpr int64_t kSegment = 128;

const Parallel kSerial{1, nullptr};

// The copy of x, see NOTE [patches].
class PaddedImages {
 public:
  PaddedImages(const Images& x, const ConvGeometry& geometry, int64_t element)
      : x_(x),
        geometry_(geometry),
        element_(element),
        height_(geometry.top + x.height + geometry.bottom),
        width_(geometry.left + x.width + geometry.right),
        channels_(x.channels / geometry.groups),
        group_bytes_(x.batch * height_ * width_ * channels_ * element),
        data_(geometry.groups * group_bytes_ + kPatchSlack) {}

  // Calls write(image, first, last, ...) for ranges of rows of an image that cover x, and puts zeros around them.
  template <class Write>
  void fill(const Parallel& parallel, const Write& write) {
    const int64_t rows =
        x_.channels_first ? std::clamp<int64_t>(kSegment / std::max<int64_t>(x_.width, 1), 1, x_.height) : 1;
    const int64_t blocks = div_up(x_.height, rows);
    parallel(x_.batch * blocks, [&](int64_t begin, int64_t end) {
      auto writer = write();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks, first = task % blocks * rows, last = std::min(first + rows, x_.height);
        pad(image, first, last);
        writer(image, first, last);
      }
    });
  }

  // Where pixel (y, x) of an image begins, for one group of channels.
  char* at(int64_t group, int64_t image, int64_t y, int64_t x) {
    return &data_[group * group_bytes_ +
                  ((image * height_ + geometry_.top + y) * width_ + geometry_.left + x) * channels_ * element_];
  }

  int64_t channels() const { return channels_; }

  Patches patches(int64_t group, const float* scales) const {
    return {
        .images = &data_[group * group_bytes_],
        .element = element_,
        .height = height_,
        .width = width_,
        .channels = channels_,
        .out_height = geometry_.out_height(x_.height),
        .out_width = geometry_.out_width(x_.width),
        .geometry = geometry_,
        .scales = scales,
    };
  }

 private:
  // The zeros beside rows [first, last), and above or below them at an end of the image.
  void pad(int64_t image, int64_t first, int64_t last) {
    const int64_t pixel = channels_ * element_, row = width_ * pixel;
    for (int64_t group = 0; group < geometry_.groups; ++group) {
      char* begin = at(group, image, first, -geometry_.left);
      if (first == 0) std::memset(begin - geometry_.top * row, 0, geometry_.top * row);
      for (int64_t y = first; y < last; ++y, begin += row) {
        std::memset(begin, 0, geometry_.left * pixel);
        std::memset(begin + row - geometry_.right * pixel, 0, geometry_.right * pixel);
      }
      if (last == x_.height) std::memset(begin, 0, geometry_.bottom * row);
    }
  }

  const Images& x_;
  const ConvGeometry& geometry_;
  int64_t element_, height_, width_, channels_, group_bytes_;
  Buffer<char> data_;
};

// `count` values from value `first` on, as they lie in memory, as one row.
Matrix values(const Images& x, int64_t first, int64_t count) {
  return {static_cast<const char*>(x.data) + first * size_of(x.dtype), x.dtype, 1, count};
}

// Quantizes the images: rule 14.
class IntImages {
 public:
  IntImages(const Kernels& kernels, const Images& x, const ConvGeometry& geometry, const float* x_scale,
            const Parallel& parallel)
      : kernels_(kernels),
        x_(x),
        geometry_(geometry),
        images_(x, geometry, sizeof(int8_t)),
        scales_(x.batch),
        inverse_(x.batch),
        given_(x_scale != nullptr) {
    if (given_) {
      std::fill_n(scales_.get(), x.batch, *x_scale);
      std::fill_n(inverse_.get(), x.batch, inverse_of(*x_scale));
    } else {
      find_scales(parallel);
    }
    images_.fill(parallel, [&] { return Writer(*this); });
  }

  Patches patches(int64_t group) const { return images_.patches(group, scales_.get()); }

 private:
  void find_scales(const Parallel& parallel) {
    const int64_t size = x_.height * x_.width * x_.channels, parts = std::max<int64_t>(div_up(size, kRangeValues), 1);
    Buffer<uint32_t> largest(x_.batch * parts);
    parallel(x_.batch * parts, [&](int64_t begin, int64_t end) {
      Buffer<float> floats(kRangeValues);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % parts * kRangeValues, count = std::min(kRangeValues, size - first);
        largest[task] = absmax_bits(kernels_, values(x_, task / parts * size + first, count), floats.get());
      }
    });
    for (int64_t image = 0; image < x_.batch; ++image) {
      const uint32_t bits = *std::max_element(&largest[image * parts], &largest[(image + 1) * parts - 1] + 1);
      scales_[image] = int8_scale(bits);
      inverse_[image] = int8_inverse(bits);
    }
  }

  // Each thread has its own.
  class Writer {
   public:
    explicit Writer(IntImages& to)
        : to_(to),
          segment_(std::max(kSegment, to.x_.width)),
          floats_(segment_ * (to.x_.channels_first ? 1 : to.x_.channels)),
          integers_(segment_ * to.x_.channels) {}

    // Rows [first, last) of an image.
    void operator()(int64_t image, int64_t first, int64_t last) {
      const Images& x = to_.x_;
      if (x.channels_first) {
        planes(image, first, last);
        return;
      }
      const int64_t count = x.width * x.channels;
      for (int64_t y = first; y < last; ++y) {
        const bool whole = to_.geometry_.groups == 1;
        auto* row = whole ? reinterpret_cast<int8_t*>(to_.images_.at(0, image, y, 0)) : integers_.get();
        quantize(image, (image * x.height + y) * count, count, row);
        if (!whole) split(image, y);
      }
    }

   private:
    void quantize(int64_t image, int64_t at, int64_t count, int8_t* q) {
      const Matrix x = values(to_.x_, at, count);
      const float inverse = to_.inverse_[image];
      if (to_.given_) {
        if (!quantize_values_clamped(to_.kernels_, x, inverse, q, floats_.get()))  // of the whole image, by any thread
          std::atomic_ref(to_.scales_[image]).store(std::numeric_limits<float>::quiet_NaN(), std::memory_order_relaxed);
      } else if (inverse != 0.0f) {
        quantize_values(to_.kernels_, x, inverse, q, floats_.get());
      } else {
        std::memset(q, 0, count);
      }
    }

    // A row of pixels, to the images of the groups.
    void split(int64_t image, int64_t y) {
      const int64_t channels = to_.images_.channels();
      const int8_t* pixel = integers_.get();
      for (int64_t x = 0; x < to_.x_.width; ++x) {
        for (int64_t group = 0; group < to_.geometry_.groups; ++group, pixel += channels)
          std::memcpy(to_.images_.at(group, image, y, x), pixel, channels);
      }
    }

    // The rows of every channel, transposed.
    void planes(int64_t image, int64_t first, int64_t last) {
      const Images& x = to_.x_;
      const int64_t count = (last - first) * x.width, channels = to_.images_.channels();
      for (int64_t c = 0; c < x.channels; ++c)
        quantize(image, ((image * x.channels + c) * x.height + first) * x.width, count, &integers_[c * count]);
      for (int64_t group = 0; group < to_.geometry_.groups; ++group) {
        for (int64_t y = first; y < last; ++y) {
          const int8_t* rows = &integers_[group * channels * count + (y - first) * x.width];
          auto* row = reinterpret_cast<int8_t*>(to_.images_.at(group, image, y, 0));
          to_.kernels_.elementwise.transpose(rows, count, channels, x.width, row, channels);
        }
      }
    }

    IntImages& to_;
    int64_t segment_;
    Buffer<float> floats_;
    Buffer<int8_t> integers_;
  };

  const Kernels& kernels_;
  const Images& x_;
  const ConvGeometry& geometry_;
  PaddedImages images_;
  Buffer<float> scales_, inverse_;  // [batch]
  bool given_;
};

// Copies the images as they are, for a16 schemes.
template <class Value>
void copy_images(const Images& x, const ConvGeometry& geometry, PaddedImages& to, const Parallel& parallel) {
  const int64_t channels = to.channels(), plane = x.height * x.width;
  const int64_t pixel_step = x.channels_first ? 1 : x.channels, channel_step = x.channels_first ? plane : 1;
  to.fill(parallel, [&] {
    return [&](int64_t image, int64_t first, int64_t last) {
      for (int64_t group = 0; group < geometry.groups; ++group) {
        const Value* source =
            static_cast<const Value*>(x.data) + image * plane * x.channels + group * channels * channel_step;
        for (int64_t y = first; y < last; ++y) {
          auto* row = reinterpret_cast<Value*>(to.at(group, image, y, 0));
          for (int64_t i = 0; i < x.width; ++i) {
            for (int64_t c = 0; c < channels; ++c)
              row[i * channels + c] = source[(y * x.width + i) * pixel_step + c * channel_step];
          }
        }
      }
    };
  });
}

// The rows of the weight, and of all that belongs to them, of one group.
Weight group_of(const Weight& w, int64_t group, int64_t groups) {
  Weight part = w.rows(group * (w.n / groups), w.n / groups);
  part.x_scale = nullptr;  // its activations are quantized already
  return part;
}

// Output pixels [patches.first, patches.first + pixels) of one group, to a matrix of which `out` is the first row.
void multiply(const Kernels& kernels, const Patches& patches, int64_t pixels, const Weight& w, const float* bias,
              const Output& out, DType dtype, const Parallel& parallel) {
  LinearInput input = {{nullptr, dtype, pixels, w.k}};
  Buffer<char> rows(w.scheme.int_activations() ? 0 : pixels * w.k * patches.element + kPatchSlack);
  if (w.scheme.int_activations()) {
    input.patches = &patches;
  } else {  // the drivers of floats read rows of a matrix
    parallel(pixels, [&](int64_t begin, int64_t end) {
      const int64_t bytes = w.k * patches.element;
      Buffer<char> scratch(bytes + kPatchSlack);
      for (int64_t m = begin; m < end; ++m) std::memcpy(&rows[m * bytes], patches.row(m, scratch.get()), bytes);
    });
    input.x.data = rows.get();
  }
  choose_driver(kernels, w.scheme, pixels).prepare(kernels, input, w, parallel)->multiply(w, bias, out, parallel);
}

}  // namespace

void conv(const Images& x, const ConvGeometry& geometry, const Weight& w, Bias bias, void* out, DType out_dtype,
          const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int64_t pixels = x.batch * geometry.out_height(x.height) * geometry.out_width(x.width);
  if (pixels == 0 || w.n == 0) return;
  const BiasFloats bias_floats(kernels, bias, w.n);
  const int64_t n = w.n / geometry.groups;
  const Parallel limited = limited_to_work(parallel, pixels * w.n * w.k);

  // One group after another with all threads, or many groups at the same time.
  const int64_t blocks = div_up(pixels, std::max(kMostPacked / w.k, kLeastPixels)), step = div_up(pixels, blocks);
  const auto run = [&](const auto& patches_of) {
    const bool wide = geometry.groups < limited.num_threads;
    const auto task = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, first = i % blocks * step;
        Patches patches = patches_of(group);
        patches.first = first;
        char* target = static_cast<char*>(out) + (first * w.n + group * n) * size_of(out_dtype);
        multiply(kernels, patches, std::min(step, pixels - first), group_of(w, group, geometry.groups),
                 bias.data != nullptr ? bias_floats.get() + group * n : nullptr,
                 {.data = target, .dtype = out_dtype, .stride = w.n}, x.dtype, wide ? limited : kSerial);
      }
    };
    wide ? task(0, geometry.groups * blocks) : limited(geometry.groups * blocks, task);
  };
  const Parallel copying = limited_to_work(parallel, x.batch * x.height * x.width * x.channels);
  if (w.scheme.int_activations()) {
    const IntImages images(kernels, x, geometry, w.x_scale, copying);
    run([&](int64_t group) { return images.patches(group); });
  } else {
    PaddedImages images(x, geometry, size_of(x.dtype));
    (size_of(x.dtype) == 4 ? copy_images<uint32_t> : copy_images<uint16_t>)(x, geometry, images, copying);
    run([&](int64_t group) { return images.patches(group, nullptr); });
  }
}

}  // namespace qk
