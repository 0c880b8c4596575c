// What computes in lanes, for any machine.
#include "losses_rows.h"
#include "objectives_rows.h"

template struct atlas::cpu::LossRange<atlas::cpu::kBaseline>;
template struct atlas::cpu::ObjectiveRange<atlas::cpu::kBaseline>;
