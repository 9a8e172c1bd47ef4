// The C interface of the kernels: plain structures, one entry point. Mirrored, field by field, by kernels/abi.py.
//
// A map is an activation tensor as [channels][blocks][height + 2 halo][width + 2 halo][16 words], samples innermost.
// A word is 32 bits: one float (a block is 16 samples), or two bfloat16 (a block is 32 samples: sample i in the upper
// half of word i, sample 16 + i in the lower). Halos are zero; whoever writes a map also writes its halo.
//
// A map of tokens has one block and one line, without a halo: its lanes are the tokens of all samples, one sample behind
// another, and then lanes that stand for none, up to the width. There the gradients are zero, and activations finite.
#pragma once
#include <cstdint>

extern "C" {

struct Map {
    uint32_t* data;
    int32_t channels, blocks, height, width, halo;
    int32_t packed;  // 1: two bfloat16 a word
    int32_t gap;     // words between a channel and the next
};

// out[r] = sum over the entries i of row r of value[i] * in[offset[i] + position], one vector a position: a convolution,
// its input gradient (entries transposed; one call for each parity of the stride), a linear layer.
struct Gather {
    Map in, out;
    const int32_t* row;       // [rows + 1]: where a row's entries begin
    const int32_t* offset;    // [entries], in words from in.data
    const float* value;       // [entries]
    const float* bias;        // [rows] or null
    const Map* add;           // or null: added to the sum (may be out itself)
    int32_t rows;
    int32_t height, width;    // positions computed
    int32_t stride_in;        // 1 or 2: steps in `in` from one position to the next
    int32_t stride_out;       // steps in `out`, whose first position is (top, left)
    int32_t top, left;
    int32_t relu;             // as in Norm
    const int32_t* tap;       // null, or of a 3x3 kernel with padding 1 and stride 1, whose rows are sorted by tap:
                              // [rows * 9 + 1] where each tap's entries begin
    int32_t unit;             // above 1: so many rows share their entries. `row`, `offset` and `tap` (of any kernel) are
    int32_t kernel, padding;  // then those of each such group's first row; `value` is of all rows, one after another
};

// grad[i] = sum over samples and positions of in[offset[i] + position] * out[r, position]: a weight's gradient.
struct Dot {
    Gather of;                // the forward gather; `out` holds the output's gradient
    float* grad;              // [entries]
    float* second;            // [entries] for the sums of the second half of the lines, or null: rows are then divided
};

// in = the gradient of the forward gather's input, from that of its output in `out`, where `unit` is above 1: every entry
// adds its products to the positions that it looks at.
struct Scatter {
    Gather of;                // `offset` is that of `in`, whose halo may be another
    int32_t accumulate;       // 1: in += the gradient
};

// y -> relu(scale * y + shift + add): BatchNorm (batch or running statistics), its ReLU and residual sum.
struct Norm {
    Map y, out;
    const Map* add;           // or null
    const float* gamma;       // [channels], null: no normalisation
    const float* beta;        // [channels] (a bias, where gamma is null), or null
    float* running_mean;      // [channels]; updated in training
    float* running_var;
    float* mean;              // [channels]: kept for backward
    float* invstd;
    float momentum, eps;
    int32_t samples;          // valid samples
    int32_t training;         // 1: batch statistics; 2: those that `mean` and `invstd` hold (a repeated forward); 0: running
    int32_t relu;             // 1: ReLU; 2: ReLU6
    int32_t groups;           // 0, or GroupNorm's: `mean` and `invstd` are then [blocks][groups][samples of a block]
    int32_t positions;        // of GroupNorm where a sample is alone, and its positions are the lanes; else 0
    float* sums;              // GroupNorm's, while it runs: [7 + blocks][2 groups (samples of a block) + 2 channels]
};

struct NormBackward {
    Norm of;                  // `out` is read only where `add` is set (its sign tells the ReLU's)
    Map grad;                 // of the output; becomes the gradient of `add` in place, where there is one
    Map grad_y;               // may be `grad` where there is no `add`
    float* grad_gamma;        // [channels] or null
    float* grad_beta;
};

struct Pool {
    Map in, out;
    Map grad_out, grad_in;    // backward only
    int32_t kernel, stride, padding;
    int32_t average;          // 0: maximum; 1: mean over the kernel's whole area; 2: over the part inside the map
    int32_t backward;
    int32_t accumulate;       // backward: add to grad_in
};

struct Copy {
    Map from, to;
    int32_t mode;             // 0: to = from; 1: to += from; 2: flatten [C][B][H][W] to [C H W][B]; 3: and back; 4: to = 0
};

// Samples [samples, channels, height, width] float <-> a map.
struct Pack {
    Map map;
    float* plain;
    int32_t samples;
    int32_t unpack;
};

// Mean cross-entropy of logits [classes][blocks] over the valid samples, and its gradient.
struct Loss {
    Map logits, grad;
    const int64_t* label;
    float* loss;              // [1]
    int32_t samples;
};

// d = grad + decay w; v = momentum v + d; w -= rate v (Nesterov's: rate (d + momentum v)), on `count` numbers.
struct Sgd {
    float* w;
    float* velocity;          // or null
    const float* grad;
    int64_t count;
    float rate, momentum, decay;
    float power;              // a of powerpropagation: w holds th, and grad is that of sign(th) |th|^a
    float* value;             // null, or where the effective weights go
    int32_t nesterov;
    int32_t chained;          // grad is that of w, whatever the power
};

// d = grad + decay w; mean += fresh_mean (d - mean); square += fresh_square (d d - square);
// w = keep w - rate mean / (root sqrt(square) + eps), on `count` numbers.
struct Adam {
    float* w;
    float* mean;
    float* square;
    const float* grad;
    int64_t count;
    float fresh_mean, fresh_square, eps, decay;
    float keep;               // 1 less what of w decays apart from the gradient
    float rate, root;         // with the bias of the step's number taken out
    float power;              // as in Sgd
    float* value;
    int32_t chained;
};

// What becomes of a gradient before the step: d = grad (that of w, whatever the power) + mu (w - start) + shift.
struct Adjust {
    float* grad;
    const float* w;
    const float* start;       // or null
    const float* shift;       // or null
    int64_t count;
    float power, mu;
    double* sums;             // null, or [ceil(count / 4096)]: the sum of the squares of each 4096 numbers
};

// grad *= min(1, most / (norm + 1e-6)), the norm's square being the sum of all `sums`.
struct Clip {
    float* grad;
    int64_t count;
    const double* sums;
    int64_t parts;
    float most;
};

// The `count` largest of something by magnitude, ties to the first in PyTorch's order; zeros never count.
struct Cut {
    int64_t count;
    int32_t exact;            // 1: select, and note the threshold; 0: all that reach the threshold
    float* threshold;         // [1]
    int64_t* found;           // [1]: how many passed
    uint32_t* work;           // [threads][4 * 2048] counters
};

// Which weights nearly reach a cut's threshold, noted when they were last written, so that nobody has to look through all of them:
// their marks and, block by block, their values in order. A block's `count` is below 0 where nothing is known of it.
struct Noted {
    uint32_t* marks;          // [blocks][in * kernel * kernel]: a bit for each lane; null: nothing is noted
    float* value;             // [blocks][room + fs_lanes()]
    int32_t* count;           // [blocks]
    int64_t room;
    const float* threshold;   // the cut's
};

// The largest weights of a dense layer, as the lists that Gather walks. Weights are stored in blocks of fs_lanes()
// output channels: [blocks][in * kernel * kernel][lanes], the last block filled up with zeros.
struct Top {
    Cut cut;
    const float* dense;
    int32_t out, in, kernel, stride, padding;
    int64_t channel, line, shift;               // of the input's map: as in fs_entries
    int32_t* row;
    int32_t* offset;
    float* value;
    int64_t back_channel, back_line, back_halo;  // of the gradient's map: as in fs_transposed; back_row null: not needed
    int32_t* back_row;
    int32_t* back_offset;
    float* back_value;
    int64_t capacity;         // entries that fit; where a threshold lets more pass, the cut is exact again
    int32_t* tally;           // [blocks * (lanes + stride^2 * in)] counters
    Noted noted;
};

// The largest activations of a map, as lists of positions in a transposed gradient: see Wide.
struct Keep {
    Cut cut;
    Map in;
    int32_t samples;
    int32_t groups, group;    // samples are treated in groups of `group`
    int32_t stride;
    int32_t line, plane, corner;  // of the transposed gradient, in positions
    int32_t* start;           // [channels * groups * stride^2 + 1]
    int32_t* position;        // [numbers in the map]
    float* value;
};

// out = in where it is among the largest, else 0.
struct Prune {
    Cut cut;
    Map in, out;
    int32_t samples;
};

// The gradient of a dense weight from kept inputs, and at once the step: v = momentum v + g + decay w; w -= rate v.
struct Wide {
    Map grad;                 // of the output
    int32_t halo;             // of `blocks`
    float* blocks;            // [blocks][samples][height + 2 halo][width + 2 halo][lanes]: the gradient, transposed
    const Keep* from;
    int32_t kernel, padding;
    float* dense;             // as in Top
    float* velocity;          // or null
    float* sums;              // [threads][in * kernel * kernel][lanes]
    float* grad_out;          // null, or where the gradient goes (and no step is taken)
    float rate, momentum, decay;
    int32_t phase;            // 0: transpose; 1: multiply and step
    Noted noted;              // written with the weights; marks null: not
};

// value[i] = dense[index[i]]
struct Take {
    const float* dense;
    const int32_t* index;
    float* value;
    int64_t count;
};

// One sample alone, positions innermost: [channels][height * width] floats.
//
// out[c][j][q][r][w] = in[c][r stride + q - padding][w stride + j - padding], or 0 outside, for every column j of the
// kernel and its first `lines` q: each tap of a convolution then lies at one distance from all output positions. Line
// `stride + q` is line q one row on, so that `stride` of them do; with all of them, every tap of small maps is aligned.
struct Unfold {
    const float* in;
    const int32_t* mask;              // as `out`, of one channel, and 16 more: 0 outside, or else all bits
    int64_t in_channel, out_channel;  // floats from one channel to the next
    int32_t channels, height, width;
    int32_t lines, rows, columns;     // of `out`
    int32_t kernel, stride, padding;
};

// A convolution with the unfolded `in`, or with the map of `of` where there is no mask.
struct Convolution {
    Unfold in;
    Gather of;
};

// Maximum or mean over windows; with a window of one, a copy.
struct Window {
    const float* in;
    float* out;
    int64_t in_channel, out_channel;
    int32_t channels, height, width, out_height, out_width;
    int32_t kernel, stride, padding;
    int32_t average;                  // as in Pool
};

// y[r] = relu(bias[r] + add[r] + sum over the entries of row r of value[i] * x[index[i]]): a linear layer.
struct Linear {
    const float* x;
    float* y;
    const int32_t* row;
    const int32_t* index;
    const float* value;
    const float* bias;                // or null
    const float* add;                 // or null
    int32_t rows, relu;
};

// out = function(in), or, where there is `grad`, function'(in) * grad; `out` may be either.
enum { SIGMOID, SILU, GELU, GELU_TANH, HARDSWISH, TANH };
struct Activation {
    Map in, grad, out;
    int32_t function;
};

// Over the channels of each token: out = gamma (x - mean) / sqrt(variance + eps) + beta, or, if `rms`, gamma x /
// sqrt(mean of x^2 + eps).
struct LayerNorm {
    Map x, out;
    const float* gamma;       // [channels] or null: 1
    const float* beta;        // [channels] or null: 0
    float* mean;              // [lanes]: kept for backward
    float* invstd;
    float eps;
    int32_t rms;
};

struct LayerNormBackward {
    LayerNorm of;             // `out` is not read
    Map grad;                 // of the output
    Map grad_x;               // may be `grad`
    float* grad_gamma;        // [channels] or null
    float* grad_beta;
};

// For each sample and head: out = softmax(scale q k^T) v, over the tokens of the sample, or, if `causal`, over those up to
// the token itself. A head's channels are successive, the first head's first; `kv_heads` of k and v are each of
// heads / kv_heads successive ones of q.
struct Attention {
    Map q, k, v, out;
    float* logsum;            // [heads][lanes]: log of the sum of the exponentials, kept for backward
    // Of each sample and head [key][query], where rows have whole blocks of 16 queries. Or null.
    const float* bias;        // is added to the scores; times log2(e)
    const uint8_t* keep;      // a bit for each probability that dropout keeps, the first query's the lowest
    int64_t bias_sample, bias_head;  // numbers from one sample's or head's bias to the next; 0: it is the same
    int32_t samples, length, keys;  // tokens of a sample: queries; and keys and values, as many where it is causal
    int32_t heads, kv_heads, size;
    int32_t causal;
    float scale;
    float factor;             // of the probabilities that are kept
};

struct AttentionBackward {
    Attention of;
    Map grad;                 // of the output
    Map grad_q, grad_k, grad_v;
};

// out[c][i] = table[row[i]][c] (0 where row[i] < 0) + add[c][i], for the first `tokens` lanes, and 0 + add in the others.
struct Embedding {
    Map out;
    const Map* add;           // or null; may be `out`
    const float* table;       // [rows][channels]
    const int64_t* row;
    int64_t tokens;
};

// grad_table[row[i]][c] += grad[c][i], for the first `tokens` lanes, but for those of the row `padding`. With `clear`, the
// table's gradient begins at 0.
struct EmbeddingBackward {
    Map grad;
    float* grad_table;
    const int64_t* row;
    int64_t tokens, rows, padding;
    int32_t clear;
};

// out[c][i] = scale in[c][source[i]], and 0 where source[i] < 0 or i >= count; or, if `scatter`, out = 0, and then
// out[c][source[i]] += scale in[c][i].
struct Rearrange {
    Map in, out;
    const int32_t* source;    // [count]
    int64_t count;
    int32_t scatter;
    float scale;
};

// plain[sample[i] + channel[c]] <-> map[c][i] for the first `tokens` lanes; 0 in the others.
struct TokenPack {
    Map map;
    float* plain;
    const int64_t* token;     // [tokens]
    const int64_t* channel;   // [channels]
    int64_t tokens;
    int32_t unpack;
};

// Mean cross-entropy of logits [classes] of the tokens whose label is not `ignored`, 0 where all are; and its gradient.
struct TokenLoss {
    Map logits, grad;
    const int64_t* label;     // [tokens]
    float* loss;              // [1]
    float* each;              // [lanes]: every token's
    int64_t tokens, ignored;
};

// out = a b (or += with `accumulate`).
struct Multiply {
    Map a, b, out;
    int32_t accumulate;
};

// out[c][i] = sum over k < terms of table[row[k][c]][i % length] * in[source[k][c]][i]; `out` is not `in`.
struct Combination {
    Map in, out;
    const float* table;       // [rows][stride]: each [length], and then again from its beginning, to 31 more at least
    const int32_t* source;    // [terms][out.channels]
    const int32_t* row;       // [terms][out.channels]
    int64_t length, stride;
    int32_t terms;
};

// One token of one sample (decode.cpp): a value is a row of floats, one a channel.
//
// y[r] = bias[r] + sum over the entries of row r of value * x[index]: a linear layer whose rows, sorted by how many entries
// they have, lie in slices of 16 (sliced ELLPACK): slice s has the rows order[16 s] and so on; its entries, from start[s] to
// start[s + 1], go round and round its rows. Rows with fewer are filled up with zeros.
struct SlicedLinear {
    const float* x;
    float* y;
    const int64_t* start;     // [slices + 1]
    const uint16_t* index;
    const float* value;
    const int32_t* order;     // [rows]
    const float* bias;        // [rows] or null
    int64_t rows;
};

// LayerNorm, or RMSNorm, as in LayerNorm.
struct VectorNorm {
    const float* x;
    float* out;
    const float* gamma;       // [channels] or null
    const float* beta;
    int64_t channels;
    int32_t rms;
    float eps;
};

// Attention of the token at `position` with itself and those before it, whose keys and values are kept; its own are added.
struct CachedAttention {
    const float* q;           // [heads][size]
    const float* k;           // [kv_heads][size]
    const float* v;
    float* out;               // [heads][size]
    float* keys;              // [kv_heads][room / 64][size][64]
    float* values;            // [kv_heads][room][size, up to a multiple of 16]
    const int64_t* position;  // [1], below `room`, which is a multiple of 64
    const float* bias;        // null, or added to the scores: [heads or 1][positions][room]
    int64_t room;
    int64_t bias_head;        // numbers from one head's bias to the next; 0: it is the same
    int32_t heads, kv_heads, size;
    float scale;
};

// out = scale x + table[row[position]], each of them 0 where its pointer (or the row: -1) says that there is none.
struct TableRow {
    const float* x;           // [channels] or null
    float* out;
    const float* table;       // [rows][channels] or null
    const int64_t* row;
    const int64_t* position;  // [1] or null: 0
    int64_t channels;
    float scale;
};

// out[c] = sum over k < terms of table[position][k][c] * x[source[k][c]]
struct VectorCombination {
    const float* x;
    float* out;
    const float* table;       // [positions][terms][channels]
    const int32_t* source;    // [terms][channels]
    const int64_t* position;  // [1] or null: 0
    int64_t channels, terms;
};

// `times` rounds of 192 multiply-adds in registers, or (`reads`) of one for each number of a thread's part of the memory.
struct Roof {
    float* memory;  // [threads][count], zeros
    int64_t count, times;
    int32_t reads;
};

struct Op {
    int64_t kind;
    void* args;
};

// Every operation: its kind, its structure, and the function (const structure&, int thread, int threads) that does a
// thread's share of it.
#define FS_OPERATIONS(X)                                                                                          \
    X(GATHER, Gather, gather) X(DOT, Dot, dot) X(NORM, Norm, norm) X(NORM_BACKWARD, NormBackward, norm_backward)  \
    X(POOL, Pool, pool) X(COPY, Copy, copy) X(PACK, Pack, pack) X(LOSS, Loss, loss) X(SGD, Sgd, sgd)              \
    X(TOP, Top, top) X(KEEP, Keep, keep) X(PRUNE, Prune, prune) X(WIDE, Wide, wide) X(TAKE, Take, take)           \
    X(CONVOLUTION, Convolution, convolution) X(WINDOW, Window, window) X(LINEAR, Linear, linear)                  \
    X(ADAM, Adam, adam) X(ADJUST, Adjust, adjust) X(CLIP, Clip, clip) X(ACTIVATION, Activation, activation)    \
    X(SCATTER, Scatter, scatter) X(ROOF, Roof, roof) X(LAYER_NORM, LayerNorm, layer_norm)                         \
    X(LAYER_NORM_BACKWARD, LayerNormBackward, layer_norm_backward) X(ATTENTION, Attention, attention)             \
    X(ATTENTION_BACKWARD, AttentionBackward, attention_backward) X(EMBEDDING, Embedding, embedding)               \
    X(EMBEDDING_BACKWARD, EmbeddingBackward, embedding_backward) X(REARRANGE, Rearrange, rearrange)               \
    X(TOKEN_PACK, TokenPack, token_pack) X(TOKEN_LOSS, TokenLoss, token_loss) X(MULTIPLY, Multiply, multiply)   \
    X(COMBINATION, Combination, combination) X(SLICED_LINEAR, SlicedLinear, sliced_linear)                        \
    X(VECTOR_NORM, VectorNorm, vector_norm) X(CACHED_ATTENTION, CachedAttention, cached_attention)                \
    X(TABLE_ROW, TableRow, table_row) X(VECTOR_COMBINATION, VectorCombination, vector_combination)

enum Kind {
#define FS_KIND(kind, type, function) kind,
    FS_OPERATIONS(FS_KIND)
#undef FS_KIND
    KINDS
};

const char* fs_isa(void);
int fs_abi(void);
int fs_lanes(void);
int64_t fs_size(int kind);
void fs_run(const Op* ops, int64_t count, int threads);
// Several lists at once, one thread each.
void fs_each(const Op* const* ops, const int64_t* count, int64_t lists, int threads);

// The entries of a mask [out][in][kernel][kernel] in order: where each row begins, and offsets in a map
// whose channels and rows lie `channel` and `line` words apart (halo - padding lines and columns in). With `tap`, a row's
// entries are sorted by tap, and tap [out * kernel^2 + 1] says where each begins.
void fs_entries(const uint8_t* mask, int64_t out, int64_t in, int64_t kernel, int64_t channel, int64_t line,
                int64_t shift, int32_t* row, int32_t* offset, int32_t* tap);
// The same entries, given by their flat positions, by input channel, for each parity (top, left) of the stride: row [stride^2 * in + 1], offsets in the
// gradient's map, and which entry each is. With `tap` (stride 1), sorted by where in the gradient they look.
void fs_transposed(const int32_t* index, int64_t count, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t channel, int64_t line, int64_t halo, int32_t* row, int32_t* offset, int32_t* order,
                   int32_t* tap);

// The state of PyTorch's generator, as torch.get_rng_state() has it: `left` - 1 numbers are there from `next` on.
struct Generator {
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next, state[624];
};

// out[i] = whether a number drawn from 0 to 1, of 53 bits, is below p.
void fs_bernoulli(Generator* generator, double p, uint8_t* out, int64_t count);
}
