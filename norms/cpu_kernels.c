/* The passes of norms/moments.py over activations on a CPU; MABN and BCN whole; and the
 * standardization of weights that no function of PyTorch's has. norms/cpu_kernels.py compiles and
 * calls them.
 *
 * Images are (N, C, H, W), N * C maps of `size` values, contiguous or, `last`, channels-last. Sums
 * are taken in REAL, BLOCK values at a time, and added up in double; none is taken across threads,
 * so that their number changes no bit of a result. Contiguous, the layers are computed a few channels
 * at a time, whose values are still in the cache when they are read again. */

#include <stdbool.h>
#include <stdint.h>
#include <tgmath.h>

typedef int64_t integer;
typedef struct {
  integer C, size;
  bool last;
} layout;

/* Values that are added up in REAL, a multiple of 4; channels that are computed together. */
enum { BLOCK = 1024, FEW = 8 };

static integer least(integer a, integer b) { return a < b ? a : b; }

/* Channels-last, a thread's whole share of them: memory is read as it lies. */
static integer together(layout l, integer threads) {
  return l.last ? ((l.C + threads - 1) / threads + 15) / 16 * 16 : FEW;
}

/* Where channel c of image n begins. */
static integer at(layout l, integer n, integer c) {
  return l.last ? n * l.C * l.size + c : (n * l.C + c) * l.size;
}

/* --- `count` channels of an image, from its pointers on ------------------------------------------
 *
 * Contiguous, one channel after another; channels-last side by side, four positions at a time. */

#define EACH_BLOCK \
  for (integer start = 0, end; end = least(start + BLOCK, l.size), start < l.size; start += BLOCK)

/* The sum of (x - center)^2. */
static void squares_of(layout l, integer count, const REAL *x, const REAL *center, double *square) {
  const integer C = l.C;
  REAL part[count];
  for (integer c = 0; c < count; c++) square[c] = 0;
  if (l.last) EACH_BLOCK {
    for (integer c = 0; c < count; c++) part[c] = 0;
    integer p = start;
    for (; p + 4 <= end; p += 4) {
      const REAL *v = x + p * C;
#pragma omp simd
      for (integer c = 0; c < count; c++) {
        const REAL a = v[c] - center[c], b = v[c + C] - center[c];
        const REAL d = v[c + 2 * C] - center[c], e = v[c + 3 * C] - center[c];
        part[c] += (a * a + b * b) + (d * d + e * e);
      }
    }
    for (; p < end; p++) {
#pragma omp simd
      for (integer c = 0; c < count; c++)
        part[c] += (x[p * C + c] - center[c]) * (x[p * C + c] - center[c]);
    }
    for (integer c = 0; c < count; c++) square[c] += part[c];
  }
  else for (integer c = 0; c < count; c++, x += l.size) EACH_BLOCK {
    REAL own = 0;
#pragma omp simd reduction(+ : own)
    for (integer p = start; p < end; p++) own += (x[p] - center[c]) * (x[p] - center[c]);
    square[c] += own;
  }
}

/* Mean and biased variance. */
static void moments_of(layout l, integer count, const REAL *x, REAL *mean, REAL *var) {
  const integer C = l.C;
  double total[count];
  REAL part[count];
  for (integer c = 0; c < count; c++) total[c] = 0;
  if (l.last) EACH_BLOCK {
    for (integer c = 0; c < count; c++) part[c] = 0;
    integer p = start;
    for (; p + 4 <= end; p += 4) {
      const REAL *v = x + p * C;
#pragma omp simd
      for (integer c = 0; c < count; c++)
        part[c] += (v[c] + v[c + C]) + (v[c + 2 * C] + v[c + 3 * C]);
    }
    for (; p < end; p++) {
#pragma omp simd
      for (integer c = 0; c < count; c++) part[c] += x[p * C + c];
    }
    for (integer c = 0; c < count; c++) total[c] += part[c];
  }
  else for (integer c = 0; c < count; c++) EACH_BLOCK {
    REAL own = 0;
#pragma omp simd reduction(+ : own)
    for (integer p = start; p < end; p++) own += x[c * l.size + p];
    total[c] += own;
  }
  for (integer c = 0; c < count; c++) mean[c] = total[c] / l.size;
  squares_of(l, count, x, mean, total);
  for (integer c = 0; c < count; c++) var[c] = total[c] / l.size;
}

