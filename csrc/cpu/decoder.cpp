// A decoder and its passes: scratch, turns, and what a child process needs anew.
#include "cpu/decoder.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "cpu/decoder_worker.h"

namespace mgf {
namespace {

// Up to so many rows every thread normalises and prepares all of them itself, which takes 1 us a row and saves a
// meeting; beyond them each thread takes a part.
constexpr int kOwnRows = 32;

std::vector<TextRow> text_rows(const Pass& pass) {
    std::vector<TextRow> found;
    int row = 0;
    for (const Segment& s : pass.segments) {
        for (int i = 0; i < s.count; ++i, ++row) {
            if (s.text != nullptr) found.push_back({&s, row});
        }
    }
    return found;
}

}  // namespace

// What passes take turns at. One per process: what a child inherits may be locked by a thread that it does not have.
struct Decoder::Desk {
    const int process = process_id();
    std::mutex busy;
    Pages memory;  // scratch, kept from pass to pass
    size_t attention_each = 0;
};

Decoder::Decoder(DecoderWeights weights, int threads, LinearIsa linear, Isa attention)
    : weights_(std::move(weights)),
      linear_(linear_kernels(linear)),
      attention_(attention_kernels(attention)),
      norm_(norm_kernels(attention)),
      pool_(threads),
      desk_(new Desk) {
    const auto fits = [&](const PackedMatrix& m) {
        if (m.data != nullptr) prepared_each_ = std::max(prepared_each_, prepared_bytes(m.format, 1, m.k));
    };
    fits(weights_.logits);
    for (const DecoderLayer& l : weights_.layers) {
        for (const PackedMatrix& m : {l.qkv, l.attn_out, l.cross_q, l.cross_kv, l.cross_out, l.ffn_in, l.ffn_out})
            fits(m);
    }
}

Decoder::~Decoder() {
    Desk* const desk = desk_.load();
    if (desk->process == process_id()) delete desk;  // else it stays behind in the child, as the pool's threads do
}

// After fork the first to come makes a new one.
Decoder::Desk& Decoder::desk() {
    Desk* current = desk_.load(std::memory_order_acquire);
    if (current->process == process_id()) return *current;
    auto fresh = std::make_unique<Desk>();
    if (desk_.compare_exchange_strong(current, fresh.get())) return *fresh.release();
    return *current;
}

// Grows with the rows and with the longest cache.
Decoder::Scratch Decoder::scratch(Desk& desk, int rows) const {
    const size_t R = size_t(rows), d = size_t(weights_.dim), threads = size_t(pool_.size());
    const size_t wide = size_t(std::max(3 * weights_.dim, weights_.ffn)),
                 own = rounded_up(4 * d) / 4 + desk.attention_each;
    const size_t prepared = rounded_up(prepared_each_ * (R + 15));  // see prepared_bytes
    const bool shared = rows > kOwnRows && threads > 1;
    const size_t sizes[] = {4 * R * d,        4 * R * d, 4 * R * d, 4 * R * wide, prepared * (shared ? 1 : threads),
                            4 * own * threads};
    size_t bytes = 0;
    for (const size_t size : sizes) bytes += rounded_up(size);
    if (desk.memory.size() < bytes) {
        desk.memory = Pages();  // the old one goes first: both may not fit
        desk.memory = Pages(bytes, "scratch for a pass: render fewer requests at once");
    }
    unsigned char* parts[6];
    unsigned char* at = desk.memory.get();
    for (int i = 0; i < 6; ++i) parts[i] = at, at += rounded_up(sizes[i]);
    const auto floats = [&](int i) { return reinterpret_cast<float*>(parts[i]); };
    return {floats(0), floats(1), floats(2), floats(3), parts[4], floats(5), int(wide), shared ? 0 : prepared, own};
}

void Decoder::run(const Pass& pass, bool alike) {
    Desk& own = desk();
    const std::lock_guard<std::mutex> alone(own.busy);
    for (const Segment& s : pass.segments) {
        for (const DecoderCache* cache : {s.cache, s.text}) {
            if (cache == nullptr) continue;
            own.attention_each = std::max(own.attention_each, rounded_up(4 * attention_scratch(cache->layer(0))) / 4);
        }
    }
    // Rows may be wanted more than once.
    const Scratch shared = scratch(own, int(std::max(pass.tokens.size(), pass.wanted.size())));
    const std::vector<TextRow> texts = text_rows(pass);
    pool_.run([&](Region& region) { Worker(*this, shared, region).run(pass, texts); }, alike);
}

void Decoder::project(const float* states, int n, DecoderCache& text, int row) {
    Desk& own = desk();
    const std::lock_guard<std::mutex> alone(own.busy);
    const Scratch shared = scratch(own, n);
    pool_.run([&](Region& region) { Worker(*this, shared, region).project(states, n, text, row); }, false);
}

void Decoder::set_positions(const float* table, int count) {
    const std::lock_guard<std::mutex> alone(desk().busy);
    weights_.positions = table;
    weights_.num_positions = count;
}

}  // namespace mgf
