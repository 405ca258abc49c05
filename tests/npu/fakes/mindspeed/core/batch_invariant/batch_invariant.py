"""A file by which core_r0.16.0 is told from other branches of MindSpeed."""
