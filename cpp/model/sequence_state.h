// What a context knows of a sequence of tokens, apart from the context: to be kept, and given back later.
#pragma once

#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace overspill {

// What a KV cache has to have in common with a state that is restored there.
struct CacheForm {
    ggml_type type_k;
    ggml_type type_v;
    bool is_recurrent = false;  // behind the KV caches, or alone, are the states of recurrent layers
    bool is_hybrid = false;
    bool has_windows = false;  // a second KV cache, of sliding windows
    bool is_long = false;      // keys are rotated as this model does it in long contexts
};

struct SequenceState {
    std::vector<int32_t> tokens;
    std::vector<uint8_t> state;  // llama.cpp's
    // The windows and recurrent layers after the first of the tokens, since they cannot go back; empty without any.
    size_t n_remembered = 0;
    std::vector<uint8_t> remembered;
    // Of the context that llama.cpp wrote it in: 1 where it could be brought to that form, which any context can read.
    uint32_t n_streams = 1;
    bool is_long = false;

    size_t n_bytes() const { return tokens.size() * sizeof(int32_t) + state.size() + remembered.size(); }
    // How many of its tokens, at most n, would be left of it in a context that goes back there.
    size_t n_kept(size_t n, const CacheForm & form, size_t window) const;
};

// llama.cpp writes an empty entry for each sequence of the context that it is not about. Returns the same state as a
// context of `n_streams` sequences would have written it, or nothing if it is not of the form: damaged, or of an
// architecture with other caches. `partial`: of windows and recurrent layers alone.
std::optional<std::vector<uint8_t>> with_streams(const std::vector<uint8_t> & state, uint32_t n_streams,
                                                 const CacheForm & form, bool partial);

}  // namespace overspill
