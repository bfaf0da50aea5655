// Causal attention over the few tokens of a prompt, and its gradient, on CPUs; icl/tiny_attention.py calls it.
//
// For 15 tokens and heads of 16 channels, general libraries spend far more on calls, copies and masks than on arithmetic.
// Here one head of one prompt, a few KiB, is worked off at a time and never leaves the nearest cache. The lanes of a vector
// are queries: P[s][i] is how much query i takes of token s, so the softmax goes down columns, and no sum is across lanes.
// Query i stands at token i * stride and sees the tokens s <= i * stride.
//
// Tensors are float32, contiguous and laid out (prompts, tokens or queries, heads * size). Results do not depend on the
// number of threads. The OpenMP runtime is the one that PyTorch has loaded, with as many threads as PyTorch was told.

#include <cstdint>
#include <cstdlib>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

using Int = int64_t;

template <int W>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef int32_t Words __attribute__((vector_size(4 * W)));
  typedef float Anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));
};
template <int W>
using Floats = typename Lanes<W>::Floats;
template <int W>
using Words = typename Lanes<W>::Words;

template <int W>
INLINE Floats<W> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::Anywhere*>(from);
}

template <int W>
INLINE void store(float* to, Floats<W> values) {
  *reinterpret_cast<typename Lanes<W>::Anywhere*>(to) = values;
}

// The sizes of a problem; constants where the compiler is to unroll. `width` is `queries` rounded up to whole vectors.
struct Sizes {
  Int heads, queries, tokens, size, stride, width;
  INLINE Int row() const { return heads * size; }
  // How many tokens the queries first .. first + lanes - 1 may see.
  INLINE Int seen(Int first, Int lanes) const {
    Int end = (first + lanes - 1) * stride + 1;
    return end < tokens ? end : tokens;
  }
};

// Where a block of four begins: at the end of `count`, at least 4, it overlaps the one before and finds the same again.
INLINE Int four_from(Int at, Int count) { return at + 4 <= count ? at : count - 4; }

// exp(x) for x <= 0: e^(n ln 2 + r) with |r| <= ln 2 / 2, by Cephes' polynomial (expf, relative error 2e-7). NaN stays NaN.
template <int W>
INLINE Floats<W> exponential(Floats<W> x) {
  Floats<W> floored = x < -87.0f ? Floats<W>{} - 87.0f : x;
  Floats<W> shifted = floored * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  Floats<W> n = shifted - 12582912.0f;
  Floats<W> r = floored - n * 0.693359375f + n * 2.12194440e-4f;
  Floats<W> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return x == x ? (Floats<W>)((Words<W>)y + ((Words<W>)shifted << 23)) : x;
}

#if defined(__GNUC__) && !defined(__clang__)
#define HAS_SHUFFLE
// One step of a transposition: swaps the blocks beside the diagonal of every square of 2 * BLOCK rows.
template <int BLOCK>
INLINE void swap(Floats<16>* x, Words<16> upper) {
  for (int i = 0; i < 16; i++)
    if (!(i & BLOCK)) {
      Floats<16> above = x[i], below = x[i + BLOCK];
      x[i] = __builtin_shuffle(above, below, upper);
      x[i + BLOCK] = __builtin_shuffle(above, below, upper + BLOCK);
    }
}
#endif

