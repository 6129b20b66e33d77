// Numbers of 4 bits out of the words of quantised checkpoints, into the layout of workers/nn/weights/grouped.py: each
// output's inputs in blocks of 32, of which a block has 16 bytes, in their low halves its first 16 inputs. For any
// processor.
#include "kernels.h"
#include "threads.h"

namespace base {
namespace {

typedef unsigned char Bytes __attribute__((vector_size(16)));
typedef unsigned Words __attribute__((vector_size(16)));
typedef unsigned long long Longs __attribute__((vector_size(16)));

constexpr long BLOCK_INPUTS = 32, BLOCK_BYTES = 16, LANES = 4, IN_WORD = 8;
constexpr long LINE_INPUTS = 128;  // whose numbers fill a cache line of an output
constexpr unsigned LOW = 0x0f0f0f0fu;
constexpr long PLACES[IN_WORD] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a word's outputs, as AutoAWQ packs them

Words load(const unsigned* p) { Words v; __builtin_memcpy(&v, p, sizeof v); return v; }
void store(unsigned char* p, Bytes v) { __builtin_memcpy(p, &v, sizeof v); }

Bytes zip_low(Bytes a, Bytes b) { return __builtin_shuffle(a, b, (Bytes){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}); }
Bytes zip_high(Bytes a, Bytes b) { return __builtin_shuffle(a, b, (Bytes){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}); }

// 16 rows of 16 bytes: four times each row is put between the bytes of the row eight before it.
void transpose(Bytes (&rows)[16]) {
    Bytes other[16];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 8; i++) other[2 * i] = zip_low(rows[i], rows[i + 8]), other[2 * i + 1] = zip_high(rows[i], rows[i + 8]);
        for (int i = 0; i < 8; i++) rows[2 * i] = zip_low(other[i], other[i + 8]), rows[2 * i + 1] = zip_high(other[i], other[i + 8]);
    }
}

void transpose(Words (&rows)[4]) {
    const Words low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    const Words a = __builtin_shuffle(rows[0], rows[2], low), b = __builtin_shuffle(rows[0], rows[2], high);
    const Words c = __builtin_shuffle(rows[1], rows[3], low), d = __builtin_shuffle(rows[1], rows[3], high);
    rows[0] = __builtin_shuffle(a, c, low), rows[1] = __builtin_shuffle(a, c, high);
    rows[2] = __builtin_shuffle(b, d, low), rows[3] = __builtin_shuffle(b, d, high);
}

// ---- Words of eight outputs

// A block of inputs of four neighbouring words: `words` are those of its first input, `stride` words before the next one's.
void put_outputs(const Repack& job, const unsigned* words, long stride, long first_output, long block) {
    Bytes even[16], odd[16];  // of each two inputs: the numbers at even places of the words, and at odd ones
    for (int i = 0; i < 16; i++) {
        const Words low = load(words + i * stride), high = load(words + (i + 16) * stride);
        even[i] = (Bytes)((low & LOW) | (high & LOW) << 4);
        odd[i] = (Bytes)((low >> 4 & LOW) | (high & ~LOW));
    }
    transpose(even), transpose(odd);
    for (long word = 0; word < LANES; word++) {
        for (long pair = 0; pair < IN_WORD / 2; pair++) {
            const long output = first_output + word * IN_WORD;
            const long of_even = output + PLACES[2 * pair], of_odd = output + PLACES[2 * pair + 1];
            const long row = 4 * word + pair;
            unsigned char* out = job.out + block * BLOCK_BYTES;
            if (0 <= of_even && of_even < job.num_outputs) store(out + of_even * job.out_stride, even[row]);
            if (0 <= of_odd && of_odd < job.num_outputs) store(out + of_odd * job.out_stride, odd[row]);
        }
    }
}

// Some inputs, as far as a cache line of an output has room for, of some words.
void repack_outputs(const Repack& job, long first_input, long word, long stop_word, long num_words) {
    const long stop = first_input + LINE_INPUTS < job.num_inputs ? first_input + LINE_INPUTS : job.num_inputs;
    for (; word < stop_word; word += LANES) {
        for (long input = first_input; input < stop; input += BLOCK_INPUTS) {
            const unsigned* words = job.words + input * job.input_stride + word;
            const long output = word * IN_WORD - job.skipped, left = num_words - word;
            if (left >= LANES) {
                put_outputs(job, words, job.input_stride, output, input / BLOCK_INPUTS);
                continue;
            }
            unsigned some[BLOCK_INPUTS * LANES] = {};
            for (long i = 0; i < BLOCK_INPUTS; i++)
                for (long lane = 0; lane < left; lane++) some[i * LANES + lane] = words[i * job.input_stride + lane];
            put_outputs(job, some, LANES, output, input / BLOCK_INPUTS);
        }
    }
}