/* The sums of dy and of dy * (x - center). */
static void sums_of(layout l, integer count, const REAL *dy, const REAL *x, const REAL *center,
                    double *total, double *product) {
  const integer C = l.C;
  REAL first[count], second[count];
  for (integer c = 0; c < count; c++) total[c] = product[c] = 0;
  if (l.last) EACH_BLOCK {
    for (integer c = 0; c < count; c++) first[c] = second[c] = 0;
    integer p = start;
    for (; p + 4 <= end; p += 4) {
      const REAL *g = dy + p * C, *v = x + p * C;
#pragma omp simd
      for (integer c = 0; c < count; c++) {
        const REAL a = g[c], b = g[c + C], d = g[c + 2 * C], e = g[c + 3 * C];
        first[c] += (a + b) + (d + e);
        second[c] += (a * (v[c] - center[c]) + b * (v[c + C] - center[c])) +
                     (d * (v[c + 2 * C] - center[c]) + e * (v[c + 3 * C] - center[c]));
      }
    }
    for (; p < end; p++) {
#pragma omp simd
      for (integer c = 0; c < count; c++) {
        first[c] += dy[p * C + c];
        second[c] += dy[p * C + c] * (x[p * C + c] - center[c]);
      }
    }
    for (integer c = 0; c < count; c++) {
      total[c] += first[c];
      product[c] += second[c];
    }
  }
  else for (integer c = 0; c < count; c++, dy += l.size, x += l.size) EACH_BLOCK {
    REAL one = 0, two = 0;
#pragma omp simd reduction(+ : one, two)
    for (integer p = start; p < end; p++) {
      one += dy[p];
      two += dy[p] * (x[p] - center[c]);
    }
    total[c] += one;
    product[c] += two;
  }
}

/* y = scale * x + shift */
static void affine_of(layout l, integer count, const REAL *x, const REAL *scale, const REAL *shift,
                      REAL *y) {
  if (l.last) for (integer p = 0; p < l.size * l.C; p += l.C) {
#pragma omp simd
    for (integer c = 0; c < count; c++) y[p + c] = scale[c] * x[p + c] + shift[c];
  }
  else for (integer c = 0; c < count; c++, x += l.size, y += l.size) {
#pragma omp simd
    for (integer p = 0; p < l.size; p++) y[p] = scale[c] * x[p] + shift[c];
  }
}

/* dx = a * dy + b * x + shift */
static void combine_of(layout l, integer count, const REAL *dy, const REAL *a, const REAL *x,
                       const REAL *b, const REAL *shift, REAL *dx) {
  if (l.last) for (integer p = 0; p < l.size * l.C; p += l.C) {
#pragma omp simd
    for (integer c = 0; c < count; c++)
      dx[p + c] = a[c] * dy[p + c] + (b[c] * x[p + c] + shift[c]);
  }
  else for (integer c = 0; c < count; c++, dy += l.size, x += l.size, dx += l.size) {
#pragma omp simd
    for (integer p = 0; p < l.size; p++) dx[p] = a[c] * dy[p] + (b[c] * x[p] + shift[c]);
  }
}

/* --- Passes over all images -------------------------------------------------------------------- */

#define EACH_FEW                                        \
  const layout l = {C, size, last};                     \
  const integer few = together(l, threads);             \
  _Pragma("omp parallel for collapse(2) num_threads(threads)") \
  for (integer n = 0; n < N; n++)                       \
    for (integer c = 0; c < C; c += few)