// Rows of one head, (queries, size), to columns (size, width); lanes without a query are 0.
template <int W>
INLINE void transpose(const Sizes& n, float* columns, const float* rows) {
#ifdef HAS_SHUFFLE
  if (W == 16 && n.width == 16 && n.size == 16) {
    Floats<16> x[16];
    for (int i = 0; i < 16; i++) x[i] = i < n.queries ? load<16>(rows + i * n.row()) : Floats<16>{};
    swap<8>(x, Words<16>{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
    swap<4>(x, Words<16>{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
    swap<2>(x, Words<16>{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
    swap<1>(x, Words<16>{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30});
    for (int i = 0; i < 16; i++) store<16>(columns + i * 16, x[i]);
    return;
  }
#endif
  for (Int c = 0; c < n.size; c++) {
    for (Int i = 0; i < n.queries; i++) columns[c * n.width + i] = rows[i * n.row() + c];
    for (Int i = n.queries; i < n.width; i++) columns[c * n.width + i] = 0;
  }
}

// products[s][i] = rows[s] . columns[.][i] for N tokens from s on, in blocks of lanes that see them.
template <int W, int N>
INLINE void multiply(const Sizes& n, float* products, const float* rows, const float* columns, Int s) {
  for (Int i = s / n.stride / W * W; i < n.width; i += W) {
    Floats<W> sum[N] = {};
    for (Int c = 0; c < n.size; c++) {
      Floats<W> column = load<W>(columns + c * n.width + i);
      for (int t = 0; t < N; t++) sum[t] += rows[(s + t) * n.row() + c] * column;
    }
    for (int t = 0; t < N; t++) store<W>(products + (s + t) * n.width + i, sum[t]);
  }
}

template <int W>
INLINE void multiply(const Sizes& n, float* products, const float* rows, const float* columns) {
  if (n.tokens < 4)
    for (Int s = 0; s < n.tokens; s++) multiply<W, 1>(n, products, rows, columns, s);
  else
    for (Int s = 0; s < n.tokens; s += 4) multiply<W, 4>(n, products, rows, columns, four_from(s, n.tokens));
}

// Scores to P: the softmax over s of scale * scores, 0 where a query does not see.
template <int W>
INLINE void softmax(const Sizes& n, float* p, float scale) {
  for (Int i = 0; i < n.width; i += W) {
    Words<W> last;
    for (int lane = 0; lane < W; lane++) last[lane] = (i + lane) * n.stride;
    Int end = n.seen(i, W);
    Floats<W> top = load<W>(p + i), sum{};
    for (Int s = 1; s < end; s++) {
      Floats<W> score = load<W>(p + s * n.width + i);
      score = last < (int32_t)s ? top : score;
      top = score > top ? score : top;
    }
    for (Int s = 0; s < end; s++) {
      Floats<W> weight = exponential<W>((load<W>(p + s * n.width + i) - top) * scale);
      weight = last < (int32_t)s ? Floats<W>{} : weight;
      sum += weight;
      store<W>(p + s * n.width + i, weight);
    }
    sum = 1.0f / sum;
    for (Int s = 0; s < end; s++) store<W>(p + s * n.width + i, load<W>(p + s * n.width + i) * sum);
    for (Int s = end; s < n.tokens; s++) store<W>(p + s * n.width + i, Floats<W>{});
  }
}

// The gradient of P to that of scale * scores, in place: P (dP - sum_s P dP).
template <int W>
INLINE void softmax_gradient(const Sizes& n, float* d, const float* p) {
  for (Int i = 0; i < n.width; i += W) {
    Int end = n.seen(i, W);
    Floats<W> mean{};
    for (Int s = 0; s < end; s++) mean += load<W>(p + s * n.width + i) * load<W>(d + s * n.width + i);
    for (Int s = 0; s < end; s++) {
      Int at = s * n.width + i;
      store<W>(d + at, load<W>(p + at) * (load<W>(d + at) - mean));
    }
    for (Int s = end; s < n.tokens; s++) store<W>(d + s * n.width + i, Floats<W>{});
  }
}

// to[i] = scale sum_{s seen by i} p[s][i] rows[s], for N queries from i on and C channels.
template <int C, int N>
INLINE void to_queries(const Sizes& n, float* to, const float* p, const float* rows, float scale, Int i) {
  Floats<C> sum[N] = {};
  Int end = n.seen(i, N);
  for (Int s = 0; s < end; s++) {
    Floats<C> row = load<C>(rows + s * n.row());
    for (int t = 0; t < N; t++) sum[t] += p[s * n.width + i + t] * row;
  }
  for (int t = 0; t < N; t++) store<C>(to + (i + t) * n.row(), scale * sum[t]);
}

// to[s] = scale sum_{i that see s} p[s][i] rows[i], for N tokens from s on and C channels.
template <int C, int N>
INLINE void to_tokens(const Sizes& n, float* to, const float* p, const float* rows, float scale, Int s) {
  Floats<C> sum[N] = {};
  for (Int i = (s + n.stride - 1) / n.stride; i < n.queries; i++) {
    Floats<C> row = load<C>(rows + i * n.row());
    for (int t = 0; t < N; t++) sum[t] += p[(s + t) * n.width + i] * row;
  }
  for (int t = 0; t < N; t++) store<C>(to + (s + t) * n.row(), scale * sum[t]);
}

// Both for all queries or tokens and all channels, in vectors of C and what is left in shorter ones.
template <int C>
INLINE void to_queries(const Sizes& n, float* to, const float* p, const float* rows, float scale, Int first = 0) {
  for (; first + C <= n.size; first += C) {
    if (n.queries < 4)
      for (Int i = 0; i < n.queries; i++) to_queries<C, 1>(n, to + first, p, rows + first, scale, i);
    else
      for (Int i = 0; i < n.queries; i += 4)
        to_queries<C, 4>(n, to + first, p, rows + first, scale, four_from(i, n.queries));
  }
  if constexpr (C > 1)
    if (first < n.size) to_queries<C == 16 ? 8 : 1>(n, to, p, rows, scale, first);
}

template <int C>
INLINE void to_tokens(const Sizes& n, float* to, const float* p, const float* rows, float scale, Int first = 0) {
  for (; first + C <= n.size; first += C) {
    if (n.tokens < 4)
      for (Int s = 0; s < n.tokens; s++) to_tokens<C, 1>(n, to + first, p, rows + first, scale, s);
    else
      for (Int s = 0; s < n.tokens; s += 4)
        to_tokens<C, 4>(n, to + first, p, rows + first, scale, four_from(s, n.tokens));
  }
  if constexpr (C > 1)
    if (first < n.size) to_tokens<C == 16 ? 8 : 1>(n, to, p, rows, scale, first);
}

// Asks for this head's share of what the next prompt has in a tensor; spread over the work, so that no one waits for memory.
template <bool WRITTEN>
INLINE void fetch(const Sizes& n, const float* of_head, Int rows, Int head) {
  const float* next = of_head - head * n.size + rows * n.row();
  for (Int i = rows * head / n.heads; i < rows * (head + 1) / n.heads; i++)
    for (Int c = 0; c < n.row(); c += 16) __builtin_prefetch(next + i * n.row() + c, WRITTEN);
}

struct Forward {
  float* out;
  const float *q, *k, *v;

  static INLINE Int work(const Sizes& n) { return n.width * (n.size + n.tokens); }

  template <int W>
  INLINE void head(const Sizes& n, Int prompt, Int h, float* work) const {
    Int query = prompt * n.queries * n.row() + h * n.size, token = prompt * n.tokens * n.row() + h * n.size;
    float *columns = work, *p = columns + n.width * n.size;
    fetch<false>(n, q + query, n.queries, h);
    transpose<W>(n, columns, q + query);
    fetch<false>(n, k + token, n.tokens, h);
    multiply<W>(n, p, k + token, columns);
    fetch<false>(n, v + token, n.tokens, h);
    softmax<W>(n, p, 1 / __builtin_sqrtf(n.size));
    fetch<true>(n, out + query, n.queries, h);
    to_queries<16>(n, out + query, p, v + token, 1);
  }
};

struct Backward {
  float *dq, *dk, *dv;
  const float *g, *q, *k, *v;

  static INLINE Int work(const Sizes& n) { return n.width * (n.size + 2 * n.tokens); }

  template <int W>
  INLINE void head(const Sizes& n, Int prompt, Int h, float* work) const {
    Int query = prompt * n.queries * n.row() + h * n.size, token = prompt * n.tokens * n.row() + h * n.size;
    float *columns = work, *p = columns + n.width * n.size, *d = p + n.width * n.tokens;
    float scale = 1 / __builtin_sqrtf(n.size);
    transpose<W>(n, columns, q + query);
    fetch<false>(n, q + query, n.queries, h);
    multiply<W>(n, p, k + token, columns);
    fetch<false>(n, k + token, n.tokens, h);
    softmax<W>(n, p, scale);
    fetch<false>(n, g + query, n.queries, h);
    transpose<W>(n, columns, g + query);
    fetch<false>(n, v + token, n.tokens, h);
    multiply<W>(n, d, v + token, columns);
    softmax_gradient<W>(n, d, p);
    fetch<true>(n, dq + query, n.queries, h);
    to_queries<16>(n, dq + query, d, k + token, scale);
    fetch<true>(n, dk + token, n.tokens, h);
    to_tokens<16>(n, dk + token, d, q + query, scale);
    fetch<true>(n, dv + token, n.tokens, h);
    to_tokens<16>(n, dv + token, p, g + query, 1);
  }
};

// All heads of some prompts. For L2H4's sizes (and K = 8 in general, with heads of 16) the loops' lengths are constants.
template <class Job>
INLINE void run(const Job& job, const Sizes& n, Int first, Int end, float* work) {
  for (Int prompt = first; prompt < end; prompt++)
    for (Int h = 0; h < n.heads; h++) {
      if (n.tokens == 15 && n.size == 16 && n.queries == 15 && n.stride == 1)
        job.template head<16>(Sizes{n.heads, 15, 15, 16, 1, 16}, prompt, h, work);
      else if (n.tokens == 15 && n.size == 16 && n.queries == 8 && n.stride == 2)
        job.template head<8>(Sizes{n.heads, 8, 15, 16, 2, 8}, prompt, h, work);
      else
        job.template head<16>(n, prompt, h, work);
    }
}

FOR_EACH_CPU void run_forward(const Forward& job, const Sizes& n, Int first, Int end, float* work) {
  run(job, n, first, end, work);
}

FOR_EACH_CPU void run_backward(const Backward& job, const Sizes& n, Int first, Int end, float* work) {
  run(job, n, first, end, work);
}

template <class Job, class Run>
void on_all_cores(const Job& job, Run run, Int prompts, const Sizes& n) {
  const Int share = 8;
#pragma omp parallel
  {
    float* work = static_cast<float*>(std::aligned_alloc(64, (4 * Job::work(n) + 63) / 64 * 64));
#pragma omp for schedule(static)
    for (Int first = 0; first < prompts; first += share)
      run(job, n, first, first + share < prompts ? first + share : prompts, work);
    std::free(work);
  }
}

Sizes sizes(Int heads, Int queries, Int tokens, Int size, Int stride) {
  return {heads, queries, tokens, size, stride, (queries + 15) / 16 * 16};
}

}  // namespace

extern "C" {

// out (prompts, queries, heads * size) of q (prompts, queries, ...), k and v (prompts, tokens, ...).
void attention_forward(float* out, const float* q, const float* k, const float* v, Int prompts, Int heads, Int queries,
                       Int tokens, Int size, Int stride) {
  on_all_cores(Forward{out, q, k, v}, run_forward, prompts, sizes(heads, queries, tokens, size, stride));
}

// Gradients dq, dk and dv from g, that of `out`; P is found anew, which is cheaper than to read it from memory.
void attention_backward(float* dq, float* dk, float* dv, const float* g, const float* q, const float* k, const float* v,
                        Int prompts, Int heads, Int queries, Int tokens, Int size, Int stride) {
  on_all_cores(Backward{dq, dk, dv, g, q, k, v}, run_backward, prompts, sizes(heads, queries, tokens, size, stride));
}
}
