// XXH3-128, with the instructions of this unit: all of the library is static here.
#pragma once

#define XXH_INLINE_ALL
#define XXH_NO_STREAM
#include "../third_party/xxhash/xxhash.h"
