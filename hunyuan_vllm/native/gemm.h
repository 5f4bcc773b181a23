// Rows times packed weights, for all schemes (avx2.h, bf16_rows.h, w8a8.h): linear layers and SiLU-gated experts.
//
// A weight [outputs, inputs] is packed into blocks of 32 output channels, 16 of the first half of all and 16 of the second:
// of gate and up, what belongs together. A block is its head, and then for each few inputs (kInputs) a piece of all its
// channels.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace hunyuan {

constexpr int kBlock = 2 * kLanes;
constexpr int64_t kAhead = 2560;              // bytes to fetch ahead of their use
constexpr int kReadingRows = 8;               // reading a weight takes as long as multiplying it with some rows

template <class Scheme>
struct Weight {
  const uint8_t* packed;
  int64_t inputs, outputs;

  int64_t pieces() const { return (inputs + Scheme::kInputs - 1) / Scheme::kInputs; }
  int64_t half() const { return (outputs + 1) / 2; }
  int64_t blocks() const { return (half() + kLanes - 1) / kLanes; }
  int64_t block_bytes() const { return Scheme::kHeadBytes + pieces() * Scheme::kBytes; }
  const uint8_t* block(int64_t b) const { return packed + b * block_bytes(); }
  Weight of_expert(int64_t expert) const { return {block(expert * blocks()), inputs, outputs}; }
};

template <class Scheme>
struct Rows {
  const typename Scheme::Element* data;
  int64_t stride;          // elements from a row to the next
  const float* scales;     // of each row of `data`, where it is rounded
  const int32_t* indices;  // which rows, or null for the first `count`
  int64_t count;

  int64_t index(int64_t i) const { return indices ? indices[i] : i; }
};

// sums [R][32] of R rows with a block. Weights that are read once need not stay in the caches: all that runs between the
// products, Python above all, is faster for it.
//
// Rows are parameters, 0 … R - 1, and not a loop, so that every sum has its register.
template <class Scheme, bool kOnce, int... kRow>
void tile(const typename Scheme::Element* const* x, const uint8_t* block, int64_t pieces,
          typename Scheme::Stored* sums) {
  const typename Scheme::Reader read;
  // A multiplication waits for the one before that adds to the same sum: few rows need several sums to keep it busy.
  constexpr int kChains = Scheme::chains(sizeof...(kRow));
  typename Scheme::Sums first_sums[kChains][sizeof...(kRow)], second_sums[kChains][sizeof...(kRow)];
  for (int c = 0; c < kChains; ++c)
    ((first_sums[c][kRow] = second_sums[c][kRow] = Scheme::zero()), ...);
  const uint8_t* w = block + Scheme::kHeadBytes;
  const auto piece = [&](int64_t p, int c) {
    const uint8_t* at = w + p * Scheme::kBytes;
    for (int line = 0; line < Scheme::kBytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + line), kOnce ? _MM_HINT_NTA : _MM_HINT_T0);
    typename Scheme::Vector first, second;
    read(at, first, second);
    const auto add = [&](const typename Scheme::Element* row, auto& sum, const auto& weights) {
      sum = Scheme::add(sum, Scheme::broadcast(row + Scheme::kInputs * p), weights);
    };
    (add(x[kRow], first_sums[c][kRow], first), ...);
    Scheme::between_halves(second, p);
    (add(x[kRow], second_sums[c][kRow], second), ...);
  };
  int64_t p = 0;
  for (; p + kChains <= pieces; p += kChains)
    for (int c = 0; c < kChains; ++c) piece(p + c, c);
  for (; p < pieces; ++p) piece(p, 0);
  for (int c = 1; c < kChains; ++c)
    ((first_sums[0][kRow] = Scheme::sum(first_sums[0][kRow], first_sums[c][kRow]),
      second_sums[0][kRow] = Scheme::sum(second_sums[0][kRow], second_sums[c][kRow])),
     ...);
  (Scheme::store(sums + kRow * kBlock, first_sums[0][kRow], block), ...);
  (Scheme::store(sums + kRow * kBlock + kLanes, second_sums[0][kRow], block + kLanes * sizeof(int32_t)), ...);
}

