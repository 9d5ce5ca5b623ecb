// A file's header is read, or refused by an Error.

#include "base/error.h"
#include "gguf/gguf_check.h"
#include "gguf/gguf_file.h"
#include "inputs.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const std::string path = scratch_file("header.gguf");
    write_file(path, data, size);
    try {
        const overspill::GgufHeader header(path);
        overspill::read_gguf(header);
        overspill::check_loadable(header, /*vocab_only =*/false);
    } catch (const overspill::Error &) {
    }
    return 0;
}
