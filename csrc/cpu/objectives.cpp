#include "objectives.h"

#include "../core/objectives.h"

extern "C" int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where) {
  const AtlasObjectives& p = *params;
  if (const int status = atlas::status_of(p)) return status;
  const atlas::cpu::ObjectiveJob job = {
      p, {{p.logits, p.reference}, {p.cotangent, nullptr}, p.batch, p.classes, 1, p.dtype}};
  atlas::cpu::run_rows<atlas::cpu::ObjectiveRange>(job, where->threads);
  return ATLAS_OK;
}