/* Mean and biased variance of every map. */
void moments(const REAL *x, REAL *mean, REAL *var, integer N, integer C, integer size, integer last,
             integer threads) {
  EACH_FEW {
    moments_of(l, least(few, C - c), x + at(l, n, c), mean + n * C + c, var + n * C + c);
  }
}

/* Sums of dy and of dy * (x - center) over every map. Numbers of maps are (N, C), of `rows` C, or
 * (C), of rows 0. */
void sums(const REAL *dy, const REAL *x, const REAL *center, REAL *total, REAL *product, integer N,
          integer C, integer size, integer last, integer rows, integer threads) {
  EACH_FEW {
    const integer count = least(few, C - c), from = at(l, n, c);
    double first[count], second[count];
    sums_of(l, count, dy + from, x + from, center + n * rows + c, first, second);
    for (integer i = 0; i < count; i++) {
      total[n * C + c + i] = first[i];
      product[n * C + c + i] = second[i];
    }
  }
}

/* out = b * x + shift and, with a, + a * dy. */
void combine(const REAL *dy, const REAL *a, const REAL *x, const REAL *b, const REAL *shift,
             REAL *out, integer N, integer C, integer size, integer last, integer rows,
             integer threads) {
  EACH_FEW {
    const integer count = least(few, C - c), from = at(l, n, c), own = n * rows + c;
    if (a)
      combine_of(l, count, dy + from, a + own, x + from, b + own, shift + own, out + from);
    else
      affine_of(l, count, x + from, b + own, shift + own, out + from);
  }
}

/* --- MABN2d in training, the release version: G groups of N images, one after another ------------ */

/* Moves `count` columns of a (rows, C) window on by as many values, and gives the columns' means
 * instead of these, unless `alone`. */
static void push(REAL *window, integer C, integer rows, REAL *values, integer count, bool alone) {
  REAL total[count];
  for (integer i = 0; i < count; i++) total[i] = values[i];
  for (integer r = 0; r < rows; r++) {
    REAL *row = window + r * C;
    const REAL *next = r < rows - 1 ? row + C : values;
    for (integer i = 0; i < count; i++) {
      row[i] = next[i];
      if (r < rows - 1) total[i] += next[i];
    }
  }
  for (integer i = 0; i < count && !alone; i++) values[i] = total[i] / rows;
}

/* gain = r / sqrt(chi_bar + eps) and inverse = 1 / sqrt(chi_bar + eps): (G, C); own: (G). */
void mabn_forward(const REAL *x, const REAL *weight, const REAL *bias, REAL *running, REAL *window,
                  const integer *tracked, REAL *y, REAL *gain, REAL *inverse, bool *own, integer G,
                  integer N, integer C, integer size, integer last, integer rows, integer until_own,
                  integer until_free, double momentum, double eps, integer threads) {
  const layout l = {C, size, last};
  const integer few = together(l, threads);
  for (integer g = 0; g < G; g++) own[g] = *tracked + g + 1 < until_own;
#pragma omp parallel for num_threads(threads)
  for (integer c = 0; c < C; c += few) {
    const integer count = least(few, C - c);
    REAL zeros[count], chi[count], scale[count];
    double square[count];
    for (integer i = 0; i < count; i++) zeros[i] = 0;
    for (integer g = 0; g < G; g++) {
      const bool free = *tracked + g + 1 > until_free;
      for (integer i = 0; i < count; i++) chi[i] = 0;
      for (integer n = g * N; n < g * N + N; n++) {
        squares_of(l, count, x + at(l, n, c), zeros, square);
        for (integer i = 0; i < count; i++) chi[i] += square[i] / (N * size);
      }
      push(window + c, C, rows, chi, count, own[g]);
      for (integer i = 0; i < count; i++) {
        const integer to = g * C + c + i;
        const REAL root = sqrt(chi[i] + (REAL)eps);
        REAL r = root / sqrt(running[c + i] + (REAL)eps);
        r = r < (REAL)0.2 ? (REAL)0.2 : r > 5 ? 5 : r; /* which leaves NaN */
        running[c + i] += (REAL)(1 - momentum) * (chi[i] - running[c + i]);
        inverse[to] = 1 / root;
        gain[to] = free ? r / root : inverse[to];
        scale[i] = weight[c + i] * gain[to];
      }
      for (integer n = g * N; n < g * N + N; n++)
        affine_of(l, count, x + at(l, n, c), scale, bias + c, y + at(l, n, c));
    }
  }
}

