"""Drop-ins: other projects' signatures on the fused operators."""
