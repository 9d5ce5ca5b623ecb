// What the fuzzers share: a vocabulary, and a file to write inputs to.
#pragma once

#include "base/log.h"
#include "model/model.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>

inline std::string environment(const char * name) {
    const char * value = std::getenv(name);
    if (value == nullptr) {
        throw std::runtime_error(std::string(name) + " is not set; python -m fuzz.guided sets it");
    }
    return value;
}

inline std::string scratch_file(const std::string & name) {
    return (std::filesystem::path(environment("OVERSPILL_FUZZ_FOLDER")) / name).string();
}

inline void write_file(const std::string & path, const uint8_t * data, size_t size) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char *>(data), static_cast<std::streamsize>(size));
}

// The vocabulary in the file OVERSPILL_FUZZ_MODEL.
inline std::shared_ptr<overspill::Model> vocabulary() {
    overspill::ModelOptions options;
    options.vocab_only = true;
    return std::make_shared<overspill::Model>(environment("OVERSPILL_FUZZ_MODEL"), options);
}