/* Its gradient; `window` holds psi of the batches before and is moved on. */
void mabn_backward(const REAL *dy, const REAL *x, const REAL *weight, const REAL *gain,
                   const REAL *inverse, const bool *own, REAL *window, REAL *dx, REAL *dweight,
                   REAL *dbias, integer G, integer N, integer C, integer size, integer last,
                   integer rows, integer threads) {
  const layout l = {C, size, last};
  const integer few = together(l, threads);
#pragma omp parallel for num_threads(threads)
  for (integer c = 0; c < C; c += few) {
    const integer count = least(few, C - c);
    REAL zeros[count], product[count], a[count], b[count];
    double first[count], second[count];
    for (integer i = 0; i < count; i++) zeros[i] = dweight[c + i] = dbias[c + i] = 0;
    for (integer g = 0; g < G; g++) {
      for (integer i = 0; i < count; i++) product[i] = 0;
      for (integer n = g * N; n < g * N + N; n++) {
        sums_of(l, count, dy + at(l, n, c), x + at(l, n, c), zeros, first, second);
        for (integer i = 0; i < count; i++) {
          dbias[c + i] += first[i];
          product[i] += second[i];
        }
      }
      for (integer i = 0; i < count; i++) {
        a[i] = weight[c + i] * gain[g * C + c + i];
        b[i] = a[i] * product[i] / (N * size); /* psi */
        dweight[c + i] += gain[g * C + c + i] * product[i];
      }
      push(window + c, C, rows, b, count, own[g]);
      for (integer i = 0; i < count; i++)
        b[i] *= -inverse[g * C + c + i] * inverse[g * C + c + i];
      for (integer n = g * N; n < g * N + N; n++)
        combine_of(l, count, dy + at(l, n, c), a, x + at(l, n, c), b, zeros, dx + at(l, n, c));
    }
  }
}

/* --- BatchChannelNorm2d in training: G groups of N images, one after another --------------------
 *
 * C channels in K groups of S; a few whole groups are computed together, channels c to `to`. As in
 * norms/bcn.py, z = p * (x - center) + bn_bias with p = bn_weight * inverse. */

#define EACH_FEW_GROUPS                                                              \
  const layout l = {C, size, last};                                                  \
  const integer S = C / K, few = last ? (K + threads - 1) / threads : 1;             \
  _Pragma("omp parallel for num_threads(threads)") for (integer k = 0; k < K; k += few)

/* mean, var: (G * N, C), of every map; center, inverse: (G, C), the batch norm's; z_mean, z_inverse:
 * (G * N, K), the channel norm's. */
