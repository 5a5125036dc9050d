// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SIGNAL_EAR_H_
#define LAYERWISE_SIGNAL_EAR_H_

#include "layerwise/status.h"

namespace layerwise {

// One signal of this process, heard in front of whoever else handles it, on whichever
// thread it arrives and whatever that thread is in. Nothing else that a process has only
// one of is taken (no wake-up descriptor, no handler of Python's).
//
// Threads: HearSignal and StopHearing may be called by several threads at once.

// From now on each signal `number` adds 1 to the eventfd `bell`, which must not block;
// then the handler that was there runs, but not the default action. Deaths of children
// are told to nobody from the first signal on (ForgetDeadChildren). With further calls
// there may be several bells, for the same `number`. A call for a bell that is known puts
// itself in front again if somebody has installed another handler since.
Status HearSignal(int number, int bell);

// The bell is not rung any more. With the last one the signal is handled as before.
void StopHearing(int bell);

// Handles SIGCHLD as by default: not at all. For a process that is leaving: the handler
// of a framework that raises since a worker died would end what is being saved.
void ForgetDeadChildren();

// In a child: from now on `number` ends it only if its parent sent it or is dead; any
// other one is left to the parent, with whom the child then dies. REQUIRES: its parent is
// the process that is to decide on its end.
Status OutliveSignal(int number);

}  // namespace layerwise

#endif  // LAYERWISE_SIGNAL_EAR_H_
