// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The kvzip authors
//
// A pool of worker threads for the CPU codec. Nothing starts when the library is loaded: workers come with the first
// call that can use them, and after a fork the child starts its own.
#pragma once

#include <stdint.h>

namespace kvz {

// Cores that this process may use.
uint32_t usable_cores();

// Call body(context, item) for item = 0 .. items-1 on up to `threads` threads (0 = all usable cores), the caller's
// among them, and return when all are done. Concurrent calls share the workers. Items are handed out in order.
void parallel_for(uint64_t items, uint32_t threads, void (*body)(void* context, uint64_t item), void* context);

template <class F>
void parallel_for(uint64_t items, uint32_t threads, F&& body) {
  parallel_for(
      items, threads, [](void* context, uint64_t item) { (*static_cast<F*>(context))(item); },
      static_cast<void*>(&body));
}

}  // namespace kvz
