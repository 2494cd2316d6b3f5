"""What every room stands on: errors, atomic files, package downloads, progress, provenance, intervals."""
