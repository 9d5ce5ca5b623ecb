// Splits texts into words as upstream does, with std::regex, and as the installed libllama does; prints where they
// differ. Standard input has the number of lists of expressions, that of texts, then each list and the texts: how many,
// and for each its bytes' number and the bytes.
#include <unicode.h>

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

// unicode.cpp, compiled under another name without what Overspill includes into it.
std::vector<std::string> upstream_regex_split(const std::string & text, const std::vector<std::string> & expressions,
                                              bool byte_encode);

static size_t number() {
    std::string line;
    std::getline(std::cin, line);
    return std::stoul(line);
}

static std::vector<std::string> strings() {
    std::vector<std::string> found(number());
    for (std::string & one : found) {
        one.resize(number());
        std::cin.read(&one[0], static_cast<std::streamsize>(one.size()));
        std::cin.ignore();
    }
    return found;
}

int main() {
    std::vector<std::vector<std::string>> lists(number());
    number();
    for (auto & list : lists) {
        list = strings();
    }
    const std::vector<std::string> texts = strings();
    size_t n_alike = 0;
    bool differ = false;
    for (const auto & list : lists) {
        for (const std::string & text : texts) {
            if (unicode_regex_split(text, list, true) == upstream_regex_split(text, list, true)) {
                ++n_alike;
            } else {
                differ = true;
                std::printf("%s: splits %s otherwise\n", list.back().c_str(), text.c_str());
            }
        }
    }
    std::printf("%zu alike\n", n_alike);
    return differ ? 1 : 0;
}