void bcn_forward(const REAL *x, const REAL *bn_weight, const REAL *bn_bias, const REAL *weight,
                 const REAL *bias, REAL *running_mean, REAL *running_var, REAL *y, REAL *mean,
                 REAL *var, REAL *center, REAL *inverse, REAL *z_mean, REAL *z_inverse, integer G,
                 integer N, integer C, integer K, integer size, integer last, integer estimated,
                 double rate, double bn_eps, double eps, integer threads) {
  EACH_FEW_GROUPS {
    const integer c = k * S, to = least(k + few, K) * S, count = to - c;
    REAL scale[count], shift[count];
    for (integer g = 0; g < G; g++) {
      REAL *middle = center + g * C, *by = inverse + g * C;
      for (integer n = g * N; n < g * N + N; n++)
        moments_of(l, count, x + at(l, n, c), mean + n * C + c, var + n * C + c);
      for (integer s = c; s < to; s++) {
        REAL own = 0, spread = 0;
        for (integer n = g * N; n < g * N + N; n++) own += mean[n * C + s];
        own /= N;
        for (integer n = g * N; n < g * N + N; n++) {
          const REAL away = mean[n * C + s] - own;
          spread += var[n * C + s] + away * away;
        }
        spread /= N;
        const REAL step = own - running_mean[s];
        const REAL unbiased = (double)(N * size) / (N * size - 1);
        const REAL moved = estimated ? spread + step * step : spread * unbiased;
        running_mean[s] += (REAL)rate * step;
        running_var[s] += (REAL)rate * (moved - running_var[s]);
        middle[s] = estimated ? running_mean[s] : own;
        by[s] = 1 / sqrt((estimated ? running_var[s] : spread) + (REAL)bn_eps);
      }
      for (integer n = g * N; n < g * N + N; n++) {
        for (integer j = k; j < to / S; j++) {
          REAL own = 0, spread = 0;
          for (integer s = j * S; s < j * S + S; s++) {
            scale[s - c] = bn_weight[s] * by[s];
            shift[s - c] = (mean[n * C + s] - middle[s]) * scale[s - c] + bn_bias[s]; /* of z */
            own += shift[s - c];
          }
          own /= S;
          for (integer s = j * S; s < j * S + S; s++) {
            const REAL away = shift[s - c] - own;
            spread += var[n * C + s] * scale[s - c] * scale[s - c] + away * away;
          }
          const REAL zi = 1 / sqrt(spread / S + (REAL)eps);
          z_mean[n * K + j] = own;
          z_inverse[n * K + j] = zi;
          for (integer s = j * S; s < j * S + S; s++) {
            scale[s - c] *= weight[j] * zi;
            shift[s - c] =
                (shift[s - c] - own) * weight[j] * zi + bias[j] - mean[n * C + s] * scale[s - c];
          }
        }
        affine_of(l, count, x + at(l, n, c), scale, shift, y + at(l, n, c));
      }
    }
  }
}

/* `through`: whether the gradient passes through the batch norm's statistics. b, shift: (G * N, C),
 * for what lies between. */
