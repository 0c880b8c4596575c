#include "objectives.h"

extern "C" int atlas_objectives(const AtlasObjectives* params, const AtlasWhere* where) {
  const AtlasObjectives& p = *params;
  if (p.batch < 0 || p.classes < 1) return ATLAS_BAD_SIZE;
  if (p.dtype < atlas::kFloat32 || p.dtype > atlas::kBFloat16) return ATLAS_BAD_DTYPE;
  const atlas::cpu::ObjectiveJob job = {
      p, {{p.logits, p.reference}, {p.cotangent, nullptr}, p.batch, p.classes, 1, p.dtype}};
  atlas::cpu::run_rows<atlas::cpu::ObjectiveRange>(job, where->threads);
  return ATLAS_OK;
}
