// The sparse products: gather (forward, input gradient) and dot (weight gradient on a mask).
//
// A tile of output positions stays in registers while the entries of a row pass: for each, one offset, one broadcast,
// one fused multiply-add a position. Every spatial shift of a convolution is then a whole vector.
#include "sums.h"
#include "vec.h"

namespace {

template <int N> struct Number { static constexpr int value = N; };

struct Frame {  // what a tile needs to know, in words
    int64_t in_row, out_row, out_channel, out_step;
};


// The entries of one tap of a 3x3 kernel, DX columns aside, for the rows [A0, A1) of a tile as wide as the map: what
// lies outside the map is left out, columns when compiled.
template <class S, int TH, int TW, int DX, int A0, int A1>
INLINE void tap(const Gather& g, const Frame& f, const uint32_t* in, int32_t first, int32_t last,
                V (&acc)[TH * TW][S::K]) {
    constexpr int B0 = DX < 0 ? 1 : 0, B1 = DX > 0 ? TW - 1 : TW;
    if constexpr (A0 < A1)
        for (int32_t i = first; i < last; i++) {
            const uint32_t* x = in + g.offset[i];
            V w = all(g.value[i]);
            for (int a = A0; a < A1; a++)
                for (int b = B0; b < B1; b++) S::fma(x + a * f.in_row + b * WORDS, w, acc[a * TW + b]);
        }
}

// Calls f(DX, A0, A1, first entry, end) for the taps of a row, with what is inside the map of the tile's rows.
template <int TH, class F>
INLINE void taps(const int32_t* from, bool top, bool bottom, F&& f) {
    auto line = [&](int i, auto a0, auto a1) INLINE_LAMBDA {
        f(Number<-1>{}, a0, a1, from[i], from[i + 1]);
        f(Number<0>{}, a0, a1, from[i + 1], from[i + 2]);
        f(Number<1>{}, a0, a1, from[i + 2], from[i + 3]);
    };
    top ? line(0, Number<1>{}, Number<TH>{}) : line(0, Number<0>{}, Number<TH>{});
    line(3, Number<0>{}, Number<TH>{});
    bottom ? line(6, Number<0>{}, Number<TH - 1>{}) : line(6, Number<0>{}, Number<TH>{});
}

template <class S, int TH, int TW, int STEP, bool WHOLE>
INLINE void tile(const Gather& g, const Frame& f, const uint32_t* in, uint32_t* out, const uint32_t* add,
                 int64_t add_row, int64_t add_channel, int64_t begin, int64_t end, bool top, bool bottom) {
    constexpr int T = TH * TW, CHAINS = 4 / (T * S::K);  // additions that need not wait for each other
    auto entry = [&](int32_t i, V (&acc)[T][S::K]) INLINE_LAMBDA {
        const uint32_t* x = in + g.offset[i];
        V w = all(g.value[i]);
        for (int a = 0; a < TH; a++)
            for (int b = 0; b < TW; b++) S::fma(x + a * f.in_row + b * STEP * WORDS, w, acc[a * TW + b]);
    };
    for (int64_t r = begin; r < end; r++) {
        if (T > 1)
            for (int b = 0; b < T; b++)  // the next tile's: so far apart, these would all be misses
                __builtin_prefetch(out + r * f.out_channel + (TH + b / TW) * f.out_row + b % TW * f.out_step, 1);
        V acc[T][S::K];
        V start = all(g.bias ? g.bias[r] : 0.0f);
        for (int t = 0; t < T; t++)
            for (int k = 0; k < S::K; k++) acc[t][k] = start;
        if constexpr (WHOLE) {
            taps<TH>(g.tap + r * 9, top, bottom, [&](auto dx, auto a0, auto a1, int32_t i, int32_t j) INLINE_LAMBDA {
                tap<S, TH, TW, decltype(dx)::value, decltype(a0)::value, decltype(a1)::value>(g, f, in, i, j, acc);
            });
        } else {
            int32_t i = g.row[r];
            if constexpr (CHAINS > 1) {
                V more[CHAINS][T][S::K] = {};
                for (; i + CHAINS <= g.row[r + 1]; i += CHAINS)
                    for (int c = 0; c < CHAINS; c++) entry(i + c, more[c]);
                for (int c = 0; c < CHAINS; c++)
                    for (int t = 0; t < T; t++)
                        for (int k = 0; k < S::K; k++) acc[t][k] += more[c][t][k];
            }
            for (; i < g.row[r + 1]; i++) entry(i, acc);
        }
        if (add)
            for (int a = 0; a < TH; a++)
                for (int b = 0; b < TW; b++) {
                    V more[S::K];
                    S::read(add + r * add_channel + a * add_row + b * f.out_step, more);
                    for (int k = 0; k < S::K; k++) acc[a * TW + b][k] += more[k];
                }
        for (int a = 0; a < TH; a++)
            for (int b = 0; b < TW; b++) {
                V* x = acc[a * TW + b];
                if (g.relu)
                    for (int k = 0; k < S::K; k++) x[k] = rectified(x[k], g.relu);
                S::write(out + r * f.out_channel + a * f.out_row + b * f.out_step, x);
            }
    }
}

template <class S, int TH, int TW, int STEP, bool WHOLE>
INLINE void dot_tile(const Dot& d, const Frame& f, const uint32_t* in, const uint32_t* out, int64_t begin, int64_t end,
                     bool top, bool bottom) {
    constexpr int T = TH * TW;
    const Gather& g = d.of;
    for (int64_t r = begin; r < end; r++) {
        if (g.row[r] == g.row[r + 1]) continue;
        typename S::Held y[T];
        for (int a = 0; a < TH; a++)
            for (int b = 0; b < TW; b++)
                S::hold(out + r * f.out_channel + a * f.out_row + b * f.out_step, y[a * TW + b]);
        Sums total(d.grad + g.row[r]);
        auto some = [&](auto a0, auto a1, auto b0, auto b1, int32_t i, int32_t last) INLINE_LAMBDA {
            for (; i < last; i++) {
                const uint32_t* x = in + g.offset[i];
                V acc[2] = {zero(), zero()};
                for (int a = decltype(a0)::value; a < decltype(a1)::value; a++)
                    for (int b = decltype(b0)::value; b < decltype(b1)::value; b++)
                        S::dot(x + a * f.in_row + b * STEP * WORDS, y[a * TW + b], acc[(a * TW + b) % 2]);
                total.put(acc[0] + acc[1]);
            }
        };
        if constexpr (WHOLE) {
            taps<TH>(g.tap + r * 9, top, bottom, [&](auto dx, auto a0, auto a1, int32_t i, int32_t last) INLINE_LAMBDA {
                constexpr int DX = decltype(dx)::value;
                some(a0, a1, Number<(DX < 0 ? 1 : 0)>{}, Number<(DX > 0 ? TW - 1 : TW)>{}, i, last);
            });
        } else {
            some(Number<0>{}, Number<TH>{}, Number<0>{}, Number<TW>{}, g.row[r], g.row[r + 1]);
        }
        total.finish();
    }
}

// Calls f(row, column, TH, TW) for tiles that cover the map, as constants.
template <int T, int TW, class F>
INLINE void strip(int height, int column, F&& f) {
    constexpr int TH = T / TW;
    int h = 0;
    for (; h + TH <= height; h += TH) f(h, column, Number<TH>{}, Number<TW>{});
    for (; h < height; h++) f(h, column, Number<1>{}, Number<TW>{});
}

template <int T, class F>
INLINE void cover(int height, int width, F&& f) {
    int w = 0;
    for (; w + T <= width; w += T) strip<T, T>(height, w, f);
    if constexpr (T >= 16) if (w + 8 <= width) strip<T, 8>(height, w, f), w += 8;
    if constexpr (T >= 8) if (w + 4 <= width) strip<T, 4>(height, w, f), w += 4;
    if constexpr (T >= 4) if (w + 2 <= width) strip<T, 2>(height, w, f), w += 2;
    if constexpr (T >= 2) if (w < width) strip<T, 1>(height, w, f);
}

// The rows whose entries are this thread's share.
Share rows_by_work(const Gather& g, int thread, int threads) {
    auto cut = [&](int t) {
        int64_t want = (int64_t(g.row[g.rows]) - g.row[0] + g.rows) * t / threads;
        int64_t low = 0, high = g.rows;
        while (low < high) {
            int64_t mid = (low + high) / 2;
            if (g.row[mid] - g.row[0] + mid < want) low = mid + 1; else high = mid;
        }
        return low;
    };
    Share s(0, 0, 1);
    s.begin = thread ? cut(thread) : 0;
    s.end = thread + 1 == threads ? g.rows : cut(thread + 1);
    return s;
}

// Which part of a product is a thread's: lines of positions, as its home has it, or else rows of entries.
struct Part {
    Share lines, rows;
    bool by_line;
    template <class S>
    static Part of(const Gather& g, int thread, int threads) {
        const int64_t lines = int64_t(g.in.blocks) * g.height;
        const bool by_line = Home(g.out, thread, threads).by_line && whole<S>(g, threads);
        return {Share(lines, by_line ? thread : 0, by_line ? threads : 1),
                by_line ? Share(g.rows, 0, 1) : rows_by_work(g, thread, threads), by_line};
    }
    // Whether so many equal parts of the positions are made of whole tiles.
    template <class S>
    static bool whole(const Gather& g, int parts) {
        int wide = S::tile;
        while (wide > g.width) wide /= 2;
        const int64_t lines = int64_t(g.in.blocks) * g.height;
        return lines % parts == 0 && lines / parts % (S::tile / wide) == 0;
    }
};

template <class S, int STEP>
void run_gather(const Gather& g, int thread, int threads) {
    Steps in(g.in), out(g.out);
    const Part mine = Part::of<S>(g, thread, threads);
    Frame f{in.row * g.stride_in, out.row * g.stride_out, out.channel, int64_t(g.stride_out) * WORDS};
    int64_t add_row = 0, add_channel = 0, add_block = 0;
    const uint32_t* add_base = nullptr;
    if (g.add) {
        Steps add(*g.add);
        add_row = add.row * g.stride_out, add_channel = add.channel, add_block = add.block;
        add_base = add.inside + g.top * add.row + int64_t(g.left) * WORDS;
    }
    for (int64_t b = 0; b < g.in.blocks; b++) {
        uint32_t* first = out.inside + b * out.block + g.top * out.row + int64_t(g.left) * WORDS;
        cover<S::tile>(g.height, g.width, [&](int h, int w, auto th, auto tw) INLINE_LAMBDA {
            if (int64_t line = b * g.height + h; line < mine.lines.begin || line >= mine.lines.end) return;
            const uint32_t* x = g.in.data + b * in.block + h * f.in_row + int64_t(w) * STEP * WORDS;
            uint32_t* y = first + h * f.out_row + w * f.out_step;
            const uint32_t* add = add_base ? add_base + b * add_block + h * add_row + w * f.out_step : nullptr;
            constexpr int TH = decltype(th)::value, TW = decltype(tw)::value;
            const bool top = h == 0, bottom = h + TH == g.height;
            if (STEP == 1 && TW >= 4 && g.tap && TW == g.width)
                tile<S, TH, TW, STEP, STEP == 1 && TW >= 4>(g, f, x, y, add, add_row, add_channel, mine.rows.begin, mine.rows.end, top, bottom);
            else
                tile<S, TH, TW, STEP, false>(g, f, x, y, add, add_row, add_channel, mine.rows.begin, mine.rows.end, top, bottom);
        });
    }
    if (g.out.halo && g.top == 0 && g.left == 0) {
        Share lines(int64_t(g.out.blocks) * g.out.height, mine.by_line ? thread : 0, mine.by_line ? threads : 1);
        for (int64_t c = mine.rows.begin; c < mine.rows.end; c++) zero_halo(g.out, c, lines);
    }
}

template <class S, int STEP>
void run_dot(const Dot& d, int thread, int threads) {
    const Gather& g = d.of;
    Steps in(g.in), out(g.out);
    Frame f{in.row * g.stride_in, out.row, out.channel, WORDS};
    const int64_t all = int64_t(g.in.blocks) * g.height;
    const int halves = d.second && Part::whole<S>(g, 2) ? 2 : 1;  // of the lines, for any number of threads
    const bool apart = halves == 2 && threads % 2 == 0;           // each by threads of its own
    const Share rows = apart ? rows_by_work(g, thread % (threads / 2), threads / 2) : rows_by_work(g, thread, threads);
    const int32_t from = g.row[rows.begin], entries = g.row[rows.end] - from;
    for (int half = 0; half < halves && entries; half++) {  // without entries, there may be no gradient to set to zero
        if (apart && half != thread / (threads / 2)) continue;
        Dot own = d;
        if (half) own.grad = d.second - g.row[0];
        memset(own.grad + from, 0, sizeof(float) * entries);
        const Share lines(all, half, halves);
        for (int64_t b = 0; b < g.in.blocks; b++)
            cover<S::tile>(g.height, g.width, [&](int h, int w, auto th, auto tw) INLINE_LAMBDA {
                if (int64_t line = b * g.height + h; line < lines.begin || line >= lines.end) return;
                const uint32_t* x = g.in.data + b * in.block + h * f.in_row + int64_t(w) * STEP * WORDS;
                const uint32_t* y = out.inside + b * out.block + h * f.out_row + w * f.out_step;
                constexpr int TH = decltype(th)::value, TW = decltype(tw)::value;
                const bool top = h == 0, bottom = h + TH == g.height;
                if (STEP == 1 && TW >= 4 && g.tap && TW == g.width)
                    dot_tile<S, TH, TW, STEP, STEP == 1 && TW >= 4>(own, f, x, y, rows.begin, rows.end, top, bottom);
                else
                    dot_tile<S, TH, TW, STEP, false>(own, f, x, y, rows.begin, rows.end, top, bottom);
            });
    }
    if (halves == 1) return;
    if (apart) barrier();
    Share share(g.row[g.rows] - g.row[0], thread, threads);
    if (!apart) share.begin = from - g.row[0], share.end = share.begin + entries;
    for (int64_t i = share.begin; i < share.end; i++) d.grad[g.row[0] + i] += d.second[i];
}

}  // namespace

void gather(const Gather& g, int thread, int threads) {
    if (g.unit > 1) return gather_units(g, thread, threads);
    if (g.in.packed)
        g.stride_in == 1 ? run_gather<Bf16, 1>(g, thread, threads) : run_gather<Bf16, 2>(g, thread, threads);
    else
        g.stride_in == 1 ? run_gather<Fp32, 1>(g, thread, threads) : run_gather<Fp32, 2>(g, thread, threads);
}

void dot(const Dot& d, int thread, int threads) {
    if (d.of.unit > 1) return dot_units(d, thread, threads);
    if (d.of.in.packed)
        d.of.stride_in == 1 ? run_dot<Bf16, 1>(d, thread, threads) : run_dot<Bf16, 2>(d, thread, threads);
    else
        d.of.stride_in == 1 ? run_dot<Fp32, 1>(d, thread, threads) : run_dot<Fp32, 2>(d, thread, threads);
}
