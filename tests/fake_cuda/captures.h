// A capture under way: shared by the runtime's section, which begins and ends it, and the record of
// work.
#pragma once
#include <pthread.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace fake {

struct Capture {
    unsigned long long id;
    Mode mode;
    pthread_t thread;
    void* origin;
    bool invalid = false;
    std::vector<std::string> nodes = {};
    std::set<void*> unjoined = {};  // streams that took part and were not waited for since
};

bool begin_capture(void* stream, Mode mode);
std::shared_ptr<Capture> end_capture(void* stream);
std::shared_ptr<Capture> capture_of(void* stream);
void join_capture(void* stream, const std::shared_ptr<Capture>& c);

}  // namespace fake
