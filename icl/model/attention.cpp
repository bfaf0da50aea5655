// Causal attention over the few tokens of a prompt, and its gradient, on CPUs; icl/model/attention.py calls it.
//
// For 15 tokens and heads of 16 channels, general libraries spend far more time on calls, copies and masks than on
// arithmetic. The kernel computes one head of one prompt at a time. Its data are a few KiB and stay in the fastest cache.
// Each lane of a vector belongs to one query. P[s][i] is the attention weight of query i on token s. The softmax of query i
// runs over the tokens s, so it stays within the lane of this query, and no sum is taken across lanes. Query i belongs to
// token i * stride, and attends to the tokens s <= i * stride.
//
// Tensors are float32 and contiguous, with the axes (prompts, tokens or queries, heads * size). Results do not depend on the
// number of threads. We use the OpenMP runtime that PyTorch has loaded, with PyTorch's number of threads.

#include <cstdint>
#include <cstdlib>

#define INLINE inline __attribute__((always_inline))

namespace {

using Int = int64_t;

template <int W>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef int32_t Words __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  typedef float Anywhere __attribute__((vector_size(4 * W), aligned(4), may_alias));
};
template <int W>
using Floats = typename Lanes<W>::Floats;
template <int W>
using Words = typename Lanes<W>::Words;
template <int W>
using Bits = typename Lanes<W>::Bits;

template <int W>
INLINE Floats<W> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::Anywhere*>(from);
}

template <int W>
INLINE void store(float* to, Floats<W> values) {
  *reinterpret_cast<typename Lanes<W>::Anywhere*>(to) = values;
}

// Sizes of a problem. `run` passes them as constants for the most common sizes, so that the compiler can unroll the loops.
// `size` is the number of channels of a head. `width` is `queries` rounded up to whole vectors.
struct Sizes {
  Int heads, queries, tokens, size, stride, width;
  // Number of floats from one token (or query) of a tensor to the next.
  INLINE Int row() const { return heads * size; }
  // Number of tokens to which at least one of the queries first .. first + lanes - 1 attends.
  INLINE Int seen(Int first, Int lanes) const {
    Int end = (first + lanes - 1) * stride + 1;
    return end < tokens ? end : tokens;
  }
};

// First index of a block of four, of which `at` is the first index that is not done yet. `count` is at least 4. If fewer than
// four indices are left, the block overlaps the previous block, and the same values are computed again.
INLINE Int four_from(Int at, Int count) { return at + 4 <= count ? at : count - 4; }

// exp(x) for x <= 0, as e^(n ln 2 + r) with |r| <= ln 2 / 2, by the polynomial of Cephes (expf, relative error 1e-7). NaN
// stays NaN. For x > 0 the result is arbitrary; x can be positive only at tokens to which a query does not attend.
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
  return x == x ? (Floats<W>)((Bits<W>)y + ((Bits<W>)shifted << 23)) : x;
}

#if defined(__clang__)
#define SHUFFLE(W, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(W, a, b, ...) __builtin_shuffle(a, b, Words<W>{__VA_ARGS__})
#endif
// One step of a transposition: swap the off-diagonal blocks of every square of 2 * BLOCK rows.
#define SWAP(W, BLOCK, UPPER, LOWER)                 \
  for (int i = 0; i < W; i++)                        \
    if (!(i & BLOCK)) {                              \
      Floats<W> above = x[i], below = x[i + BLOCK];  \
      x[i] = SHUFFLE(W, above, below, UPPER);        \
      x[i + BLOCK] = SHUFFLE(W, above, below, LOWER); \
    }
#define LIST(...) __VA_ARGS__