// ---- Words of eight inputs

// A block of one output, whose four words these are.
Bytes block_of(Words words) {
    const Words behind = (Words)__builtin_shuffle((Longs)words, (Longs){1, 1});  // the last two words first
    const Words even = (words & LOW) | (behind & LOW) << 4, odd = (words >> 4 & LOW) | (behind & ~LOW);
    return zip_low((Bytes)even, (Bytes)odd);
}

// Four outputs' words of the same inputs.
Words words_of(const Repack& job, long word, long output) {
    const unsigned* place = job.words + word * job.input_stride + output * job.output_stride;
    const long left = job.num_outputs - output;
    if (job.output_stride == 1 && left >= LANES) return load(place);
    Words found = {};
    for (long lane = 0; lane < (left < LANES ? left : LANES); lane++) found[lane] = place[lane * job.output_stride];
    return found;
}

void put_block(const Repack& job, Words (&of_outputs)[4], long output, long block) {
    for (long lane = 0; lane < LANES && output + lane < job.num_outputs; lane++)
        store(job.out + (output + lane) * job.out_stride + block * BLOCK_BYTES, (Bytes)of_outputs[lane]);
}

void repack_inputs(const Repack& job, long first_input, long stop_input, long output, long stop_output) {
    for (; output < stop_output; output += LANES) {
        for (long block = first_input / BLOCK_INPUTS; block < stop_input / BLOCK_INPUTS; block++) {
            Words words[4];
            if (job.input_stride == 1) {
                for (long lane = 0; lane < LANES; lane++)
                    words[lane] = output + lane < job.num_outputs ? load(job.words + 4 * block + (output + lane) * job.output_stride) : Words{};
            } else {
                for (long i = 0; i < 4; i++) words[i] = words_of(job, 4 * block + i, output);
                transpose(words);
            }
            for (long lane = 0; lane < LANES; lane++) words[lane] = (Words)block_of(words[lane]);
            put_block(job, words, output, block);
        }
    }
}

// The number of one input, of four outputs.
Words number_of(const Repack& job, long input, long output) {
    return words_of(job, input / IN_WORD, output) >> (unsigned)(4 * (input % IN_WORD)) & 15;
}

// As `order` has the inputs.
void repack_ordered(const Repack& job, long output, long stop_output) {
    for (long block = 0; block < job.num_inputs / BLOCK_INPUTS; block++) {
        const long* inputs = job.order + block * BLOCK_INPUTS;
        for (long first = output; first < stop_output; first += LANES) {
            Words bytes[4] = {};
            for (long i = 0; i < BLOCK_BYTES; i++) {
                const Words both = number_of(job, inputs[i], first) | number_of(job, inputs[i + BLOCK_BYTES], first) << 4;
                bytes[i / 4] |= both << (unsigned)(8 * (i % 4));
            }
            transpose(bytes);
            put_block(job, bytes, first, block);
        }
    }
}

long parts(long count, long size) { return (count + size - 1) / size; }
long least(long a, long b) { return a < b ? a : b; }

}  // namespace

// Neighbouring parts of the file are read one after the other: it may still be on its way from the disk.
void repack(const Repack& job) {
    if (job.has_outputs) {
        constexpr long AT_ONCE = 16;  // words: a cache line
        const long num_words = parts(job.skipped + job.num_outputs, IN_WORD), columns = parts(num_words, AT_ONCE);
        #pragma omp parallel for
        for (long part = 0; part < parts(job.num_inputs, LINE_INPUTS) * columns; part++) {
            const long word = part % columns * AT_ONCE;
            repack_outputs(job, part / columns * LINE_INPUTS, word, least(word + AT_ONCE, num_words), num_words);
        }
        return;
    }
    constexpr long AT_ONCE = 16;  // outputs
    const long inputs = job.input_stride == 1 || job.order ? job.num_inputs : LINE_INPUTS;
    const long columns = parts(job.num_outputs, AT_ONCE);
    #pragma omp parallel for
    for (long part = 0; part < parts(job.num_inputs, inputs) * columns; part++) {
        const long first = part / columns * inputs, output = part % columns * AT_ONCE, stop = least(output + AT_ONCE, job.num_outputs);
        if (job.order) repack_ordered(job, output, stop);
        else repack_inputs(job, first, least(first + inputs, job.num_inputs), output, stop);
    }
}

}  // namespace base