template <class Scheme, bool kOnce, int... kRow>
constexpr auto tile_with(std::integer_sequence<int, kRow...>) {
  return &tile<Scheme, kOnce, kRow...>;
}

// The tile for some rows, of those for 1, 2, … rows.
template <class Scheme, bool kOnce, int... kBefore>
auto tile_of(int64_t rows, std::integer_sequence<int, kBefore...>) {
  constexpr decltype(&tile<Scheme, kOnce, 0>) tiles[] = {
      tile_with<Scheme, kOnce>(std::make_integer_sequence<int, kBefore + 1>())...};
  return tiles[rows - 1];
}

// store(row, block, first, second) for all rows (their place among `rows`) and blocks: the products of channels 16·block
// onwards of the first half and of the second, without the weight's scale.
template <class Scheme, typename Store>
void product(const Rows<Scheme>& rows, const Weight<Scheme>& weight, int64_t first, int64_t last, const Store& store) {
  constexpr int kTileRows = Scheme::kTileRows;
  constexpr auto kSizes = std::make_integer_sequence<int, kTileRows>();
  for (int64_t done = 0; done < rows.count; done += Scheme::kMostRows) {
    const int64_t count = std::min<int64_t>(Scheme::kMostRows, rows.count - done), tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t block = first; block < last; ++block)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = done + count * t / tiles, size = done + count * (t + 1) / tiles - begin;
        const typename Scheme::Element* x[kTileRows];
        typename Scheme::Stored sums[kTileRows * kBlock];
        for (int64_t r = 0; r < size; ++r) x[r] = rows.data + rows.stride * rows.index(begin + r);
        const auto multiply = tiles == 1 && Scheme::streams() ? tile_of<Scheme, true>(size, kSizes) : tile_of<Scheme, false>(size, kSizes);
        multiply(x, weight.block(block), weight.pieces(), sums);
        for (int64_t r = 0; r < size; ++r) {
          const auto* own = sums + r * kBlock;
          const float scale = rows.scales ? rows.scales[rows.index(begin + r)] : 1;
          store(begin + r, block, Scheme::values(own, scale), Scheme::values(own + kLanes, scale));
        }
      }
  }
}

template <class Scheme>
struct Group {
  Rows<Scheme> rows;
  Weight<Scheme> weight;
  const float* scale;
};

// Calls work(group, first block, last block) for this thread's part of all blocks: equal parts by cost, and contiguous, so
// that a thread streams through memory.
template <class Scheme, typename Work>
void share(const std::vector<Group<Scheme>>& groups, const Work& work) {
  const auto cost = [](const Group<Scheme>& group) { return group.weight.pieces() * (group.rows.count + kReadingRows); };
  int64_t total = 0, before = 0;
  for (const auto& group : groups) total += cost(group) * group.weight.blocks();
  const auto [from, to] = part_of(total);
  for (const auto& group : groups) {
    const int64_t each = cost(group), blocks = group.weight.blocks();
    const auto place = [&](int64_t at) { return std::clamp<int64_t>((at - before + each - 1) / each, 0, blocks); };
    const int64_t first = place(from), last = place(to);
    if (first < last) work(group, first, last);
    before += each * blocks;
  }
}

// Rows as a scheme multiplies them: as they are, or, rounded or filled up to whole pieces, in memory of their own.
template <class Scheme>
class Prepared {
 public:
  Prepared(const bf16* x, int64_t stride, int64_t count, int64_t inputs)
      : x_(x), stride_(stride), count_(count), inputs_(inputs) {
    if (Scheme::kRoundsRows || inputs % Scheme::kInputs) {
      own_stride_ = Weight<Scheme>{nullptr, inputs, 0}.pieces() * Scheme::kInputs;
      own_.reset(new typename Scheme::Element[count * own_stride_]());
      scales_.reset(new float[count]);
    }
  }

  Rows<Scheme> rows(const int32_t* indices, int64_t count) const {
    if (own_) return {own_.get(), own_stride_, scales_.get(), indices, count};
    if constexpr (Scheme::kRoundsRows) return {};
    else return {x_, stride_, nullptr, indices, count};
  }

