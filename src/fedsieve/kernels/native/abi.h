// The C interface of the kernels: plain structures, one entry point. Mirrored, field by field, by kernels/program.py.
//
// A map is an activation tensor as [channels][blocks][height + 2 halo][width + 2 halo][16 words], samples innermost.
// A word is 32 bits: one float (a block is 16 samples), or two bfloat16 (a block is 32 samples: sample i in the upper
// half of word i, sample 16 + i in the lower). Halos are zero; whoever writes a map also writes its halo.
#pragma once
#include <cstdint>

extern "C" {

struct Map {
    uint32_t* data;
    int32_t channels, blocks, height, width, halo;
    int32_t packed;  // 1: two bfloat16 a word
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
    int32_t relu;
};

// grad[i] = sum over samples and positions of in[offset[i] + position] * out[r, position]: a weight's gradient.
struct Dot {
    Gather of;                // the forward gather; `out` holds the output's gradient
    float* grad;              // [entries]
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
    int32_t relu;
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

// v = momentum v + grad + decay w; w -= rate v, on `count` numbers.
struct Sgd {
    float* w;
    float* velocity;          // or null
    const float* grad;
    int64_t count;
    float rate, momentum, decay;
    float power;              // a of powerpropagation: w holds th, and grad is that of sign(th) |th|^a
    float* value;             // where power != 1: the effective weights
};

// SWAT: the largest |in| of a map as lists, and the dense weight gradient that they give.
struct Keep {
    Map in;
    int64_t count;            // how many to keep
    int32_t exact;            // 1: select; 0: all whose |in| >= threshold
    float* threshold;         // [1]
    uint32_t* work;           // [threads][3][2048] counters
    int32_t samples;
    // The lists: for channel c and group g of samples, entries start[c * groups + g] ... of `position` and `value`.
    int32_t groups, group;    // samples a group
    int32_t row, plane;       // of the transposed gradient, in positions: see Wide
    int32_t halo;
    int32_t stride;
    int32_t* start;           // [channels * groups + 1]
    int32_t* position;        // [capacity]
    float* value;
    int64_t capacity;
    int32_t* kept;            // [1]: entries found (never more than capacity are written)
};

// The gradient of a convolution's dense weight from kept inputs.
struct Wide {
    Map grad;                 // of the output
    float* blocks;            // [ceil(channels / 16)][samples][height + 2 halo][width + 2 halo][16]: transposed
    Keep* from;
    float* dense;             // [out channels][in channels][kernel][kernel]
    int32_t kernel, stride, padding;
    int32_t phase;            // 0: transpose; 1: multiply
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
// kernel and parity q of the stride: each tap of a convolution then lies at one distance from all output positions.
struct Unfold {
    const float* in;
    float* out;
    int64_t in_channel, out_channel;  // floats from one channel to the next
    int32_t channels, height, width;
    int32_t rows, columns;            // of `out`, for one column and parity
    int32_t kernel, stride, padding;
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

struct Op {
    int64_t kind;
    void* args;
};

enum Kind { GATHER, DOT, NORM, NORM_BACKWARD, POOL, COPY, PACK, LOSS, SGD, KEEP, WIDE, TAKE, UNFOLD, WINDOW, LINEAR, KINDS };

const char* fs_isa(void);
int fs_abi(void);
int64_t fs_size(int kind);
void fs_run(const Op* ops, int64_t count, int threads);

// The entries of a mask [out][in][kernel][kernel] in order: where each row begins, flat positions, and offsets in a map
// whose channels and rows lie `channel` and `line` words apart (halo - padding lines and columns in).
void fs_entries(const uint8_t* mask, int64_t out, int64_t in, int64_t kernel, int64_t channel, int64_t line,
                int64_t shift, int32_t* row, int32_t* index, int32_t* offset);
// The same entries by input channel, for each parity (top, left) of the stride: row [stride^2 * in + 1], offsets in the
// gradient's map, and which entry each is.
void fs_transposed(const int32_t* index, int64_t count, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t channel, int64_t line, int64_t halo, int32_t* row, int32_t* offset, int32_t* order);
}