INLINE void transpose_square(Floats<16> (&x)[16]) {
  SWAP(16, 8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
       LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  SWAP(16, 4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
       LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  SWAP(16, 2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
       LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  SWAP(16, 1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
       LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
}

INLINE void transpose_square(Floats<8> (&x)[8]) {
  SWAP(8, 4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
  SWAP(8, 2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
  SWAP(8, 1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
}

INLINE void transpose_square(Floats<4> (&x)[4]) {
  SWAP(4, 2, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
  SWAP(4, 1, LIST(0, 4, 2, 6), LIST(1, 5, 3, 7))
}

// Transpose the rows of one head (queries, size) to columns (size, width). Lanes without a query are 0.
template <int W>
INLINE void transpose(const Sizes& n, float* columns, const float* rows) {
  for (Int first = 0; first < n.width; first += W) {
    Int c = 0;
    for (; c + W <= n.size; c += W) {
      Floats<W> x[W];
      for (int i = 0; i < W; i++) x[i] = first + i < n.queries ? load<W>(rows + (first + i) * n.row() + c) : Floats<W>{};
      transpose_square(x);
      for (int i = 0; i < W; i++) store<W>(columns + (c + i) * n.width + first, x[i]);
    }
    for (; c < n.size; c++)
      for (Int i = first; i < first + W; i++) columns[c * n.width + i] = i < n.queries ? rows[i * n.row() + c] : 0;
  }
}

// products[s][i] = rows[s] . columns[.][i] for the N tokens from s on. Vectors of queries that attend to none of these
// tokens are skipped.
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

// Convert scores to P in place: the softmax over s of scale * scores. P is 0 at tokens to which a query does not attend.
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

// Convert dP, the gradient with respect to P, to the gradient with respect to scale * scores, in place: P (dP - sum_s P
// dP).
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

// to[i] = scale * (sum of p[s][i] rows[s] over the tokens s to which query i attends), for the N queries from i on and C
// channels.
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

// to[s] = scale * (sum of p[s][i] rows[i] over the queries i that attend to token s), for the N tokens from s on and C
// channels.
template <int C, int N>
INLINE void to_tokens(const Sizes& n, float* to, const float* p, const float* rows, float scale, Int s) {
  Floats<C> sum[N] = {};
  for (Int i = (s + n.stride - 1) / n.stride; i < n.queries; i++) {
    Floats<C> row = load<C>(rows + i * n.row());
    for (int t = 0; t < N; t++) sum[t] += p[(s + t) * n.width + i] * row;
  }
  for (int t = 0; t < N; t++) store<C>(to + (s + t) * n.row(), scale * sum[t]);
}

// Both functions again, for all queries or all tokens and for all channels. They process channels in vectors of C, and the
// remaining channels in shorter vectors.
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

// Prefetch a part of the next prompt's data in a tensor. Each head fetches its share, and the calls are spread over the
// computation, so that no head waits for memory.
template <bool WRITTEN>
INLINE void fetch(const Sizes& n, const float* of_head, Int rows, Int head) {
  const float* next = of_head - head * n.size + rows * n.row();
  for (Int i = rows * head / n.heads; i < rows * (head + 1) / n.heads; i++)
    for (Int c = 0; c < n.row(); c += 16) __builtin_prefetch(next + i * n.row() + c, WRITTEN);
}

struct Forward {
  float* out;
  const float *q, *k, *v;

  // Number of floats of working memory for one head: the transposed queries, and P.
  static INLINE Int work(const Sizes& n) { return n.width * (n.size + n.tokens); }

  template <int W, int C>
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
    to_queries<C>(n, out + query, p, v + token, 1);
  }
};

struct Backward {
  float *dq, *dk, *dv;
  const float *g, *q, *k, *v;

  // Number of floats of working memory for one head: the transposed queries (later the transposed g), P, and its gradient.
  static INLINE Int work(const Sizes& n) { return n.width * (n.size + 2 * n.tokens); }

  template <int W, int C>
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
    to_queries<C>(n, dq + query, d, k + token, scale);
    fetch<true>(n, dk + token, n.tokens, h);
    to_tokens<C>(n, dk + token, d, q + query, scale);
    fetch<true>(n, dv + token, n.tokens, h);
    to_tokens<C>(n, dv + token, p, g + query, 1);
  }
};

// Compute all heads of the prompts first .. end - 1, with vectors of W lanes. For the sizes of the preset L2H4 (K = 8,
// heads of 16 channels), the lengths of the loops are constants.
template <int W, class Job>
INLINE void run(const Job& job, const Sizes& n, Int first, Int end, float* work) {
  constexpr int HALF = W == 16 ? 8 : W;
  for (Int prompt = first; prompt < end; prompt++)
    for (Int h = 0; h < n.heads; h++) {
      if (n.tokens == 15 && n.size == 16 && n.queries == 15 && n.stride == 1)
        job.template head<W, W>(Sizes{n.heads, 15, 15, 16, 1, 16}, prompt, h, work);
      else if (n.tokens == 15 && n.size == 16 && n.queries == 8 && n.stride == 2)
        job.template head<HALF, W>(Sizes{n.heads, 8, 15, 16, 2, 8}, prompt, h, work);
      else
        job.template head<W, W>(n, prompt, h, work);
    }
}

// One version of `run` for each kind of processor. GCC's code for vectors longer than the processor's is ten times slower.
template <class Job>
using Range = void (*)(const Job&, const Sizes&, Int, Int, float*);

#define RANGE(NAME, TARGET, W)                                                              \
  template <class Job>                                                                      \
  TARGET void NAME(const Job& job, const Sizes& n, Int first, Int end, float* work) {       \
    run<W>(job, n, first, end, work);                                                       \
  }

RANGE(range_4, , 4)
#ifdef __x86_64__
RANGE(range_8, __attribute__((target("avx2,fma,bmi2"))), 8)
RANGE(range_16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), 16)
#endif

template <class Job>
Range<Job> range(Int lanes) {
#ifdef __x86_64__
  if (lanes == 16) return range_16<Job>;
  if (lanes == 8) return range_8<Job>;
#endif
  return range_4<Job>;
}

// Compute all prompts, with several threads. A thread computes blocks of `share` prompts. A single block needs no second
// thread.
template <class Job>
void on_all_cores(const Job& job, Int prompts, const Sizes& n, Int lanes) {
  const Int share = 8;
  const Range<Job> run = range<Job>(lanes);
#pragma omp parallel if (prompts > share)
  {
    float* work = static_cast<float*>(std::aligned_alloc(64, (4 * Job::work(n) + 63) / 64 * 64));
#pragma omp for schedule(static)
    for (Int first = 0; first < prompts; first += share)
      run(job, n, first, first + share < prompts ? first + share : prompts, work);
    std::free(work);
  }
}

Sizes sizes(Int heads, Int queries, Int tokens, Int size, Int stride, Int lanes) {
  return {heads, queries, tokens, size, stride, (queries + lanes - 1) / lanes * lanes};
}

}  // namespace

extern "C" {

// Digest of this source, which setup.py passes. A library that was compiled from another source is not used.
const char* attention_source() { return SOURCE; }

// Number of lanes of the longest vectors of this processor: 16, 8 or 4.
Int attention_lanes() {
#ifdef __x86_64__
  bool has_8 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool has_16 = has_8 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_16 ? 16 : has_8 ? 8 : 4;
#else
  return 4;
#endif
}

// Attention. `out` and q have the shape (prompts, queries, heads * size), and k and v the shape (prompts, tokens, heads *
// size).
void attention_forward(float* out, const float* q, const float* k, const float* v, Int prompts, Int heads, Int queries,
                       Int tokens, Int size, Int stride, Int lanes) {
  on_all_cores(Forward{out, q, k, v}, prompts, sizes(heads, queries, tokens, size, stride, lanes), lanes);
}

// Gradients dq, dk and dv from g, the gradient of `out`. P is computed again, which is cheaper than reading it from memory.
void attention_backward(float* dq, float* dk, float* dv, const float* g, const float* q, const float* k, const float* v,
                        Int prompts, Int heads, Int queries, Int tokens, Int size, Int stride, Int lanes) {
  on_all_cores(Backward{dq, dk, dv, g, q, k, v}, prompts, sizes(heads, queries, tokens, size, stride, lanes), lanes);
}
}