  // Called by all threads, who may use the rows afterwards.
  void prepare() const {
    if (!own_) return;
    const auto [first, last] = part_of(count_);
    for (int64_t r = first; r < last; ++r)
      scales_[r] = Scheme::prepare(x_ + r * stride_, inputs_, &own_[r * own_stride_]);
    barrier();
  }

 private:
  const bf16* x_;
  int64_t stride_, count_, inputs_, own_stride_ = 0;
  std::unique_ptr<typename Scheme::Element[]> own_;
  std::unique_ptr<float[]> scales_;
};

// Packs a weight [outputs, inputs]; there are zeros where there is no channel.
template <class Scheme>
void pack(uint8_t* packed, const typename Scheme::Value* weight, int64_t outputs, int64_t inputs) {
  using Value = typename Scheme::Value;
  constexpr int kInputs = Scheme::kInputs;
  const Weight<Scheme> to{packed, inputs, outputs};
  const std::vector<Value> zeros(inputs);
  parallel(outputs * inputs, [&] {
    const auto [first, last] = part_of(to.blocks());
    for (int64_t block = first; block < last; ++block) {
      const Value* rows[kBlock];
      uint8_t* out = packed + block * to.block_bytes();
      for (int place = 0; place < kBlock; ++place) {
        const int half = Scheme::half(place);
        const int64_t channel = half * to.half() + block * kLanes + Scheme::lane(place);
        rows[place] = channel < (half ? outputs : to.half()) ? weight + channel * inputs : zeros.data();
        if constexpr (Scheme::kHeadBytes != 0) {
          int32_t begin = 0;
          for (int64_t k = 0; k < inputs; ++k) begin -= 128 * rows[place][k];
          std::memcpy(out + place * sizeof begin, &begin, sizeof begin);
        }
      }
      out += Scheme::kHeadBytes;
      for (int64_t p = 0; p < to.pieces(); ++p, out += Scheme::kBytes) {
        std::memset(out, 0, Scheme::kBytes);
        const int64_t size = std::min<int64_t>(kInputs, inputs - p * kInputs) * sizeof(Value);
        for (int place = 0; place < kBlock; ++place)
          std::memcpy(out + place * kInputs * sizeof(Value), rows[place] + kInputs * p, size);
        Scheme::encode(out);
      }
    }
  });
}

// With the scales of channels from `channel` on, if there are any.
inline Floats scaled(Floats values, const float* scale, int64_t channel, Lanes lanes) {
  return scale ? multiply(values, load(scale + channel, lanes)) : values;
}

// Puts a linear layer's products into y [rows, outputs], scaled and with their bias; scale and bias may be null.
struct LinearResult {
  bf16* y;
  const float *scale, *bias;
  int64_t outputs, half;

  void operator()(int64_t row, int64_t block, Floats first, Floats second) const {
    store(row, block * kLanes, half, first);
    store(row, half + block * kLanes, outputs, second);
  }

 private:
  void store(int64_t row, int64_t channel, int64_t end, Floats value) const {
    const Lanes lanes = first_lanes(end - channel);
    value = scaled(value, scale, channel, lanes);
    if (bias) value = add(value, load(bias + channel, lanes));
    store_bf16(y + row * outputs + channel, lanes, value);
  }
};

// y [rows, outputs] = x [rows, inputs] · (scale ⊙ weight)ᵀ + bias
template <class Scheme>
void linear(bf16* y, const bf16* x, int64_t stride, const uint8_t* packed, const float* scale, const float* bias,
            int64_t rows, int64_t outputs, int64_t inputs) {
  const Prepared<Scheme> prepared(x, stride, rows, inputs);
  const std::vector<Group<Scheme>> groups{{prepared.rows(nullptr, rows), {packed, inputs, outputs}, scale}};
  const LinearResult result{y, scale, bias, outputs, groups[0].weight.half()};
  parallel(rows * outputs * inputs, [&] {
    prepared.prepare();
    share(groups, [&](const Group<Scheme>& group, int64_t begin, int64_t end) {
      product(group.rows, group.weight, begin, end, result);
    });
  });
}

}  // namespace hunyuan
