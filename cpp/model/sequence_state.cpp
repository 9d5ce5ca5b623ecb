#include "model/sequence_state.h"

#include <algorithm>
#include <cstring>

namespace overspill {

namespace {

// llama.cpp's mark and the number of the sequence, which it does not look at.
constexpr size_t n_bytes_of_head = 8;
constexpr uint32_t most_streams = 256;
constexpr uint32_t most_layers = 4096;
// A cell's place in two dimensions and its token, which some architectures need.
constexpr size_t n_bytes_of_extension = 12;

class Reader {
  public:
    Reader(const std::vector<uint8_t> & bytes, size_t at) : bytes_(bytes), at_(at) {}

    template <typename T>
    T read() {
        T value{};
        if (bytes_.size() - at_ < sizeof(T)) {
            failed_ = true;
            return value;
        }
        std::memcpy(&value, bytes_.data() + at_, sizeof(T));
        at_ += sizeof(T);
        return value;
    }
    void skip(uint64_t n, uint64_t size) {
        const uint64_t left = bytes_.size() - at_;
        if (size != 0 && n > left / size) {
            failed_ = true;
            return;
        }
        at_ += static_cast<size_t>(n * size);
    }
    void expect(bool is_so) { failed_ = failed_ || !is_so; }
    bool failed() const { return failed_; }
    size_t at() const { return at_; }
    bool is_at_end() const { return at_ == bytes_.size(); }

  private:
    const std::vector<uint8_t> & bytes_;
    size_t at_;
    bool failed_ = false;
};

// A KV cache in a state: the number of its streams, and of each the cells.
struct Cache {
    size_t begin;
    size_t content_begin;  // of the one stream that is not empty; as content_end if none is
    size_t content_end;
    size_t end;
};

void skip_keys(Reader & in, uint32_t n_layers, uint32_t n_cells, ggml_type type) {
    for (uint32_t layer = 0; layer < n_layers && !in.failed(); ++layer) {
        in.expect(in.read<int32_t>() == type);
        in.skip(n_cells, in.read<uint64_t>());
    }
}

void skip_transposed_values(Reader & in, uint32_t n_layers, uint32_t n_cells, ggml_type type) {
    for (uint32_t layer = 0; layer < n_layers && !in.failed(); ++layer) {
        in.expect(in.read<int32_t>() == type);
        const uint64_t n_bytes = in.read<uint32_t>();
        in.skip(in.read<uint32_t>() * n_bytes, n_cells);
    }
}

// Cells of one stream, behind their number. Caches of latent attention have no values.
void skip_cells(Reader & in, uint32_t n_cells, const CacheForm & form, bool has_values, bool is_extended) {
    in.skip(n_cells, 3 * sizeof(uint32_t) + (is_extended ? n_bytes_of_extension : 0));
    const auto is_transposed = in.read<uint32_t>();
    const auto n_layers = in.read<uint32_t>();
    in.expect(is_transposed <= 1 && n_layers <= most_layers);
    skip_keys(in, n_layers, n_cells, form.type_k);
    if (has_values) {
        (is_transposed != 0 ? skip_transposed_values : skip_keys)(in, n_layers, n_cells, form.type_v);
    }
}

std::optional<std::vector<Cache>> caches_in(const std::vector<uint8_t> & state, const CacheForm & form, size_t n_caches,
                                            bool has_values, bool is_extended) {
    std::vector<Cache> caches;
    Reader in(state, n_bytes_of_head);
    // Without recurrent layers, caches come until the end.
    const bool until_end = !form.is_recurrent && !form.is_hybrid;
    while (until_end ? !in.is_at_end() : caches.size() < n_caches) {
        Cache cache{in.at(), 0, 0, 0};
        const auto n_streams = in.read<uint32_t>();
        in.expect(n_streams >= 1 && n_streams <= most_streams);
        for (uint32_t stream = 0; stream < n_streams && !in.failed(); ++stream) {
            const size_t begin = in.at();
            const auto n_cells = in.read<uint32_t>();
            if (n_cells == 0) {
                continue;
            }
            in.expect(cache.content_end == 0);
            skip_cells(in, n_cells, form, has_values, is_extended);
            cache.content_begin = begin;
            cache.content_end = in.at();
        }
        if (in.failed()) {
            return std::nullopt;
        }
        cache.end = in.at();
        caches.push_back(cache);
    }
    return caches;
}

std::optional<std::vector<Cache>> caches_in(const std::vector<uint8_t> & state, const CacheForm & form, bool partial) {
    if (state.size() < n_bytes_of_head) {
        return std::nullopt;
    }
    size_t n_caches = form.has_windows ? 2 : 1;
    if (form.is_recurrent || (form.is_hybrid && partial && !form.has_windows)) {
        n_caches = 0;
    }
    for (const bool is_extended : {false, true}) {
        for (const bool has_values : {true, false}) {
            if (auto found = caches_in(state, form, n_caches, has_values, is_extended)) {
                return found;
            }
        }
    }
    return std::nullopt;
}

}  // namespace

size_t SequenceState::n_kept(size_t n, const CacheForm & form, size_t window) const {
    if (is_long != form.is_long) {
        return 0;
    }
    const bool can_go_back = !form.is_recurrent && !form.is_hybrid && (!form.has_windows || tokens.size() <= window);
    if (n >= tokens.size() || can_go_back) {
        return std::min(n, tokens.size());
    }
    return !remembered.empty() && n_remembered <= n ? n_remembered : 0;
}

std::optional<std::vector<uint8_t>> with_streams(const std::vector<uint8_t> & state, uint32_t n_streams,
                                                 const CacheForm & form, bool partial) {
    const auto caches = caches_in(state, form, partial);
    if (!caches) {
        return std::nullopt;
    }
    std::vector<uint8_t> result;
    result.reserve(state.size() + caches->size() * sizeof(uint32_t) * n_streams);
    const auto copy = [&](size_t begin, size_t end) {
        result.insert(result.end(), state.begin() + static_cast<ptrdiff_t>(begin),
                      state.begin() + static_cast<ptrdiff_t>(end));
    };
    size_t at = 0;
    for (const Cache & cache : *caches) {
        copy(at, cache.begin);
        const auto * number = reinterpret_cast<const uint8_t *>(&n_streams);
        result.insert(result.end(), number, number + sizeof(n_streams));
        copy(cache.content_begin, cache.content_end);
        const uint32_t n_empty = n_streams - (cache.content_end > 0 ? 1 : 0);
        result.insert(result.end(), n_empty * sizeof(uint32_t), 0);
        at = cache.end;
    }
    copy(at, state.size());
    return result;
}

}  // namespace overspill
