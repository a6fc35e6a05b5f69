"""The shared ground floor: objects, sources, kernel access, daemon parts. Imports neither `cni` nor `proxy`."""