void bcn_backward(const REAL *dy, const REAL *x, const REAL *bn_weight, const REAL *bn_bias,
                  const REAL *weight, const REAL *mean, const REAL *var, const REAL *center,
                  const REAL *inverse, const REAL *z_mean, const REAL *z_inverse, REAL *dx,
                  REAL *dbn_weight, REAL *dbn_bias, REAL *dweight, REAL *dbias, REAL *b,
                  REAL *shift, integer G, integer N, integer C, integer K, integer size,
                  integer last, integer through, integer threads) {
  EACH_FEW_GROUPS {
    const integer c = k * S, to = least(k + few, K) * S, count = to - c;
    REAL a[count], dz[count], dzx[count];
    double total[count], product[count];
    for (integer j = k; j < to / S; j++) dweight[j] = dbias[j] = 0;
    for (integer s = c; s < to; s++) dbn_weight[s] = dbn_bias[s] = 0;
    for (integer g = 0; g < G; g++) {
      const REAL *middle = center + g * C, *by = inverse + g * C;
      for (integer s = 0; s < count; s++) dz[s] = dzx[s] = 0;
      for (integer n = g * N; n < g * N + N; n++) {
        const integer from = at(l, n, c);
        sums_of(l, count, dy + from, x + from, mean + n * C + c, total, product);
        for (integer j = k; j < to / S; j++) {
          const REAL zi = z_inverse[n * K + j], gain = weight[j] * zi;
          REAL db = 0, dw = 0;
          for (integer s = j * S; s < j * S + S; s++) {
            const integer m = n * C + s;
            const REAL w = bn_weight[s] * by[s], p = w * zi; /* y = weight * u + bias */
            const REAL q = ((mean[m] - middle[s]) * w + bn_bias[s] - z_mean[n * K + j]) * zi;
            db += total[s - c];
            dw += p * product[s - c] + q * total[s - c]; /* u = (x - mean) * p + q */
            b[m] = p;
            shift[m] = q;
          }
          dbias[j] += db;
          dweight[j] += dw;
          db *= -gain / (S * size);
          dw *= -gain / (S * size);
          for (integer s = j * S; s < j * S + S; s++) {
            const integer m = n * C + s;
            b[m] *= dw; /* dz = gain * dy + b * (x - mean) + shift */
            shift[m] = db + dw * shift[m];
            const REAL sum = gain * total[s - c] + size * shift[m];
            dz[s - c] += sum;
            dzx[s - c] +=
                gain * product[s - c] + (mean[m] - middle[s]) * sum + size * b[m] * var[m];
          }
        }
      }
      for (integer s = c; s < to; s++) {
        dbn_bias[s] += dz[s - c];
        dbn_weight[s] += dzx[s - c] * by[s];
        dz[s - c] = through ? -dz[s - c] / (N * size) : 0;
        dzx[s - c] = through ? -dzx[s - c] * by[s] * by[s] / (N * size) : 0;
      }
      for (integer n = g * N; n < g * N + N; n++) {
        for (integer s = c; s < to; s++) {
          const integer m = n * C + s;
          const REAL p = bn_weight[s] * by[s];
          a[s - c] = weight[s / S] * z_inverse[n * K + s / S] * p;
          b[m] = (b[m] + dzx[s - c]) * p;
          shift[m] = (shift[m] + dz[s - c] + dzx[s - c] * (mean[m] - middle[s])) * p;
          shift[m] -= b[m] * mean[m];
        }
        const integer from = at(l, n, c), m = n * C + c;
        combine_of(l, count, dy + from, a, x + from, b + m, shift + m, dx + from);
      }
    }
  }
}

/* --- Standardized filters ------------------------------------------------------------------------
 *
 * y = (x - mean) * by, by = 1 / (std + eps), with the variance over size - less of a filter's `size`
 * weights. Kept for the gradient: mean, by, and slope of dx = by * (dy - mean(dy)) -
 * slope * sum(dy * (x - mean)) * (x - mean). */

void standardize(const REAL *x, REAL *y, REAL *mean, REAL *by, REAL *slope, integer filters,
                 integer size, integer less, double eps, integer threads) {
  const layout l = {filters, size, false};
#pragma omp parallel for num_threads(threads)
  for (integer f = 0; f < filters; f += FEW) {
    const integer count = least(FEW, filters - f);
    REAL var[FEW], shift[FEW];
    moments_of(l, count, x + f * size, mean + f, var);
    for (integer i = 0; i < count; i++) {
      const double std = sqrt((double)var[i] * size / (size - less)), below = std + eps;
      by[f + i] = 1 / below;
      slope[f + i] = std > 0 ? 1 / (below * below * std * (size - less)) : 0;
      shift[i] = -mean[f + i] * by[f + i];
    }
    affine_of(l, count, x + f * size, by + f, shift, y + f * size);
  }
}

void standardize_backward(const REAL *dy, const REAL *x, const REAL *mean, const REAL *by,
                          const REAL *slope, REAL *dx, integer filters, integer size,
                          integer threads) {
  const layout l = {filters, size, false};
#pragma omp parallel for num_threads(threads)
  for (integer f = 0; f < filters; f += FEW) {
    const integer count = least(FEW, filters - f);
    double total[FEW], product[FEW];
    REAL b[FEW], shift[FEW];
    sums_of(l, count, dy + f * size, x + f * size, mean + f, total, product);
    for (integer i = 0; i < count; i++) {
      b[i] = -slope[f + i] * product[i];
      shift[i] = -by[f + i] * (total[i] / size) - b[i] * mean[f + i];
    }
    combine_of(l, count, dy + f * size, by + f, x + f * size, b, shift, dx + f * size);
  }
}
